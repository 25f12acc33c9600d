# SPDX-License-Identifier: Apache-2.0
"""The models of PPO, the optimizers of the trained ones, and their checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.data.examples import PromptLine
from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.feedback.schema import Ranking
from rlhf_fast.models.fsdp import sharded
from rlhf_fast.models.gguf import resolve_model
from rlhf_fast.models.heads import check_head
from rlhf_fast.models.loading import (
    checkpoint_activations,
    fit_padding,
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
    make_critic,
    reading_limits,
    resolve_dtype,
)
from rlhf_fast.models.lora import adapters_off, add_lora, merged_copy
from rlhf_fast.models.optim import AdamW
from rlhf_fast.run.checkpoint import load_state
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.run.progress import notice

from .config import OptimizerOptions, PPOConfig
from .kl_controller import KLController
from .objectives import OBJECTIVES
from .prompts import Prompts, encode_lines
from .ptx import Demonstrations
from .reward_functions import check_columns, load_functions
from .reward_reader import reader_of
from .rewards import Rewards
from .settings import given


@dataclass
class Agent:
    """The models of PPO and the optimizers of the trained ones; no critic if the objective needs none."""

    tokenizer: Any
    policy: Any
    adapters: Any | None  # the PeftModel around the policy, with LoRA
    frozen: Any | None  # the reference; None if it is the policy with its adapters off
    rewards: Rewards
    critic: Any | None
    policy_optimizer: AdamW
    critic_optimizer: AdamW | None
    kl_controller: KLController
    demonstrations: Demonstrations | None = None  # PPO-ptx: also trained on
    prompts_drawn: int = 0  # so far: index of the next step's first prompt
    largest_gap: float = 0.0  # of the last step, between old and new log-probabilities, which should be equal

    @contextmanager
    def reference(self) -> Iterator[Any]:
        """The policy as it was when RL began, also in a resumed run."""
        if self.adapters is None:
            yield self.frozen
        else:
            with adapters_off(self.adapters):
                yield self.policy

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

    def merged_policy(self) -> Any:
        """The policy as a plain model, with adapters merged."""
        return self.policy if self.adapters is None else merged_copy(self.adapters)


def load_agent(config: PPOConfig) -> Agent:
    """Load all models. All are in eval mode: dropout would make old and new log-probabilities differ."""
    config = config.resolved()
    for name in filter(None, (config.model, config.reward_model)):
        resolve_model(name)  # report a wrong name before the other model is loaded
    dtype, trust = resolve_dtype(config.dtype), config.trust_remote_code
    functions = load_functions(config.reward_functions)
    tokenizer = load_tokenizer(config.model, trust)
    policy = sharded(load_causal_lm(config.model, dtype, trust, config.load_in_4bit), config.fsdp)
    fit_padding(tokenizer, policy)
    frozen = None
    if not config.lora_rank:
        frozen = sharded(load_causal_lm(config.model, dtype, trust).requires_grad_(False), config.fsdp)
    adapters = add_lora(policy, config.lora_rank) if config.lora_rank else None
    reward = reader = None
    if config.reward_model:
        reward = load_reward_model(config.reward_model, dtype, tokenizer, trust, new_head=False)
        reward.requires_grad_(False)
        reader = reader_of(reward, config.reward_model, tokenizer, policy, config.micro_batch_size, trust)
        reward = sharded(reward, config.fsdp)
    critic = critic_optimizer = None
    if OBJECTIVES[config.objective].critic:
        start = config.model if reader is not None else config.reward_model or config.model
        new = start == config.model  # it is a language model
        critic = make_critic(load_reward_model(start, dtype, tokenizer, trust, config.load_in_4bit, new_head=new))
        critic = sharded(critic, config.fsdp)
        if new:
            torch.nn.init.zeros_(critic.score.weight)  # a new head is random: values of 0 are better
        if config.lora_rank:
            add_lora(critic, config.lora_rank, head=critic.score)
        critic_optimizer = optimizer_of(critic, config.critic_lr, config)
    for model in (policy, critic) if config.gradient_checkpointing else ():
        if model is not None:
            checkpoint_activations(model)
    rewards = Rewards(reward, functions, given(config.score_clip), reader)
    if given(config.score_clip) and reward is not None and not rewards.clips:
        notice(f"{config.reward_model!r} has no score_mean and score_std: its raw scores are not clipped to score_clip")
    return Agent(
        tokenizer=tokenizer,
        policy=policy,
        adapters=adapters,
        frozen=frozen,
        rewards=rewards,
        critic=critic,
        policy_optimizer=optimizer_of(policy, config.lr, config),
        critic_optimizer=critic_optimizer,
        kl_controller=KLController(given(config.kl_coef), config.kl_target),
    )


def optimizer_of(model: Any, lr: float, options: OptimizerOptions) -> AdamW:
    """AdamW over the trained parameters of the model."""
    return AdamW(
        model.parameters(),
        lr=lr,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_eps,
        weight_decay=options.weight_decay,
    )


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


def encode_prompts(lines: Sequence[PromptLine | Ranking], config: PPOConfig, agent: Agent) -> Prompts:
    """Token ids of what `read_prompts_or_feedback` read; the options decide what happens to those that do not fit."""
    check_columns(agent.rewards.functions, lines)
    limits = reading_limits(agent.policy, config)
    prompts = encode_lines(lines, agent.tokenizer, limits, config.max_new_tokens, config.dpo_pairs == "all")
    check_head(agent.policy, torch.tensor([prompts.ids[0]], device=agent.policy.device))
    return prompts


def save(agent: Agent, run: RunFolder, step: int) -> None:
    """A checkpoint: float32 weights and moments of the trained models, kl_coef, the position among the prompts."""
    state: dict[str, Any] = {
        "step": step,
        "policy": agent.policy_optimizer.state_dict(),
        "kl_coef": agent.kl_controller.coef,
        "prompts_drawn": agent.prompts_drawn,
    }
    if agent.critic_optimizer is not None:
        state["critic"] = agent.critic_optimizer.state_dict()
    run.save_checkpoint(step, state)


def restore(agent: Agent, run: RunFolder) -> int:
    """Steps done: those of the newest checkpoint, which is loaded if the run was asked to resume, else 0."""
    checkpoint = run.latest_checkpoint()
    if checkpoint is None:
        run.truncate_metrics(0)
        return 0
    state = load_state(checkpoint, "step", "policy", "kl_coef", "prompts_drawn")
    agent.policy_optimizer.load_state_dict(state["policy"])
    if agent.critic_optimizer is not None:
        agent.critic_optimizer.load_state_dict(state["critic"])
    if agent.kl_controller.target and "kl_coef" not in run.changed:  # a fixed coefficient comes from the options
        agent.kl_controller.coef = float(state["kl_coef"])
    agent.prompts_drawn = int(state["prompts_drawn"])
    run.truncate_metrics(state["step"])
    notice(f"going on from {checkpoint}")
    return int(state["step"])
