# SPDX-License-Identifier: Apache-2.0
"""`rlhf-fast eval A B --prompts FILE`: two models on the same prompts with the same random numbers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from rlhf_fast.data.examples import encode_prompt, read_prompts
from rlhf_fast.errors import UserError
from rlhf_fast.feedback.raters import load_rater
from rlhf_fast.models.batches import MicroBatch
from rlhf_fast.models.loading import context_length, find_model, load_causal_lm, load_reward_model, load_tokenizer
from rlhf_fast.rollout.evaluate import evaluate
from rlhf_fast.rollout.rollout import Sampler, SamplingParams
from rlhf_fast.rollout.sampler import Served, add_arguments, open_sampler, options_of, server_log
from rlhf_fast.run.checkpoint import write_json
from rlhf_fast.run.terminal import printable
from rlhf_fast.trainer.rl.reward_reader import reader_of
from rlhf_fast.trainer.rl.rewards import Rewards

RESAMPLES = 2000


def win_rate(first: Sequence[float], second: Sequence[float], samples: int) -> dict[str, float]:
    """How often `second` beats `first`, a tie counting half, with a 95 % interval.

    Both hold `samples` values per prompt. The interval is a bootstrap over prompts, because samples of one prompt are
    not independent.
    """
    a, b = (torch.tensor(values, dtype=torch.float64).view(-1, samples) for values in (first, second))
    wins = ((b > a).double() + 0.5 * (b == a).double()).mean(1)  # (P,)
    generator = torch.Generator().manual_seed(0)
    drawn = wins[torch.randint(len(wins), (RESAMPLES, len(wins)), generator=generator)].mean(1)
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"rate": float(wins.mean()), "low": low, "high": high, "prompts": len(wins)}


def compare(options: argparse.Namespace, sampler: Sampler) -> dict[str, Any]:
    """Figures of both models, and win rates of the second by reward and by gold, as far as they are measured."""
    names = {"a": find_model(options.a), "b": find_model(options.b)}
    lines = read_prompts(options.prompts)[: options.limit]
    rater = load_rater(options.rater) if options.rater else None
    if rater is not None:
        rater.check_columns(lines)
    tokenizer = load_tokenizer(names["a"])
    if load_tokenizer(names["b"]).get_vocab() != tokenizer.get_vocab():
        raise UserError(f"{names['a']} and {names['b']} have different vocabularies, so there is no KL between them")
    reference = load_causal_lm(find_model(options.reference or options.a), options.dtype)
    reward = reader = None
    micro_batch = MicroBatch.of(options)
    if options.reward_model:
        source = find_reward(options.reward_model)
        reward = load_reward_model(source, options.dtype, tokenizer, new_head=False)
        reader = reader_of(reward, source, tokenizer, reference, micro_batch)
    figures: dict[str, dict[str, float]] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    for key, name in names.items():
        model = load_causal_lm(name, options.dtype)
        room = context_length(model) - options.max_new_tokens + 1
        encoded = [encode_prompt(tokenizer, line.prompt, max_length=room, where=line.where) for line in lines]
        figures[key], rows[key] = evaluate(
            model,
            lambda: nullcontext(reference),
            None if reader is not None else reward,
            tokenizer,
            lines,
            encoded,
            SamplingParams(max_new_tokens=options.max_new_tokens, temperature=options.temperature),
            samples=options.samples,
            micro_batch=micro_batch,
            rater=rater,
            sampler=sampler,
        )
        if reader is not None:
            figures[key] |= Rewards(reward, [], reader=reader).add_to(rows[key], lines)
    wins = {
        measure: win_rate([row[measure] for row in rows["a"]], [row[measure] for row in rows["b"]], options.samples)
        for measure in ("reward", "gold")
        if measure in rows["a"][0]
    }
    return {"models": names, "figures": figures, "win_rate_of_b": wins, "samples": rows}


def find_reward(name: str) -> str:
    """The reward model of a run folder (reward/model or model), or `name` itself."""
    for inside in ("reward/model", "model"):
        if (Path(name) / inside / "config.json").exists():
            return str(Path(name) / inside)
    return name


def main(arguments: Sequence[str]) -> int:
    """Parse the options of the subcommand and print a table."""
    parser = argparse.ArgumentParser("rlhf-fast eval", description="Compare two models on prompts.")
    parser.add_argument("a", help="the model to compare with: run folder, model folder or Hugging Face id")
    parser.add_argument("b", help="the model that is judged, likewise")
    parser.add_argument("--prompts", required=True, help='data file of {"prompt": ...}')
    parser.add_argument("--reward-model", help="report rewards of this reward model")
    parser.add_argument("--rater", help="report ratings of this function (gold): module:function or file.py:function")
    parser.add_argument("--reference", help="measure the KL from this model (default A)")
    parser.add_argument("--samples", type=int, default=4, help="completions of each prompt (default 4)")
    parser.add_argument("--limit", type=int, default=None, help="use the first prompts only")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--micro-batch-size", type=int, default=32, help="sequences in one pass (default 32)")
    parser.add_argument("--micro-batch-tokens", type=int, default=0, help="most tokens in one pass; 0: no limit")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--output", help="also write everything, samples included, to this JSON file")
    add_arguments(parser)
    options = parser.parse_args(list(arguments))
    if min(options.samples, options.max_new_tokens, options.temperature, options.micro_batch_size) <= 0:
        raise UserError("--samples, --max-new-tokens, --temperature and --micro-batch-size must be greater than 0")
    if options.output and Path(options.output).exists():
        raise UserError(f"{options.output} exists already; name another with --output")
    with open_sampler(options_of(options), Served(find_model(options.a), options.dtype), server_log()) as sampler:
        result = compare(options, sampler)
    if options.output:
        write_json(Path(options.output), result)
    print(printable(shown(result)))
    return 0


def shown(result: dict[str, Any]) -> str:
    """The comparison as text."""
    a, b = result["figures"]["a"], result["figures"]["b"]
    lines = [f"{'':12}{'A':>10}{'B':>10}", *(f"{name:12}{a[name]:10.3f}{b[name]:10.3f}" for name in a)]
    for measure, win in result["win_rate_of_b"].items():
        interval = f"95 % interval {win['low']:.1%} to {win['high']:.1%}, {win['prompts']} prompts"
        lines.append(f"B wins by {measure} {win['rate']:.1%} ({interval})")
    return "\n".join([*lines, f"models: {json.dumps(result['models'])}; kl is in nats per sequence"])
