# SPDX-License-Identifier: Apache-2.0
"""PPO as in cleanrl's ppo.py, with rlhf_fast in three places. Names are cleanrl's: tensors are (steps, envs).

    python examples/recipes/ppo_cleanrl.py

The task is a corridor: walk right to the reward, in as few steps as possible.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import rlhf_fast as rf

NUM_ENVS, NUM_STEPS, LENGTH = 16, 64, 8
GAMMA, GAE_LAMBDA, CLIP_COEF, ENT_COEF = 0.99, 0.95, 0.2, 0.01


class Corridors:
    """NUM_ENVS corridors of LENGTH cells; right is action 1; the last cell ends the episode with reward 1."""

    def __init__(self) -> None:
        self.cell = torch.zeros(NUM_ENVS, dtype=torch.int64)

    def observe(self) -> Tensor:
        return nn.functional.one_hot(self.cell, LENGTH).float()

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.cell = (self.cell + 2 * action - 1).clamp(min=0)
        done = self.cell == LENGTH - 1
        self.cell[done] = 0
        return self.observe(), torch.where(done, 1.0, -0.02), done


class Agent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(LENGTH, 32), nn.Tanh(), nn.Linear(32, 2))
        self.critic = nn.Sequential(nn.Linear(LENGTH, 32), nn.Tanh(), nn.Linear(32, 1))


def advantages_and_returns(
    rewards: Tensor, values: Tensor, dones: Tensor, next_done: Tensor, next_value: Tensor
) -> tuple[Tensor, Tensor]:
    """cleanrl's reversed loop over steps. `dones[t]` means that step t starts an episode, so step t - 1 ended one."""
    ended = torch.cat([dones[1:], next_done[None]]).T
    cut = torch.ones(rewards.shape[1], dtype=torch.bool)  # the rollout stops, the episode does not
    advantages, returns = rf.gae(
        rewards.T, values.T, dones=ended, truncated=cut, bootstrap_values=next_value, gamma=GAMMA, lam=GAE_LAMBDA
    )
    return advantages.T, returns.T


@torch.no_grad()
def rollout(agent: Agent, envs: Corridors, next_done: Tensor) -> tuple[Tensor, ...]:
    obs, actions, logprobs, rewards, dones, values = ([] for _ in range(6))
    next_obs = envs.observe()
    for _ in range(NUM_STEPS):
        obs.append(next_obs)
        dones.append(next_done)
        logits = agent.actor(next_obs)
        action = torch.multinomial(logits.softmax(-1), 1)[:, 0]
        actions.append(action)
        logprobs.append(rf.token_logprobs(logits, action))
        values.append(agent.critic(next_obs)[:, 0])
        next_obs, reward, next_done = envs.step(action)
        rewards.append(reward)
    next_value = agent.critic(next_obs)[:, 0]
    stacked = tuple(torch.stack(x) for x in (obs, actions, logprobs, rewards, dones, values))
    return *stacked, next_done, next_value


def update(agent: Agent, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, ...]) -> float:
    b_obs, b_actions, b_logprobs, b_advantages, b_returns = (x.reshape(-1, *x.shape[2:]) for x in batch)
    for mb in torch.randperm(len(b_obs)).chunk(4):
        stats = rf.token_stats(agent.actor(b_obs[mb]), b_actions[mb])  # log-probs and entropy in one reading
        log_ratio = stats.logprobs - b_logprobs[mb]
        ratio = log_ratio.clamp(-rf.LOG_RATIO_LIMIT, rf.LOG_RATIO_LIMIT).exp()  # without the limit it may be inf
        advantages = (b_advantages[mb] - b_advantages[mb].mean()) / (b_advantages[mb].std() + 1e-8)
        pg_loss = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP_COEF, 1 + CLIP_COEF)).mean()
        v_loss = 0.5 * ((agent.critic(b_obs[mb])[:, 0] - b_returns[mb]) ** 2).mean()
        loss = pg_loss - ENT_COEF * stats.entropy.mean() + 0.5 * v_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        newlogprob = rf.token_logprobs(agent.actor(b_obs), b_actions)
        return rf.approx_kl(b_logprobs[None], newlogprob[None], estimator="k3").mean().item()


def main(iterations: int = 25) -> list[float]:
    """Mean reward per step after each iteration."""
    torch.manual_seed(1)
    agent, envs = Agent(), Corridors()
    optimizer = torch.optim.Adam(agent.parameters(), lr=3e-3, eps=1e-5)
    next_done, history = torch.zeros(NUM_ENVS, dtype=torch.bool), []
    for iteration in range(iterations):
        obs, actions, logprobs, rewards, dones, values, next_done, next_value = rollout(agent, envs, next_done)
        advantages, returns = advantages_and_returns(rewards, values, dones, next_done, next_value)
        for _ in range(4):
            approx_kl = update(agent, optimizer, (obs, actions, logprobs, advantages, returns))
        history.append(rewards.mean().item())
        print(f"iteration {iteration:2d}  reward {history[-1]:+.3f}  approx_kl {approx_kl:.4f}")
    return history


if __name__ == "__main__":
    main()
