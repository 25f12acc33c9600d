# SPDX-License-Identifier: Apache-2.0
"""Write the tiny task: a random two-layer, 64-wide Llama-type model, its tokenizer and three data files.

    python examples/tiny/make_data.py runs/tiny-data

writes `model/`, `sft.jsonl`, `feedback_prompts.jsonl` and `heldout.jsonl` there, in a second, without a
network. A prompt such as "ann wants animals" names a topic; a demonstration is eight words, each drawn from
the topic with probability 1/4 and otherwise from all 32 words, so that the fine-tuned model knows the topics
and can still improve.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # raters.py is next to this file, and there is no package
from raters import ANSWER_WORDS, TOPICS

from rlhf_fast.models.tiny import write_tiny_model

NAMES = ["ann", "ben", "cleo", "dan", "eve", "fay", "gus", "hal", "ida", "jon", "kim", "leo"]
VERBS = ["wants", "likes", "needs"]
ON_TOPIC = 0.25  # plus a quarter of the rest by chance: 0.44 of a demonstration's words are on the topic


def make_tiny(
    folder: Path, *, seed: int = 0, demonstrations: int = 1200, rankings: int = 384, heldout: int = 48
) -> None:
    """Write the model and the data files into `folder`, the same ones for the same `seed`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    prompts = [f"{name} {verb} {topic}" for name in NAMES for verb in VERBS for topic in TOPICS]
    rng.shuffle(prompts)
    unseen, seen = prompts[:heldout], prompts[heldout:]
    chosen = [rng.choice(seen) for _ in range(demonstrations)]
    _write_jsonl(folder / "sft.jsonl", [{"prompt": p, "completion": _demonstration(p, rng)} for p in chosen])
    _write_jsonl(folder / "feedback_prompts.jsonl", [{"prompt": rng.choice(seen)} for _ in range(rankings)])
    _write_jsonl(folder / "heldout.jsonl", [{"prompt": p, "completion": _demonstration(p, rng)} for p in unseen])
    words = [*NAMES, *VERBS, *TOPICS, *(word for topic in TOPICS.values() for word in topic)]
    write_tiny_model(folder / "model", words, seed=seed)


def _demonstration(prompt: str, rng: random.Random) -> str:
    own = TOPICS[prompt.split()[-1]]
    every = [word for words in TOPICS.values() for word in words]
    return " " + " ".join(rng.choice(own if rng.random() < ON_TOPIC else every) for _ in range(ANSWER_WORDS))


def _write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    make_tiny(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tiny-data"))
