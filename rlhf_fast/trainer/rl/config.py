# SPDX-License-Identifier: Apache-2.0
"""Options of reinforcement learning.

None stands for "the objective's own": `resolved` fills it in from `objectives/`, once, before anything reads it, and
config.yaml of the run shows the value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rlhf_fast.errors import UserError
from rlhf_fast.rollout.mismatch import CAPS
from rlhf_fast.rollout.mismatch import Kind as CorrectionKind
from rlhf_fast.rollout.rollout import SamplingParams
from rlhf_fast.run.options import (
    FILE,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    Options,
    Range,
    RunOptions,
    SamplerOptions,
    SamplingOptions,
    Schedule,
)

from .objectives import OBJECTIVES
from .objectives.dpo import PairLoss
from .objectives.objective import KLEstimator, KLPlace, RatioLevel

if TYPE_CHECKING:
    ObjectiveName = str
    from typing import Self
else:
    ObjectiveName = Literal[tuple(OBJECTIVES)]

HALF = Range(lambda value: 0 <= value < 0.5, "at least 0 and below 0.5")
BELOW_ONE = Range(lambda value: 0 <= value < 1, "at least 0 and below 1")

# Defaults of options that depend on the objective, unless its file sets them.
COMMON_DEFAULTS: dict[str, Any] = {
    "kl_coef": 0.05,
    "kl_in": "reward",
    "importance_ratio": "token",
    "cliprange": 0.2,
    "num_minibatches": 2,
    "dynamic_sampling": 0,
    "overlong_filter": False,
    "overlong_penalty": 0.0,
    "score_clip": 0.0,
}
# Unless the objective sets one: the estimator with the correct gradient for `kl_in`.
ESTIMATORS: dict[str, KLEstimator] = {
    "reward": "k1",
    "loss": "k3",
    "loss-straight-through": "k1",
    "loss-importance": "k3",
}
# Clip ranges that belong to a ratio: a mean over tokens moves far less than one token's ratio or than their product.
MEAN_RATIO_CLIPS = {name: OBJECTIVES["gspo"].defaults[name] for name in ("cliprange", "cliprange_high")}
# Without effect without a critic (a file of several objectives may set lam and others), or without token losses.
OF_CRITIC = ("critic_warmup", "whiten_rewards", "bootstrap_truncated")
OF_TOKENS = ("importance_ratio", "cliprange", "cliprange_high", "dual_clip", "entropy_coef", "gamma", "overlong_filter")


@dataclass
class ObjectiveOptions(Options):
    """Options of the objective."""

    CHANGEABLE = frozenset(
        {"kl_coef", "kl_target", "kl_estimator", "kl_in", "early_stop_kl", "importance_ratio", "cliprange"}
        | {"cliprange_high", "dual_clip", "entropy_coef", "dpo_loss", "label_smoothing"}
    )

    objective: ObjectiveName = "ppo"
    """Objective: ppo has a critic and GAE, reinforce++ neither; the others compare samples of one prompt."""
    kl_coef: Annotated[float | None, NOT_NEGATIVE] = None
    """Coefficient of the KL from the reference model; beta of dpo. None: the objective's."""
    kl_target: Annotated[float, NOT_NEGATIVE] = 0.0
    """Adapt kl_coef so that the KL comes to this many nats per sequence; 0 keeps it fixed."""
    kl_estimator: KLEstimator | None = None
    """KL from two log-probabilities of the sampled token, or exact: over the vocabulary. None: the objective's."""
    kl_in: KLPlace | None = None
    """KL in the reward, or in the loss: with its own gradient, with k2's, or weighted by the ratio."""
    early_stop_kl: Annotated[float, NOT_NEGATIVE] = 0.0
    """End a step's update once the KL from the sampling policy exceeds this many nats per token; 0: never."""
    importance_ratio: RatioLevel | None = None
    """Ratio of a token, of its sequence (rloo), or the geometric mean over the sequence (gspo)."""
    cliprange: Annotated[float | None, PROBABILITY] = None
    """The probability ratio is clipped to [1 - c, 1 + c]. None: the objective's, or that of its ratio."""
    cliprange_high: Annotated[float | None, POSITIVE] = None
    """An upper limit of its own, 1 + c ("clip higher" of DAPO). None: the objective's for its ratio, else cliprange."""
    dual_clip: Annotated[float, NOT_NEGATIVE] = 0.0
    """Dual clip: largest ratio for negative advantages (Ye et al. 2020 use 3); 0: no limit."""
    entropy_coef: Annotated[float, NOT_NEGATIVE] = 0.0
    """Coefficient of the entropy bonus of each token's distribution."""
    dpo_loss: PairLoss = "sigmoid"
    """Loss of a pair with the objective dpo; ipo is that of Azar et al. 2023."""
    dpo_pairs: Literal["best-worst", "all"] = "best-worst"
    """With dpo, the best and the worst sample of a prompt, or all pairs that differ."""
    label_smoothing: Annotated[float, HALF] = 0.0
    """With dpo and the sigmoid loss, label smoothing: the assumed share of pairs with swapped labels."""


@dataclass
class RewardOptions(Options):
    """Options of the rewards."""

    CHANGEABLE = frozenset(
        {"score_clip", "missing_eos_penalty", "missing_eos_score", "overlong_filter", "overlong_penalty"}
        | {"overlong_buffer"}
    )

    reward_model: str = ""
    """Folder or id of the reward model (a sequence classifier with one label)."""
    reward_functions: tuple[str, ...] = ()
    """Added to the score: `module:function`, `0.5*file.py:function` weighted, or the URL of a server."""
    score_clip: Annotated[float | None, NOT_NEGATIVE] = None
    """A reward model's normalised score is clipped to plus or minus this; 0: no limit. None: the objective's."""
    missing_eos_penalty: Annotated[float, NOT_NEGATIVE] = 0.0
    """Subtracted from the score of a completion that did not end by itself."""
    missing_eos_score: float | None = None
    """Replaces the score of a completion that did not end by itself."""
    overlong_filter: bool | None = None
    """Do not learn from completions that did not end by themselves. None: the objective's."""
    overlong_penalty: Annotated[float | None, NOT_NEGATIVE] = None
    """Penalty at max_new_tokens, growing linearly from 0 over overlong_buffer before it. None: the objective's."""
    overlong_buffer: Annotated[float, PROBABILITY] = 0.2
    """Share of max_new_tokens over which overlong_penalty grows from 0."""


@dataclass
class CriticOptions(Options):
    """Options of the critic of ppo and its advantages."""

    CHANGEABLE = frozenset(
        {"critic_warmup", "gamma", "lam", "cliprange_value", "whiten_rewards", "bootstrap_truncated"}
    )

    critic_warmup: Annotated[int, NOT_NEGATIVE] = 0
    """Steps at the start in which only the critic learns."""
    gamma: Annotated[float, FRACTION] = 1.0
    """Discount per token."""
    lam: Annotated[float, FRACTION] = 0.95
    """Decay of generalized advantage estimation."""
    cliprange_value: Annotated[float, NOT_NEGATIVE] = 0.2
    """Values are clipped to this distance from the old ones in a step; 0: no limit."""
    whiten_rewards: bool = False
    """Divide the rewards of a step's tokens by their standard deviation before advantages (TRL's option)."""
    bootstrap_truncated: bool = False
    """Bootstrap samples truncated at max_new_tokens with the critic's value of their last state."""


@dataclass
class OptimizerOptions(Options):
    """Options of AdamW and the learning-rate schedule."""

    CHANGEABLE = frozenset(
        {"lr", "critic_lr", "lr_schedule", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps"}
        | {"max_grad_norm"}
    )

    lr: Annotated[float, POSITIVE] = 1e-5
    """Learning rate of the policy; docs/objectives.md has a table by model size."""
    critic_lr: Annotated[float, POSITIVE] = 3e-5
    """Learning rate of the critic."""
    lr_schedule: Schedule = "constant"
    """After the warm-up: constant, or falling to 0 at max_steps."""
    warmup_steps: Annotated[int, NOT_NEGATIVE] = 0
    """Steps over which learning rates rise from 0."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0
    """Decoupled weight decay of AdamW."""
    adam_beta1: Annotated[float, BELOW_ONE] = 0.9
    """beta1 of AdamW: decay of the mean of gradients."""
    adam_beta2: Annotated[float, BELOW_ONE] = 0.95
    """beta2 of AdamW: decay of the mean of squared gradients."""
    adam_eps: Annotated[float, POSITIVE] = 1e-8
    """eps of AdamW: added to the root of that mean."""
    max_grad_norm: Annotated[float, NOT_NEGATIVE] = 1.0
    """Largest gradient norm: larger gradients are scaled down; 0: no limit."""


@dataclass
class EngineOptions(SamplerOptions):
    """Options of the sampler."""

    CHANGEABLE = frozenset({"sampler_correction", "sampler_cap"})

    sampler_correction: CorrectionKind = "truncate"
    """Weights of an engine's tokens by p_trainer / p_engine: limited to sampler_cap, or 0 outside of a band."""
    sampler_cap: Annotated[float | None, POSITIVE] = None
    """Largest weight of a token by truncate (None: 2), of a sequence by sequence-mask (None: 3)."""
    one_step_ahead: bool = False
    """A server samples each step's completions while the step before learns, by the weights before that update."""


@dataclass
class PPOOptions(EngineOptions, OptimizerOptions, CriticOptions, RewardOptions, ObjectiveOptions, SamplingOptions):
    """Reinforcement learning of a copy of the model against the reward model, held near the original."""

    CHANGEABLE = frozenset(
        {"epochs", "num_minibatches", "prompts_per_step", "samples_per_prompt", "dynamic_sampling", "eval_steps"}
        | {"ptx_coef"}
    )
    EXTENDS = frozenset({"max_steps", "prompt_epochs", "max_seconds"})

    prompts_file: Annotated[str, FILE] = ""
    """JSONL of prompts. With the objective dpo also feedback: its ranked completions replace sampled ones."""
    eval_prompts_file: str | None = None
    """JSONL of held-out prompts, sampled before and after with one fixed seed."""
    eval_samples: Annotated[int, POSITIVE] = 2
    """Completions of each held-out prompt."""
    eval_steps: Annotated[int, NOT_NEGATIVE] = 0
    """Steps between evaluations on the held-out prompts; 0: only before and after."""
    keep_best: bool = False
    """Save the model with the highest held-out reward of those evaluated, the last among them; needs eval_steps."""
    rater: str | None = None
    """Simulated rater, reported beside the reward on held-out prompts; never trained on."""
    ptx_file: str | None = None
    """Demonstrations that each update also learns from (PPO-ptx), against forgetting."""
    ptx_coef: Annotated[float, POSITIVE] = 27.8
    """Coefficient of their mean negative log-likelihood; the default is InstructGPT's."""
    prompts_per_step: Annotated[int, POSITIVE] = 8
    """Prompts in a step; each is sampled `samples_per_prompt` times."""
    dynamic_sampling: Annotated[int | None, NOT_NEGATIVE] = None
    """Maximum number of extra rounds of prompts, to replace those whose samples all earn the same; 0 keeps them."""
    max_steps: Annotated[int, NOT_NEGATIVE] = 100
    """Steps of sampling and learning."""
    prompt_epochs: Annotated[float, NOT_NEGATIVE] = 0.0
    """Passes over the prompts (or pairs) of prompts_file instead of max_steps; 0: max_steps decides."""
    min_steps: Annotated[int, NOT_NEGATIVE] = 10
    """Steps to run in spite of max_seconds: if time is short they get fewer prompts instead."""
    max_seconds: Annotated[float, NOT_NEGATIVE] = 0.0
    """End early, save and report once the phase has taken this long; 0: no limit."""
    epochs: Annotated[int, POSITIVE] = 1
    """Passes over the samples of a step."""
    num_minibatches: Annotated[int | None, POSITIVE] = None
    """Minibatches (optimizer steps) in one such pass. None: the objective's."""

    def resolved(self) -> Self:
        """A copy in which every option that is None has the objective's default."""
        if self.objective not in OBJECTIVES:
            raise UserError(f"objective must be one of {', '.join(map(repr, OBJECTIVES))}, got {self.objective!r}")
        defaults = {**COMMON_DEFAULTS, **OBJECTIVES[self.objective].defaults}
        if self.kl_in not in (None, defaults["kl_in"]):
            defaults |= {"kl_in": self.kl_in, "kl_estimator": ESTIMATORS[str(self.kl_in)]}
        defaults.setdefault("kl_estimator", ESTIMATORS[defaults["kl_in"]])
        defaults["num_minibatches"] = math.gcd(defaults["num_minibatches"], self._units[0])
        if self.importance_ratio not in (None, defaults["importance_ratio"]):
            clips = self._clips_of_ratio(defaults["importance_ratio"])
            defaults |= clips if self.cliprange is None else dict.fromkeys(clips, self.cliprange)
        defaults.setdefault("cliprange_high", defaults["cliprange"] if self.cliprange is None else self.cliprange)
        defaults["sampler_cap"] = CAPS.get(self.sampler_correction)
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})

    def _clips_of_ratio(self, usual: str) -> dict[str, float]:
        """Defaults of the clip ranges with another `importance_ratio` than the objective's `usual` one."""
        if OBJECTIVES[self.objective].token_loss != "ppo":
            return {}  # its range is of weights
        if self.importance_ratio == "sequence-mean":
            return MEAN_RATIO_CLIPS
        return dict.fromkeys(MEAN_RATIO_CLIPS, COMMON_DEFAULTS["cliprange"]) if usual == "sequence-mean" else {}

    @property
    def _units(self) -> tuple[int, str]:
        """How many units the minibatches of a step share, and of what: samples, or prompts with all their pairs."""
        if OBJECTIVES[self.objective].pairs:
            return self.prompts_per_step, "prompts_per_step"
        return self.prompts_per_step * self.samples_per_prompt, "prompts_per_step x samples_per_prompt"

    def changed(self, *names: str) -> tuple[str, ...]:
        """Those of these options that are not what they would be by default, with the others as they are."""
        default: dict[str, Any] = {f.name: f.default for f in fields(self) if f.name in names}
        mine, others = self.resolved(), replace(self, **default).resolved()
        return tuple(name for name in names if getattr(mine, name) != getattr(others, name))

    def validate(self) -> None:
        """Raise UserError if an option is out of its range or conflicts with another."""
        super().validate()
        SamplingParams.of(self)  # refuses conflicting options
        for wrong, message in (*self.resolved()._contradictions(), *self._ignored()):
            if wrong:
                raise UserError(message)

    def _contradictions(self) -> Iterator[tuple[bool, str]]:
        """(whether it holds, message) for conflicting options, once resolved."""
        objective, (units, of_what) = OBJECTIVES[self.objective], self._units
        yield (
            not self.reward_model and not self.reward_functions and not objective.pairs,
            "reward_model must be a folder or an id of a reward model, or name reward_functions",
        )
        yield (
            units % (self.num_minibatches or 1) != 0,
            f"num_minibatches {self.num_minibatches} must divide {of_what} = {units}",
        )
        yield (
            objective.compares and self.samples_per_prompt < 2,
            f"objective {self.objective!r} compares samples of one prompt: samples_per_prompt must be 2 or more",
        )
        yield (
            bool(self.dynamic_sampling) and not objective.compares,
            f"dynamic_sampling is for an objective that compares samples of one prompt, not for {self.objective!r}",
        )
        yield (
            self.kl_estimator == "exact" and self.truncates,
            "kl_estimator exact is over the whole vocabulary, which top_k, top_p and min_p cut: take k1, k2 or k3",
        )
        yield (
            self.kl_in == "loss" and self.kl_estimator == "k1",
            "kl_estimator k1 in the loss has no gradient on average: take k2, k3, exact or loss-straight-through",
        )
        yield (
            self.kl_in in ("loss-straight-through", "loss-importance") and self.kl_estimator == "exact",
            f"kl_in {self.kl_in!r} only applies to sampled estimators; the exact KL has the right gradient: take loss",
        )
        yield (
            self.kl_in == "loss" and self.kl_estimator == "exact" and self.importance_ratio != "token",
            "kl_estimator exact in the loss needs importance_ratio token: take k2 or k3",
        )
        yield (
            self.entropy_coef > 0 and self.truncates,
            "entropy_coef is of the whole vocabulary, which top_k, top_p and min_p cut: leave them at 0, 1 and 0",
        )
        yield (
            objective.pairs and (self.kl_estimator == "exact" or self.kl_in != "reward"),
            f"objective {self.objective!r} has its KL in its own loss: leave kl_estimator k1 and kl_in reward",
        )
        yield (
            objective.pairs and self.kl_coef == 0,
            f"kl_coef is the beta of {self.objective!r}: with 0 its loss teaches nothing, so it must be above 0",
        )
        yield (
            self.kl_target > 0 and self.kl_coef == 0,
            "kl_target moves kl_coef, which must then be above 0",
        )
        yield (
            self.keep_best and not (self.eval_steps and self.eval_prompts_file),
            "keep_best compares evaluations: set eval_steps and eval_prompts_file",
        )
        yield (
            self.keep_best and not self.reward_model and not self.reward_functions,
            "keep_best compares rewards: set reward_model or reward_functions",
        )
        yield from self._not_ahead()
        yield 0 < self.dual_clip <= 1, f"dual_clip must be above 1, or 0 for none, got {self.dual_clip}"

    def _not_ahead(self) -> Iterator[tuple[bool, str]]:
        """(whether it is set, message) for options that one_step_ahead does not go with."""
        for wrong, message in (
            (self.sampler != "vllm-server", "needs sampler vllm-server, which works while this process learns"),
            (bool(self.dynamic_sampling), "excludes dynamic_sampling, which samples more once the scores are known"),
            (self.max_seconds > 0, "excludes max_seconds, which makes steps smaller when the next is sampled already"),
            (self.sampler_correction == "none", "needs a sampler_correction, as its samples are one update old"),
            (OBJECTIVES[self.objective].pairs, f"is not for {self.objective!r}: no correction weights its pairs"),
        ):
            yield self.one_step_ahead and wrong, f"one_step_ahead {message}"

    def _ignored(self) -> Iterator[tuple[bool, str]]:
        """(whether it is set, message) for options that the objective does not use."""
        objective, name = OBJECTIVES[self.objective], repr(self.objective)
        capped = self.sampler_correction in CAPS or self.sampler_cap in CAPS.values()  # of a file for another kind
        for option in () if objective.critic else self.changed(*OF_CRITIC):
            yield True, f"{option} needs an objective with a critic; {name} has none: leave it out"
        for option in self.changed(*OF_TOKENS) if objective.pairs else ():
            yield True, f"{option} is not for {name}, which learns from pairs: leave it out"
        yield (
            self.dual_clip > 0 and objective.token_loss != "ppo",
            f"dual_clip is for objectives with PPO's loss, not for {name}: leave it out",
        )
        for option in () if objective.pairs else self.changed("dpo_loss", "dpo_pairs", "label_smoothing"):
            yield True, f"{option} is for the objective 'dpo' alone: leave it out"
        for option, other, there in (
            ("overlong_buffer", "overlong_penalty", self.resolved().overlong_penalty),
            ("ptx_coef", "ptx_file", self.ptx_file),
            ("eval_steps", "eval_prompts_file", self.eval_prompts_file),
            ("sampler_cap", "sampler_correction truncate or sequence-mask", capped),
        ):
            yield not there and bool(self.changed(option)), f"{option} needs {other}: leave it out or set that"
        yield self.label_smoothing > 0 and self.dpo_loss == "ipo", "label_smoothing is not for ipo: leave it out"


@dataclass
class PPOConfig(PPOOptions, RunOptions):
    """Improve a language model against a reward model by RL (PPO, GRPO, RLOO, ...) or DPO."""

    def validate(self) -> None:
        """Raise UserError if an option is out of its range or conflicts with another."""
        super().validate()
        if self.max_new_tokens >= self.max_length:
            raise UserError(
                f"max_new_tokens ({self.max_new_tokens}) must leave room for a prompt in max_length ({self.max_length})"
            )
