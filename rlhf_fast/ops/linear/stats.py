# SPDX-License-Identifier: Apache-2.0
"""linear_token_logprobs and linear_token_stats: `token_stats` of hidden @ weight.T + bias, tile by tile.

The forward makes every tile once and folds it. The backward takes the kept tiles, makes the others again, turns each
into its gradient and multiplies that by hidden and weight: three matmuls where all are kept, four where none is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast import _dispatch
from rlhf_fast._pages import give_back
from rlhf_fast.ops import codes
from rlhf_fast.ops._register import define, define_backward, save, saved
from rlhf_fast.ops.linear.head import Head, HeadGradients, Needs
from rlhf_fast.ops.linear.inputs import (
    HEAD,
    HEAD_GRADIENTS,
    NEEDS,
    Lora,
    check_head,
    fake_gradients,
    tile_dtype,
)
from rlhf_fast.ops.linear.rows import Rows
from rlhf_fast.ops.linear.shards import Shard
from rlhf_fast.ops.linear.slices import RowGradients, RowOptions, Slices, fold, own_targets
from rlhf_fast.ops.linear.tiles import Tiles, kept_elements, tile_shape
from rlhf_fast.ops.logprob import (
    ROW_OPTIONS,
    TokenStats,
    as_token_stats,
    check_row_options,
    check_targets,
    fake_stats,
    not_differentiable,
    output_bits,
)
from rlhf_fast.ops.reference import accumulate_dtype


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
    vocab_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    process_group: Any = None,
) -> Tensor:
    """`token_logprobs(hidden @ weight.T + bias, targets, ...)` without the logits.

    Args:
        hidden: `(..., H)` float32, bfloat16, float16 or float64; weight, bias and lora of the same dtype.
            Under autocast all are cast to its dtype, as the model's own head would.
        lora: `(A (r, H), B (V, r), scale)`: the head is weight + scale * B @ A, which is never formed.
        targets, temperature, logit_scale, softcap, vocab_size: as for `token_logprobs`.
        mask: `(...)` bool, True = real token. Masked rows are dropped before the matmul and return 0.
        logits_dtype: torch.float32 makes exact logits from half-precision operands; None = the operands' dtype.
        memory_budget: bytes of logits kept for the backward; the others are made again there. None = 512 MiB on CPU,
            2 GiB on CUDA; 0 keeps none. Beside it there is one tile, of 16 MiB on CPU and 256 MiB on CUDA. Results
            depend on it only by rounding.
        process_group: weight, bias and B are this rank's of equal contiguous slices of the vocabulary, in rank order;
            hidden and targets (ids in the whole vocabulary) are the same on all ranks, and so is hidden's gradient. A
            weight that is a DTensor sharded on dim 0 says so itself; note that outside its module's forward an FSDP2
            parameter is one too, although there each rank has tokens of its own. Before
            torch.compile(fullgraph=True), call the op once with the group: the ranks compare their shapes then.

    Returns:
        `targets.shape` float32 (float64 for float64); differentiable in hidden, weight, bias, A and B. Gradients that
        nobody needs (a frozen head) are not computed.
    """
    results = _linear_stats(
        "linear_token_logprobs", hidden, weight, targets, codes.LOGPROBS, temperature, logit_scale, softcap, mask,
        vocab_size, bias=bias, lora=lora, logits_dtype=logits_dtype, memory_budget=memory_budget,
        process_group=process_group,
    )  # fmt: skip
    return results[0]


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
    vocab_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    process_group: Any = None,
) -> TokenStats:
    """`token_stats(hidden @ weight.T + bias, targets, ...)` without the logits; arguments as `linear_token_logprobs`.

    logprobs, entropy and logsumexp are differentiable in hidden, weight, bias and the LoRA factors.
    """
    op = "linear_token_stats"
    asked = output_bits(op, outputs, targets)
    results = _linear_stats(
        op, hidden, weight, targets, asked, temperature, logit_scale, softcap, mask, vocab_size, bias=bias, lora=lora,
        logits_dtype=logits_dtype, memory_budget=memory_budget, process_group=process_group,
    )  # fmt: skip
    return as_token_stats(results, asked)


def _linear_stats(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    asked: int,
    temperature: float | Tensor,
    logit_scale: float,
    softcap: float | None,
    mask: Tensor | None,
    vocab_size: int | None,
    **head_options: Any,
) -> tuple[Tensor, ...]:
    head = check_head(op, hidden, weight, **head_options)
    rows = head.hidden.shape[:-1]
    row_temperature, scalar, cap, columns = check_row_options(
        op, rows, head.vocabulary, temperature, softcap, mask, vocab_size, head.hidden
    )
    if asked & codes.LOGPROBS:
        check_targets(op, targets, rows, head.vocabulary if columns < 0 else columns, mask, head.hidden)
    else:
        targets = None
    return _dispatch.select(op, head.hidden).linear_token_stats(
        *head.tensors, targets, mask, row_temperature, head.lora_scale, scalar, float(logit_scale), cap, columns,
        head.float_logits, head.group, asked, head.budget,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------- the two loops


class _Loop:
    """What forward and backward share: the real rows of all inputs, the head, and its tiles."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None,
        targets: Tensor | None, mask: Tensor | None, row_temperature: Tensor | None, lora_scale: float,
        temperature: float, logit_scale: float, softcap: float, vocab_size: int, float_logits: bool, group: int,
    ) -> None:  # fmt: skip
        self.rows = Rows(hidden.shape[:-1], mask)
        self.k = () if targets is None or targets.shape == hidden.shape[:-1] else (targets.shape[-1],)
        self.shard = Shard(group, weight.shape[0])
        self.head = Head(weight, bias, lora_a, lora_b, lora_scale).first(self.shard.counting(vocab_size))
        taken = self.rows.take(hidden, (hidden.shape[-1],))
        assert taken is not None
        self.hidden, self.low = taken, self.head.low_rank(taken)
        self.targets = self.take_k(targets)
        temperatures = self.rows.take(row_temperature, (), 1)
        self.options = RowOptions(temperatures, temperature, logit_scale, softcap)
        self.dtype = accumulate_dtype(hidden.dtype)

    def take_k(self, x: Tensor | None) -> Tensor | None:
        """Like targets, as (real, K)."""
        taken = self.rows.take(x, self.k)
        return taken if taken is None or self.k else taken.unsqueeze(-1)

    def tiles(self, kept: Tensor, budget: int) -> Tiles:
        rows, columns = self.rows.real, self.head.weight.shape[0]
        shape = tile_shape(rows, columns, kept.element_size(), kept.device.type, budget)
        return Tiles(rows, columns, kept, *shape)

    def fill(self, tile: Tensor, rows: slice, columns: slice) -> None:
        self.head.fill(tile, self.hidden[rows], None if self.low is None else self.low[rows], columns)

    def own_targets(self, rows: slice, columns: slice) -> tuple[Tensor | None, Tensor | None]:
        if self.targets is None:
            return None, None
        first = self.shard.first
        return own_targets(self.targets[rows], slice(columns.start + first, columns.stop + first))


def _reference(ops: Any, *args: Any) -> tuple[Tensor, ...]:
    *inputs, outputs, budget = args
    hidden, weight = inputs[0], inputs[1]
    with torch.autocast(hidden.device.type, enabled=False):  # the caller cast already
        loop = _Loop(*inputs)
        dtype = tile_dtype(hidden, inputs[-2])
        elements = kept_elements(loop.rows.count, weight.shape[0], dtype.itemsize, budget)
        kept = hidden.new_empty(elements, dtype=dtype)
        tiles = loop.tiles(kept, budget)
        k = 0 if loop.targets is None else loop.targets.shape[1]
        blocks = max(1, tiles.column_blocks)
        slices = Slices.dead(blocks, loop.rows.real, k, outputs, loop.hidden, loop.dtype)
        for tile in tiles:
            loop.fill(tile.logits, tile.rows, tile.columns)
            local, here = loop.own_targets(tile.rows, tile.columns)
            fold(
                ops, slices, tile.columns.start // tiles.width, tile.rows, tile.logits, local, here, loop.options,
                outputs, tile.columns.start + loop.shard.first,
            )  # fmt: skip
        whole = loop.shard.merge(slices, loop.options.factor)
        results = whole.results(loop.options.factor, loop.dtype, bool(outputs & codes.LOGSUMEXP))
    if results[0] is not None and not loop.k:
        results[0] = results[0].squeeze(-1)
    widths = (loop.k, (), (), (), (), (2,))
    empty = [hidden.new_empty(0, dtype=loop.dtype)] * 4 + [hidden.new_empty(0, dtype=torch.int64)]
    put = [loop.rows.put(x, w) if x is not None else None for x, w in zip(results, widths, strict=True)]
    return (*(e.clone() if x is None else x for x, e in zip(put, [*empty, empty[0]], strict=True)), kept)


def _reference_backward_(ops: Any, *args: Any) -> tuple[Tensor, ...]:
    """The gradients to hidden, weight, bias, lora_a and lora_b; kept tiles end up as their own gradients."""
    grad_logprobs, grad_entropy, grad_logsumexp, *rest = args
    *inputs, entropy, parts, kept, budget, fresh = rest[:-5]
    needs = Needs(*rest[-5:])
    hidden, weight = inputs[0], inputs[1]
    with torch.autocast(hidden.device.type, enabled=False):
        loop = _Loop(*inputs)
        take = loop.rows.take
        taken_parts = take(parts, (2,))
        assert taken_parts is not None
        wanted = RowGradients(
            loop.take_k(grad_logprobs), take(grad_entropy), take(grad_logsumexp), loop.targets, take(entropy),
            taken_parts,
        )  # fmt: skip
        tiles = loop.tiles(kept, budget)
        sums = HeadGradients(loop.head, loop.hidden, loop.low, needs, tiles.row_blocks, revisits=False)
        for tile in tiles:
            if not (tile.kept and fresh):
                loop.fill(tile.logits, tile.rows, tile.columns)
            local, here = loop.own_targets(tile.rows, tile.columns)
            wanted.turn(ops, tile.logits, tile.rows, local, here, loop.options)
            sums.add(tile.logits, tile.rows, tile.columns)
            if tile.kept:
                give_back(tile.logits)
        grad_hidden, *grads = sums.finish(weight.shape[0], loop.shard.sum)
    return (loop.rows.put(grad_hidden, (hidden.shape[-1],)) if needs.hidden else grad_hidden, *grads)


def _reference_backward(ops: Any, *args: Any) -> tuple[Tensor, ...]:
    kept = -8
    copied = (*args[:kept], args[kept].clone(), *args[kept + 1 :])
    return _reference_backward_(ops, *copied)


# ----------------------------------------------------------------------------------------------- registration

INPUTS = f"Tensor hidden, {HEAD}, Tensor? targets, Tensor? mask, Tensor? row_temperature"
OPTIONS = f"float lora_scale, {ROW_OPTIONS}, bool float_logits, int group"
GRADIENTS = "Tensor? grad_logprobs, Tensor? grad_entropy, Tensor? grad_logsumexp"


def _backward_schema(kept: str) -> str:
    return (
        f"({GRADIENTS}, {INPUTS}, {OPTIONS}, Tensor? entropy, Tensor parts, {kept} kept, int budget, bool fresh, "
        f"{NEEDS}) -> ({HEAD_GRADIENTS})"
    )


def _fake(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    targets, float_logits, outputs, budget = rest[3], rest[-4], rest[-2], rest[-1]
    rows = hidden.shape[:-1]
    dtype = tile_dtype(hidden, float_logits)
    elements = torch.sym_min(rows.numel() * weight.shape[0], budget // dtype.itemsize)
    stats = fake_stats(hidden, targets, rows, accumulate_dtype(hidden.dtype), outputs)
    return *stats, hidden.new_empty(elements, dtype=dtype)


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    return fake_gradients(args[3:8], args[-5:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *arguments, outputs, budget = inputs
    entropy, parts, kept = output[1], output[5], output[6]
    ctx.mark_non_differentiable(*not_differentiable(output, outputs))
    ctx.set_materialize_grads(False)
    save(ctx, *arguments[:8], entropy if outputs & codes.ENTROPY else None, parts, kept)
    ctx.options, ctx.budget, ctx.fresh = arguments[8:], budget, True


def _backward(ops: Any, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * (len(ctx.options) + 5)
    if all(g is None for g in grads[:3]):
        return (None,) * 5 + nothing
    *inputs, entropy, parts, kept = saved(ctx, "linear_token_stats")
    wanted = ctx.needs_input_grad[:5]
    # With create_graph the gradients must come from an operator that refuses to be differentiated; while tracing,
    # functionalisation would copy the tiles anyway.
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(kept) is not Tensor:
        backward, fresh = ops.linear_token_stats_backward, ctx.fresh
    else:  # tiles turn into gradients; a second backward fills them again
        backward, fresh = ops.linear_token_stats_backward_, ctx.fresh
        kept, ctx.fresh = kept.data, False
    results = backward(*grads[:3], *inputs, *ctx.options, entropy, parts, kept, ctx.budget, fresh, *wanted)
    return (*(g if w else None for g, w in zip(results, wanted, strict=True)), *nothing)


define(
    "linear_token_stats",
    f"({INPUTS}, {OPTIONS}, int outputs, int budget) -> (Tensor logprobs, Tensor entropy, Tensor logsumexp, "
    "Tensor sum_sq_probs, Tensor argmax, Tensor parts, Tensor kept)",
    reference=_reference, fake=_fake, setup_context=_setup_context, backward=_backward,
)  # fmt: skip
define("linear_token_stats_backward_", _backward_schema("Tensor(a!)"),
       reference=_reference_backward_, fake=_fake_backward)  # fmt: skip
define_backward("linear_token_stats_backward", _backward_schema("Tensor"),
                reference=_reference_backward, fake=_fake_backward, of="linear_token_stats")  # fmt: skip
