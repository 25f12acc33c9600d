# SPDX-License-Identifier: Apache-2.0
"""The loop of linear_policy_loss over blocks of whole rows, and what one token's loss and its gradient are."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast._pages import give_back
from rlhf_fast.ops import codes
from rlhf_fast.ops.linear.head import Head, HeadGradients, Needs
from rlhf_fast.ops.linear.inputs import tile_dtype
from rlhf_fast.ops.linear.pairs import pair_kl, pair_kl_backward
from rlhf_fast.ops.linear.rows import Rows
from rlhf_fast.ops.linear.shards import Shard
from rlhf_fast.ops.linear.slices import RowGradients, RowOptions, Slices, fold, own_targets
from rlhf_fast.ops.linear.tiles import Tile, Tiles, budget_of, tile_shape, whole_rows
from rlhf_fast.ops.reference import accumulate_dtype
from rlhf_fast.ops.token_losses import TOKEN_LOSSES, Clip, importance_ratio, kl_estimate, zero_beyond_limit

EXACT = 4  # an estimator beside those of codes.ESTIMATORS: the KL over the vocabulary, against the reference's head
BY_CODE = tuple(TOKEN_LOSSES.values())


class Settings(NamedTuple):
    """The loss' options as the operator takes them."""

    objective: int
    clip: Clip
    kl_coef: float
    estimator: int
    gradient: int
    importance: bool
    entropy_coef: float


class Tokens(NamedTuple):
    """Per-token inputs of the real rows, (n,) each."""

    targets: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    share: Tensor  # 1 / normalizer
    ref_logprobs: Tensor | None

    def at(self, rows: slice) -> Tokens:
        return Tokens(*(None if x is None else x[rows] for x in self))  # type: ignore[arg-type]


class _Loop:
    """The real rows, both heads, and where the results go."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None,
        targets: Tensor, mask: Tensor | None, row_temperature: Tensor | None, old_logprobs: Tensor, advantages: Tensor,
        share: Tensor, ref_logprobs: Tensor | None, ref_hidden: Tensor | None, ref_weight: Tensor | None,
        ref_bias: Tensor | None, lora_scale: float, temperature: float, logit_scale: float, softcap: float,
        vocab_size: int, float_logits: bool, group: int,
    ) -> None:  # fmt: skip
        self.rows = Rows(hidden.shape[:-1], mask)
        take = self.rows.take
        self.shard = Shard(group, weight.shape[0])
        columns = self.shard.counting(vocab_size)
        self.head = Head(weight, bias, lora_a, lora_b, lora_scale).first(columns)
        self.ref_head = None if ref_weight is None else Head(ref_weight, ref_bias, None, None, 0.0).first(columns)
        taken = take(hidden, (hidden.shape[-1],))
        assert taken is not None
        self.hidden, self.low = taken, self.head.low_rank(taken)
        self.ref_hidden = None if ref_hidden is None else take(ref_hidden, (ref_hidden.shape[-1],))
        self.options = RowOptions(take(row_temperature, (), 1), temperature, logit_scale, softcap)
        per_token = (targets, old_logprobs, advantages, share, ref_logprobs)
        self.tokens = Tokens(*(take(x) for x in per_token))  # type: ignore[arg-type]
        self.dtype = accumulate_dtype(hidden.dtype)
        self.tile_dtype = tile_dtype(hidden, float_logits)

    def block(self, rows: slice, memory: Tensor) -> Tiles:
        """The tiles of a block of rows, all in `memory`; one of whole rows where a KL over the vocabulary is wanted."""
        height, columns = rows.stop - rows.start, self.head.weight.shape[0]
        width = tile_shape(height, columns, memory.element_size(), memory.device.type, memory.nbytes)[1]
        width = columns if self.ref_head is not None else width
        return Tiles(height, columns, memory[: height * columns], height, max(1, width))

    def own_targets(self, rows: slice, tile: Tile) -> tuple[Tensor, Tensor]:
        columns, first = tile.columns, self.shard.first
        targets = self.tokens.targets[rows].unsqueeze(-1)
        return own_targets(targets, slice(columns.start + first, columns.stop + first))

    def statistics(self, ops: Any, rows: slice, tiles: Tiles) -> tuple[Tensor, Tensor, Tensor]:
        """Fills the tiles of a block; its log-probs (n,), entropy (n,) and parts (n, 2)."""
        asked = codes.LOGPROBS | codes.ENTROPY
        options, low = self.options.at(rows), None if self.low is None else self.low[rows]
        slices = Slices.dead(max(1, tiles.column_blocks), tiles.rows, 1, asked, self.hidden, self.dtype)
        for at, tile in enumerate(tiles):
            self.head.fill(tile.logits, self.hidden[rows], low, tile.columns)
            fold(ops, slices, at, tile.rows, tile.logits, *self.own_targets(rows, tile), options, asked, 0)
        merged = self.shard.merge(slices, options.factor)
        logprobs, entropy, _, _, _, parts = merged.results(options.factor, self.dtype, False)
        assert logprobs is not None and entropy is not None and parts is not None
        return logprobs.squeeze(-1), entropy, parts

    def reference_tile(self, rows: slice, memory: Tensor) -> Tensor:
        assert self.ref_head is not None and self.ref_hidden is not None
        height, columns = rows.stop - rows.start, self.head.weight.shape[0]
        tile = memory[: height * columns].view(height, columns)
        return self.ref_head.fill(tile, self.ref_hidden[rows], None, slice(0, columns))


def policy_loop(ops: Any, *args: Any) -> tuple[Tensor, ...]:
    """loss, logprobs, entropy, kl, clip_fraction, and the gradients of loss in hidden and head."""
    *inputs, objective, low, high, dual, kl_coef, estimator, gradient, importance, entropy_coef, budget = args[:-5]
    settings = Settings(objective, Clip(low, high, dual), kl_coef, estimator, gradient, importance, entropy_coef)
    needs = Needs(*args[-5:])
    hidden, weight = inputs[0], inputs[1]
    with torch.autocast(hidden.device.type, enabled=False):  # the caller cast already
        loop = _Loop(*inputs)
        real, width = loop.rows.real, loop.head.weight.shape[0]
        spare = 0 if hidden.dtype == loop.dtype or not needs.weight else weight.numel() * loop.dtype.itemsize
        bytes_of_row = max(1, width) * loop.tile_dtype.itemsize * (1 if loop.ref_head is None else 3)
        limit = budget_of(None if budget < 0 else budget, hidden.device)
        height = whole_rows(real, bytes_of_row, spare, hidden.device.type, limit)
        sums = HeadGradients(loop.head, loop.hidden, loop.low, needs, -(-real // height))
        per_token = hidden.new_zeros((4, real), dtype=loop.dtype)  # logprobs, entropy, kl, loss
        clipped = torch.zeros(real, dtype=torch.bool, device=hidden.device)
        heads = 1 if loop.ref_head is None else 2
        memory = hidden.new_empty((heads, height * width), dtype=loop.tile_dtype)
        for top in range(0, real, height):
            rows = slice(top, min(top + height, real))
            per_token[:, rows], clipped[rows] = _block(ops, loop, settings, rows, memory, sums if any(needs) else None)
        grad_hidden, *grads = sums.finish(weight.shape[0], loop.shard.sum)
        if needs.hidden:
            grad_hidden = loop.rows.put(grad_hidden, (hidden.shape[-1],))
    loss = (per_token[3] * loop.tokens.share).sum()
    counted = torch.ones_like(clipped) if loop.rows.masked is None else ~loop.rows.masked
    fraction = ((clipped & counted).sum() / counted.sum().clamp(min=1)).to(loop.dtype)
    outputs = [loop.rows.put(x.clone()) for x in per_token[:3]]
    return (loss, *outputs, fraction, grad_hidden, *grads)


def _block(
    ops: Any, loop: _Loop, settings: Settings, rows: slice, memory: Tensor, sums: HeadGradients | None
) -> tuple[Tensor, Tensor]:
    """Of one block of rows: logprobs, entropy, kl and loss (4, n), and which were clipped; its gradients go to sums."""
    tiles = loop.block(rows, memory[0])
    logprobs, entropy, parts = loop.statistics(ops, rows, tiles)
    tokens, options = loop.tokens.at(rows), loop.options.at(rows)
    objective = BY_CODE[settings.objective](logprobs, logprobs - tokens.old_logprobs, tokens.advantages, settings.clip)
    slope = objective.slope
    kl, exact_grad = torch.zeros_like(logprobs), None
    if loop.ref_head is not None:
        tile = memory[0, : tiles.rows * tiles.columns].view(tiles.rows, tiles.columns)
        wanted = settings.kl_coef * tokens.share if sums is not None and settings.kl_coef != 0 else None
        kl, exact_grad = _exact_kl(ops, tile, loop.reference_tile(rows, memory[1]), options, loop.shard, wanted)
    elif tokens.ref_logprobs is not None:
        kl, kl_slope = _estimated_kl(logprobs, tokens, settings)
        slope = slope + settings.kl_coef * kl_slope
    loss = objective.loss - settings.entropy_coef * entropy
    if settings.kl_coef != 0:  # a KL that is only watched may be infinite
        loss = loss + settings.kl_coef * kl
    if sums is not None:
        grad_entropy = None if settings.entropy_coef == 0 else -settings.entropy_coef * tokens.share
        gradients = RowGradients(
            (slope * tokens.share).unsqueeze(-1), grad_entropy, None, None,
            None if grad_entropy is None else entropy, parts,
        )  # fmt: skip
        for part in tiles:
            gradients.turn(ops, part.logits, part.rows, *loop.own_targets(rows, part), options)
            if exact_grad is not None:
                part.logits.add_(exact_grad)
            sums.add(part.logits, rows, part.columns)
            if sums.once:  # no other block of rows needs the memory
                give_back(part.logits)
    return torch.stack([logprobs, entropy, kl, loss]), objective.clipped


def _exact_kl(
    ops: Any, tile: Tensor, ref_tile: Tensor, options: RowOptions, shard: Shard, wanted: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The reverse KL (n,), and its gradient to the tile for the gradient `wanted` (n,) of the loss in it."""
    kl, parts = pair_kl(ops, tile, ref_tile, options, options, codes.REVERSE, 0.5, shard)
    if wanted is None:
        return kl, None
    pair = (tile, ref_tile, options, options, codes.REVERSE, 0.5)
    return kl, pair_kl_backward(ops, wanted, *pair, parts, True, False)[0]


def _estimated_kl(logprobs: Tensor, tokens: Tokens, settings: Settings) -> tuple[Tensor, Tensor]:
    """The estimate (n,), times the ratio if so wanted, and its derivative in logprobs."""
    assert tokens.ref_logprobs is not None
    kl, slope = kl_estimate(logprobs, tokens.ref_logprobs, settings.estimator, settings.gradient)
    if not settings.importance:
        return kl, slope
    log_ratio = logprobs - tokens.old_logprobs
    ratio = importance_ratio(log_ratio)
    return kl * ratio, slope * ratio + zero_beyond_limit(kl * ratio, log_ratio)
