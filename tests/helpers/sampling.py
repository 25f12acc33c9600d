# SPDX-License-Identifier: Apache-2.0
"""What the built-in sampler makes of a causal LM: the distributions it samples from, beside the model's own.

`python tests/helpers/sampling.py` tries every class of transformers that builds tiny, in two minutes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from rlhf_fast.errors import UserError
from rlhf_fast.rollout import builtin
from rlhf_fast.rollout.rollout import SamplingParams

PROMPTS = [[5, 9, 11, 40], [8, 33], [6, 33, 21, 50, 4, 17]]


class Tokenizer:
    """As much of one as sampling asks for."""

    pad_token_id, eos_token_id = 0, -1  # no end

    def decode(self, ids: Tensor, skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids.tolist() if isinstance(ids, Tensor) else ids))


def outcome(model: Any) -> str:
    """'sampled' if every token is drawn from softmax of the model's own logits, 'wrong by ...' nats if from another
    distribution, else why the model is refused."""
    seen: list[Tensor] = []
    draw = builtin.draw

    def watched(logits: Tensor, *args: Any) -> Any:
        seen.append(logits.clone())
        return draw(logits, *args)

    params = SamplingParams(max_new_tokens=4)
    model.generation_config.eos_token_id = None
    builtin.draw = watched
    try:
        rollout = builtin.generate(model, Tokenizer(), PROMPTS, params, seed=0, samples_per_prompt=2)
    except UserError as error:
        return f"refused: {error}"
    finally:
        builtin.draw = draw
    worst = 0.0
    if sum(map(len, seen)) != int(rollout.response_mask.sum()):
        return f"{sum(map(len, seen))} draws for {int(rollout.response_mask.sum())} tokens"
    drawn = [logits.log_softmax(-1) for logits in seen]
    for row in range(len(rollout.texts)):
        ids = rollout.input_ids[row][rollout.attention_mask[row]]
        start = len(PROMPTS[row // 2])
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1)
        for step in range(len(ids) - start):
            gaps = (drawn_at(drawn, row, step) - logits[start + step - 1]).abs()
            worst = max(worst, float(gaps.max()))
    return "sampled" if worst < 1e-3 else f"wrong by {worst:.2g} nats"


def drawn_at(drawn: list[Tensor], row: int, step: int) -> Tensor:
    """(V,) log-probabilities that a token was drawn from. All rows in one wave, or two of each prompt in each."""
    if len(drawn[0]) == 2 * len(PROMPTS):
        return drawn[step][row]
    return drawn[row // 2 * 4 + step][row % 2]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from helpers import causal_lms

    transformers.logging.set_verbosity_error()
    for model_type, name in causal_lms.classes():
        model = causal_lms.tiny(model_type, name)
        print(f"{name}: {causal_lms.NOT_BUILT if model is None else outcome(model)}", flush=True)
