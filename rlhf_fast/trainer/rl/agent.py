# SPDX-License-Identifier: Apache-2.0
"""The models of PPO, the optimizers of the trained ones, and their checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.data.examples import PromptLine
from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.feedback.schema import Ranking
from rlhf_fast.models.activations import set_up_activations
from rlhf_fast.models.adapters import save_adapters
from rlhf_fast.models.batches import MicroBatch
from rlhf_fast.models.fsdp import shard_size, sharded
from rlhf_fast.models.gguf import resolve_model
from rlhf_fast.models.heads import check_head
from rlhf_fast.models.loading import (
    fit_padding,
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
    make_critic,
    parameter_count,
    reading_limits,
    resolve_dtype,
)
from rlhf_fast.models.lora import adapters_off, add_lora, merged_copy
from rlhf_fast.models.optim import AdamW
from rlhf_fast.run.checkpoint import load_state
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.run.options import OptimizerKind
from rlhf_fast.run.progress import notice

from .ahead import OneStepAhead
from .kl_controller import KLController
from .pace import Pace
from .prompts import PromptOptions, Prompts, encode_lines
from .ptx import Demonstrations
from .reward_functions import load_functions
from .reward_reader import reader_of
from .rewards import Rewards


@dataclass
class Agent:
    """The models of PPO and the optimizers of the trained ones; no critic if the objective needs none."""

    tokenizer: Any
    policy: Any
    adapters: Any | None  # the PeftModel around the policy, with LoRA
    frozen: Any | None  # the reference; None if it is the policy with its adapters off, or no step needs it
    rewards: Rewards
    critic: Any | None
    policy_optimizer: AdamW
    critic_optimizer: AdamW | None
    kl_controller: KLController
    demonstrations: Demonstrations | None = None  # PPO-ptx: also trained on
    ahead: OneStepAhead | None = None  # has the next step's completions sampled meanwhile
    prompts_drawn: int = 0  # so far: index of the next step's first prompt
    largest_gap: float = 0.0  # of the last step, between old and new log-probabilities, which should be equal
    load_reference: Callable[[], Any] | None = None  # for evaluations, if no step needs it
    begin_change: Callable[[], None] = lambda: None  # called before a step changes what `save` writes

    @contextmanager
    def reference(self) -> Iterator[Any]:
        """The policy as it was when RL began, also in a resumed run."""
        if self.adapters is None:
            with self.keep_reference():
                yield self.frozen
        else:
            with adapters_off(self.adapters):
                yield self.policy

    @contextmanager
    def keep_reference(self) -> Iterator[None]:
        """Within it the reference is in memory. Outside it is not, if no step needs it. All ranks must enter."""
        if self.frozen is not None or self.load_reference is None:
            yield
            return
        self.frozen = self.load_reference()
        try:
            yield
        finally:
            self.frozen = None

    def train(self, mode: bool) -> None:
        """Switch the trained models' training mode on or off."""
        for model in (self.policy, self.critic):
            if model is not None:
                model.train(mode)

    def set_learning_rates(self, policy: float, critic: float) -> None:
        """Set the learning rates of the next update."""
        for optimizer, lr in ((self.policy_optimizer, policy), (self.critic_optimizer, critic)):
            for group in () if optimizer is None else optimizer.param_groups:
                group["lr"] = lr

    def watch_changes(self, begin_change: Callable[[], None]) -> None:
        """Have `begin_change()` called before a step changes weights or anything else that `save` writes."""
        self.begin_change = begin_change
        for optimizer in (self.policy_optimizer, self.critic_optimizer):
            if optimizer is not None:
                optimizer.before_step(begin_change)

    def parameter_count(self) -> int:
        """Number of weights of policy and critic, which is as large."""
        return parameter_count(self.policy) * (2 if self.critic is not None else 1)

    def merged_policy(self) -> Any:
        """The policy as a plain model, with adapters merged."""
        return self.policy if self.adapters is None else merged_copy(self.adapters)


class ModelOptions(NamedTuple):
    """Which models are loaded, and how."""

    model: str
    reward_model: str  # "" for none
    critic: bool
    dtype: str | torch.dtype
    trust_remote_code: bool
    load_in_4bit: bool
    lora_rank: int  # 0: all weights are trained
    fsdp: bool
    fsdp_size: int
    gradient_checkpointing: bool
    activation_offloading: bool


class AdamOptions(NamedTuple):
    """Options of AdamW, with the learning rates at the start."""

    lr: float
    critic_lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    kind: OptimizerKind


class AgentOptions(NamedTuple):
    """Options of loading an `Agent`."""

    models: ModelOptions
    adam: AdamOptions
    reward_functions: tuple[str, ...]
    score_clip: float
    micro_batch: MicroBatch  # for a reward model with another vocabulary
    kl_coef: float
    kl_target: float
    reference: bool  # whether a step needs it; otherwise it is loaded for evaluations alone


def load_agent(options: AgentOptions) -> Agent:
    """Load all models. All are in eval mode: dropout would make old and new log-probabilities differ."""
    models = options.models
    for name in filter(None, (models.model, models.reward_model)):
        resolve_model(name)  # report a wrong name before the other model is loaded
    dtype, trust = resolve_dtype(models.dtype), models.trust_remote_code
    models = models._replace(dtype=dtype)
    functions = load_functions(options.reward_functions)
    tokenizer = load_tokenizer(models.model, trust)
    policy = sharded(load_causal_lm(models.model, dtype, trust, models.load_in_4bit), models.fsdp, models.fsdp_size)
    fit_padding(tokenizer, policy)

    def load_reference() -> Any:
        return sharded(load_causal_lm(models.model, dtype, trust).requires_grad_(False), models.fsdp, models.fsdp_size)

    full = not models.lora_rank
    adapters = add_lora(policy, models.lora_rank) if models.lora_rank else None
    reward = reader = None
    if models.reward_model:
        reward = load_reward_model(models.reward_model, dtype, tokenizer, trust, new_head=False)
        reward.requires_grad_(False)
        reader = reader_of(reward, models.reward_model, tokenizer, policy, options.micro_batch, trust)
        reward = sharded(reward, models.fsdp, models.fsdp_size)
    rewards = Rewards(reward, functions, options.score_clip, reader)
    if options.score_clip and reward is not None and not rewards.clips:
        notice(f"{models.reward_model!r} has no score_mean and score_std: its raw scores are not clipped to score_clip")
    critic = load_critic(models, tokenizer, scores_text=reader is not None) if models.critic else None
    for model in (policy, critic):
        if model is not None:
            set_up_activations(model, models.gradient_checkpointing, models.activation_offloading)
    adam = options.adam
    return Agent(
        tokenizer=tokenizer,
        policy=policy,
        adapters=adapters,
        frozen=load_reference() if full and options.reference else None,
        load_reference=load_reference if full and not options.reference else None,
        rewards=rewards,
        critic=critic,
        policy_optimizer=optimizer_of(policy, adam.lr, adam),
        critic_optimizer=None if critic is None else optimizer_of(critic, adam.critic_lr, adam),
        kl_controller=KLController(options.kl_coef, options.kl_target),
    )


def load_critic(models: ModelOptions, tokenizer: Any, *, scores_text: bool) -> Any:
    """The critic: from the reward model, or from the policy if there is none or it `scores_text` of other tokens."""
    start = models.model if scores_text else models.reward_model or models.model
    new = start == models.model  # it is a language model
    four_bit = models.load_in_4bit
    loaded = load_reward_model(start, models.dtype, tokenizer, models.trust_remote_code, four_bit, new_head=new)
    critic = sharded(make_critic(loaded), models.fsdp, models.fsdp_size)
    if new:
        torch.nn.init.zeros_(critic.score.weight)  # a new head is random: values of 0 are better
    if models.lora_rank:
        add_lora(critic, models.lora_rank, head=critic.score)
    return critic


def optimizer_of(model: Any, lr: float, adam: AdamOptions) -> AdamW:
    """AdamW over the trained parameters of the model."""
    rest: dict[str, Any] = {"betas": adam.betas, "eps": adam.eps, "weight_decay": adam.weight_decay, "kind": adam.kind}
    return AdamW(model.parameters(), lr=lr, **rest)


@torch.no_grad()
def calibrate_critic(critic: Any, values: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    """Fit slope and shift of the critic's head to the first step's rewards (B,); returns its values (B, T) from now on.

    A reward model has learned to read the last token only. Elsewhere its readings were seen to lie two standard
    deviations off, which value clipping would take a dozen steps to put right. The line is that of least squares, its
    slope kept in [0.1, 1], so that the head's gradient still reaches the trunk.
    """
    readings, targets = ranks().cat(values[mask]), ranks().cat(rewards[:, None].expand_as(values)[mask])
    spread = readings - readings.mean()
    slope = ((spread * targets).sum() / spread.square().sum().clamp(min=1e-8)).clamp(0.1, 1.0)
    shift = targets.mean() - slope * readings.mean()
    critic.score.weight.mul_(slope)
    critic.score.bias.mul_(slope).add_(shift)
    return (values * slope + shift) * mask


def encode_prompts(lines: Sequence[PromptLine | Ranking], agent: Agent, options: PromptOptions) -> Prompts:
    """Token ids of what `read_data` read; the options decide what happens to those that do not fit."""
    limits = reading_limits(agent.policy, options.limits)
    prompts = encode_lines(lines, agent.tokenizer, limits, options.max_new_tokens, options.every_pair)
    check_head(agent.policy, torch.tensor([prompts.ids[0]], device=agent.policy.device))
    return prompts


def save(agent: Agent, pace: Pace, run: RunFolder, step: int) -> None:
    """A checkpoint: float32 weights and moments of the trained models, kl_coef, the position among the prompts, the
    samples that were drawn ahead, and the time taken."""
    state: dict[str, Any] = {
        "step": step,
        "policy": agent.policy_optimizer.state_dict(),
        "kl_coef": agent.kl_controller.coef,
        "prompts_drawn": agent.prompts_drawn,
        "timer": pace.timer.state(),
        "pace": pace.state(),
    }
    if agent.critic_optimizer is not None:
        state["critic"] = agent.critic_optimizer.state_dict()
    if agent.ahead is not None:
        state["ahead"] = agent.ahead.state(step)
    run.save_checkpoint(step, state)


def save_policy(agent: Agent, run: RunFolder) -> None:
    """The policy in model/; with LoRA its adapters in adapters/ too."""
    if agent.adapters is not None:
        save_adapters(agent.adapters, run)
    run.save_model(agent.merged_policy(), agent.tokenizer)


def restore(agent: Agent, pace: Pace, run: RunFolder) -> int:
    """Steps done: those of the newest checkpoint, which is loaded if the run was asked to resume, else 0."""
    checkpoint = run.latest_checkpoint()
    if checkpoint is None:
        run.truncate_metrics(0)
        return 0
    state = load_state(checkpoint, "step", "policy", "kl_coef", "prompts_drawn", shard_size=shard_size(agent.policy))
    agent.policy_optimizer.load_state_dict(state["policy"])
    if agent.critic_optimizer is not None:
        agent.critic_optimizer.load_state_dict(state["critic"])
    if agent.kl_controller.target and "kl_coef" not in run.changed:  # a fixed coefficient comes from the options
        agent.kl_controller.coef = float(state["kl_coef"])
    agent.prompts_drawn = int(state["prompts_drawn"])
    pace.timer.resume(state.get("timer"))
    pace.resume(state.get("pace"))
    if agent.ahead is not None:
        agent.ahead.load(state.get("ahead"), int(state["step"]))
    run.truncate_metrics(state["step"])
    notice(f"going on from {checkpoint}")
    return int(state["step"])
