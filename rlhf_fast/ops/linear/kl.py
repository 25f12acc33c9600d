# SPDX-License-Identifier: Apache-2.0
"""linear_token_kl: the exact KL of two heads' laws, from the hidden states of each, a pair of tiles at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast import _dispatch
from rlhf_fast.ops import _check, codes
from rlhf_fast.ops._register import define, define_backward, save, saved
from rlhf_fast.ops.linear.head import Head, HeadGradients, Needs
from rlhf_fast.ops.linear.inputs import HEAD, HEAD_GRADIENTS, NEEDS, Lora, check_head, fake_gradients, tile_dtype
from rlhf_fast.ops.linear.pairs import pair_kl, pair_kl_backward
from rlhf_fast.ops.linear.rows import Rows
from rlhf_fast.ops.linear.shards import Shard
from rlhf_fast.ops.linear.slices import RowOptions
from rlhf_fast.ops.linear.tiles import Tile, Tiles, kept_elements, whole_rows
from rlhf_fast.ops.logprob import check_row_options
from rlhf_fast.ops.reference import accumulate_dtype


def linear_token_kl(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    ref_hidden: Tensor,  # (..., H')
    ref_weight: Tensor,  # (V, H')
    *,
    bias: Tensor | None = None,  # (V,)
    ref_bias: Tensor | None = None,  # (V,)
    lora: Lora | None = None,
    kind: str = "reverse",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    ref_temperature: float | Tensor | None = None,
    logit_scale: float = 1.0,
    ref_logit_scale: float | None = None,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    mask: Tensor | None = None,  # (...)
    vocab_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    process_group: Any = None,
) -> Tensor:
    """`token_kl(hidden @ weight.T + bias, ref_hidden @ ref_weight.T + ref_bias, ...)` without the logits.

    Args:
        ref_hidden, ref_weight, ref_bias: the reference's; its width H' may differ from the policy's.
        lora: the policy's `(A, B, scale)`, as for `linear_token_logprobs`; as are mask, logits_dtype and process_group.
        kind, beta, temperature, ref_temperature, vocab_size: as for `token_kl`.
        ref_logit_scale, ref_softcap: the reference's own, None = the policy's; ref_softcap=0.0 = none.
        memory_budget: bytes of logits (of both) kept for the backward. At any time there is one pair of tiles, of at
            least 256 rows if the budget has room for them.

    Returns:
        `(...)` float32 (float64 for float64). Differentiable in hidden, weight, bias and lora, and in the reference's
        tensors if they require grad.
    """
    op = "linear_token_kl"
    options = {"logits_dtype": logits_dtype, "memory_budget": memory_budget, "process_group": process_group}
    head = check_head(op, hidden, weight, bias, lora, **options)  # type: ignore[arg-type]
    ref = check_head(op, ref_hidden, ref_weight, ref_bias, side="ref_", **options)  # type: ignore[arg-type]
    _check.same_dtype(op, "ref_hidden", ref.hidden, "hidden", head.hidden)
    _check.on_device(op, "ref_hidden", ref.hidden, "hidden", head.hidden)
    rows = head.hidden.shape[:-1]
    _check.shape_is(op, "ref_hidden", ref.hidden, (*rows, ref.hidden.shape[-1]), "the rows of hidden and its own H")
    if ref.weight.shape[0] != head.weight.shape[0]:
        raise ValueError(
            f"rlhf_fast.{op}: ref_weight must have the vocabulary of weight, {head.weight.shape[0]} rows, "
            f"got {tuple(ref.weight.shape)}"
        )
    kind_code = _check.choice(op, "kind", kind, codes.KL_KINDS)
    if not 0 < beta < 1:
        raise ValueError(f"rlhf_fast.{op}: beta must be strictly between 0 and 1, got {beta}")
    row_temperature, scalar, cap, columns = check_row_options(
        op, rows, head.vocabulary, temperature, softcap, mask, vocab_size, head.hidden
    )
    ref_row_temperature, ref_scalar = row_temperature, scalar
    if ref_temperature is not None:
        ref_row_temperature, ref_scalar = _check.temperature(
            op, "ref_temperature", ref_temperature, rows, head.hidden, mask
        )
    ref_scale = logit_scale if ref_logit_scale is None else ref_logit_scale
    ref_cap = cap if ref_softcap is None else ref_softcap and _check.positive(op, "ref_softcap", ref_softcap)
    kl, _, _ = _dispatch.select(op, head.hidden).linear_token_kl(
        *head.tensors, *ref.tensors[:3], mask, row_temperature, ref_row_temperature, head.lora_scale, scalar,
        ref_scalar, float(logit_scale), float(ref_scale), cap, float(ref_cap), columns, head.float_logits, head.group,
        kind_code, float(beta), max(head.budget, ref.budget),
    )  # fmt: skip
    return kl


# ----------------------------------------------------------------------------------------------- the two loops


class _Loop:
    """The real rows of both sides, both heads, and their tiles side by side: policy's, then reference's."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None,
        ref_hidden: Tensor, ref_weight: Tensor, ref_bias: Tensor | None, mask: Tensor | None,
        row_temperature: Tensor | None, ref_row_temperature: Tensor | None, lora_scale: float, temperature: float,
        ref_temperature: float, logit_scale: float, ref_logit_scale: float, softcap: float, ref_softcap: float,
        vocab_size: int, float_logits: bool, group: int, kind: int, beta: float,
    ) -> None:  # fmt: skip
        self.rows = Rows(hidden.shape[:-1], mask)
        take = self.rows.take
        self.shard = Shard(group, weight.shape[0])
        columns = self.shard.counting(vocab_size)
        self.head = Head(weight, bias, lora_a, lora_b, lora_scale).first(columns)
        self.ref_head = Head(ref_weight, ref_bias, None, None, 0.0).first(columns)
        taken, ref_taken = take(hidden, (hidden.shape[-1],)), take(ref_hidden, (ref_hidden.shape[-1],))
        assert taken is not None and ref_taken is not None
        self.hidden, self.ref_hidden, self.low = taken, ref_taken, self.head.low_rank(taken)
        self.options = RowOptions(take(row_temperature, (), 1), temperature, logit_scale, softcap)
        self.ref_options = RowOptions(take(ref_row_temperature, (), 1), ref_temperature, ref_logit_scale, ref_softcap)
        self.kind, self.beta = kind, beta
        self.dtype = accumulate_dtype(hidden.dtype)

    def tiles(self, kept: Tensor, budget: int) -> Tiles:
        width = 2 * self.head.weight.shape[0]
        height = whole_rows(self.rows.real, width * kept.element_size(), 0, kept.device.type, budget)
        return Tiles(self.rows.real, width, kept, height, max(1, width))

    def pair(self, tile: Tile, fill: bool) -> tuple[Tensor, Tensor]:
        """The two tiles in one."""
        half = tile.logits.shape[1] // 2
        tiles = tile.logits.view(-1).view(2, -1, half)
        if fill:
            rows, everything = tile.rows, slice(0, half)
            self.head.fill(tiles[0], self.hidden[rows], None if self.low is None else self.low[rows], everything)
            self.ref_head.fill(tiles[1], self.ref_hidden[rows], None, everything)
        return tiles[0], tiles[1]


def _reference(ops: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, budget = args
    hidden, weight = inputs[0], inputs[1]
    with torch.autocast(hidden.device.type, enabled=False):  # the caller cast already
        loop = _Loop(*inputs)
        dtype = tile_dtype(hidden, inputs[19])
        elements = kept_elements(loop.rows.count, 2 * weight.shape[0], dtype.itemsize, budget)
        kept = hidden.new_empty(elements, dtype=dtype)
        kl = hidden.new_zeros(loop.rows.real, dtype=loop.dtype)
        parts = hidden.new_zeros((loop.rows.real, 6), dtype=loop.dtype)
        for tile in loop.tiles(kept, budget):
            pair = loop.pair(tile, True)
            options, ref_options = loop.options.at(tile.rows), loop.ref_options.at(tile.rows)
            kl[tile.rows], parts[tile.rows] = pair_kl(
                ops, *pair, options, ref_options, loop.kind, loop.beta, loop.shard
            )
    return loop.rows.put(kl), loop.rows.put(parts, (6,)), kept


def _reference_backward(ops: Any, grad_kl: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *inputs, parts, kept, budget = args[:-8]
    needs, ref_needs = Needs(*args[-8:-3]), Needs(args[-3], args[-2], args[-1], False, False)
    hidden, weight, ref_hidden = inputs[0], inputs[1], inputs[5]
    with torch.autocast(hidden.device.type, enabled=False):
        loop = _Loop(*inputs)
        taken_grad, taken_parts = loop.rows.take(grad_kl), loop.rows.take(parts, (6,))
        assert taken_grad is not None and taken_parts is not None
        tiles = loop.tiles(kept, budget)
        sums = HeadGradients(loop.head, loop.hidden, loop.low, needs, tiles.row_blocks)
        ref_sums = HeadGradients(loop.ref_head, loop.ref_hidden, None, ref_needs, tiles.row_blocks)
        everything = slice(0, loop.head.weight.shape[0])
        for tile in tiles:
            pair = loop.pair(tile, not tile.kept)
            options, ref_options = loop.options.at(tile.rows), loop.ref_options.at(tile.rows)
            grad, ref_grad = pair_kl_backward(
                ops, taken_grad[tile.rows], *pair, options, ref_options, loop.kind, loop.beta,
                taken_parts[tile.rows], any(needs), any(ref_needs),
            )  # fmt: skip
            if any(needs):
                sums.add(grad, tile.rows, everything)
            if any(ref_needs):
                ref_sums.add(ref_grad, tile.rows, everything)
        vocabulary, over_ranks = weight.shape[0], loop.shard.sum
        grads, ref_grads = sums.finish(vocabulary, over_ranks), ref_sums.finish(vocabulary, over_ranks)
    hidden_grad = loop.rows.put(grads[0], (hidden.shape[-1],)) if needs.hidden else grads[0]
    ref_hidden_grad = loop.rows.put(ref_grads[0], (ref_hidden.shape[-1],)) if ref_needs.hidden else ref_grads[0]
    return (hidden_grad, *grads[1:], ref_hidden_grad, *ref_grads[1:3])


# ----------------------------------------------------------------------------------------------- registration

INPUTS = (
    f"Tensor hidden, {HEAD}, Tensor ref_hidden, Tensor ref_weight, Tensor? ref_bias, Tensor? mask, "
    "Tensor? row_temperature, Tensor? ref_row_temperature, float lora_scale, float temperature, "
    "float ref_temperature, float logit_scale, float ref_logit_scale, float softcap, float ref_softcap, "
    "int vocab_size, bool float_logits, int group, int kind, float beta"
)
REF_NEEDS = "bool needs_ref_hidden, bool needs_ref_weight, bool needs_ref_bias"
TENSORS = 11  # of the inputs


def _fake(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype, rows = accumulate_dtype(hidden.dtype), hidden.shape[:-1]
    tile = tile_dtype(hidden, rest[-5])
    elements = torch.sym_min(rows.numel() * 2 * weight.shape[0], rest[-1] // tile.itemsize)
    return (
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty((*rows, 6), dtype=dtype),
        hidden.new_empty(elements, dtype=tile),
    )


def _fake_backward(grad_kl: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return fake_gradients(args[:8], args[-8:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    save(ctx, *inputs[:TENSORS], *output[1:])
    ctx.options = inputs[TENSORS:]


def _backward(ops: Any, ctx: Any, grad_kl: Tensor | None, *_: Any) -> tuple[Any, ...]:
    nothing = (None,) * (TENSORS - 8 + len(ctx.options))
    if grad_kl is None:
        return (None,) * 8 + nothing
    *inputs, parts, kept = saved(ctx, "linear_token_kl")
    *options, budget = ctx.options
    wanted = ctx.needs_input_grad[:8]
    grads = ops.linear_token_kl_backward(grad_kl, *inputs, *options, parts, kept, budget, *wanted)
    return (*(g if w else None for g, w in zip(grads, wanted, strict=True)), *nothing)


define(
    "linear_token_kl", f"({INPUTS}, int budget) -> (Tensor kl, Tensor parts, Tensor kept)",
    reference=_reference, fake=_fake, setup_context=_setup_context, backward=_backward,
)  # fmt: skip
define_backward(
    "linear_token_kl_backward",
    f"(Tensor grad_kl, {INPUTS}, Tensor parts, Tensor kept, int budget, {NEEDS}, {REF_NEEDS}) -> ({HEAD_GRADIENTS}, "
    "Tensor ref_hidden, Tensor ref_weight, Tensor ref_bias)",
    reference=_reference_backward, fake=_fake_backward, of="linear_token_kl",
)  # fmt: skip
