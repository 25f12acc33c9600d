# SPDX-License-Identifier: Apache-2.0
"""linear_token_logprobs and linear_token_stats: `token_stats` of hidden @ weight.T + bias, tile by tile.

The forward computes every tile once and reduces it to statistics of its rows. The backward uses the tiles that the
memory budget kept, computes the others again, overwrites each with its gradient and multiplies that by hidden and
weight: three matmuls if all are kept, four if none is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast import _dispatch
from rlhf_fast._pages import give_back
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
from rlhf_fast.ops.linear.row_selection import RowInputs, RowSelection, select_rows
from rlhf_fast.ops.linear.slices import RowGradients, RowStatistics, Slices, fold, own_targets
from rlhf_fast.ops.linear.tiles import Tiles, tile_shape
from rlhf_fast.ops.logprob import (
    TokenStats,
    as_token_stats,
    check_row_options,
    check_targets,
    fake_stats,
    not_differentiable,
    output_bits,
)
from rlhf_fast.ops.reference import accumulate_dtype


class Inputs(NamedTuple):
    head: HeadTensors
    targets: Tensor | None  # (...) or (..., K)
    rows: RowInputs
    row_temperature: Tensor | None  # (...)


class Options(NamedTuple):
    loop: LoopOptions
    logits: LogitOptions
    outputs: int  # bits of codes.OUTPUTS


class Outputs(NamedTuple):
    logprobs: Tensor  # as targets; what `outputs` leaves out is (0,)
    entropy: Tensor  # (...), as the next three
    logsumexp: Tensor
    sum_sq_probs: Tensor
    argmax: Tensor
    parts: Tensor  # (..., 2): row max of u and log-sum, see reference/logprob.py
    tiles: Tensor  # (elements,) the tiles that the budget keeps for the backward


class Gradients(NamedTuple):
    """The incoming gradients; None where the loss does not depend on the output."""

    grad_logprobs: Tensor | None
    grad_entropy: Tensor | None
    grad_logsumexp: Tensor | None


class Saved(NamedTuple):
    entropy: Tensor | None
    parts: Tensor
    tiles: Tensor


class TileState(NamedTuple):
    tiles_hold_logits: bool  # not yet overwritten by an earlier backward


def linear_token_logprobs(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (...) or (..., K)
    *,
    bias: Tensor | None = None,  # (V,)
    lora: Lora | None = None,  # A (r, H), B (V, r), scale
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,  # (...)
    rows: Tensor | None = None,  # (R,)
    vocab_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    process_group: Any = None,
) -> Tensor:
    """`token_logprobs(hidden @ weight.T + bias, targets, ...)` without the logits.

    Args:
        hidden: `(..., H)` float32, bfloat16, float16 or float64; weight, bias and lora of the same dtype.
            Under autocast all are cast to its dtype, like the model's own head, but at every call, because ops cannot
            use autocast's cache of cast weights. If that matters, keep the head in that dtype or cast it once a step.
        lora: `(A (r, H), B (V, r), scale)`: the head is weight + scale * B @ A, which is never formed.
        targets, temperature, logit_scale, softcap, vocab_size: as for `token_logprobs`.
        mask: `(...)` bool, True = real token. Masked rows are dropped before the matmul and return 0.
        rows: `(R,)` int64 or int32, instead of mask: indices of the real rows among the N, each once, -1 for padding.
            With a mask on a GPU the host waits for the number of real rows, once for forward and backward together
            (under torch.compile in each); with indices it never waits, so a CUDA graph of fixed R can be captured.
        logits_dtype: torch.float32 gives exact logits of half-precision operands; None = the operands' dtype.
        memory_budget: bytes of logits kept for the backward; the others are computed again there. None = 512 MiB on
            CPU, 2 GiB on CUDA; 0 keeps none. One more tile is always needed, of 16 MiB on CPU and at most 256 MiB on
            CUDA. Results depend on the budget only by rounding.
        process_group: the vocabulary is split into equal contiguous slices in rank order, and weight, bias and B are
            this rank's; hidden and targets (ids in the whole vocabulary) are the same on all ranks, and so is hidden's
            gradient. Before torch.compile(fullgraph=True) call the op once with the group: the ranks then compare their
            shapes. None = the full weight; a sharded DTensor is then refused, since with FSDP2 each rank has other
            rows.

    Returns:
        `targets.shape` float32 (float64 for float64); differentiable in hidden, weight, bias, A and B. Gradients that
        are not needed (of a frozen head) are not computed.

    Raises:
        TypeError, ValueError: on a wrong dtype, shape, device or range, naming the argument.
    """
    results = linear_stats(
        "linear_token_logprobs",
        check_head("linear_token_logprobs", hidden, weight, bias, lora, logits_dtype, memory_budget, process_group),
        targets, codes.LOGPROBS, temperature, logit_scale, softcap, mask, rows, vocab_size,
    )  # fmt: skip
    return results.logprobs


def linear_token_stats(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    targets: Tensor | None = None,  # (...) or (..., K)
    *,
    outputs: tuple[str, ...] = ("logprobs", "entropy"),
    bias: Tensor | None = None,  # (V,)
    lora: Lora | None = None,  # A (r, H), B (V, r), scale
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,  # (...)
    rows: Tensor | None = None,  # (R,)
    vocab_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    process_group: Any = None,
) -> TokenStats:
    """`token_stats(hidden @ weight.T + bias, targets, ...)` without the logits; arguments as `linear_token_logprobs`.

    logprobs, entropy and logsumexp are differentiable in hidden, weight, bias and the LoRA factors.

    Raises:
        TypeError, ValueError: on a wrong dtype, shape, device or range, naming the argument.
    """
    op = "linear_token_stats"
    wanted = output_bits(op, outputs, targets)
    head = check_head(op, hidden, weight, bias, lora, logits_dtype, memory_budget, process_group)
    results = linear_stats(op, head, targets, wanted, temperature, logit_scale, softcap, mask, rows, vocab_size)
    return as_token_stats(results, wanted)


def linear_stats(
    op: str,
    head: CheckedHead,
    targets: Tensor | None,
    outputs: int,
    temperature: float | Tensor,
    logit_scale: float,
    softcap: float | None,
    mask: Tensor | None,
    rows: Tensor | None,
    vocab_size: int | None,
) -> Outputs:
    """The outputs of the operator linear_token_stats; `op` is the calling public function, for messages."""
    hidden = head.tensors.hidden
    row_inputs, checked, padded = select_rows(op, mask, rows, hidden)
    row_temperature, scalar, cap, columns = check_row_options(
        op, head.shape, head.vocabulary, temperature, softcap, checked, vocab_size, hidden
    )
    if outputs & codes.LOGPROBS:
        check_targets(op, targets, head.shape, head.vocabulary if columns < 0 else columns, checked, hidden)
    else:
        targets = None
    ops = _dispatch.select(op.replace("hf.", "linear_"), hidden)  # those of rf.hf run where the linear ones do
    _dispatch.name_call(op)
    budget = head.options.budget if any(needs_of(head.tensors)) else 0
    scale = _check.factor(op, "logit_scale", logit_scale)
    options = Options(
        head.options._replace(vocab_size=columns, budget=budget, rows_padded=padded),
        LogitOptions(scalar, scale, cap), outputs,
    )  # fmt: skip
    inputs = Inputs(head.tensors, targets, row_inputs, row_temperature)
    return Outputs(*ops.linear_token_stats(*flatten(inputs, options)))


# ----------------------------------------------------------------------------------------------- the two loops


class _Loop(HeadRows):
    """The selected rows with their targets, and the tiles of their logits."""

    def __init__(self, inputs: Inputs, options: Options) -> None:
        hidden = inputs.head.hidden
        super().__init__(
            inputs.head, options.loop, RowSelection(hidden.shape[:-1], inputs.rows, options.loop.rows_padded)
        )
        targets = inputs.targets
        self.k = () if targets is None or targets.shape == hidden.shape[:-1] else (targets.shape[-1],)
        self.targets = self.take_k(targets)
        self.row_shaping = self.shaping(inputs.row_temperature, options.logits)
        self.budget = options.loop.budget

    def take_k(self, x: Tensor | None) -> Tensor | None:
        """Like targets, as (selected, K)."""
        taken = self.selection.take(x, self.k)
        return taken if taken is None or self.k else taken.unsqueeze(-1)

    def buffer(self) -> Tensor:
        elements = buffer_elements(self.selection.most, self.vocabulary, self.tile_dtype, self.budget)
        return self.hidden.new_empty(elements, dtype=self.tile_dtype)

    def tiles(self, buffer: Tensor) -> Tiles:
        return Tiles(self.count, self.columns, buffer, *tile_shape(self.count, self.columns, buffer))

    def own_targets(self, rows: slice, columns: slice) -> tuple[Tensor | None, Tensor | None]:
        if self.targets is None:
            return None, None
        first = self.shard.first
        return own_targets(self.targets[rows], slice(columns.start + first, columns.stop + first))


def _forward(ops: Any, inputs: Inputs, options: Options) -> Outputs:
    with torch.autocast(inputs.head.hidden.device.type, enabled=False):  # the caller cast already
        loop = _Loop(inputs, options)
        buffer = loop.buffer()
        tiles = loop.tiles(buffer)
        k = 0 if loop.targets is None else loop.targets.shape[1]
        blocks = max(1, tiles.column_blocks)
        slices = Slices.empty(blocks, loop.count, k, options.outputs, loop.hidden, loop.sum_dtype)
        for tile in tiles:
            loop.fill(tile.logits, tile.rows, tile.columns)
            local, here = loop.own_targets(tile.rows, tile.columns)
            fold(
                ops, slices, tile.columns.start // tiles.width, tile.rows, tile.logits, local, here, loop.row_shaping,
                options.outputs, tile.columns.start + loop.shard.first,
            )  # fmt: skip
        factor = loop.row_shaping.factor
        merged = loop.shard.merge(slices, factor)
        stats = merged.row_statistics(factor, loop.sum_dtype, options.outputs)
    return _outputs(loop, stats, buffer)


def _outputs(loop: _Loop, stats: RowStatistics, buffer: Tensor) -> Outputs:
    """In the caller's shape; (0,) for outputs that were not requested."""
    logprobs = stats.logprobs if stats.logprobs is None or loop.k else stats.logprobs.squeeze(-1)

    def put(x: Tensor | None, width: tuple[int, ...] = (), dtype: torch.dtype = loop.sum_dtype) -> Tensor:
        return loop.hidden.new_empty(0, dtype=dtype) if x is None else loop.selection.put(x, width).clone()

    return Outputs(
        put(logprobs, loop.k), put(stats.entropy), put(stats.logsumexp), put(stats.sum_sq_probs),
        put(stats.argmax, (), torch.int64), put(stats.parts, (2,)), buffer,
    )  # fmt: skip


def _backward_in_place(
    ops: Any, grads: Gradients, inputs: Inputs, options: Options, stored: Saved, state: TileState, needs: Needs
) -> HeadGradientTensors:
    """The gradients of the head's tensors; tiles that were kept are overwritten with their own gradient."""
    with torch.autocast(inputs.head.hidden.device.type, enabled=False):
        loop = _Loop(inputs, options)
        take = loop.selection.take
        parts = take(stored.parts, (2,))
        assert parts is not None
        wanted = RowGradients(
            loop.take_k(grads.grad_logprobs), take(grads.grad_entropy), take(grads.grad_logsumexp), loop.targets,
            take(stored.entropy), parts,
        )  # fmt: skip
        tiles = loop.tiles(stored.tiles)
        sums = HeadGradients(loop.head, loop.hidden, loop.low, needs, tiles.row_blocks, revisits=False)
        for tile in tiles:
            if not (tile.in_buffer and state.tiles_hold_logits):
                loop.fill(tile.logits, tile.rows, tile.columns)
            wanted.turn(ops, tile.logits, tile.rows, *loop.own_targets(tile.rows, tile.columns), loop.row_shaping)
            sums.add(tile.logits, tile.rows, tile.columns)
            if tile.in_buffer:
                give_back(tile.logits)
        result = sums.finish(loop.vocabulary, loop.shard.sum)
    return result._replace(grad_hidden=loop.put_hidden(result.grad_hidden) if needs.hidden else result.grad_hidden)


def _backward_out_of_place(
    ops: Any, grads: Gradients, inputs: Inputs, options: Options, stored: Saved, state: TileState, needs: Needs
) -> HeadGradientTensors:
    stored = stored._replace(tiles=stored.tiles.clone())
    return _backward_in_place(ops, grads, inputs, options, stored, state, needs)


# ----------------------------------------------------------------------------------------------- registration

BACKWARD_ARGUMENTS = (Gradients, Inputs, Options, Saved, TileState, Needs)


def _backward_schema(mutated: str = "") -> str:
    first = schema(*BACKWARD_ARGUMENTS[:-1], mutated=mutated)
    return f"({first}, {schema(Needs, prefix='needs_')}) -> ({schema(HeadGradientTensors)})"


def _fake(inputs: Inputs, options: Options) -> Outputs:
    hidden, weight = inputs.head.hidden, inputs.head.weight
    dtype = tile_dtype(hidden, options.loop.float_logits)
    rows = selected_rows(hidden, inputs.rows.row_index)
    elements = buffer_elements(rows, weight.shape[0], dtype, options.loop.budget)
    sums = accumulate_dtype(hidden.dtype)
    logprobs, entropy, logsumexp, squares, argmax, parts = fake_stats(
        hidden, inputs.targets, hidden.shape[:-1], sums, options.outputs
    )
    tiles = hidden.new_empty(elements, dtype=dtype)
    return Outputs(logprobs, entropy, logsumexp, squares, argmax, parts, tiles)


def _fake_backward(
    grads: Gradients, inputs: Inputs, options: Options, stored: Saved, state: TileState, needs: Needs
) -> tuple[Tensor, ...]:
    return fake_gradients(inputs.head, needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, options = unflatten(inputs, Inputs, Options)
    outputs = Outputs(*output)
    ctx.mark_non_differentiable(*not_differentiable(output, options.outputs))
    ctx.set_materialize_grads(False)
    entropy = outputs.entropy if options.outputs & codes.ENTROPY else None
    save(ctx, *flatten(tensors, Saved(entropy, outputs.parts, outputs.tiles)))
    ctx.options, ctx.tiles_hold_logits = options, True


def _backward(ops: Any, ctx: Any, *flat_grads: Tensor | None) -> tuple[Any, ...]:
    grads = Gradients(*flat_grads[: len(Gradients._fields)])
    needed, _ = unflatten(ctx.needs_input_grad, Inputs, Options)
    if all(g is None for g in grads):
        return gradients_of([], [], Inputs, Options)
    inputs, stored = unflatten(saved(ctx), Inputs, Saved)
    state = TileState(ctx.tiles_hold_logits)
    # With create_graph the gradients must come from an operator that refuses to be differentiated; while tracing,
    # functionalisation would copy the tiles anyway.
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(stored.tiles) is not Tensor:
        backward = ops.linear_token_stats_backward
    else:  # tiles turn into gradients; a second backward fills them again
        backward = ops.linear_token_stats_backward_
        stored, ctx.tiles_hold_logits = stored._replace(tiles=stored.tiles.data), False
    results = backward(*flatten(grads, inputs, ctx.options, stored, state, Needs(*needed.head)))
    return gradients_of(results, needed.head, Inputs, Options)


PUBLIC = ("linear_token_stats", "linear_token_logprobs", "hf.token_logprobs", "hf.token_stats")
define(
    "linear_token_stats", f"({schema(Inputs, Options)}) -> ({schema(Outputs)})",
    reference=on_bundles(_forward, Inputs, Options), fake=fake_on_bundles(_fake, Inputs, Options),
    derivative=Derivative(_setup_context, _backward), public=PUBLIC,
)  # fmt: skip
define(
    "linear_token_stats_backward_", _backward_schema(mutated="tiles"),
    reference=on_bundles(_backward_in_place, *BACKWARD_ARGUMENTS),
    fake=fake_on_bundles(_fake_backward, *BACKWARD_ARGUMENTS),
)  # fmt: skip
define_backward(
    "linear_token_stats_backward", _backward_schema(),
    reference=on_bundles(_backward_out_of_place, *BACKWARD_ARGUMENTS),
    fake=fake_on_bundles(_fake_backward, *BACKWARD_ARGUMENTS), of=PUBLIC,
)  # fmt: skip
_dispatch.served_by("token_stats", "linear_token_logprobs", "linear_token_stats")
