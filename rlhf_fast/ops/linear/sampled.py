# SPDX-License-Identifier: Apache-2.0
"""linear_sampled_logprobs: log-probs under top-k or top-p sampling, computed from the kept ids only.

Sampling from the k best tokens is sampling from the softmax over these k. Its log-probability needs k rows of the
weight, not V: rows of hidden are sorted by how many ids they keep; blocks of them gather their rows of the weight,
multiply, and reduce the (n, k) logits, padded with -inf, like any other tile. If a block keeps more than V / 192 ids a
row, it multiplies by the whole weight, which is then faster than gathering.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
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
    HeadGradientTensors,
    HeadTensors,
    LogitOptions,
    LoopOptions,
    Lora,
    Needs,
    check_head,
    fake_gradients,
)
from rlhf_fast.ops.linear.row_selection import RowInputs, RowSelection, row_count, select_rows
from rlhf_fast.ops.linear.slices import RowGradients, Slices, fold
from rlhf_fast.ops.linear.tiles import CPU_ROW_TILE, GPU_TILE
from rlhf_fast.ops.logprob import check_row_options, check_targets
from rlhf_fast.ops.reference import accumulate_dtype
from rlhf_fast.ops.reference.logprob import shape_logits

# A block that keeps more than V / DENSE_FROM ids a row multiplies by the whole weight. Measured on two busy Zen 4
# threads, 256 x 576 x 49152, forward alone and with its backward; gathering takes, relative to the whole product:
#     128 ids  1/3 to 1/2 in float32, 2/3 to 4/5 in bfloat16      256 ids  2/3 to 3/4 in float32, all of it in bfloat16
#     512 ids  1.1 to 1.4 times it in float32, 2.6 in bfloat16
DENSE_FROM = 192


class Inputs(NamedTuple):
    head: HeadTensors
    targets: Tensor  # (...)
    support_ids: Tensor  # (total,)
    support_offsets: Tensor  # (N + 1,)
    rows: RowInputs
    row_temperature: Tensor | None  # (...)


class Options(NamedTuple):
    loop: LoopOptions
    logits: LogitOptions


class Outputs(NamedTuple):
    logprobs: Tensor  # (...)
    parts: Tensor  # (N, 2): row max and log-sum over the kept ids


class Gradients(NamedTuple):
    grad_logprobs: Tensor


class Saved(NamedTuple):
    parts: Tensor


def linear_sampled_logprobs(
    hidden: Tensor,  # (..., H), N rows
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (...)
    support_ids: Tensor,  # (total,)
    support_offsets: Tensor,  # (N + 1,)
    *,
    bias: Tensor | None = None,  # (V,)
    lora: Lora | None = None,  # A (r, H), B (V, r), scale
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,  # (...)
    rows: Tensor | None = None,  # (R,)
    logits_dtype: torch.dtype | None = None,
    process_group: Any = None,
) -> Tensor:
    """log softmax of the logits at each row's kept ids, read at its target.

    Args:
        hidden, weight, bias, lora, temperature, logit_scale, softcap, mask, rows, logits_dtype, process_group: as for
            `linear_token_logprobs`.
        targets: int64, each among the kept ids of its row; any value at masked rows.
        support_ids, support_offsets: int64 or int32; row n keeps support_ids[support_offsets[n]:support_offsets[n+1]],
            distinct ids in any order. The host reads the offsets, so it waits for a GPU once.

    Returns:
        `(...)` float32 (float64 for float64), differentiable in hidden, weight, bias, A and B. A target outside its
        support raises ValueError on CPU; on a GPU it gives -inf and no gradient.

    Raises:
        TypeError, ValueError: on a wrong dtype, shape, device or range, naming the argument.
    """
    op = "linear_sampled_logprobs"
    head = check_head(op, hidden, weight, bias, lora, logits_dtype, process_group=process_group)
    row_inputs, checked, padded = select_rows(op, mask, rows, head.tensors.hidden)
    row_temperature, scalar, cap, _ = check_row_options(
        op, head.shape, head.vocabulary, temperature, softcap, checked, None, head.tensors.hidden
    )
    check_targets(op, targets, head.shape, head.vocabulary, checked, head.tensors.hidden)
    _check.shape_is(op, "targets", targets, head.shape, "the rows of hidden")
    scale = _check.factor(op, "logit_scale", logit_scale)
    _check_support(op, support_ids, support_offsets, targets, checked, head.vocabulary)
    inputs = Inputs(head.tensors, targets, support_ids, support_offsets, row_inputs, row_temperature)
    options = Options(
        head.options._replace(rows_padded=padded),
        LogitOptions(scalar, scale, cap),
    )
    return Outputs(
        *_dispatch.select(op, head.tensors.hidden).linear_sampled_logprobs(*flatten(inputs, options))
    ).logprobs


def _check_support(
    op: str, ids: Tensor, offsets: Tensor, targets: Tensor, mask: Tensor | None, vocabulary: int
) -> None:
    for name, x in (("support_ids", ids), ("support_offsets", offsets)):
        if not isinstance(x, Tensor) or x.dtype not in (torch.int64, torch.int32):
            came = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"rlhf_fast.{op}: {name} must be an int64 or int32 tensor, got {came}")
        _check.on_device(op, name, x, "targets", targets)
    if ids.dim() != 1:
        raise ValueError(f"rlhf_fast.{op}: support_ids must have one dimension, got {tuple(ids.shape)}")
    _check.shape_is(op, "support_offsets", offsets, (targets.numel() + 1,), "the rows and one more")
    if not (_check.can_look(ids) and _check.can_look(offsets) and _check.can_look(targets)):
        return
    counts = offsets.diff()
    if int(offsets[0]) != 0 or int(offsets[-1]) != ids.numel() or bool((counts < 0).any()):
        raise ValueError(
            f"rlhf_fast.{op}: support_offsets must rise from 0 to the {ids.numel()} support_ids, got "
            f"{offsets.tolist() if offsets.numel() <= 8 else [*offsets[:4].tolist(), '...', *offsets[-2:].tolist()]}"
        )
    if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < vocabulary):
        bad = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise ValueError(f"rlhf_fast.{op}: support_ids must be between 0 and {vocabulary - 1}, got {bad}")
    device = ids.device
    row = torch.repeat_interleave(torch.arange(targets.numel(), device=device), counts.long())
    has_target = torch.zeros(targets.numel(), dtype=torch.bool, device=device) if mask is None else ~mask.reshape(-1)
    has_target[row[ids == targets.reshape(-1)[row]]] = True
    if not bool(has_target.all()):
        lacking = int((~has_target).nonzero()[0])
        raise ValueError(
            f"rlhf_fast.{op}: support_ids must hold each row's target, got a row {lacking} without its target "
            f"{int(targets.reshape(-1)[lacking])}"
        )


# ----------------------------------------------------------------------------------------------- the two loops


class _Block(NamedTuple):
    """Rows with similar numbers of kept ids, padded to the largest number."""

    rows: slice
    ids: Tensor  # (n, K) as columns of this rank, 0 where not here
    here: Tensor  # (n, K) bool: neither padding nor on another rank
    target: Tensor  # (n, 1) index of the target among the K
    target_here: Tensor  # (n, 1)
    found: Tensor  # (n,) the target is in the support, on any rank
    dense: bool


class _Loop(HeadRows):
    """The selected rows, sorted by how many ids they keep, in blocks."""

    def __init__(self, inputs: Inputs, options: Options) -> None:
        offsets = inputs.support_offsets.long()
        self.order = _by_support(offsets.diff(), inputs.rows, options.loop.rows_padded)
        shape = inputs.head.hidden.shape[:-1]
        super().__init__(inputs.head, options.loop, RowSelection(shape, RowInputs(None, self.order), False))
        self.begin, self.end = offsets[:-1][self.order], offsets[1:][self.order]
        self.ids = inputs.support_ids.long()
        targets = self.selection.take(inputs.targets)
        assert targets is not None
        self.targets = targets.unsqueeze(-1)
        # Scale and cap are applied by `logits`, before the ids elsewhere become -inf.
        self.row_shaping = self.shaping(inputs.row_temperature, LogitOptions(options.logits.temperature, 1.0, 0.0))
        self.logit_scale, self.softcap = options.logits.logit_scale, options.logits.softcap

    def blocks(self) -> Iterator[_Block]:
        sizes = (self.end - self.begin).tolist()
        columns, width = self.head.weight.shape
        limit = (CPU_ROW_TILE if self.hidden.device.type == "cpu" else GPU_TILE) // self.hidden.element_size()
        start = 0
        for stop in range(1, len(sizes) + 1):
            dense = sizes[stop - 1] * DENSE_FROM > columns
            following = sizes[min(stop, len(sizes) - 1)]
            full = (stop + 1 - start) * (columns if dense else following * width) > limit
            if stop == len(sizes) or full or dense != (following * DENSE_FROM > columns):
                yield self._block(slice(start, stop), max(1, sizes[stop - 1]), dense)
                start = stop

    def _block(self, rows: slice, most: int, dense: bool) -> _Block:
        place = self.begin[rows].unsqueeze(-1) + torch.arange(most, device=self.begin.device)
        real = place < self.end[rows].unsqueeze(-1)
        ids = self.ids[torch.where(real, place, 0)] if self.ids.numel() else torch.zeros_like(place)
        is_target = (ids == self.targets[rows]) & real
        local = ids - self.shard.first
        here = real & (local >= 0) & (local < self.shard.columns)
        at_target = is_target & here
        target = at_target.long().argmax(-1, keepdim=True)
        any_here = at_target.any(-1, keepdim=True)
        return _Block(rows, torch.where(here, local, 0), here, target, any_here, is_target.any(-1), dense)

    def logits(self, block: _Block) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits (n, K) for the softmax, their derivative in the raw logits, and the gathered weight rows (n, K, H)."""
        hidden, gathered = self.hidden[block.rows], None
        if block.dense:
            tile = hidden.new_empty((hidden.shape[0], self.shard.columns), dtype=self.tile_dtype)
            raw = self.fill(tile, block.rows, slice(0, self.shard.columns)).gather(1, block.ids)
        else:
            gathered = self.head.weight.index_select(0, block.ids.view(-1)).view(*block.ids.shape, -1)
            raw = self._dots(gathered, hidden)
            raw = raw if self.head.bias is None else raw + self.head.bias[block.ids]
            if self.low is not None:
                assert self.head.lora_b is not None
                raw = raw + self._dots(self.head.lora_b[block.ids], self.low[block.rows])
        shaped = shape_logits(raw, None, 1.0, self.logit_scale, self.softcap, -1)
        return shaped.z.masked_fill(~block.here, -torch.inf).contiguous(), shaped.slope, gathered

    def _dots(self, of: Tensor, hidden: Tensor) -> Tensor:
        """(n, K, H) and (n, H) -> (n, K)"""
        return torch.bmm(of.to(self.tile_dtype), hidden.to(self.tile_dtype).unsqueeze(-1)).squeeze(-1)


def _by_support(counts: Tensor, rows: RowInputs, padded: bool) -> Tensor:
    """The selected rows, sorted by how many ids they keep."""
    if rows.row_index is not None:
        index = rows.row_index[rows.row_index >= 0] if padded else rows.row_index
        return index[counts[index].argsort(stable=True)]
    order = counts.argsort(stable=True)
    return order if rows.mask is None else order[rows.mask.reshape(-1)[order]]


def _forward(ops: Any, inputs: Inputs, options: Options) -> Outputs:
    hidden = inputs.head.hidden
    with torch.autocast(hidden.device.type, enabled=False):  # the caller cast already
        loop = _Loop(inputs, options)
        logprobs = hidden.new_empty(loop.count, dtype=loop.sum_dtype)
        parts = hidden.new_empty((loop.count, 2), dtype=loop.sum_dtype)
        for block in loop.blocks():
            z, _, _ = loop.logits(block)
            shaping = loop.row_shaping.at(block.rows)
            slices = Slices.empty(1, z.shape[0], 1, codes.LOGPROBS, z, loop.sum_dtype)
            everything = slice(0, z.shape[0])
            fold(ops, slices, 0, everything, z, block.target, block.target_here, shaping, codes.LOGPROBS, 0)
            merged = loop.shard.merge(slices, shaping.factor)
            stats = merged.row_statistics(shaping.factor, loop.sum_dtype, codes.LOGPROBS)
            assert stats.logprobs is not None
            logprobs[block.rows] = torch.where(block.found, stats.logprobs.squeeze(-1), -torch.inf)
            parts[block.rows] = stats.parts
        everywhere = loop.selection.put(parts, (2,)).view(loop.selection.count, 2)
    return Outputs(loop.selection.put(logprobs), everywhere)


def _backward_loop(
    ops: Any, grads: Gradients, inputs: Inputs, options: Options, stored: Saved, needs: Needs
) -> HeadGradientTensors:
    with torch.autocast(inputs.head.hidden.device.type, enabled=False):
        loop = _Loop(inputs, options)
        sums = HeadGradients(loop.head, loop.hidden, loop.low, needs, row_blocks=2)  # 2: nothing is complete at once
        entries: list[_Entries] = []
        given, sorted_parts = loop.selection.take(grads.grad_logprobs), stored.parts[loop.order]
        assert given is not None
        for block in loop.blocks():
            z, slope, gathered = loop.logits(block)
            wanted = torch.where(block.found, given[block.rows], 0.0).unsqueeze(-1)
            gradients = RowGradients(wanted, None, None, None, None, sorted_parts[block.rows])
            everything = slice(0, z.shape[0])
            gradients.turn(ops, z, everything, block.target, block.target_here, loop.row_shaping.at(block.rows))
            grad = z.mul_(slope).masked_fill_(~block.here, 0)
            if gathered is None:
                tile = grad.new_zeros((z.shape[0], loop.shard.columns)).scatter_add_(1, block.ids, grad)
                sums.add(tile, block.rows, slice(0, loop.shard.columns))
            else:
                entries.append(_add_rows(sums, block, grad, gathered))
        _add_entries(sums, entries)
        result = sums.finish(loop.vocabulary, loop.shard.sum)
    return result._replace(grad_hidden=loop.put_hidden(result.grad_hidden) if needs.hidden else result.grad_hidden)


class _Entries(NamedTuple):
    """Gradients of gathered logits, one for each kept id."""

    ids: Tensor
    rows: Tensor
    grads: Tensor


def _add_rows(sums: HeadGradients, block: _Block, grad: Tensor, gathered: Tensor) -> _Entries:
    """Adds a gathered block's gradient of hidden; returns its entries of the sparse gradient of the weight."""
    rows, narrow = block.rows, grad.to(sums.of.dtype).unsqueeze(1)
    if sums.needs.hidden:
        sums.hidden[rows] = torch.bmm(narrow, gathered).squeeze(1).to(sums.hidden.dtype)
    if sums.low_grad.numel():
        assert sums.head.lora_b is not None
        sums.low_grad[rows] = torch.bmm(narrow, sums.head.lora_b[block.ids]).squeeze(1).to(sums.low_grad.dtype)
    row = torch.arange(rows.start, rows.stop, device=grad.device).unsqueeze(-1).expand_as(grad)
    return _Entries(block.ids[block.here], row[block.here], grad[block.here])


def _add_entries(sums: HeadGradients, entries: list[_Entries]) -> None:
    """The weight's gradient is a sparse (V, N) matrix times hidden, sorted by id: no atomics, one order."""
    needs, low, vocabulary = sums.needs, sums.low, sums.head.weight.shape[0]
    if not entries or not (needs.weight or needs.bias or needs.lora_b):
        return
    ids, rows, grads = (torch.cat(x) for x in zip(*entries, strict=True))
    if needs.bias:
        sums.bias.index_put_((ids,), grads.to(sums.bias.dtype), accumulate=True)
    if not (needs.weight or needs.lora_b) or not ids.numel():
        return
    order = ids.argsort(stable=True)
    begins = torch.searchsorted(ids[order], torch.arange(vocabulary + 1, device=ids.device))
    with warnings.catch_warnings():  # PyTorch calls its sparse CSR tensors a beta
        warnings.simplefilter("ignore", UserWarning)
        sparse = torch.sparse_csr_tensor(begins, rows[order], grads[order], size=(vocabulary, sums.of.shape[0]))
        if needs.weight:
            total = sums.weight_sum(slice(0, vocabulary))
            total += sparse @ sums.of.to(grads.dtype)
        if needs.lora_b and low is not None:
            sums.lora_b += sparse @ low.to(grads.dtype)


# ----------------------------------------------------------------------------------------------- registration

BACKWARD_ARGUMENTS = (Gradients, Inputs, Options, Saved, Needs)


def _fake(inputs: Inputs, options: Options) -> Outputs:
    hidden = inputs.head.hidden
    dtype = accumulate_dtype(hidden.dtype)
    return Outputs(
        hidden.new_empty(hidden.shape[:-1], dtype=dtype), hidden.new_empty((row_count(hidden), 2), dtype=dtype)
    )


def _fake_backward(
    grads: Gradients, inputs: Inputs, options: Options, stored: Saved, needs: Needs
) -> tuple[Tensor, ...]:
    return fake_gradients(inputs.head, needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, options = unflatten(inputs, Inputs, Options)
    outputs = Outputs(*output)
    ctx.mark_non_differentiable(outputs.parts)
    ctx.set_materialize_grads(False)
    save(ctx, *flatten(tensors, Saved(outputs.parts)))
    ctx.options = options


def _backward(ops: Any, ctx: Any, grad_logprobs: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_logprobs is None:
        return gradients_of([], [], Inputs, Options)
    inputs, stored = unflatten(saved(ctx), Inputs, Saved)
    needed, _ = unflatten(ctx.needs_input_grad, Inputs, Options)
    grads = ops.linear_sampled_logprobs_backward(
        *flatten(Gradients(grad_logprobs), inputs, ctx.options, stored, Needs(*needed.head))
    )
    return gradients_of(grads, needed.head, Inputs, Options)


define(
    "linear_sampled_logprobs", f"({schema(Inputs, Options)}) -> ({schema(Outputs)})",
    reference=on_bundles(_forward, Inputs, Options), fake=fake_on_bundles(_fake, Inputs, Options),
    derivative=Derivative(_setup_context, _backward),
)  # fmt: skip
define_backward(
    "linear_sampled_logprobs_backward",
    f"({schema(*BACKWARD_ARGUMENTS[:-1])}, {schema(Needs, prefix='needs_')}) -> ({schema(HeadGradientTensors)})",
    reference=on_bundles(_backward_loop, *BACKWARD_ARGUMENTS),
    fake=fake_on_bundles(_fake_backward, *BACKWARD_ARGUMENTS), of=("linear_sampled_logprobs",),
)  # fmt: skip
_dispatch.served_by("token_stats", "linear_sampled_logprobs")
