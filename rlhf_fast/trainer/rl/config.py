# SPDX-License-Identifier: Apache-2.0
"""Options of reinforcement learning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from rlhf_fast.errors import UserError
from rlhf_fast.run.options import FILE, FRACTION, NOT_NEGATIVE, POSITIVE, Range, RunOptions, SamplingOptions

OPEN_FRACTION = Range(lambda value: 0 < value < 1, "between 0 and 1")


@dataclass
class PPOOptions(SamplingOptions):
    """Reinforcement learning of a copy of the model against the reward model, held near the original."""

    CHANGEABLE = frozenset(
        {"lr", "critic_lr", "critic_warmup", "kl_coef", "kl_target", "early_stop_kl", "gamma", "lam", "cliprange"}
        | {"cliprange_high", "cliprange_value", "score_clip", "missing_eos_penalty", "epochs", "num_minibatches"}
        | {"prompts_per_step", "samples_per_prompt", "dynamic_sampling"}
    )
    EXTENDS = frozenset({"max_steps", "max_seconds"})

    prompts_file: Annotated[str, FILE] = ""
    """JSONL of prompts to learn on. With the objective dpo also feedback: ranked completions are then not sampled."""
    eval_prompts_file: str | None = None
    """JSONL of held-out prompts, sampled before and after with one fixed seed."""
    eval_samples: Annotated[int, POSITIVE] = 2
    """Completions of each held-out prompt."""
    reward_model: str = ""
    """Folder or id of the reward model (a sequence classifier with one label)."""
    reward_functions: tuple[str, ...] = ()
    """Added to the score: `module:function`, or `0.5*file.py:function` weighted; f(prompt, completions) -> numbers."""
    rater: str | None = None
    """Simulated rater, shown beside the reward on held-out prompts; never trained on."""
    objective: Literal["ppo", "grpo", "dr_grpo", "dapo", "rloo", "reinforce++", "dpo"] = "ppo"
    """What is maximised: ppo has a critic and GAE, reinforce++ neither; the others compare samples of one prompt."""
    prompts_per_step: Annotated[int, POSITIVE] = 8
    """Prompts in a step; each is sampled `samples_per_prompt` times."""
    dynamic_sampling: Annotated[int, NOT_NEGATIVE] = 0
    """Extra rounds of prompts, at most, in place of those whose samples all earn the same (DAPO); 0 keeps them."""
    max_steps: Annotated[int, NOT_NEGATIVE] = 100
    """Steps of sampling and learning."""
    max_seconds: Annotated[float, NOT_NEGATIVE] = 0.0
    """End early, save and report once the phase has taken this long; 0 sets no limit."""
    epochs: Annotated[int, POSITIVE] = 1
    """Passes over the samples of a step."""
    num_minibatches: Annotated[int, POSITIVE] = 2
    """Optimizer steps in one such pass."""
    lr: Annotated[float, POSITIVE] = 1e-5
    """Learning rate of the policy."""
    critic_lr: Annotated[float, POSITIVE] = 3e-5
    """Learning rate of the critic."""
    critic_warmup: Annotated[int, NOT_NEGATIVE] = 0
    """Steps at the start in which the critic alone learns."""
    kl_coef: Annotated[float, NOT_NEGATIVE] = 0.05
    """Price of one nat of divergence from the reference model; beta of dpo."""
    kl_target: Annotated[float, NOT_NEGATIVE] = 0.0
    """Move kl_coef so that the divergence comes to this many nats per sequence; 0 keeps it fixed."""
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = "k1"
    """From the two log-probabilities of the sampled token, or exact: over the whole vocabulary."""
    kl_in: Literal["reward", "loss", "loss-straight-through", "loss-importance"] = "reward"
    """Charge it in the reward, or in the loss: with its own gradient, with k2's, or weighted by the ratio."""
    early_stop_kl: Annotated[float, NOT_NEGATIVE] = 0.0
    """End a step's update once the policy is this many nats a token from the one that sampled; 0: never."""
    gamma: Annotated[float, FRACTION] = 1.0
    """Discount per token."""
    lam: Annotated[float, FRACTION] = 0.95
    """Decay of generalized advantage estimation."""
    cliprange: Annotated[float, OPEN_FRACTION] = 0.2
    """The probability ratio is clipped to [1 - c, 1 + c]."""
    cliprange_high: Annotated[float, NOT_NEGATIVE] = 0.0
    """Another upper limit, 1 + c ("clip higher" of DAPO, which uses 0.28); 0 takes that of cliprange."""
    cliprange_value: Annotated[float, NOT_NEGATIVE] = 0.2
    """Values may move this far from the old ones in a step; 0 sets no limit."""
    score_clip: Annotated[float, NOT_NEGATIVE] = 5.0
    """The normalised score is limited to plus or minus this; 0 sets no limit."""
    missing_eos_penalty: Annotated[float, NOT_NEGATIVE] = 0.0
    """Taken off the score of a completion that did not end by itself."""

    def validate(self) -> None:
        """Raise UserError if an option is out of its range, or does not go with another."""
        super().validate()
        from .objectives import OBJECTIVES

        objective, samples = OBJECTIVES[self.objective], self.prompts_per_step * self.samples_per_prompt
        for wrong, message in (
            (
                not self.reward_model and not self.reward_functions and self.objective != "dpo",
                "reward_model must be a folder or an id of a reward model, or name reward_functions",
            ),
            (
                samples % self.num_minibatches != 0,
                f"num_minibatches {self.num_minibatches} must divide prompts_per_step x samples_per_prompt = {samples}",
            ),
            (
                objective.compares and self.samples_per_prompt < 2,
                f"objective {self.objective!r} compares samples of one prompt: samples_per_prompt must be 2 or more",
            ),
            (
                self.dynamic_sampling > 0 and not objective.compares,
                f"dynamic_sampling is for an objective that compares samples of one prompt, not for {self.objective!r}",
            ),
            (
                self.kl_estimator == "exact" and (self.top_k > 0 or self.top_p < 1),
                "kl_estimator exact is over the whole vocabulary, which top_k and top_p cut: take k1, k2 or k3",
            ),
            (
                self.kl_in == "loss" and self.kl_estimator == "k1",
                "kl_estimator k1 in the loss has no gradient on average: take k2, k3, exact or loss-straight-through",
            ),
            (
                self.kl_in in ("loss-straight-through", "loss-importance") and self.kl_estimator == "exact",
                f"kl_in {self.kl_in!r} mends estimates; the exact KL has the right gradient: take loss",
            ),
            (
                objective.token_loss is None and (self.kl_estimator == "exact" or self.kl_in != "reward"),
                f"objective {self.objective!r} has its KL in its own loss: leave kl_estimator k1 and kl_in reward",
            ),
            (self.kl_target > 0 and self.kl_coef == 0, "kl_target moves kl_coef, which must then be above 0"),
            (
                self.critic_warmup > 0 and not objective.critic,
                f"critic_warmup is for an objective with a critic, which {self.objective!r} has not",
            ),
        ):
            if wrong:
                raise UserError(message)


@dataclass
class PPOConfig(PPOOptions, RunOptions):
    """Improve a language model against a reward model by PPO."""

    def validate(self) -> None:
        """Raise UserError if an option is out of its range, or does not go with another."""
        super().validate()
        if self.max_new_tokens >= self.max_length:
            raise UserError(
                f"max_new_tokens ({self.max_new_tokens}) must leave room for a prompt in max_length ({self.max_length})"
            )
