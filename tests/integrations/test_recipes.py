# SPDX-License-Identifier: Apache-2.0
"""The loops of examples/recipes learn, and what each replaced gives the same numbers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"


def recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "iterations", "start", "end"),
    [("ppo_cleanrl", 10, 0.05, 0.11), ("grpo_nanochat", 25, 0.65, 0.85), ("plain_loop", 25, 0.65, 0.85)],
)
def test_it_learns(name: str, iterations: int, start: float, end: float) -> None:
    history = recipe(name).main(iterations)
    assert history[0] < start and history[-1] > end, history


def test_every_recipe_is_tested_and_shown() -> None:
    page = (RECIPES.parents[1] / "docs" / "recipes.md").read_text()
    names = {path.name for path in RECIPES.glob("*.py")}
    assert names == {"ppo_cleanrl.py", "grpo_nanochat.py", "plain_loop.py"}
    assert all(f"examples/recipes/{name}" in page for name in names)


def test_cleanrls_loop(generator: torch.Generator) -> None:
    ppo = recipe("ppo_cleanrl")
    rewards, values = torch.randn(2, 33, 5, generator=generator)
    dones = torch.rand(33, 5, generator=generator) < 0.2
    next_done = torch.tensor([True, False, False, True, False])
    next_value = torch.randn(5, generator=generator)
    expected = torch.zeros_like(rewards)
    lastgaelam = torch.zeros(5)
    for t in reversed(range(33)):  # as cleanrl's ppo.py has it
        nextnonterminal = 1.0 - (next_done if t == 32 else dones[t + 1]).float()
        nextvalues = next_value if t == 32 else values[t + 1]
        delta = rewards[t] + ppo.GAMMA * nextvalues * nextnonterminal - values[t]
        expected[t] = lastgaelam = delta + ppo.GAMMA * ppo.GAE_LAMBDA * nextnonterminal * lastgaelam
    advantages, returns = ppo.advantages_and_returns(rewards, values, dones, next_done, next_value)
    torch.testing.assert_close(advantages, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(returns, expected + values, rtol=1e-5, atol=1e-5)


def test_nanochats_logprobs(generator: torch.Generator) -> None:
    grpo = recipe("grpo_nanochat")
    model = grpo.GPT()
    inputs = torch.randint(0, grpo.VOCAB, (3, 9), generator=generator)
    targets = torch.randint(-1, grpo.VOCAB, (3, 9), generator=generator)
    logits = model.lm_head(model.trunk(inputs))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
    torch.testing.assert_close(grpo.logprobs_of(model, inputs, targets), -loss.view(3, 9), rtol=1e-5, atol=1e-5)


def test_the_plain_loops_mask() -> None:
    plain = recipe("plain_loop")
    torch.manual_seed(0)
    ids, mask = plain.sample(plain.Policy())
    for row, real in zip(ids[:, plain.PROMPT :].tolist(), mask.tolist(), strict=True):
        length = row.index(0) + 1 if 0 in row else len(row)
        assert real == [True] * length + [False] * (len(row) - length)


def test_the_plain_loops_logprobs(generator: torch.Generator) -> None:
    plain = recipe("plain_loop")
    policy = plain.Policy()
    hidden: Tensor = torch.randn(2, 5, plain.WIDTH, generator=generator)
    response = torch.randint(0, plain.VOCAB, (2, 5), generator=generator)
    mask = torch.rand(2, 5, generator=generator) < 0.6
    truth = (policy.head(hidden) / plain.TEMPERATURE).log_softmax(-1).gather(-1, response[..., None])[..., 0] * mask
    made = plain.response_logprobs(policy, hidden, response, mask)
    torch.testing.assert_close(made, truth, rtol=1e-5, atol=1e-5)
