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
FIRST_LOOK = 1024  # ids sorted first: sorting the vocabulary is slow, and top-p rarely keeps more


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
    size = probabilities.shape[1]
    count = min(params.top_k or FIRST_LOOK, size)
    values, ids = probabilities.topk(count)
    least = params.min_p * values[:, :1]
    if params.top_k:
        mass = (values * (values >= least)).sum(-1, keepdim=True)
    else:
        mass = (probabilities * (probabilities >= least)).sum(-1, keepdim=True)
        enough = (values.sum(-1, keepdim=True) >= params.top_p * mass) if params.top_p < 1 else values[:, -1:] < least
        if count < size and not bool((enough | (values[:, -1:] < least)).all()):
            values, ids = probabilities.sort(descending=True)
    before = values.cumsum(-1, dtype=torch.float64) - values
    keep = (before < params.top_p * mass) & (values > 0) & (values >= least)
    keep[:, 0] = True
    return values, ids, keep
