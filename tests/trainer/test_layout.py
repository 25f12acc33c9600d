# SPDX-License-Identifier: Apache-2.0
"""Rows that share what they begin with, or a long row: the states and gradients are those of separate rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from rlhf_fast.data.examples import pad_right
from rlhf_fast.models import heads, layout
from rlhf_fast.models.batches import Batch

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
MODELS = {
    "llama": transformers.LlamaConfig(**SIZES, num_key_value_heads=2),
    "qwen3": transformers.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8),
    "gpt2": transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, bos_token_id=1, eos_token_id=2),
    "gpt_neox": transformers.GPTNeoXConfig(**SIZES),
    "gemma3": transformers.Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=8, sliding_window=16),
}


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(MODELS[name]).eval()


def rows_of(prompts: list[list[int]], completions: list[list[list[int]]]) -> tuple[Tensor, Tensor]:
    ids, mask = pad_right([p + c for p, own in zip(prompts, completions, strict=True) for c in own], 0)
    return ids, mask.bool()


def samples() -> tuple[Tensor, Tensor]:
    """Three prompts, two of which begin alike, and completions some of which do."""
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12], [5, 6, 7, 8, 40, 41, 42], [60, 61, 62, 63, 64, 65]]
    return rows_of(
        prompts, [[[20, 21], [20, 22, 23, 24], [25]], [[30], [30, 31]], [[50, 51, 52], [53], [54, 55], [56]]]
    )


def states_and_gradients(model: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    wanted = mask.clone()
    wanted[:, 0] = False
    model.zero_grad()
    logprobs = heads.token_logprobs(model, ids, mask, wanted)
    (logprobs * torch.linspace(0.5, 1.5, logprobs.numel()).view_as(logprobs)).sum().backward()
    return logprobs.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_as_alone(model: Any, ids: Tensor, mask: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, packed_gradients = states_and_gradients(model, ids, mask)
    monkeypatch.setattr(heads, "layout", lambda *args: None)
    alone, gradients = states_and_gradients(model, ids, mask)
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=2e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_sharing_changes_neither_values_nor_gradients(
    name: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(name)
    model.set_attn_implementation(attention)
    ids, mask = samples()
    found = layout.layout(model, ids, mask)
    assert found is not None and found.input_ids.numel() < ids.numel()
    assert_same_as_alone(model, ids, mask, monkeypatch)


def test_rows_of_one_length_that_have_nothing_in_common_are_left_alone() -> None:
    ids, mask = pad_right([[1, 2, 3, 4], [4, 5, 6, 7], [8, 9, 10, 11]], 0)
    assert layout.layout(model_of("llama"), ids, mask.bool()) is None


@pytest.mark.parametrize("seed", range(4))
def test_unlike_rows_are_packed_and_change_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts with one to four completions, of any length, prompts that begin alike among them."""
    model = model_of("llama")
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(1, 99, (length,), generator=generator).tolist()

    begin = tokens(2, 6)
    prompts = [begin * (i % 2) + tokens(1, 9) for i in range(6)]
    completions = [[tokens(1, 25) for _ in range(1 + (i + seed) % 4)] for i in range(6)]
    ids, mask = rows_of(prompts, completions)
    found = layout.layout(model, ids, mask)
    assert found is not None
    assert len(found.input_ids) > 1  # several rows of several prompts
    assert found.input_ids.numel() < 1.25 * int(mask.sum())  # hardly any pads
    assert_same_as_alone(model, ids, mask, monkeypatch)


def test_long_completions_of_a_short_prompt_are_left_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(99, (8, 400), generator=generator)
    ids[:, :4] = 7
    assert layout.layout(model_of("llama"), ids, torch.ones_like(ids, dtype=torch.bool)) is None


def test_rows_longer_than_a_sliding_window_are_left_alone() -> None:
    ids = torch.randint(99, (1, 20)).repeat(4, 1)
    ids[:, 15:] = torch.randint(99, (4, 5), generator=torch.Generator().manual_seed(0))
    assert layout.layout(model_of("gemma3"), ids, torch.ones_like(ids, dtype=torch.bool)) is None


def test_a_model_that_ignores_the_mask_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    trunk = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda attention_mask=None, **more: trunk(**more))
    assert layout.layout(model, *samples()) is None
    assert layout.layout(model_of("llama"), *samples()) is not None


def test_a_plan_keeps_the_rows_of_a_prompt_together() -> None:
    ids, mask = samples()
    asked = mask & (torch.arange(ids.shape[1]) >= torch.tensor([8, 8, 8, 7, 7, 6, 6, 6, 6])[:, None])
    plan = Batch(ids, mask, asked).plan(4)
    assert [part.tolist() for part in plan] == [[1, 0, 2, 4], [3, 5, 7, 6], [8]]
