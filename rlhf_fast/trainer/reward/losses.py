# SPDX-License-Identifier: Apache-2.0
"""What a reward model learns from one ranking: K completions with scores s (K,) and somebody's order of them.

Every loss weighs a ranking once, however many completions it has, and ties teach nothing about the order of what is
tied. Another loss is one function here and its name in `LOSSES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_fast.feedback.encoded import EncodedRanking


def bradley_terry(scores: Tensor, ranking: EncodedRanking) -> Tensor:
    """1 / C(K, 2) x sum over pairs of -log sigmoid(s_better - s_worse) (Ouyang et al. 2022, equation 1)."""
    return _pairwise(scores, ranking, margins=False)


def margin(scores: Tensor, ranking: EncodedRanking) -> Tensor:
    """Bradley-Terry on s_better - s_worse - m, m the difference of the ratings, or of the ranks (Llama 2)."""
    return _pairwise(scores, ranking, margins=True)


def plackett_luce(scores: Tensor, ranking: EncodedRanking) -> Tensor:
    """Mean over completions of -log P(it is chosen among itself and all worse ones) (Luce 1959, Plackett 1975).

    Without ties that is -log P(order) / (K - 1); of tied completions each is set against the worse ones alone.
    """
    goodness = torch.tensor(ranking.source.goodness, device=scores.device)
    rivals = goodness[:, None] > goodness  # (K, K): [i, j] = j is worse than i
    choices = rivals | torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    terms = torch.where(choices, scores, -torch.inf).logsumexp(1) - scores
    return terms[rivals.any(1)].sum() / (len(scores) - 1)


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
        worth = scores.new_tensor(ranking.source.ratings or ranking.source.goodness)
        gaps = gaps - (worth[better] - worth[worse]).clamp(min=0)
    return -logsigmoid(gaps).sum() / math.comb(len(scores), 2)


def pair_accuracy(rankings: Sequence[EncodedRanking], scores: Sequence[Tensor]) -> float | None:
    """Share of the pairs whose better completion has the higher score; None without pairs."""
    margins = pair_margins(rankings, scores)
    return float((margins > 0).double().mean()) if len(margins) else None


def pair_margins(rankings: Sequence[EncodedRanking], scores: Sequence[Tensor]) -> Tensor:
    """(P,) score of the better less that of the worse completion, for every pair of every ranking."""
    found = [s[b] - s[w] for ranking, s in zip(rankings, scores, strict=True) for b, w in ranking.pairs]
    return torch.stack(found).detach() if found else torch.zeros(0)


def calibration(rankings: Sequence[EncodedRanking], scores: Sequence[Tensor], bins: int = 5) -> list[dict[str, float]]:
    """How sure the model is of its choice, sigmoid(|margin|), against how often it is right, in bins of sureness.

    `scores` are raw ones: it is their difference that the losses take for log-odds.
    """
    margins = pair_margins(rankings, scores)
    sure, right = margins.abs().sigmoid(), (margins > 0).float()
    place = ((sure - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    return [
        {
            "predicted": float(sure[place == b].mean()),
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
