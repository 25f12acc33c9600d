# SPDX-License-Identifier: Apache-2.0
"""How far annotators agree, over all pairs of completions that two of them have compared.

On a pair (i, j) an annotator says that i is better, that j is, or that they tie. Raw agreement is the share of equal
answers. Krippendorff's alpha sets it against chance (Krippendorff 2011, nominal data):

    alpha = 1 - observed disagreement / disagreement expected from the answers' frequencies

1 is perfect, 0 is chance. Which completion stands first is arbitrary, so every pair counts in both orders, which makes
"better" and "worse" equally frequent.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations, permutations
from typing import NamedTuple

from .schema import Ranking


class Agreement(NamedTuple):
    """Agreement of two or more annotators; alpha is None if all answers are the same, as chance is then undefined."""

    pairs: int  # comparisons of two annotators' answers on one pair of completions
    raw: float
    alpha: float | None


def agreement(rankings: Sequence[Ranking]) -> Agreement | None:
    """Agreement over all annotators; None if no two have rated the same completions."""
    units: dict[tuple[str, int, int], list[int]] = defaultdict(list)
    for ranking in rankings:
        for i, j in permutations(range(len(ranking.goodness)), 2):
            units[ranking.key(), i, j].append(_sign(ranking.goodness[i] - ranking.goodness[j]))
    coincidences: Counter[tuple[int, int]] = Counter()
    weights: dict[tuple[int, int], float] = defaultdict(float)
    for answers in units.values():
        for a, b in permutations(answers, 2):
            coincidences[a, b] += 1
            weights[a, b] += 1 / (len(answers) - 1)
    compared = coincidences.total()
    if not compared:
        return None
    equal = sum(count for (a, b), count in coincidences.items() if a == b)
    return Agreement(compared // 4, equal / compared, _alpha(weights))


def _alpha(weights: dict[tuple[int, int], float]) -> float | None:
    """Krippendorff's alpha from the coincidence matrix."""
    frequency: dict[int, float] = defaultdict(float)
    for (a, _), weight in weights.items():
        frequency[a] += weight
    total = sum(frequency.values())
    observed = sum(weight for (a, b), weight in weights.items() if a != b) / total
    expected = sum(frequency[a] * frequency[b] for a in frequency for b in frequency if a != b) / (total * (total - 1))
    return 1 - observed / expected if expected else None


def by_pair_of_annotators(rankings: Sequence[Ranking]) -> dict[tuple[str, str], Agreement]:
    """Agreement of every two annotators who have rated the same completions."""
    by_annotator: dict[str, list[Ranking]] = defaultdict(list)
    for ranking in rankings:
        by_annotator[ranking.annotator or "nobody named"].append(ranking)
    pairs = combinations(sorted(by_annotator), 2)
    agreements = {(a, b): agreement(by_annotator[a] + by_annotator[b]) for a, b in pairs}
    return {names: value for names, value in agreements.items() if value is not None}


def _sign(difference: float) -> int:
    return (difference > 0) - (difference < 0)
