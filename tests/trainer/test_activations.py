# SPDX-License-Identifier: Apache-2.0
"""Activations in CPU memory or recomputed: losses and gradients are the same, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.offloads import is_weight_of, moved_to_host
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from rlhf_fast.models import activations
from rlhf_fast.models.batches import Batch
from rlhf_fast.models.heads import token_logprobs, token_values
from rlhf_fast.models.loading import load_causal_lm, load_reward_model, make_critic
from rlhf_fast.models.lora import add_lora


def batch(padded: str) -> Batch:
    """Rows of several lengths: padded on one side, or prompts that share a beginning."""
    ids = torch.randint(5, 33, (4, 24), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([24, 20, 9, 24])[:, None]
    places = torch.arange(24)
    attended = places < lengths if padded == "right" else places >= 24 - lengths
    if padded == "shared":
        ids, attended = ids[:1].repeat(4, 1), torch.ones(4, 24, dtype=torch.bool)
        ids[:, 20:] = torch.arange(16).view(4, 4) + 9
    return Batch(ids, attended, attended & (attended.cumsum(1) > 2))


def gradients(model: Any, given: Batch, made: Any, autocast: bool) -> list[Tensor]:
    """The loss, and the gradient of each trained weight."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # as SFT does
        loss = (made(model, given) * torch.linspace(-1, 1, given.input_ids.shape[1])).sum()
    loss.backward()
    found = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad()
    return found


@pytest.mark.parametrize("kind", ["policy", "critic", "adapters"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "autocast"])
def test_loss_and_gradients_are_the_same_bit_for_bit(kind: str, dtype: str, tiny: Path) -> None:
    autocast = dtype == "autocast"
    if autocast:
        dtype = "bfloat16" if kind == "adapters" else "float32"  # frozen weights are not cast
    if kind == "critic":
        model = make_critic(load_reward_model(str(tiny / "model"), dtype, new_head=True))
    else:
        model = load_causal_lm(str(tiny / "model"), dtype)
    if kind == "adapters":
        add_lora(model, 4)
    made = token_values if kind == "critic" else token_logprobs
    model.train()
    with moved_to_host(least=16) as moved:
        wanted = {padded: gradients(model, batch(padded), made, autocast) for padded in ("left", "right", "shared")}
        assert not moved
        activations.offload_activations(model)
        counts = []
        for recompute in (False, True):
            if recompute:
                activations.checkpoint_activations(model)
            for padded, expected in wanted.items():
                moved.clear()
                found = gradients(model, batch(padded), made, autocast)
                assert len(found) == len(expected) > 5
                assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)), padded
                counts.append(sum(x.numel() for x, _ in moved))
                places = {p.data_ptr() for p in model.parameters()}
                assert moved and not any(x.data_ptr() in places for x, _ in moved)  # weights stay
                assert not any(is_weight_of(model, x) for x, _ in moved)  # and what autocast makes of them
        assert all(recomputed < kept / 4 for kept, recomputed in zip(counts[:3], counts[3:], strict=True))
        with torch.no_grad():
            moved.clear()
            made(model, batch("left"))
            assert not moved


def test_strides_survive() -> None:
    """A backward on another memory layout could round differently."""
    tensor = torch.randn(64, 64).t()
    kept = activations.ToHost().pack(tensor)
    assert isinstance(kept, tuple) and kept[1].data_ptr() != tensor.data_ptr()
    back = activations.to_device(kept)
    assert torch.equal(back, tensor) and back.stride() == tensor.stride()


def copy_by(host: activations.ToHost, saved: Tensor) -> Tensor:
    kept = host.pack(saved)
    assert isinstance(kept, tuple) and torch.equal(kept[1], saved)
    return kept[1]


def test_what_is_saved_twice_is_copied_once_until_it_changes() -> None:
    host = activations.ToHost()
    tensor, others = torch.randn(64, 64), [torch.randn(64, 64) for _ in range(9)]
    first = copy_by(host, tensor)
    assert all(copy_by(host, other) is not first for other in others) and copy_by(host, tensor) is first
    for view in (tensor.t(), tensor[:32], tensor[32:], tensor.view(torch.int32)):
        assert copy_by(host, view) is not first
    tensor.add_(1)
    changed = copy_by(host, tensor)
    assert changed is not first and copy_by(host, tensor) is changed


def test_memory_on_the_device_is_free_again_and_nothing_else_in_it_is_taken_for_what_was_there() -> None:
    host = activations.ToHost()
    for _ in range(50):
        tensor = torch.randn(64, 64)
        copy_by(host, tensor)
        storage = StorageWeakRef(tensor.untyped_storage())
        del tensor
        assert storage.expired()


def test_expanded_tensors_stay() -> None:
    """A copy of a mask of one head would be as large as those of all heads."""
    mask = torch.randn(2, 1, 32, 32).expand(2, 8, 32, 32)
    assert activations.ToHost().pack(mask) is mask
    one_head = torch.randn(32, 32).expand(1, 1, 32, 32)  # expands nothing
    copy_by(activations.ToHost(), one_head)
