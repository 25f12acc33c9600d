# SPDX-License-Identifier: Apache-2.0
"""Reward-model losses on one ranking: K completions with scores s (K,), and their order.

Every loss weighs a ranking once, however many completions it has, and ties teach nothing about the order of what is
tied. Another loss is one function here and its name in `LOSSES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_fast.errors import UserError
from rlhf_fast.feedback.encoded import EncodedRanking


def bradley_terry(scores: Tensor, ranking: EncodedRanking) -> Tensor:
    """Mean over the pairs of -log sigmoid(s_better - s_worse) (Ouyang et al. 2022, equation 1)."""
    return _pairwise(scores, ranking, margins=False)


def margin(scores: Tensor, ranking: EncodedRanking) -> Tensor:
    """Bradley-Terry on s_better - s_worse - m (Touvron et al. 2023, Llama 2, equation 2).

    m is the difference of the ratings, or of the ranks, in units of the largest one in the training data, which
    `scaled_margins` has seen to: from 0 to 1, as the smaller of Llama 2's margins (table 27).
    """
    return _pairwise(scores, ranking, margins=True)


def plackett_luce(scores: Tensor, ranking: EncodedRanking) -> Tensor:
    """Mean over completions of -log P(it is the best of itself and all worse ones) (Luce 1959, Plackett 1975).

    The mean is over completions that are better than some other. Without ties it is -log P(order) / (K - 1); of tied
    completions each is set against the worse ones alone.
    """
    goodness = torch.tensor(ranking.source.goodness, device=scores.device)
    rivals = goodness[:, None] > goodness  # (K, K): [i, j] = j is worse than i
    choices = rivals | torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    terms = torch.where(choices, scores, -torch.inf).logsumexp(1) - scores
    return terms[rivals.any(1)].mean()


def best_of_k(scores: Tensor, ranking: EncodedRanking) -> Tensor:
    """-log of the softmax mass on the best completion, or on those tied for it (Ziegler et al. 2019)."""
    goodness = torch.tensor(ranking.source.goodness, device=scores.device)
    return scores.logsumexp(0) - scores[goodness == goodness.max()].logsumexp(0)


def regression(scores: Tensor, ranking: EncodedRanking) -> Tensor:
    """Half the mean squared error to the ratings, which `standardised` has brought to mean 0 and deviation 1."""
    assert ranking.source.ratings is not None  # train_reward refuses rankings without
    return 0.5 * (scores - scores.new_tensor(ranking.source.ratings)).square().mean()


LOSSES: dict[str, Callable[[Tensor, EncodedRanking], Tensor]] = {
    "bradley_terry": bradley_terry,
    "margin": margin,
    "plackett_luce": plackett_luce,
    "best_of_k": best_of_k,
    "regression": regression,
}


def ranking_loss(
    scores: Sequence[Tensor], rankings: Sequence[EncodedRanking], loss: str = "bradley_terry", centering: float = 0.0
) -> Tensor:
    """Sum over rankings of the loss; `scores` holds one (K,) tensor for each.

    `centering` x the mean over pairs of (s_i + s_j)^2 keeps scores near 0 (Eisenstein et al. 2023); no order needs it.
    """
    losses = []
    for score, ranking in zip(scores, rankings, strict=True):
        if ranking.pairs or loss == "regression":
            losses.append(LOSSES[loss](score, ranking))
        if centering:
            first, second = torch.triu_indices(len(score), len(score), offset=1, device=score.device)
            losses.append(centering * (score[first] + score[second]).square().mean())
    return torch.stack(losses).sum() if losses else scores[0].sum() * 0.0


def _pairwise(scores: Tensor, ranking: EncodedRanking, margins: bool) -> Tensor:
    better, worse = torch.tensor(ranking.pairs, device=scores.device).T
    gaps = scores[better] - scores[worse]
    if margins:
        worth = scores.new_tensor(worth_of(ranking))
        gaps = gaps - (worth[better] - worth[worse]).clamp(min=0)
    return -logsigmoid(gaps).mean()


def worth_of(ranking: EncodedRanking) -> list[float]:
    """The ratings, or without ratings the negated ranks."""
    return ranking.source.ratings or ranking.source.goodness


def scaled_margins(rankings: Sequence[EncodedRanking]) -> list[EncodedRanking]:
    """Rankings with ratings divided by the largest difference within one ranking, so that margins are between 0 and 1.

    Ratings and ranks are scaled apart: a file may hold rankings with either.
    """
    largest: dict[bool, float] = {}
    for ranking in rankings:
        worth, rated = worth_of(ranking), ranking.source.ratings is not None
        largest[rated] = max(largest.get(rated, 0.0), max(worth) - min(worth))
    return [
        with_ratings(r, [value / (largest[r.source.ratings is not None] or 1.0) for value in worth_of(r)])
        for r in rankings
    ]


def standardised(rankings: Sequence[EncodedRanking]) -> list[EncodedRanking]:
    """Rankings with ratings standardised to mean 0 and deviation 1 over all of them, whatever their unit."""
    for ranking in rankings:
        if ranking.source.ratings is None:
            raise UserError(f"{ranking.source.where}: the loss regression needs ratings, and this line has ranks only")
    ratings = torch.tensor([value for ranking in rankings for value in ranking.source.ratings or []]).double()
    mean, std = float(ratings.mean()), max(float(ratings.std(correction=0)), 1e-6)
    return [with_ratings(r, [(value - mean) / std for value in r.source.ratings or []]) for r in rankings]


def with_ratings(ranking: EncodedRanking, ratings: list[float]) -> EncodedRanking:
    """The ranking with other ratings and its own order."""
    return replace(ranking, source=replace(ranking.source, ratings=ratings))


def pair_accuracy(rankings: Sequence[EncodedRanking], scores: Sequence[Tensor]) -> float | None:
    """Share of the pairs whose better completion has the higher score; None without pairs."""
    margins = pair_margins(rankings, scores)
    return float((margins > 0).double().mean()) if len(margins) else None


def pair_margins(rankings: Sequence[EncodedRanking], scores: Sequence[Tensor]) -> Tensor:
    """(P,) score of the better minus that of the worse completion, for every pair of every ranking."""
    margins = [s[b] - s[w] for ranking, s in zip(rankings, scores, strict=True) for b, w in ranking.pairs]
    return torch.stack(margins).detach() if margins else torch.zeros(0)


def calibration(rankings: Sequence[EncodedRanking], scores: Sequence[Tensor], bins: int = 5) -> list[dict[str, float]]:
    """Calibration: sigmoid(|margin|), the probability of the model's choice, against how often it is right, in bins.

    `scores` are raw: the losses treat their differences as log-odds.
    """
    margins = pair_margins(rankings, scores)
    probability, right = margins.abs().sigmoid(), (margins > 0).float()
    place = ((probability - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    return [
        {
            "predicted": float(probability[place == b].mean()),
            "observed": float(right[place == b].mean()),
            "pairs": int((place == b).sum()),
        }
        for b in range(bins)
        if bool((place == b).any())
    ]


def calibration_error(bins: Sequence[dict[str, float]]) -> float | None:
    """Mean distance of observed from predicted over all pairs; None without pairs."""
    total = sum(entry["pairs"] for entry in bins)
    gaps = sum(entry["pairs"] * abs(entry["predicted"] - entry["observed"]) for entry in bins)
    return gaps / total if total else None


# Preparation of all training rankings that a loss needs; other losses need none.
PREPARE: dict[str, Callable[[Sequence[EncodedRanking]], list[EncodedRanking]]] = {
    "margin": scaled_margins,
    "regression": standardised,
}
