# SPDX-License-Identifier: Apache-2.0
"""The loop of linear_policy_loss over blocks of whole rows, with each token's loss and gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast._pages import give_back
from rlhf_fast.ops import codes
from rlhf_fast.ops.linear.head import HeadGradients
from rlhf_fast.ops.linear.head_rows import HeadRows
from rlhf_fast.ops.linear.inputs import HeadTensors, LogitOptions, LoopOptions, Needs
from rlhf_fast.ops.linear.pairs import Pair, pair_kl, pair_kl_backward
from rlhf_fast.ops.linear.row_selection import RowInputs, RowSelection
from rlhf_fast.ops.linear.slices import RowGradients, Slices, fold, own_targets
from rlhf_fast.ops.linear.tiles import Tile, Tiles, tile_shape, whole_rows
from rlhf_fast.ops.token_losses import TOKEN_LOSSES, Clip, importance_ratio, kl_estimate, zero_beyond_limit

EXACT = 4  # one more estimator than codes.ESTIMATORS: the KL over the vocabulary, with the reference's head
BY_CODE = tuple(TOKEN_LOSSES.values())


class RefTensors(NamedTuple):
    """The reference's hidden states and head, used only by the exact KL."""

    ref_hidden: Tensor | None  # (..., H')
    ref_weight: Tensor | None  # (V, H')
    ref_bias: Tensor | None  # (V,)


class Inputs(NamedTuple):
    head: HeadTensors
    targets: Tensor  # (...)
    old_logprobs: Tensor  # (...)
    advantages: Tensor  # (...)
    share: Tensor  # (...) 1 / normalizer
    log_ratio: Tensor | None  # (...)
    ref_logprobs: Tensor | None  # (...)
    ref: RefTensors
    rows: RowInputs
    row_temperature: Tensor | None  # (...)


class LossOptions(NamedTuple):
    objective: int  # place in TOKEN_LOSSES
    clip: Clip
    kl_coef: float
    estimator: int  # of codes.ESTIMATORS, or EXACT
    gradient: int  # of codes.GRADIENTS
    importance: bool
    entropy_coef: float


class Options(NamedTuple):
    loop: LoopOptions
    logits: LogitOptions
    loss: LossOptions


class Outputs(NamedTuple):
    """Outputs other than the gradients of the loss."""

    loss: Tensor  # ()
    logprobs: Tensor  # (...)
    entropy: Tensor  # (...)
    kl: Tensor  # (...)
    clip_fraction: Tensor  # ()


class Tokens(NamedTuple):
    """Per-token inputs of the selected rows, (n,) each."""

    targets: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    share: Tensor
    log_ratio: Tensor | None
    ref_logprobs: Tensor | None

    def at(self, rows: slice) -> Tokens:
        return Tokens(*(None if x is None else x[rows] for x in self))  # type: ignore[arg-type]

    def log_ratio_of(self, logprobs: Tensor) -> Tensor:
        return logprobs - self.old_logprobs if self.log_ratio is None else self.log_ratio


class TokenResults(NamedTuple):
    """Of some tokens, (n,) each."""

    logprobs: Tensor
    entropy: Tensor
    kl: Tensor
    loss: Tensor
    clipped: Tensor  # bool

    @staticmethod
    def empty(count: int, like: Tensor, dtype: torch.dtype) -> TokenResults:
        logprobs, entropy, kl, loss = like.new_zeros((4, count), dtype=dtype).unbind()
        return TokenResults(logprobs, entropy, kl, loss, torch.zeros(count, dtype=torch.bool, device=like.device))

    def write(self, rows: slice, block: TokenResults) -> None:
        for whole, part in zip(self, block, strict=True):
            whole[rows] = part


class _Loop(HeadRows):
    """The selected rows and tokens, both heads, and blocks of whole rows."""

    def __init__(self, inputs: Inputs, options: Options) -> None:
        selection = RowSelection(inputs.head.hidden.shape[:-1], inputs.rows, options.loop.rows_padded)
        super().__init__(inputs.head, options.loop, selection)
        self.loss = options.loss
        self.ref: HeadRows | None = None
        if inputs.ref.ref_hidden is not None and inputs.ref.ref_weight is not None:
            ref = HeadTensors(
                inputs.ref.ref_hidden, inputs.ref.ref_weight, inputs.ref.ref_bias, lora_a=None, lora_b=None
            )
            self.ref = HeadRows(ref, options.loop, selection)
        self.row_shaping = self.shaping(inputs.row_temperature, options.logits)
        per_token = (
            inputs.targets, inputs.old_logprobs, inputs.advantages, inputs.share, inputs.log_ratio, inputs.ref_logprobs
        )  # fmt: skip
        self.tokens = Tokens(*(selection.take(x) for x in per_token))  # type: ignore[arg-type]
        self.budget = options.loop.budget

    def block_height(self, needs: Needs) -> int:
        """Rows of a block. If all fit in one block, no float32 sum of the weight's gradient is needed."""
        saved = self.hidden.dtype != self.sum_dtype and needs.weight
        spare = self.vocabulary * self.hidden.shape[1] * self.sum_dtype.itemsize if saved else 0
        buffers = 1 if self.ref is None else 3  # the exact KL: both logits, and the gradient of one
        row_bytes = max(1, self.block_columns) * self.tile_dtype.itemsize * buffers
        return whole_rows(self.count, row_bytes, spare, self.device.type, self.budget)

    def block(self, rows: slice, memory: Tensor) -> Tiles:
        """The tiles of a block of rows, all in `memory`; one of whole rows where a KL over the vocabulary is needed."""
        height = rows.stop - rows.start
        width = self.columns if self.ref is not None else tile_shape(height, self.columns, memory)[1]
        return Tiles(height, self.columns, memory[: height * self.columns], height, max(1, width))

    def own_targets(self, rows: slice, tile: Tile) -> tuple[Tensor, Tensor]:
        columns, first = tile.columns, self.shard.first
        targets = self.tokens.targets[rows].unsqueeze(-1)
        return own_targets(targets, slice(columns.start + first, columns.stop + first))

    def statistics(self, ops: Any, rows: slice, tiles: Tiles) -> tuple[Tensor, Tensor, Tensor]:
        """Fills the tiles of a block; its log-probs (n,), entropy (n,) and parts (n, 2)."""
        outputs = codes.LOGPROBS | codes.ENTROPY
        shaping = self.row_shaping.at(rows)
        slices = Slices.empty(max(1, tiles.column_blocks), tiles.rows, 1, outputs, self.hidden, self.sum_dtype)
        for at, tile in enumerate(tiles):
            self.fill(tile.logits, rows, tile.columns)
            fold(ops, slices, at, tile.rows, tile.logits, *self.own_targets(rows, tile), shaping, outputs, 0)
        merged = self.shard.merge(slices, shaping.factor)
        stats = merged.row_statistics(shaping.factor, self.sum_dtype, outputs)
        assert stats.logprobs is not None and stats.entropy is not None
        return stats.logprobs.squeeze(-1), stats.entropy, stats.parts

    def pair(self, rows: slice, memory: Tensor) -> Pair:
        """The filled tile of the policy's logits, and that of the reference's."""
        assert self.ref is not None
        height = rows.stop - rows.start
        policy, ref = (x[: height * self.columns].view(height, self.columns) for x in memory)
        self.ref.fill(ref, rows, slice(0, self.columns))
        shaping = self.row_shaping.at(rows)
        return Pair(policy, ref, shaping, shaping)


def policy_loop(ops: Any, inputs: Inputs, options: Options, needs: Needs) -> tuple[Tensor, ...]:
    """Outputs, and the gradients of the loss in hidden and head."""
    hidden = inputs.head.hidden
    with torch.autocast(hidden.device.type, enabled=False):  # the caller cast already
        loop = _Loop(inputs, options)
        height = loop.block_height(needs)
        row_blocks = -(-loop.count // height)
        sums = HeadGradients(loop.head, loop.hidden, loop.low, needs, row_blocks, hold_sums=True)
        results = TokenResults.empty(loop.count, hidden, loop.sum_dtype)
        heads = 1 if loop.ref is None else 2
        memory = hidden.new_empty((heads, height * loop.columns), dtype=loop.tile_dtype)
        for top in range(0, loop.count, height):
            rows = slice(top, min(top + height, loop.count))
            results.write(rows, _block(ops, loop, rows, memory, sums if any(needs) else None))
        grads = sums.finish(loop.vocabulary, loop.shard.sum)
        if needs.hidden:
            grads = grads._replace(grad_hidden=loop.put_hidden(grads.grad_hidden))
    used = loop.selection.used()
    counted = torch.ones_like(results.clipped) if used is None else used
    fraction = ((results.clipped & counted).sum() / counted.sum().clamp(min=1)).to(loop.sum_dtype)
    put = loop.selection.put
    loss = (results.loss * loop.tokens.share).sum()
    logprobs, entropy, kl = (put(x.clone()) for x in (results.logprobs, results.entropy, results.kl))
    return (*Outputs(loss, logprobs, entropy, kl, fraction), *grads)


def _block(ops: Any, loop: _Loop, rows: slice, memory: Tensor, sums: HeadGradients | None) -> TokenResults:
    """The results of one block of rows; its gradients go to sums."""
    tiles = loop.block(rows, memory[0])
    logprobs, entropy, parts = loop.statistics(ops, rows, tiles)
    tokens, options = loop.tokens.at(rows), loop.loss
    token_losses = BY_CODE[options.objective](logprobs, tokens.log_ratio_of(logprobs), tokens.advantages, options.clip)
    slope, share = token_losses.slope, tokens.share
    kl, kl_gradient = torch.zeros_like(logprobs), None
    if loop.ref is None and tokens.ref_logprobs is not None:
        kl, kl_slope = _estimated_kl(logprobs, tokens, options)
        slope = slope + options.kl_coef * kl_slope
    if sums is not None and loop.tile_dtype == torch.float16:
        share = share * sums.fit_scale(_largest_gradient(loop, slope, tokens))
    if loop.ref is not None:
        grad_kl = options.kl_coef * share if sums is not None and options.kl_coef != 0 else None
        kl, kl_gradient = _exact_kl(ops, loop.pair(rows, memory), loop, grad_kl)
    loss = token_losses.loss - options.entropy_coef * entropy
    if options.kl_coef != 0:  # a KL that is only reported may be infinite
        loss = loss + options.kl_coef * kl
    if sums is not None:
        grad_entropy = None if options.entropy_coef == 0 else -options.entropy_coef * share
        gradients = RowGradients(
            (slope * share).unsqueeze(-1), grad_entropy, None, None,
            None if grad_entropy is None else entropy, parts,
        )  # fmt: skip
        _add_gradients(ops, loop, rows, tiles, gradients, kl_gradient, sums)
    return TokenResults(logprobs, entropy, kl, loss, token_losses.clipped)


def _add_gradients(
    ops: Any, loop: _Loop, rows: slice, tiles: Tiles, gradients: RowGradients, kl_gradient: Tensor | None,
    sums: HeadGradients,
) -> None:  # fmt: skip
    """Overwrites the tiles of a block with their gradients and adds these to the gradients of hidden and head."""
    for tile in tiles:
        gradients.turn(ops, tile.logits, tile.rows, *loop.own_targets(rows, tile), loop.row_shaping.at(rows))
        if kl_gradient is not None:
            tile.logits.add_(kl_gradient)
        sums.add(tile.logits, rows, tile.columns)
        if sums.once:  # no other block of rows needs the memory
            give_back(tile.logits)


def _largest_gradient(loop: _Loop, slope: Tensor, tokens: Tokens) -> Tensor:
    """An upper bound of the tiles' gradients, if every log-probability that contributes is above -30 nats."""
    options = loop.loss
    nats = 30.0 * (abs(options.entropy_coef) + (abs(options.kl_coef) if loop.ref is not None else 0.0))
    shaping = loop.row_shaping
    temperature: Any = shaping.temperature if shaping.row_temperature is None else shaping.row_temperature.min()
    return ((slope.abs() + nats) * tokens.share.abs()).max() * (abs(shaping.logit_scale) / temperature)


def _exact_kl(ops: Any, pair: Pair, loop: _Loop, grad_kl: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The reverse KL (n,), and its gradient in the policy's tile for the gradient grad_kl (n,) of the loss in it."""
    kl, parts = pair_kl(ops, pair, codes.REVERSE, 0.5, loop.shard)
    if grad_kl is None:
        return kl, None
    return kl, pair_kl_backward(ops, grad_kl, pair, codes.REVERSE, 0.5, parts, True, False)[0]


def _estimated_kl(logprobs: Tensor, tokens: Tokens, options: LossOptions) -> tuple[Tensor, Tensor]:
    """The estimate (n,), times the ratio if `options.importance`, and its derivative in logprobs."""
    assert tokens.ref_logprobs is not None
    kl, slope = kl_estimate(logprobs, tokens.ref_logprobs, options.estimator, options.gradient)
    if not options.importance:
        return kl, slope
    log_ratio = logprobs - tokens.old_logprobs
    ratio = importance_ratio(log_ratio)
    return kl * ratio, slope * ratio + zero_beyond_limit(kl * ratio, log_ratio)
