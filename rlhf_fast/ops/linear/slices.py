# SPDX-License-Identifier: Apache-2.0
"""Statistics of one slice of the vocabulary, and merging slices. A slice is a column of tiles, or the part of a rank.

With slice s of mass w_s = exp(lse_s - lse), lse = log sum_s exp(lse_s), per row

    entropy = sum_s w_s (entropy_s - log w_s)        sum_sq_probs = sum_s w_s^2 sum_sq_probs_s

and a target's log-probability is that within its slice plus log w_s. Maxima and log-sums are always stored separately.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops import codes
from rlhf_fast.ops.reference.common import wide_dtype
from rlhf_fast.ops.reference.logprob import times


class Shaping(NamedTuple):
    """Temperature, scale and softcap of some rows, as the row operators take them."""

    row_temperature: Tensor | None  # (n,)
    temperature: float
    logit_scale: float
    softcap: float

    def at(self, rows: slice) -> Shaping:
        return self if self.row_temperature is None else self._replace(row_temperature=self.row_temperature[rows])

    @property
    def factor(self) -> Tensor | float:
        """Factor from the row's largest u (`parts[..., 0]` of token_stats) to its largest z.

        See `rlhf_fast.ops.reference.logprob.ShapedLogits`; (n,) float64 where temperatures are per row.
        """
        temperature: Any = self.temperature if self.row_temperature is None else _widened(self.row_temperature)
        return (1.0 if self.softcap > 0 else abs(self.logit_scale)) / temperature


class RowStatistics(NamedTuple):
    """Outputs of token_stats for n rows; those not requested are None."""

    logprobs: Tensor | None  # (n, K)
    entropy: Tensor | None  # (n,)
    logsumexp: Tensor | None  # (n,)
    sum_sq_probs: Tensor | None  # (n,)
    argmax: Tensor | None  # (n,)
    parts: Tensor  # (n, 2)


class Slices(NamedTuple):
    """Statistics per slice and row; outputs not requested are None."""

    max: Tensor  # (S, n) of u, see Shaping.factor
    log_sum: Tensor  # (S, n)
    target: Tensor | None  # (S, n, K) float64: z - max, NaN where the target is in another slice
    entropy: Tensor | None  # (S, n)
    sum_sq_probs: Tensor | None  # (S, n)
    argmax: Tensor | None  # (S, n), among all columns

    @staticmethod
    def empty(count: int, rows: int, k: int, outputs: int, like: Tensor, dtype: torch.dtype) -> Slices:
        """Slices without any mass, to be overwritten."""
        zeros = like.new_zeros((count, rows), dtype=dtype)
        return Slices(
            zeros - torch.inf,
            zeros.clone(),
            _widened(like.new_full((count, rows, k), torch.nan, dtype=dtype)) if outputs & codes.LOGPROBS else None,
            zeros.clone() if outputs & codes.ENTROPY else None,
            zeros.clone() if outputs & codes.SUM_SQ_PROBS else None,
            zeros.to(torch.int64) if outputs & codes.ARGMAX else None,
        )

    def merge(self, factor: Tensor | float) -> Slices:
        """All slices merged into one (1, n)."""
        best = self.max.argmax(0, keepdim=True)  # the first among ties, so argmax has the lowest index
        top = self.max.gather(0, best)
        safe_top = torch.where(top == -torch.inf, 0.0, _widened(top))
        shift = (_widened(self.max) - safe_top) * factor
        mass = shift + self.log_sum  # log of the slice's sum, relative to the row's max
        log_sum = torch.logsumexp(mass, 0, keepdim=True)
        log_sum = torch.where(log_sum == -torch.inf, 0.0, log_sum)
        log_share = mass - log_sum
        share = log_share.exp()
        target, entropy, squares = self.target, self.entropy, self.sum_sq_probs
        if target is not None:
            moved = target + shift.unsqueeze(-1)
            elsewhere = target.isnan()
            logit = torch.where(elsewhere, 0.0, moved).sum(0, keepdim=True)
            target = torch.where(elsewhere.all(0, keepdim=True), torch.nan, logit)
        if entropy is not None:
            entropy = (share * entropy - times(share, log_share)).sum(0, keepdim=True).to(entropy.dtype)
        if squares is not None:
            squares = (share.square() * squares).sum(0, keepdim=True).to(squares.dtype)
        argmax = None if self.argmax is None else self.argmax.gather(0, best)
        return Slices(top, log_sum, target, entropy, squares, argmax)

    def row_statistics(self, factor: Tensor | float, dtype: torch.dtype, outputs: int) -> RowStatistics:
        """The statistics of the rows, from a single merged slice."""
        top, log_sum = self.max[0], self.log_sum[0]
        return RowStatistics(
            None if self.target is None else (self.target[0] - log_sum.unsqueeze(-1)).clamp(max=0).to(dtype),
            None if self.entropy is None else self.entropy[0].clamp(min=0),
            (_widened(top) * factor + log_sum).to(dtype) if outputs & codes.LOGSUMEXP else None,
            None if self.sum_sq_probs is None else self.sum_sq_probs[0],
            None if self.argmax is None else self.argmax[0],
            torch.stack([top.to(dtype), log_sum.to(dtype)], -1),
        )


def _widened(x: Tensor) -> Tensor:
    """In float64, if the device has it."""
    return x.to(wide_dtype(x.device))


def own_targets(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Targets (n, K) as indices into the columns, 0 for those elsewhere, and which ones are here."""
    here = (targets >= columns.start) & (targets < columns.stop)
    return torch.where(here, targets - columns.start, 0), here


def fold(
    ops: Any, slices: Slices, at: int, rows: slice, tile: Tensor, local: Tensor | None, here: Tensor | None,
    shaping: Shaping, outputs: int, first_column: int,
) -> None:  # fmt: skip
    """Writes the statistics of a tile into slice `at`. local, here: its targets, from `own_targets`."""
    row_outputs = outputs & ~codes.LOGSUMEXP
    logprobs, entropy, _, squares, argmax, parts = ops.token_stats(
        tile, local, None, *shaping.at(rows), -1, row_outputs, False
    )
    slices.max[at, rows] = parts[:, 0]
    slices.log_sum[at, rows] = parts[:, 1]
    if slices.target is not None and here is not None:
        slices.target[at, rows] = (_widened(logprobs) + _widened(parts[:, 1:])).masked_fill(~here, torch.nan)
    if slices.entropy is not None:
        slices.entropy[at, rows] = entropy
    if slices.sum_sq_probs is not None:
        slices.sum_sq_probs[at, rows] = squares
    if slices.argmax is not None:
        slices.argmax[at, rows] = argmax + first_column


class RowGradients(NamedTuple):
    """The gradient of the loss in each row's statistics, and what its backward needs from the forward."""

    logprobs: Tensor | None  # (n, K)
    entropy: Tensor | None  # (n,)
    logsumexp: Tensor | None  # (n,)
    targets: Tensor | None  # (n, K), among all columns
    row_entropy: Tensor | None  # (n,)
    parts: Tensor  # (n, 2)

    def turn(
        self, ops: Any, tile: Tensor, rows: slice, local: Tensor | None, here: Tensor | None, shaping: Shaping
    ) -> None:
        """Overwrites a tile of logits with its gradient.

        The row kernels handle targets inside the tile. A target in another tile subtracts g_logprob * p from every
        entry here, which equals a logsumexp with the gradient -g_logprob.
        """
        at_targets, at_sum = None, None if self.logsumexp is None else self.logsumexp[rows]
        if self.logprobs is not None:
            assert here is not None
            given = self.logprobs[rows]
            at_targets = torch.where(here, given, 0.0)
            elsewhere = torch.where(here, 0.0, given).sum(-1)
            at_sum = elsewhere.neg() if at_sum is None else at_sum - elsewhere
        entropy = None if self.entropy is None else self.entropy[rows]
        row_entropy = None if self.row_entropy is None else self.row_entropy[rows]
        ops.token_stats_backward_(
            at_targets, entropy, at_sum, tile, local if at_targets is not None else None, None,
            shaping.at(rows).row_temperature, row_entropy, self.parts[rows], shaping.temperature, shaping.logit_scale,
            shaping.softcap, -1,
        )  # fmt: skip
