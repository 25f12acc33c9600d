# SPDX-License-Identifier: Apache-2.0
"""linear_token_kl: the exact KL of two heads' distributions, from the hidden states of each, in pairs of tiles."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast import _dispatch
from rlhf_fast.ops import _check, codes
from rlhf_fast.ops._register import Derivative, define, define_backward, save, saved
from rlhf_fast.ops.linear.bundles import fake_on_bundles, flatten, gradients_of, on_bundles, schema, unflatten
from rlhf_fast.ops.linear.head import HeadGradients
from rlhf_fast.ops.linear.head_rows import HeadRows
from rlhf_fast.ops.linear.inputs import (
    CheckedHead,
    HeadGradientTensors,
    HeadTensors,
    LogitOptions,
    LoopOptions,
    Lora,
    Needs,
    buffer_elements,
    check_head,
    fake_gradients,
    needs_of,
    selected_rows,
    tile_dtype,
)
from rlhf_fast.ops.linear.pairs import Pair, pair_kl, pair_kl_backward
from rlhf_fast.ops.linear.row_selection import RowInputs, RowSelection, select_rows
from rlhf_fast.ops.linear.tiles import Tile, Tiles, rows_of_pair
from rlhf_fast.ops.logprob import check_row_options
from rlhf_fast.ops.reference import accumulate_dtype


class RefTensors(NamedTuple):
    """The reference's hidden states and head."""

    ref_hidden: Tensor  # (..., H')
    ref_weight: Tensor  # (V, H')
    ref_bias: Tensor | None  # (V,)


class Inputs(NamedTuple):
    head: HeadTensors
    ref: RefTensors
    rows: RowInputs
    row_temperature: Tensor | None  # (...)
    ref_row_temperature: Tensor | None  # (...)


class RefLogitOptions(NamedTuple):
    """As LogitOptions, of the reference."""

    ref_temperature: float
    ref_logit_scale: float
    ref_softcap: float


class Options(NamedTuple):
    loop: LoopOptions
    logits: LogitOptions
    ref_logits: RefLogitOptions
    kind: int  # of codes.KL_KINDS
    beta: float


class Outputs(NamedTuple):
    kl: Tensor  # (...)
    parts: Tensor  # (..., 6) what `token_kl` saves for its backward
    tiles: Tensor  # (elements,) the tiles that the budget keeps for the backward


class Gradients(NamedTuple):
    grad_kl: Tensor


class Saved(NamedTuple):
    parts: Tensor
    tiles: Tensor


class RefNeeds(NamedTuple):
    """Which of the RefTensors need a gradient."""

    ref_hidden: bool
    ref_weight: bool
    ref_bias: bool


class RefGradientTensors(NamedTuple):
    grad_ref_hidden: Tensor
    grad_ref_weight: Tensor
    grad_ref_bias: Tensor


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
    rows: Tensor | None = None,  # (R,)
    vocab_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    process_group: Any = None,
) -> Tensor:
    """`token_kl(hidden @ weight.T + bias, ref_hidden @ ref_weight.T + ref_bias, ...)` without the logits.

    Args:
        ref_hidden, ref_weight, ref_bias: of the reference; its width H' may differ from the policy's.
        lora: the policy's `(A, B, scale)`; this and mask, rows, logits_dtype and process_group are as for
            `linear_token_logprobs`.
        kind, beta, temperature, ref_temperature, vocab_size: as for `token_kl`.
        ref_logit_scale, ref_softcap: of the reference, None = the policy's; ref_softcap=0.0 = none.
        memory_budget: bytes of logits (of both) kept for the backward. One more pair of tiles is always needed, on CPU
            of at least 1024 rows if the budget allows, on CUDA of at most 256 MiB or one row.

    Returns:
        `(...)` float32 (float64 for float64). Differentiable in hidden, weight, bias and lora, and in the reference's
        tensors if they require grad.

    Raises:
        TypeError, ValueError: on a wrong dtype, shape, device or range, naming the argument.
    """
    op = "linear_token_kl"
    options = {"logits_dtype": logits_dtype, "memory_budget": memory_budget, "process_group": process_group}
    head = check_head(op, hidden, weight, bias, lora, **options)  # type: ignore[arg-type]
    ref = check_reference(op, head, ref_hidden, ref_weight, ref_bias, **options)  # type: ignore[arg-type]
    row_inputs, checked, padded = select_rows(op, mask, rows, head.tensors.hidden)
    kind_code = _check.choice(op, "kind", kind, codes.KL_KINDS)
    if not 0 < _check.number(op, "beta", beta) < 1:
        raise ValueError(f"rlhf_fast.{op}: beta must be strictly between 0 and 1, got {beta}")
    row_temperature, scalar, cap, columns = check_row_options(
        op, head.shape, head.vocabulary, temperature, softcap, checked, vocab_size, head.tensors.hidden
    )
    ref_row_temperature, ref_scalar = row_temperature, scalar
    if ref_temperature is not None:
        ref_row_temperature, ref_scalar = _check.temperature(
            op, "ref_temperature", ref_temperature, head.shape, head.tensors.hidden, checked
        )
    ref_scale = logit_scale if ref_logit_scale is None else ref_logit_scale
    ref_cap = cap if ref_softcap is None else _check.number(op, "ref_softcap", ref_softcap)
    if ref_cap != 0:  # 0: the reference has none, though the policy has one
        _check.positive_factor(op, "ref_softcap", ref_cap)
    needed = any(needs_of(head.tensors)) or any(needs_of(ref.tensors))
    loop_options = head.options._replace(
        vocab_size=columns, budget=head.options.budget if needed else 0, rows_padded=padded
    )
    scale = _check.factor(op, "logit_scale", logit_scale)
    ref_scale = _check.factor(op, "ref_logit_scale", ref_scale)
    outputs = _dispatch.select(op, head.tensors.hidden).linear_token_kl(*flatten(
        Inputs(head.tensors, ref_tensors(ref), row_inputs, row_temperature, ref_row_temperature),
        Options(
            loop_options, LogitOptions(scalar, scale, cap),
            RefLogitOptions(ref_scalar, ref_scale, float(ref_cap)), kind_code, float(beta),
        ),
    ))  # fmt: skip
    return Outputs(*outputs).kl


def check_reference(
    op: str, head: CheckedHead, ref_hidden: Tensor, ref_weight: Tensor, ref_bias: Tensor | None, **options: Any
) -> CheckedHead:
    """The reference's head, checked: rows, dtype and vocabulary must be those of the policy."""
    ref = check_head(op, ref_hidden, ref_weight, ref_bias, side="ref_", **options)
    hidden, ref_hidden = head.tensors.hidden, ref.tensors.hidden
    _check.same_dtype(op, "ref_hidden", ref_hidden, "hidden", hidden)
    _check.on_device(op, "ref_hidden", ref_hidden, "hidden", hidden)
    _check.shape_is(
        op, "ref_hidden", ref_hidden, (*head.shape, ref_hidden.shape[-1]), "the rows of hidden and its own H"
    )
    if ref.tensors.weight.shape[0] != head.tensors.weight.shape[0]:
        raise ValueError(
            f"rlhf_fast.{op}: ref_weight must have the vocabulary of weight, {head.tensors.weight.shape[0]} rows, "
            f"got {tuple(ref.tensors.weight.shape)}"
        )
    return ref


def ref_tensors(ref: CheckedHead) -> RefTensors:
    return RefTensors(ref.tensors.hidden, ref.tensors.weight, ref.tensors.bias)


# ----------------------------------------------------------------------------------------------- the two loops


class _Loop:
    """The selected rows of policy and reference, both heads, and pairs of tiles: the policy's, then the reference's."""

    def __init__(self, inputs: Inputs, options: Options) -> None:
        self.selection = RowSelection(inputs.head.hidden.shape[:-1], inputs.rows, options.loop.rows_padded)
        self.policy = HeadRows(inputs.head, options.loop, self.selection)
        self.ref = HeadRows(HeadTensors(*inputs.ref, lora_a=None, lora_b=None), options.loop, self.selection)
        self.policy_shaping = self.policy.shaping(inputs.row_temperature, options.logits)
        self.ref_shaping = self.policy.shaping(inputs.ref_row_temperature, LogitOptions(*options.ref_logits))
        self.budget = options.loop.budget
        self.kind, self.beta = options.kind, options.beta
        self.everything = slice(0, self.policy.columns)

    def buffer(self) -> Tensor:
        policy = self.policy
        elements = buffer_elements(self.selection.most, 2 * policy.vocabulary, policy.tile_dtype, self.budget)
        return policy.hidden.new_empty(elements, dtype=policy.tile_dtype)

    def tiles(self, buffer: Tensor) -> Tiles:
        policy, width = self.policy, 2 * self.policy.columns
        row_bytes = 2 * policy.block_columns * buffer.element_size()
        height = rows_of_pair(policy.count, row_bytes, buffer.device.type, self.budget)
        return Tiles(policy.count, width, buffer, height, max(1, width), whole_rows=True)

    def pair(self, tile: Tile, fill: bool) -> Pair:
        """Splits a tile into its pair; fill: compute the logits first."""
        policy, ref = tile.logits.view(-1).view(2, tile.rows.stop - tile.rows.start, self.policy.columns)
        if fill:
            self.policy.fill(policy, tile.rows, self.everything)
            self.ref.fill(ref, tile.rows, self.everything)
        return Pair(policy, ref, self.policy_shaping.at(tile.rows), self.ref_shaping.at(tile.rows))


def _forward(ops: Any, inputs: Inputs, options: Options) -> Outputs:
    hidden = inputs.head.hidden
    with torch.autocast(hidden.device.type, enabled=False):  # the caller cast already
        loop = _Loop(inputs, options)
        buffer = loop.buffer()
        kl = hidden.new_zeros(loop.policy.count, dtype=loop.policy.sum_dtype)
        parts = hidden.new_zeros((loop.policy.count, 6), dtype=loop.policy.sum_dtype)
        for tile in loop.tiles(buffer):
            pair = loop.pair(tile, True)
            kl[tile.rows], parts[tile.rows] = pair_kl(ops, pair, loop.kind, loop.beta, loop.policy.shard)
    return Outputs(loop.selection.put(kl), loop.selection.put(parts, (6,)), buffer)


def _backward_loop(
    ops: Any, grads: Gradients, inputs: Inputs, options: Options, stored: Saved, needs: Needs, ref_needs: RefNeeds
) -> tuple[Tensor, ...]:
    with torch.autocast(inputs.head.hidden.device.type, enabled=False):
        loop = _Loop(inputs, options)
        policy, ref = loop.policy, loop.ref
        grad_kl, parts = loop.selection.take(grads.grad_kl), loop.selection.take(stored.parts, (6,))
        assert grad_kl is not None and parts is not None
        tiles = loop.tiles(stored.tiles)
        ref_head_needs = Needs(*ref_needs, lora_a=False, lora_b=False)
        sums = HeadGradients(policy.head, policy.hidden, policy.low, needs, tiles.row_blocks)
        ref_sums = HeadGradients(ref.head, ref.hidden, None, ref_head_needs, tiles.row_blocks)
        for tile in tiles:
            pair = loop.pair(tile, not tile.in_buffer)
            grad, ref_grad = pair_kl_backward(
                ops, grad_kl[tile.rows], pair, loop.kind, loop.beta, parts[tile.rows], any(needs), any(ref_needs)
            )
            if any(needs):
                sums.add(grad, tile.rows, loop.everything)
            if any(ref_needs):
                ref_sums.add(ref_grad, tile.rows, loop.everything)
        gradients = sums.finish(policy.vocabulary, policy.shard.sum)
        ref_gradients = ref_sums.finish(ref.vocabulary, ref.shard.sum)
    grad_hidden = policy.put_hidden(gradients.grad_hidden) if needs.hidden else gradients.grad_hidden
    ref_hidden = ref.put_hidden(ref_gradients.grad_hidden) if ref_needs.ref_hidden else ref_gradients.grad_hidden
    return (*gradients._replace(grad_hidden=grad_hidden),
            *RefGradientTensors(ref_hidden, ref_gradients.grad_weight, ref_gradients.grad_bias))  # fmt: skip


# ----------------------------------------------------------------------------------------------- registration

BACKWARD_ARGUMENTS = (Gradients, Inputs, Options, Saved, Needs, RefNeeds)


def _fake(inputs: Inputs, options: Options) -> Outputs:
    hidden, weight = inputs.head.hidden, inputs.head.weight
    dtype, shape = accumulate_dtype(hidden.dtype), hidden.shape[:-1]
    tile = tile_dtype(hidden, options.loop.float_logits)
    rows = selected_rows(hidden, inputs.rows.row_index)
    elements = buffer_elements(rows, 2 * weight.shape[0], tile, options.loop.budget)
    return Outputs(
        hidden.new_empty(shape, dtype=dtype), hidden.new_empty((*shape, 6), dtype=dtype),
        hidden.new_empty(elements, dtype=tile),
    )  # fmt: skip


def _fake_backward(
    grads: Gradients, inputs: Inputs, options: Options, stored: Saved, needs: Needs, ref_needs: RefNeeds
) -> tuple[Tensor, ...]:
    return fake_gradients((*inputs.head, *inputs.ref), (*needs, *ref_needs))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, options = unflatten(inputs, Inputs, Options)
    outputs = Outputs(*output)
    ctx.mark_non_differentiable(outputs.parts, outputs.tiles)
    ctx.set_materialize_grads(False)
    save(ctx, *flatten(tensors, Saved(outputs.parts, outputs.tiles)))
    ctx.options = options


def _backward(ops: Any, ctx: Any, grad_kl: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_kl is None:
        return gradients_of([], [], Inputs, Options)
    inputs, stored = unflatten(saved(ctx), Inputs, Saved)
    needed, _ = unflatten(ctx.needs_input_grad, Inputs, Options)
    grads = ops.linear_token_kl_backward(*flatten(
        Gradients(grad_kl), inputs, ctx.options, stored, Needs(*needed.head), RefNeeds(*needed.ref)
    ))  # fmt: skip
    return gradients_of(grads, (*needed.head, *needed.ref), Inputs, Options)


define(
    "linear_token_kl", f"({schema(Inputs, Options)}) -> ({schema(Outputs)})",
    reference=on_bundles(_forward, Inputs, Options), fake=fake_on_bundles(_fake, Inputs, Options),
    derivative=Derivative(_setup_context, _backward),
)  # fmt: skip
define_backward(
    "linear_token_kl_backward",
    f"({schema(Gradients, Inputs, Options, Saved)}, {schema(Needs, RefNeeds, prefix='needs_')}) -> "
    f"({schema(HeadGradientTensors, RefGradientTensors)})",
    reference=on_bundles(_backward_loop, *BACKWARD_ARGUMENTS),
    fake=fake_on_bundles(_fake_backward, *BACKWARD_ARGUMENTS), of=("linear_token_kl",),
)  # fmt: skip
_dispatch.served_by("token_kl", "linear_token_kl")
