# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of the samplers on a real small LM: the built-in one, and vLLM's server beside it.

    python benchmarks/sampling.py [--model MODEL] [--dtype bfloat16] [--engine]      the table of docs/engine.md

Eight prompts of 34 to 37 tokens, one sample and eight samples of each, temperature 0.8. A figure is the median of
`--repeats` calls, the prompts' reading included, after one call to warm up; the samplers take turns. With `--engine` a
server is started (RLHF_FAST_ENGINE_PYTHON or .venv-engine); its weights are sent once, before. The memory limit is what
reading the weights and the cache once a token allows, at the bandwidth measured before; the prompts' pass is left out.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import bandwidth, machine

from rlhf_fast.models.loading import load_causal_lm, load_tokenizer
from rlhf_fast.rollout.builtin import generate
from rlhf_fast.rollout.rollout import Sampler, SamplingParams
from rlhf_fast.rollout.sampler import Served, open_sampler
from rlhf_fast.run.options import SamplerOptions
from rlhf_fast.run.runtime import tune_process

SHAPES = ((1, 96), (8, 32))  # samples of a prompt, new tokens
PROMPTS = 8


def prompts(vocabulary: int) -> list[list[int]]:
    """Random ids."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(100, vocabulary, (34 + i % 4,), generator=generator).tolist() for i in range(PROMPTS)]


def speed(sampler: Sampler, model: Any, tokenizer: Any, each: int, most: int, seed: int) -> float:
    """Tokens per second of one call."""
    encoded = prompts(model.config.vocab_size)
    params = SamplingParams(max_new_tokens=most, temperature=0.8)
    start = time.perf_counter()
    rollout = sampler(model, tokenizer, encoded, params, seed=seed, samples_per_prompt=each)
    return int(rollout.response_mask.sum()) / (time.perf_counter() - start)


def memory_limit(model: Any, each: int, most: int, bytes_per_second: float) -> float:
    """Tokens per second if a step takes as long as reading the weights, and the cache at half of its growth."""
    rows, config, size = PROMPTS * each, model.config.get_text_config(), model.dtype.itemsize
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = (
        2
        * config.num_hidden_layers
        * (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        * head
        * size
    )
    weights = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}  # a tied head counts once
    return rows * bytes_per_second / (sum(weights.values()) + rows * (36 + most / 2) * token)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--engine", action="store_true", help="vLLM's server, too")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    tune_process()
    samplers: dict[str, Sampler] = {"built-in": generate}
    with ExitStack() as servers, tempfile.TemporaryDirectory() as folder:
        if options.engine:
            served = Served(options.model, options.dtype, 512)
            wanted = SamplerOptions(sampler="vllm-server")
            samplers["vllm-server"] = servers.enter_context(open_sampler(wanted, served, Path(folder) / "log"))
        model, tokenizer = load_causal_lm(options.model, options.dtype), load_tokenizer(options.model)
        print(machine())
        speed_of_memory = bandwidth()["read"]
        print(f"reads {speed_of_memory / 1e9:.1f} GB/s")
        print("| rows | new tokens | sampler | tokens/s, median | memory limit | of the runs |\n|" + " --- |" * 6)
        for each, most in SHAPES:
            found: dict[str, list[float]] = {name: [] for name in samplers}
            for run in range(options.repeats + 1):
                for name, sampler in samplers.items():
                    found[name].append(speed(sampler, model, tokenizer, each, most, seed=run))
            for name, (_, *speeds) in found.items():
                runs = ", ".join(f"{value:.0f}" for value in sorted(speeds))
                limit = memory_limit(model, each, most, speed_of_memory)
                print(
                    f"| {PROMPTS * each} | {most} | {name} | {median(speeds):.0f} | {limit:.0f} | {runs} |", flush=True
                )


if __name__ == "__main__":
    main()
