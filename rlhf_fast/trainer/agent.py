# SPDX-License-Identifier: Apache-2.0
"""The models of PPO, the optimizers of those that learn, and their checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.data.examples import PromptLine, encode_prompt, read_prompts
from rlhf_fast.models.heads import check_head
from rlhf_fast.models.loading import (
    context_length,
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
    make_critic,
    resolve_dtype,
)
from rlhf_fast.run.checkpoint import load_state, save_state
from rlhf_fast.run.errors import UserError
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.run.progress import notice

from .config import PPOConfig
from .objectives import NEEDS_CRITIC
from .optim import AdamW
from .rewards import Rewards, load_functions

BETAS = (0.9, 0.95)


@dataclass
class Agent:
    """The models of PPO and the optimizers of those that learn; no critic where the objective needs none."""

    tokenizer: Any
    policy: Any
    reference: Any
    rewards: Rewards
    critic: Any | None
    policy_optimizer: AdamW
    critic_optimizer: AdamW | None


@dataclass
class Prompts:
    """Prompts of one file and their token ids."""

    lines: list[PromptLine]
    ids: list[list[int]]


def load_agent(config: PPOConfig) -> Agent:
    """Load all models. None is ever in training mode: dropout would make old and new log-probabilities differ."""
    dtype, trust = resolve_dtype(config.dtype), config.trust_remote_code
    functions = load_functions(config)
    tokenizer = load_tokenizer(config.model, trust)
    policy, reference = (load_causal_lm(config.model, dtype, trust) for _ in range(2))
    reference.requires_grad_(False)
    reward = None
    if config.reward_model:
        reward = load_reward_model(config.reward_model, dtype, tokenizer, trust).requires_grad_(False)
        if reward.get_input_embeddings().num_embeddings != policy.get_input_embeddings().num_embeddings:
            raise UserError(
                f"the reward model {config.reward_model!r} has another vocabulary than {config.model!r}; "
                "it must read the same token ids"
            )
    critic = critic_optimizer = None
    if config.objective in NEEDS_CRITIC:
        critic = make_critic(load_reward_model(config.reward_model or config.model, dtype, tokenizer, trust))
        if reward is None:
            torch.nn.init.zeros_(critic.score.weight)  # a new head is random: values that are 0 do less harm
        critic_optimizer = AdamW(critic.parameters(), lr=config.critic_lr, betas=BETAS)
    policy_optimizer = AdamW(policy.parameters(), lr=config.lr, betas=BETAS)
    rewards = Rewards(reward, functions)
    return Agent(tokenizer, policy, reference, rewards, critic, policy_optimizer, critic_optimizer)


@torch.no_grad()
def calibrate_critic(critic: Any, values: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """Fit slope and shift of the critic's head to the first step's scores (B,); returns its values (B, T) from now on.

    A reward model has learned to read the last token only. Elsewhere its readings were seen to lie two standard
    deviations off, which value clipping would take a dozen steps to put right. The line is that of least squares, its
    slope kept in [0.1, 1], so that the head's gradient still reaches the trunk.
    """
    readings, targets = values[mask], scores[:, None].expand_as(values)[mask]
    spread = readings - readings.mean()
    slope = ((spread * targets).sum() / spread.square().sum().clamp(min=1e-8)).clamp(0.1, 1.0)
    shift = targets.mean() - slope * readings.mean()
    critic.score.weight.mul_(slope)
    critic.score.bias.mul_(slope).add_(shift)
    return (values * slope + shift) * mask


def load_prompts(path: str, config: PPOConfig, agent: Agent) -> Prompts:
    """Read and encode a file of prompts; UserError for one too long to leave room for a completion."""
    lines = read_prompts(path)
    room = min(config.max_length, context_length(agent.policy)) - config.max_new_tokens + 1
    ids = [encode_prompt(agent.tokenizer, line.prompt, max_length=room, where=line.where) for line in lines]
    check_head(agent.policy, torch.tensor([ids[0]], device=agent.policy.device))
    return Prompts(lines, ids)


def save(agent: Agent, run: RunFolder, step: int) -> None:
    """A checkpoint: float32 weights and moments of what learns; all else follows from the config and the step."""
    state: dict[str, Any] = {"step": step, "policy": agent.policy_optimizer.state_dict()}
    if agent.critic_optimizer is not None:
        state["critic"] = agent.critic_optimizer.state_dict()
    with run.checkpoint(step) as folder:
        save_state(folder, state)


def restore(agent: Agent, run: RunFolder) -> int:
    """Steps done: those of the newest checkpoint, which is loaded if the run was asked to resume, else 0."""
    checkpoint = run.latest_checkpoint()
    if checkpoint is None:
        run.truncate_metrics(0)
        return 0
    state = load_state(checkpoint)
    agent.policy_optimizer.load_state_dict(state["policy"])
    if agent.critic_optimizer is not None:
        agent.critic_optimizer.load_state_dict(state["critic"])
    run.truncate_metrics(state["step"])
    notice(f"going on from {checkpoint}")
    return int(state["step"])
