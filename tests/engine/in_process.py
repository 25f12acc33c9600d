# SPDX-License-Identifier: Apache-2.0
"""Samples by vLLM in this process, as JSON: `python in_process.py MODEL`, with a Python that has vLLM; or in several
processes, by torchrun, each its share of the prompts.

TRAINER_SITE is a folder of packages that vLLM's environment lacks, such as accelerate; its own come first.
"""

from __future__ import annotations

import json
import os
import random
import sys
from typing import Any

sys.path.append(os.environ["TRAINER_SITE"])

import torch  # noqa: E402
from helpers.engine_policy import PROMPTS, Tokenizer, learn, policy  # noqa: E402

from rlhf_fast.distributed.ranks import ranks  # noqa: E402
from rlhf_fast.models.heads import token_logprobs  # noqa: E402
from rlhf_fast.rollout.engine import EngineError, EngineSampler  # noqa: E402
from rlhf_fast.rollout.rollout import Rollout, SamplingParams  # noqa: E402
from rlhf_fast.rollout.vllm_in_process import VLLMInProcess  # noqa: E402

DRAWS = {"plain": {}, "top_k": {"top_k": 7}, "top_p": {"top_p": 0.8}}


def gap(model: Any, rollout: Rollout) -> float:
    assert rollout.logprobs is not None
    with torch.no_grad():
        return float((token_logprobs(model, rollout.batch, 0.8) - rollout.logprobs).abs().max())


def main() -> dict[str, Any]:
    random.seed(3)
    torch.manual_seed(3)
    wanted = random.Random(3).random(), torch.rand(2, generator=torch.Generator().manual_seed(3)).tolist()
    set_threads, variables = torch.set_num_threads, dict(os.environ)
    engine = VLLMInProcess(sys.argv[1], "float32", 128, block_size=32)
    changed = {name for name in os.environ if os.environ[name] != variables.get(name) and not name.startswith("VLLM_")}
    undisturbed = (random.random(), torch.rand(2).tolist()) == wanted and torch.set_num_threads is set_threads
    sampler, model, found = EngineSampler(engine), policy(), []
    mine = ranks().share(len(PROMPTS), "prompts")
    for step, options in enumerate([*DRAWS.values(), {}]):
        rollout = sampler(
            model, Tokenizer(), PROMPTS[mine], SamplingParams(max_new_tokens=8, temperature=0.8, **options), seed=step,
            samples_per_prompt=4, first_prompt=mine.start,
        )  # fmt: skip
        kept = None if rollout.support is None else ranks().cat(rollout.support.ids).tolist()
        texts = [text for part in ranks().every(rollout.texts) for text in part]
        found.append({"texts": texts, "gap": max(ranks().every(gap(model, rollout))), "kept": kept})
        learn(model, step)
    refused = []
    for prompt in ([3, 96], [3] * 125):
        try:
            sampler(model, Tokenizer(), [prompt], SamplingParams(max_new_tokens=8), seed=0)
        except EngineError as error:
            refused.append(str(error))
    engine.close()
    assert ranks().total([1.0]) == [float(os.environ.get("WORLD_SIZE", "1"))]  # the group of the trainer is left alone
    return {"rounds": found, "refused": refused, "undisturbed": undisturbed, "changed": sorted(changed)}


if __name__ == "__main__":
    result = json.dumps(main())
    if ranks().main:
        print("RESULT " + result, flush=True)
