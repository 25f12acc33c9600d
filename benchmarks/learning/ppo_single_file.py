# SPDX-License-Identifier: Apache-2.0
"""PPO for language models, written for this comparison from the papers alone; it imports nothing of rlhf_fast.

Schulman et al. 2017 (arXiv 1707.06347, eq. 7), GAE of Schulman et al. 2016 (arXiv 1506.02438, eq. 16), the KL per token
in the reward of Ziegler et al. 2019 (arXiv 1909.08593, eq. 2), and the details of cleanrl ("The 37 implementation
details of PPO", and the N of RLHF): clipped value loss, advantages whitened over the batch, score at the last token,
value of a state before its token, Adam with eps 1e-5, gradients clipped to norm 1, no dropout, minibatches shuffled.

All prompts here have one length, so there is no padding in front, and full logits are small.
"""

from __future__ import annotations

import copy

import torch
from settings import BETAS, EVERY, RL, Curve
from task import Task, load, logits_of, sample
from task import reward as worth
from torch import Tensor, nn

GAMMA, LAMBDA, CLIP, VALUE_CLIP, MINIBATCHES = 1.0, 0.95, 0.2, 0.2, 2


class Critic(nn.Module):
    """The policy's trunk with a value head that starts at 0."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(policy.model)
        self.head = nn.Linear(policy.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.model(input_ids=ids, use_cache=False).last_hidden_state).squeeze(-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum()


def token_logprobs(model: nn.Module, ids: Tensor, prompt: int) -> Tensor:
    logits = logits_of(model, ids)[:, prompt - 1 : -1]
    return logits.log_softmax(-1).gather(-1, ids[:, prompt:, None]).squeeze(-1)


def advantages_of(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """GAE from the last token backwards; behind the last token the value is 0."""
    advantages = torch.zeros_like(rewards)
    last, following = torch.zeros(len(rewards)), torch.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + GAMMA * following - values[:, t]
        last = (delta + GAMMA * LAMBDA * last) * mask[:, t]
        advantages[:, t] = last
        following = values[:, t] * mask[:, t]
    return advantages, advantages + values


def learn(task: Task, seed: int) -> Curve:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    policy, reference = load(task.start), load(task.start)
    critic = Critic(policy)
    adam = [torch.optim.AdamW(m.parameters(), RL["lr"], BETAS, 1e-5, weight_decay=0.0) for m in (policy, critic)]
    texts = task.prompts("feedback_prompts.jsonl")
    order: list[int] = []
    curve = [{"step": 0, **task.measure(policy)}]
    for step in range(RL["steps"]):
        if len(order) < RL["prompts"]:
            order += torch.randperm(len(texts), generator=generator).tolist()
        prompts = [texts[order.pop(0)] for _ in range(RL["prompts"])]
        prompts = [text for text in prompts for _ in range(RL["samples"])]
        rollout = sample(policy, [task.tokenizer(p)["input_ids"] for p in prompts], task.tokenizer, generator)
        ids, mask, width = rollout.ids, rollout.mask.float(), rollout.prompt
        scores = torch.tensor(worth(prompts, rollout.texts, rollout.ended))
        with torch.no_grad():
            old, ref = (token_logprobs(m, ids, width) * mask for m in (policy, reference))
            values = critic(ids)[:, width - 1 : -1] * mask
        rewards = -RL["kl_coef"]["ppo"] * (old - ref)
        rewards[torch.arange(len(ids)), mask.sum(1).long() - 1] += scores
        advantages, returns = advantages_of(rewards, values, mask)
        mean = masked_mean(advantages, mask)
        advantages = (advantages - mean) / (masked_mean((advantages - mean) ** 2, mask) + 1e-8).sqrt()
        for rows in torch.randperm(len(ids), generator=generator).chunk(MINIBATCHES):
            part = mask[rows]
            ratio = (token_logprobs(policy, ids[rows], width) - old[rows]).exp()
            gain = advantages[rows]
            policy_loss = masked_mean(-torch.min(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain), part)
            new = critic(ids[rows])[:, width - 1 : -1]
            near = values[rows] + (new - values[rows]).clamp(-VALUE_CLIP, VALUE_CLIP)
            errors = torch.max((new - returns[rows]) ** 2, (near - returns[rows]) ** 2)
            (policy_loss + 0.5 * masked_mean(errors, part)).backward()
            for optimizer, model in zip(adam, (policy, critic), strict=True):
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        if (step + 1) % EVERY == 0:
            curve.append({"step": step + 1, **task.measure(policy)})
    return curve
