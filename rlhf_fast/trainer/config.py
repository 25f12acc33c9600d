# SPDX-License-Identifier: Apache-2.0
"""The options of the phases, as dataclasses; the line under a field is its help on the command line.

Every option class holds what one phase alone needs, `RunOptions` what all share. `SFTConfig` and its kin join the
two for a phase run by itself; `PipelineConfig` holds the shared ones once and each phase's own in a section:

    model: smollm2
    output_dir: runs/demo
    sft: {train_file: train.jsonl, lr: 1.0e-4}
    ppo: {kl_coef: 0.05}
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

from rlhf_fast.feedback.collect import CollectConfig, CollectOptions
from rlhf_fast.run.errors import UserError
from rlhf_fast.run.options import (
    FILE,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    Options,
    Range,
    RunOptions,
    SamplingOptions,
    load_config,
)

__all__ = [
    "CollectConfig",
    "PPOConfig",
    "PPOOptions",
    "PipelineConfig",
    "RewardConfig",
    "RewardOptions",
    "RunOptions",
    "SFTConfig",
    "SFTOptions",
    "load_config",
]

PROPER_FRACTION = Range(lambda value: 0 <= value < 1, "between 0 and 1")
OPEN_FRACTION = Range(lambda value: 0 < value < 1, "between 0 and 1")


@dataclass
class SFTOptions(Options):
    """Supervised fine-tuning on demonstrations."""

    train_file: Annotated[str, FILE] = ""
    """{"prompt", "completion"}, {"messages"} or {"text"} on each line; JSONL, Parquet, CSV or datasets:NAME[:SPLIT]."""
    eval_file: str | None = None
    """Held-out demonstrations of the same form; their loss is reported before and after."""
    epochs: Annotated[float, POSITIVE] = 2.0
    """Passes over the training file."""
    max_steps: Annotated[int, NOT_NEGATIVE] = 0
    """End after this many optimizer steps; 0 lets `epochs` decide."""
    batch_size: Annotated[int, POSITIVE] = 16
    """Demonstrations per optimizer step."""
    lr: Annotated[float, POSITIVE] = 1e-4
    """Peak learning rate of AdamW; linear decay to 0."""
    packing: bool = False
    """Put the demonstrations of a micro-batch end to end instead of padding them; the result is the same."""


@dataclass
class RewardOptions(Options):
    """A scalar head on the model, trained on all pairs of every ranking."""

    feedback_file: str = ""
    """Feedback: {"prompt", "completions", "ratings" and/or "ranks"} on each line, or a file of another tool."""
    loss: Literal["bradley_terry", "margin", "plackett_luce", "best_of_k", "regression"] = "bradley_terry"
    """What is learned from a ranking: its pairs, pairs with margins, its order, its best, or the ratings themselves."""
    centering: Annotated[float, NOT_NEGATIVE] = 0.0
    """Weight of the squared sum of two scores, which keeps scores near 0; 0.01 is usual."""
    eval_fraction: Annotated[float, PROPER_FRACTION] = 0.2
    """Share of the prompts held out to measure pair accuracy."""
    epochs: Annotated[float, POSITIVE] = 2.0
    """Passes over the training rankings."""
    batch_size: Annotated[int, POSITIVE] = 8
    """Rankings per optimizer step."""
    lr: Annotated[float, POSITIVE] = 5e-5
    """Peak learning rate of the trunk."""
    head_lr: Annotated[float, POSITIVE] = 1e-3
    """Peak learning rate of the new scalar head."""


@dataclass
class PPOOptions(SamplingOptions):
    """Reinforcement learning of a copy of the model against the reward model, held near the original."""

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
class SFTConfig(SFTOptions, RunOptions):
    """Fine-tune a language model on demonstrations."""


@dataclass
class RewardConfig(RewardOptions, RunOptions):
    """Train a reward model on rankings or ratings."""

    def validate(self) -> None:
        """Raise UserError if an option is out of its range, or does not go with another."""
        super().validate()
        if not self.feedback_file:
            raise UserError("feedback_file must be the name of a JSONL file, got ''")


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


@dataclass
class PipelineConfig(RunOptions):
    """All phases one after the other: sft, collect, reward, ppo."""

    sft: SFTOptions = field(default_factory=SFTOptions)
    collect: CollectOptions = field(default_factory=CollectOptions)
    reward: RewardOptions = field(default_factory=RewardOptions)
    ppo: PPOOptions = field(default_factory=PPOOptions)

    def validate(self) -> None:
        """Raise UserError if an option is out of its range; what an earlier phase makes need not be named."""
        super().validate()
        self.sft.validate()
        self.reward.validate()
        if not self.reward.feedback_file:
            self.collect.validate()
        dataclasses.replace(self.ppo, reward_model=self.ppo.reward_model or "reward/model").validate()
