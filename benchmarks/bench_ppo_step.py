# SPDX-License-Identifier: Apache-2.0
"""A step of PPO on a language model of SmolLM2-135M's shape, part by part, in three variants:

    full logits  the usual loop: logits of every position, log_softmax of (B, T, V), masked rows thrown away after it
    eager        the same ops on rows compacted to real tokens before the head
    native       ours: linear_token_logprobs for scoring, ppo_advantages, linear_policy_loss for the update

The weights are random, which changes no time. Reward model and reference share frozen weights and run by themselves;
the critic has a trunk of its own. Generation is the same code for all: it is timed once a round and counts for each,
and the responses that are learned from are random, so that their lengths are known.
`python benchmarks/bench_ppo_step.py eager` prints the peak extra memory, of a process of its own.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from common import eager_linear_logprobs, eager_logprobs, eager_ppo_advantages
from memory import resident
from torch import Tensor

import rlhf_fast as rf

transformers = pytest.importorskip("transformers", reason="the trainer extra is not installed")

VARIANTS = ("native", "eager", "full logits")
BATCH, PROMPT, RESPONSE, ROUNDS = 8, 32, 96, 3
SHAPE = dict(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True,
)  # fmt: skip


def clipped(logprobs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    ratio = (logprobs - old).exp()
    return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)


class Step:
    """One batch: score, value, log-probs of both models, advantages, then a gradient step of policy and critic.

    Called as each variant in turn, on the same models: what they learn changes no time.
    """

    def __init__(self, batch: int = BATCH) -> None:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**SHAPE)
        self.policy = transformers.LlamaForCausalLM(config)
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)
        self.critic = copy.deepcopy(self.policy.model)
        self.value_head, self.reward_head = (torch.randn(config.hidden_size) * 0.01 for _ in range(2))
        self.optimisers = [torch.optim.AdamW(m.parameters(), lr=1e-6) for m in (self.policy, self.critic)]
        self.variant = ""
        self.parts: dict[str, dict[str, list[float]]] = {variant: defaultdict(list) for variant in VARIANTS}
        self.use(batch)

    def use(self, batch: int) -> None:
        """Other sequences, so many of them."""
        self.sequences = torch.randint(SHAPE["vocab_size"], (batch, PROMPT + RESPONSE))
        self.mask = torch.arange(RESPONSE) < torch.randint(RESPONSE // 2, RESPONSE + 1, (batch, 1))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.parts[self.variant][name].append(time.perf_counter() - start)

    @property
    def tokens(self) -> Tensor:
        return self.sequences[:, PROMPT:]

    def hidden(self, trunk: Any) -> Tensor:
        """The states that predict the response's tokens, (B, T, H)."""
        return trunk(self.sequences).last_hidden_state[:, PROMPT - 1 : -1]

    def logprobs(self, model: Any) -> Tensor:
        """(B, T), for scoring."""
        if self.variant == "full logits":  # as models return them: of the prompt's positions, too
            return eager_logprobs(model(self.sequences).logits[:, PROMPT - 1 : -1], self.tokens)
        hidden, weight = self.hidden(model.model), model.lm_head.weight
        if self.variant == "native":
            return rf.linear_token_logprobs(hidden, weight, self.tokens, mask=self.mask)
        real = eager_linear_logprobs(hidden[self.mask], weight, self.tokens[self.mask])
        return torch.zeros(self.mask.shape).masked_scatter(self.mask, real)

    def head_loss(self, hidden: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
        """The clipped loss of the real tokens, from the states that predict them."""
        weight, mask, tokens = self.policy.lm_head.weight, self.mask, self.tokens
        if self.variant == "native":
            return rf.linear_policy_loss(hidden, weight, tokens, old, advantages, mask=mask).loss
        if self.variant == "eager":
            real = eager_linear_logprobs(hidden[mask], weight, tokens[mask])
            return clipped(real, old[mask], advantages[mask]).mean()
        logprobs = eager_linear_logprobs(hidden, weight, tokens)
        return (clipped(logprobs, old, advantages) * mask).sum() / mask.sum()

    def update_policy(self, old: Tensor, advantages: Tensor) -> None:
        if self.variant == "full logits":
            logprobs = self.logprobs(self.policy)
            loss = (clipped(logprobs, old, advantages) * self.mask).sum() / self.mask.sum()
        else:
            loss = self.head_loss(self.hidden(self.policy.model), old, advantages)
        loss.backward()

    def generate(self) -> float:
        """Seconds of sampling as many tokens as the step learns from."""
        start = time.perf_counter()
        options = {"do_sample": True, "max_new_tokens": RESPONSE, "min_new_tokens": RESPONSE, "pad_token_id": 0}
        with torch.no_grad():
            self.policy.generate(self.sequences[:, :PROMPT], **options)
        return time.perf_counter() - start

    def finish(self) -> None:
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad()

    def __call__(self, variant: str) -> None:
        self.variant = variant
        with torch.no_grad():
            with self.part("reward model"):
                scores = self.reference.model(self.sequences).last_hidden_state[:, -1] @ self.reward_head
            with self.part("critic, values"):
                values = self.hidden(self.critic) @ self.value_head
            with self.part("reference, log-probs"):
                ref = self.logprobs(self.reference)
            with self.part("policy, old log-probs"):
                old = self.logprobs(self.policy)
            with self.part("advantages"):
                if self.variant == "native":
                    made = rf.ppo_advantages(scores, old, ref, values, self.mask, kl_coef=0.1)
                    advantages, returns = made.advantages, made.returns
                else:
                    advantages, returns = eager_ppo_advantages(scores, old, ref, values, self.mask)
        with self.part("policy, forward and backward"):
            self.update_policy(old, advantages)
        with self.part("critic, forward and backward"):
            predicted = self.hidden(self.critic) @ self.value_head
            ((predicted - returns).square() * self.mask).mean().backward()
        with self.part("optimisers"):
            self.finish()


def extra_bytes(variant: str) -> dict[str, int]:
    """Peak over what is resident before, gradients there already: of the policy's update, and of its head alone."""
    step = Step(batch=1)
    step.variant = variant
    step.update_policy(torch.full(step.mask.shape, -10.8), torch.ones(step.mask.shape))
    step.use(BATCH)
    old, advantages = torch.full(step.mask.shape, -10.8), torch.randn(step.mask.shape)
    with torch.no_grad():
        states = step.hidden(step.policy.model)

    def peak(call: Any) -> int:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator kept would hide what the call takes
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        call()
        return max(0, resident("VmHWM") - before)

    return {
        "peak extra memory of the policy's update": peak(lambda: step.update_policy(old, advantages)),
        "of its head alone": peak(lambda: step.head_loss(states.clone().requires_grad_(), old, advantages).backward()),
    }


def extra_bytes_in_a_child(variant: str) -> dict[str, int]:
    if not Path("/proc/self/clear_refs").exists():
        return {}
    output = subprocess.run([sys.executable, __file__, variant], capture_output=True, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


@cache
def measured() -> dict[str, dict[str, list[float]]]:
    """Seconds by variant and part: all variants run in every round, after a warm-up."""
    step = Step()
    for _ in range(1 + ROUNDS):
        seconds = step.generate()
        for variant in VARIANTS:
            step.parts[variant]["generation"].append(seconds)
            step(variant)
    return {variant: {name: times[1:] for name, times in parts.items()} for variant, parts in step.parts.items()}


@pytest.mark.timeout(1800)  # the first one measures all: minutes, and many on a busy machine
def test_ppo_step(benchmark: Any, replay: Callable[[list[float]], None], variant: str) -> None:
    parts = measured()[variant]
    benchmark.group = f"PPO step, 135M parameters, {BATCH} x ({PROMPT} + {RESPONSE}) tokens"
    replay([sum(times) for times in zip(*parts.values(), strict=True)])
    medians = {name: statistics.median(times) for name, times in parts.items()}
    benchmark.extra_info.update(provider=variant, parts=medians, extra_bytes=extra_bytes_in_a_child(variant))


if __name__ == "__main__":
    print(json.dumps(extra_bytes(sys.argv[1])))
