# SPDX-License-Identifier: Apache-2.0
"""The demo's *simulated rater*: a transparent rule that stands in for a person.

    rating = VADER's compound sentiment of the whole sentence, in [-1, 1],
             minus 0.1 for each word of the completion short of seven

VADER (Hutto & Gilbert 2014) adds up the sentiment of the words in a lexicon and knows negation and emphasis.
Without the second term the policy soon answers everything with " is amazing!". The rule does not claim to be good
taste: it is simple enough to see what a policy must do to score high, and where it cheats.
"""

import functools
from typing import Any

MIN_WORDS = 7
PENALTY_PER_MISSING_WORD = 0.1


@functools.cache
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def simulated_rater(prompt: str, completions: list[str]) -> list[float]:
    """Rate each completion of `prompt`; higher is better. The best possible rating is 1, the worst -1.7."""
    return [_rate(prompt, completion) for completion in completions]


def _rate(prompt: str, completion: str) -> float:
    sentiment = _vader().polarity_scores(prompt + completion)["compound"]
    missing_words = max(0, MIN_WORDS - len(completion.split()))
    return sentiment - PENALTY_PER_MISSING_WORD * missing_words
