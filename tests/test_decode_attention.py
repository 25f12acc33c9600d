# SPDX-License-Identifier: Apache-2.0
"""Attention of one new token per row over a cache: the CPU kernel and its reference against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tools import native_is_built
from torch import Tensor, nn

import rlhf_fast as rf
from rlhf_fast.models import attention
from rlhf_fast.ops.decode_attention import decode_attention, has_decode_kernel

needs_native = pytest.mark.skipif(not native_is_built(), reason="extension not built")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def truth(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Head by head and row by row, in float64."""
    shared = query.shape[1] // key.shape[1]
    out = torch.zeros(*query.shape[:2], value.shape[3], dtype=torch.float64)
    for row in range(len(query)):
        seen = torch.ones(key.shape[2], dtype=torch.bool) if mask is None else mask[row]
        for head in range(query.shape[1]):
            keys, values = (x[row, head // shared, seen].double() for x in (key, value))
            if len(keys):
                out[row, head] = (scale * keys @ query[row, head].double()).softmax(0) @ values
    return out


def cache(rows: int, heads: int, length: int, size: int, dtype: torch.dtype) -> Tensor:
    """A view of a buffer with room, as the sampler's cache is; what is past its end is NaN."""
    buffer = torch.full((rows, heads, length + 5, size), torch.nan, dtype=dtype)
    buffer[:, :, :length] = torch.randn(rows, heads, length, size).to(dtype)
    return buffer[:, :, :length]


@pytest.mark.parametrize("namespace", ["rlhf_fast", "rlhf_fast_torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "key_heads"), [(9, 3), (4, 4), (14, 2), (5, 1)])
@pytest.mark.parametrize(("length", "size", "value_size"), [(1, 64, 64), (17, 80, 80), (130, 20, 37)])
def test_it_is_softmax_attention(
    namespace: str, dtype: torch.dtype, heads: int, key_heads: int, length: int, size: int, value_size: int
) -> None:
    torch.manual_seed(0)
    query = torch.randn(3, heads, size).to(dtype)
    key, value = cache(3, key_heads, length, size, dtype), cache(3, key_heads, length, value_size, dtype)
    mask = torch.rand(3, length) < 0.7
    mask[0], mask[1] = True, False  # all are seen; none is
    op = getattr(torch.ops, namespace).decode_attention
    for seen in (None, mask):
        wanted = truth(query, key, value, seen, 0.3)
        atol = 2e-6 if dtype == torch.float32 else 0.0
        rtol = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
        torch.testing.assert_close(op(query, key, value, seen, 0.3).double(), wanted, atol=atol + 2e-6, rtol=rtol)


@needs_native
def test_masked_keys_are_not_read_and_any_strides_are() -> None:
    torch.manual_seed(1)
    query, key, value = torch.randn(2, 6, 16), torch.randn(2, 7, 2, 16), torch.randn(2, 2, 16, 7)
    key, value = key.transpose(1, 2), value.transpose(2, 3)  # tokens before heads; a value's numbers lie apart
    mask = torch.tensor([False, False, True, True, True, True, True]).expand(2, -1)
    wanted = truth(query, key, value, mask, 0.25)
    key[:, :, :2], value[:, :, :2] = torch.nan, torch.inf
    torch.testing.assert_close(decode_attention(query, key, value, mask, 0.25).double(), wanted, atol=2e-6, rtol=0)


@needs_native
@pytest.mark.parametrize("length", [1, 5, 17])
def test_a_query_of_nan_gives_nan_however_many_keys_fill_the_last_vector(length: int) -> None:
    query, key = torch.randn(2, 3, 16), torch.randn(2, 1, length, 16)
    query[0, 1] = torch.nan
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[:, : length // 2] = False
    for seen in (None, mask):
        got = decode_attention(query, key, key, seen, 0.25)
        assert bool(got[0, 1].isnan().all()) and int(got.isnan().sum()) == 16


@needs_native
def test_wrong_sizes_raise_instead_of_reading_past_the_end() -> None:
    query, key = torch.randn(2, 6, 16), torch.randn(2, 2, 7, 16)
    wrong: list[Any] = [
        (query[:1], key, key, None),
        (query[:, :5], key, key, None),
        (query[..., :8], key, key, None),
        (query, key, key[:, :, :3], None),
        (query, key, key.bfloat16(), None),
        (query, key, key, torch.ones(2, 6, dtype=torch.bool)),
        (query, key, key, torch.ones(2, 7)),
    ]
    for arguments in wrong:
        with pytest.raises(RuntimeError, match="decode_attention"):
            decode_attention(*arguments, 1.0)


@needs_native
def test_attend_reads_one_new_token_by_the_kernel_and_agrees_with_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    assert has_decode_kernel(torch.zeros(1)) and not has_decode_kernel(torch.zeros(1, dtype=torch.float64))
    calls: list[Tensor | None] = []

    def recorded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        calls.append(mask)
        return decode_attention(query, key, value, mask, scale)

    monkeypatch.setattr(attention, "decode_attention", recorded)
    torch.manual_seed(2)
    module = nn.Module()
    module.num_key_value_groups = 3  # type: ignore[assignment]
    query, key, value = torch.randn(2, 6, 1, 16), cache(2, 2, 9, 16, torch.float32), cache(2, 2, 9, 16, torch.float32)
    mask = torch.rand(2, 1, 1, 9) < 0.6
    mask[..., -1] = True
    for seen in (None, mask, mask[:1]):
        for scaling in (None, 0.4):
            wanted, _ = sdpa_attention_forward(module, query, key, value, seen, scaling=scaling)
            got, _ = attention.attend(module, query, key, value, seen, scaling=scaling)
            torch.testing.assert_close(got, wanted, atol=2e-6, rtol=0)
    assert len(calls) == 6
    attention.attend(module, torch.randn(2, 6, 2, 16), key, value, None)  # two tokens
    attention.attend(module, query.clone().requires_grad_(), key, value, None)[0].sum().backward()  # a gradient
    learned = value.clone().requires_grad_()
    attention.attend(module, query, key, learned, None)[0].sum().backward()  # a gradient for the values alone
    assert learned.grad is not None and bool(learned.grad.any())
    attention.attend(module, query, key, value, torch.zeros(2, 1, 1, 9))  # a bias
    with rf.use_backend("torch"):
        attention.attend(module, query, key, value, None)
    assert len(calls) == 6


def test_values_of_another_dtype_are_left_to_pytorch() -> None:
    """Autocast multiplies the positions into query and key in float32, and leaves the values in bfloat16."""
    pytest.importorskip("transformers")
    query, key, value = torch.randn(2, 4, 1, 16), torch.randn(2, 4, 9, 16), torch.randn(2, 4, 9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = attention.attend(nn.Module(), query, key, value.bfloat16(), None)
    wanted = truth(query[:, :, 0], key, value.bfloat16(), None, 0.25)
    torch.testing.assert_close(got[:, 0].double(), wanted, atol=0.05, rtol=0)
