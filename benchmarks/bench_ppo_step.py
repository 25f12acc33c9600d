# SPDX-License-Identifier: Apache-2.0
"""A whole optimisation step of PPO on a language model of SmolLM2-135M's shape: eager ops and ours, part by part.

The weights are random, which changes no time. Reward model and reference share frozen weights and run by themselves;
the critic has a trunk of its own. Both variants drop masked rows before the head. Fused ops are a small share of such a
step, and this is where it can be seen how small.
"""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from common import eager_linear_logprobs, eager_ppo_advantages
from torch import Tensor

import rlhf_fast as rf

transformers = pytest.importorskip("transformers", reason="the trainer extra is not installed")

BATCH, PROMPT, RESPONSE = 4, 16, 32
SHAPE = dict(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True,
)  # fmt: skip


def eager_policy_loss(
    hidden: Tensor, weight: Tensor, tokens: Tensor, mask: Tensor, old: Tensor, advantages: Tensor
) -> Tensor:
    ratio = (eager_linear_logprobs(hidden[mask], weight, tokens[mask]) - old[mask]).exp()
    gain = torch.min(ratio * advantages[mask], ratio.clamp(0.8, 1.2) * advantages[mask])
    return -gain.mean()


def our_policy_loss(
    hidden: Tensor, weight: Tensor, tokens: Tensor, mask: Tensor, old: Tensor, advantages: Tensor
) -> Tensor:
    ratio = (rf.linear_token_logprobs(hidden, weight, tokens, mask=mask) - old).exp()
    gain = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return -gain.sum() / mask.sum()


class Step:
    """One batch: generate, score, value, log-probs of both models, advantages, then a gradient step of both."""

    def __init__(self, variant: str) -> None:
        self.ours = variant == "native"
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**SHAPE)
        self.policy = transformers.LlamaForCausalLM(config)
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)
        self.critic = copy.deepcopy(self.policy.model)
        self.value_head, self.reward_head = (torch.randn(config.hidden_size) * 0.01 for _ in range(2))
        self.optimisers = [torch.optim.AdamW(m.parameters(), lr=1e-6) for m in (self.policy, self.critic)]
        self.prompts = torch.randint(config.vocab_size, (BATCH, PROMPT))
        self.mask = torch.arange(RESPONSE) < torch.randint(RESPONSE // 2, RESPONSE + 1, (BATCH, 1))
        self.parts: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.parts[name].append(time.perf_counter() - start)

    def hidden(self, trunk: Any, sequences: Tensor) -> Tensor:
        """The states that predict the response's tokens, (B, T, H)."""
        return trunk(sequences).last_hidden_state[:, PROMPT - 1 : -1]

    def logprobs(self, hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        if self.ours:
            return rf.linear_token_logprobs(hidden, weight, tokens, mask=self.mask)
        real = eager_linear_logprobs(hidden[self.mask], weight, tokens[self.mask])
        return torch.zeros(tokens.shape).masked_scatter(self.mask, real)

    def __call__(self) -> None:
        policy, reference = self.policy, self.reference
        weight, ref_weight = policy.lm_head.weight, reference.lm_head.weight
        with torch.no_grad():
            with self.part("generation"):
                options = {"do_sample": True, "max_new_tokens": RESPONSE, "min_new_tokens": RESPONSE, "pad_token_id": 0}
                sequences = policy.generate(self.prompts, **options)
            tokens = sequences[:, PROMPT:]
            with self.part("reward model"):
                scores = reference.model(sequences).last_hidden_state[:, -1] @ self.reward_head
            with self.part("critic, values"):
                values = self.hidden(self.critic, sequences) @ self.value_head
            with self.part("reference, log-probs"):
                ref_logprobs = self.logprobs(self.hidden(reference.model, sequences), ref_weight, tokens)
            with self.part("policy, old log-probs"):
                old = self.logprobs(self.hidden(policy.model, sequences), weight, tokens)
            with self.part("advantages"):
                if self.ours:
                    made = rf.ppo_advantages(scores, old, ref_logprobs, values, self.mask, kl_coef=0.1)
                    advantages, returns = made.advantages, made.returns
                else:
                    advantages, returns = eager_ppo_advantages(scores, old, ref_logprobs, values, self.mask)
        with self.part("policy, forward"):
            policy_loss = our_policy_loss if self.ours else eager_policy_loss
            states = self.hidden(policy.model, sequences)
            loss = policy_loss(states, weight, tokens, self.mask, old, advantages)
        with self.part("policy, backward"):
            loss.backward()
        with self.part("critic, forward and backward"):
            predicted = self.hidden(self.critic, sequences) @ self.value_head
            ((predicted - returns).square() * self.mask).mean().backward()
        with self.part("optimisers"):
            for optimiser in self.optimisers:
                optimiser.step()
                optimiser.zero_grad()


@pytest.mark.parametrize("provider", ["native", "eager"])
def test_ppo_step(benchmark: Any, provider: str) -> None:
    step = Step(provider)
    benchmark.group = f"PPO step, 135M parameters, {BATCH} x ({PROMPT} + {RESPONSE}) tokens"
    benchmark.pedantic(step, rounds=2, warmup_rounds=1)
    parts = {name: sorted(times[1:] or times)[len(times[1:] or times) // 2] for name, times in step.parts.items()}
    benchmark.extra_info.update(provider=provider, parts=parts)
