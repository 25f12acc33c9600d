# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a policy on held-out prompts: reward, simulated rater, KL from the reference, variety."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.data.examples import PromptLine
from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.feedback.raters import Rater
from rlhf_fast.models.batches import NO_ROWS, Batch, MicroBatch, in_micro_batches
from rlhf_fast.models.fsdp import pad_to_ranks
from rlhf_fast.models.heads import sequence_scores, token_logprobs, token_logprobs_entropy

from .builtin import generate
from .rollout import Rollout, Sampler, SamplingParams, needs_all_ranks

OpenReference = Callable[[], AbstractContextManager[Any]]  # yields the model that the KL is measured from
EVAL_SEED = 20_000_003  # one seed for every evaluation, so that before and after draw the same random numbers


def evaluate(
    policy: Any,
    reference: OpenReference,
    reward: Any,
    tokenizer: Any,
    prompts: Sequence[PromptLine],
    encoded: list[list[int]],
    params: SamplingParams,
    *,
    samples: int,
    micro_batch: MicroBatch,
    total: int | None = None,
    rater: Rater | None = None,
    sampler: Sampler = generate,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Figures and one row for each sample: prompt, completion, reward, gold (if a rater is given), kl, entropy, tokens,
    ended; a row's kl and entropy are sums over its tokens.

    reward: mean normalised score (where there is a reward model). gold: mean of the simulated rater. kl: nats per
    sequence, log p - log p_ref summed over the tokens the policy sampled. entropy: nats per token. distinct: share of
    different texts among the samples. distinct_2: different word pairs by all word pairs. ended: share that ended by
    themselves. With several ranks each samples its share of the prompts, and all get all rows. With `total` the prompts
    are the first of so many, and their random numbers those of an evaluation of all.
    """
    own: dict[int, list[dict[str, Any]]] = {}
    size = max(1, SAMPLES_AT_ONCE // samples)
    starts = range(0, len(prompts), size)
    for place in range(ranks().index, -(-len(starts) // ranks().count) * ranks().count, ranks().count):
        has_work = place < len(starts)
        if not has_work and not needs_all_ranks(sampler, policy):
            break
        start = starts[place] if has_work else 0
        part = encoded[start : start + size]
        numbers: dict[str, int] = {"seed": EVAL_SEED + start, "samples_per_prompt": samples}
        if total is not None:
            numbers["total_prompts"] = min(size, total - start)
        rollout = sampler(policy, tokenizer, part, params, **numbers)
        measured = _measure(policy, reference, reward, rollout, params.temperature, micro_batch)
        if has_work:
            own[start] = measured
    parts = {start: part for rank in ranks().every(own) for start, part in rank.items()}
    rows = [row for start in sorted(parts) for row in parts[start]]
    groups = [[row["completion"] for row in rows[place : place + samples]] for place in range(0, len(rows), samples)]
    for place, row in enumerate(rows):
        row["prompt"] = prompts[place // samples].prompt
    if rater is not None:
        by_prompt = list(zip(prompts, groups, strict=True))
        ratings = ranks().once(lambda: [rater(line.prompt, group, **line.columns) for line, group in by_prompt])
        for row, rating in zip(rows, (x for group in ratings for x in group), strict=True):
            row["gold"] = rating
    return figures_of(rows), rows


def figures_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The figures of an evaluation from its rows, or of a part of its prompts from theirs."""
    functions = dict.fromkeys(name for row in rows for name in row if name.startswith("rewards/"))
    figures = {}
    for name, shown in {**SHOWN_AS, **{name: name for name in functions}}.items():
        if values := [row[name] for row in rows if name in row]:  # a function may have no opinion of a sample
            figures[shown] = sum(values) / len(values)
    if all("entropy" in row for row in rows):  # not so in samples.jsonl of earlier versions
        figures["entropy"] = sum(row["entropy"] for row in rows) / sum(row["tokens"] for row in rows)
    return {**figures, **variety([row["completion"] for row in rows])}


SAMPLES_AT_ONCE = 128  # limits the memory of the KV cache
SHOWN_AS = {"reward": "reward", "gold": "gold", "kl": "kl", "tokens": "length", "ended": "ended"}


def _measure(
    policy: Any, reference: OpenReference, reward: Any, rollout: Rollout, temperature: float, micro_batch: MicroBatch
) -> list[dict[str, Any]]:
    """One row for each sample; its entropy is the sum over its tokens."""
    batch = rollout.batch
    plan = pad_to_ranks(batch.plan(micro_batch.rows, tokens=micro_batch.tokens), policy, NO_ROWS)

    def with_entropy(part: Batch) -> Tensor:
        return torch.stack(token_logprobs_entropy(policy, part, temperature), -1)

    own, entropy = in_micro_batches(with_entropy, batch, plan).unbind(-1)
    with reference() as model:
        ref_own = in_micro_batches(lambda part: token_logprobs(model, part, temperature), batch, plan)
    columns = {
        "completion": rollout.texts,
        "kl": (own - ref_own).sum(1).tolist(),
        "entropy": entropy.sum(1).tolist(),
        "tokens": rollout.response_mask.sum(1).tolist(),
        "ended": rollout.ended.tolist(),
    }
    if reward is not None:
        columns["reward"] = in_micro_batches(lambda part: sequence_scores(reward, part), batch, plan).tolist()
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def variety(texts: list[str]) -> dict[str, float]:
    """Share of distinct texts, and of distinct word pairs among all word pairs of all texts (1 where there is none)."""
    pairs = Counter(pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False))
    return {
        "distinct": len({text.strip() for text in texts}) / len(texts),
        "distinct_2": len(pairs) / pairs.total() if pairs else 1.0,
    }
