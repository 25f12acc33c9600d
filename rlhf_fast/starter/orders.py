# SPDX-License-Identifier: Apache-2.0
"""The sample task: people order a meal, sometimes politely. Rows for every format that the trainer reads."""

from __future__ import annotations

import itertools
import random
from typing import Any

Row = dict[str, Any]

NAMES = ["ann", "ben", "cleo", "dan", "eve", "fay", "gus", "hal", "ida", "jon", "kim", "leo"]
MEALS = {
    "breakfast": ["toast", "porridge", "eggs", "yoghurt", "pancakes", "muesli"],
    "lunch": ["soup", "salad", "noodles", "rice", "lentils", "dumplings"],
    "dinner": ["pasta", "curry", "stew", "pizza", "risotto", "beans"],
}
DRINKS = ["water", "tea", "coffee", "juice", "milk", "lemonade"]
GREETINGS = ["hello", "good day", "hey", ""]
WISHES = ["i would like", "may i have", "i want", "give me"]
ENDINGS = ["please", "thank you", "now", "quickly", ""]
PHRASES = ["orders", "with", "and", *GREETINGS, *WISHES, *ENDINGS]
HELD_OUT = 12  # prompts that nothing is trained on


def words() -> list[str]:
    """Every word of the task, each once."""
    texts = [*NAMES, *MEALS, *itertools.chain(*MEALS.values()), *DRINKS, *PHRASES]
    return list(dict.fromkeys(word for text in texts for word in text.split()))


def prompts(seed: int = 0) -> tuple[list[str], list[str]]:
    """(those to train on, those held out)."""
    every = [f"{name} orders {meal}" for name in NAMES for meal in MEALS]
    random.Random(seed).shuffle(every)
    return every[HELD_OUT:], every[:HELD_OUT]


def order(prompt: str, rng: random.Random) -> str:
    """One way to order the prompt's meal. It begins with a space, since prompt and completion are put together."""
    food = rng.choice(MEALS[prompt.split()[-1]])
    drink = f"{rng.choice(['with', 'and'])} {rng.choice(DRINKS)}" if rng.random() < 0.5 else ""
    parts = (rng.choice(GREETINGS), rng.choice(WISHES), food, drink, rng.choice(ENDINGS))
    return " " + " ".join(part for part in parts if part)


def demonstrations(of: list[str], count: int, seed: int = 0) -> list[Row]:
    """`count` rows of a prompt and an order, polite or not."""
    rng = random.Random(seed)
    return [
        {"prompt": prompt, "completion": order(prompt, rng)} for prompt in itertools.islice(itertools.cycle(of), count)
    ]


def every_format(of: list[str], seed: int = 0) -> dict[str, list[Row]]:
    """File name -> a few rows, for each form that the phases read."""
    rng = random.Random(seed)
    few = of[:4]
    polite, rude = " hello may i have soup please", " hey give me soup now"
    four = [[order(prompt, rng) for _ in range(4)] for prompt in few]
    as_messages = [
        {"role": "user", "content": "A soup?"},
        {"role": "assistant", "content": "Hello, may I have the soup, please?"},
    ]
    return {
        "sft-prompt-completion.jsonl": [{"prompt": prompt, "completion": order(prompt, rng)} for prompt in few],
        "sft-messages.json": [{"messages": [{"role": "system", "content": "Be polite."}, *as_messages]}],
        "sft-text.jsonl": [{"text": "Hello, may I have the soup, please?"}, {"text": "A coffee would be lovely."}],
        "prompts-with-columns.csv": [{"prompt": prompt, "meal": prompt.split()[-1]} for prompt in few],
        "prompts-messages.jsonl": [{"prompt": as_messages[:1]}],
        "feedback-ratings.jsonl": [
            {"prompt": prompt, "completions": texts, "ratings": [4, 1, 3, 2], "annotator": "ann"}
            for prompt, texts in zip(few, four, strict=True)
        ],
        "feedback-ranks.jsonl": [
            {"prompt": prompt, "completions": texts, "ranks": [1, 3, 2, 3], "annotator": "ben"}
            for prompt, texts in zip(few, four, strict=True)
        ],
        "feedback-chosen-rejected.jsonl": [{"prompt": "ann orders lunch", "chosen": polite, "rejected": rude}],
        "feedback-to-label.jsonl": [{"prompt": p, "completions": texts} for p, texts in zip(few, four, strict=True)],
    }
