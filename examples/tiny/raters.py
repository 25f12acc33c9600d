# SPDX-License-Identifier: Apache-2.0
"""The tiny task's rater: the share of an answer's eight words that are on the topic the prompt names."""

TOPICS = {
    "animals": ["cat", "dog", "horse", "sheep", "goat", "duck", "mouse", "wolf"],
    "colors": ["red", "blue", "green", "yellow", "black", "white", "pink", "brown"],
    "food": ["bread", "rice", "cheese", "apple", "soup", "honey", "egg", "salt"],
    "weather": ["rain", "snow", "wind", "sun", "cloud", "storm", "fog", "frost"],
}
ANSWER_WORDS = 8


def topic_share(prompt: str, completions: list[str]) -> list[float]:
    """Words on the topic / max(8, words), in [0, 1]; the prompt's last word names the topic."""
    on_topic = set(TOPICS[prompt.split()[-1]])
    answers = [completion.split() for completion in completions]
    return [sum(word in on_topic for word in words) / max(ANSWER_WORDS, len(words)) for words in answers]
