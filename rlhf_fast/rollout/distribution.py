# SPDX-License-Identifier: Apache-2.0
"""Drawing tokens from softmax(logits / temperature), over all ids or those that min-p, top-k and top-p keep."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_fast.models.batches import Support

from .rollout import SamplingParams

BLOCK = 256  # ids whose probabilities are summed first
AT_ONCE = 2**19  # logits: a CPU's cache holds what is made of them, which is read several times
FIRST_LOOK = 256  # ids sorted first: sorting the vocabulary is slow, and top-p rarely keeps more
MORE = 16  # times as many in each further look, at the rows that may keep more


def draw(
    logits: Tensor, uniform: Tensor, params: SamplingParams, forbidden: list[int] | None = None
) -> tuple[Tensor, Support | None]:
    """(N,) ids drawn from logits (N, V) by inverting the CDF at `uniform` (N,) in [0, 1), and their `Support`.

    The support is None without top-k, top-p and min-p. `forbidden` ids are removed first.
    """
    if forbidden:
        logits = logits.index_fill(1, torch.tensor(forbidden, device=logits.device), -torch.inf)
    if not params.truncated:
        rows = max(1, AT_ONCE // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(logits))
        parts = zip(logits.split(rows), uniform.split(rows), strict=True)
        return torch.cat([_invert((part / params.temperature).softmax(-1), point) for part, point in parts]), None
    probabilities = (logits / params.temperature).softmax(-1)
    probabilities, ids, keep = _likeliest(probabilities, params)
    place = _invert(probabilities * keep, uniform)
    return ids.gather(1, place[:, None]).squeeze(1), Support.of_counts(ids[keep], keep.sum(-1))


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """(N,) the first column of weights (N, V) >= 0 at which the cumulative sum exceeds `uniform` of the total.

    Sums are float64, since float32 sums of 50 000 terms would favour the last ids: first over blocks, then within the
    selected block. A column of weight 0 is never returned, whatever the rounding.
    """
    missing = -weights.shape[1] % BLOCK
    blocks = (pad(weights, (0, missing)) if missing else weights).unflatten(1, (-1, BLOCK))  # `pad` by 0 copies
    sums = blocks.sum(-1, dtype=torch.float64).cumsum(-1)  # (N, V / BLOCK)
    block, point = _first_above(sums, uniform[:, None] * sums[:, -1:])
    before = pad(sums, (1, 0)).gather(1, block)
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, 1, BLOCK)).squeeze(1).cumsum(-1, dtype=torch.float64)
    place, _ = _first_above(inside, point - before)
    return (block * BLOCK + place).squeeze(1)


def _first_above(sums: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 1) the first column of ascending `sums` (N, K) above `point` (N, 1), and the point.

    A point at or above the last sum is moved just below it.
    """
    point = torch.minimum(point, sums[:, -1:].nextafter(sums.new_zeros(())))
    return torch.searchsorted(sums, point.contiguous(), right=True).clamp_(max=sums.shape[1] - 1), point


def _likeliest(probabilities: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities (N, K) in descending order, their ids, and which of them are kept: those of at least `min_p` times
    the largest, of these the `top_k` likeliest, of these the fewest that have `top_p` of their mass (at least one).
    The order is vLLM's."""
    if not params.top_k:
        return _look(probabilities, _mass(probabilities, params), params, FIRST_LOOK)
    values, ids = probabilities.topk(min(params.top_k, probabilities.shape[1]))
    return values, ids, _kept(values, _mass(values, params), params)


def _look(probabilities: Tensor, mass: Tensor, params: SamplingParams, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """`_likeliest` without top-k from the `count` likeliest ids, and from more of them in the rows where all are kept.

    Each row's result depends on that row alone, but for which of equal probabilities come first: topk leaves that open,
    and on a GPU it may differ.
    """
    count = min(count, probabilities.shape[1])
    values, ids = probabilities.topk(count)
    keep = _kept(values, mass, params)
    rows = keep[:, -1].nonzero().squeeze(1)
    if count == probabilities.shape[1] or not len(rows):
        most = int(keep.sum(-1).max())
        return values[:, :most], ids[:, :most], keep[:, :most]
    further = _look(probabilities[rows], mass[rows], params, MORE * count)
    missing = max(0, further[0].shape[1] - count)
    parts = []
    for part, more in zip((values, ids, keep), further, strict=True):
        wide = pad(part, (0, missing))
        wide[rows] = pad(more, (0, wide.shape[1] - more.shape[1]))
        parts.append(wide)
    return parts[0], parts[1], parts[2]


def _mass(probabilities: Tensor, params: SamplingParams) -> Tensor:
    """(N, 1) sums of those that min-p keeps, of which top-p is a share; infinite without top-p."""
    if params.top_p == 1:
        return probabilities.new_full((len(probabilities), 1), torch.inf)
    kept = probabilities if params.min_p == 0 else probabilities * (probabilities >= _least(probabilities, params))
    return kept.sum(-1, keepdim=True)


def _least(probabilities: Tensor, params: SamplingParams) -> Tensor:
    return params.min_p * probabilities.amax(-1, keepdim=True)


def _kept(values: Tensor, mass: Tensor, params: SamplingParams) -> Tensor:
    """Which of the likeliest probabilities (N, K), in descending order, are kept, if those that may be sum to `mass`.
    If one is not, none after it is."""
    before = values.cumsum(-1, dtype=torch.float64) - values
    keep = (before < params.top_p * mass) & (values > 0) & (values >= _least(values, params))
    keep[:, 0] = True
    return keep
