# SPDX-License-Identifier: Apache-2.0
"""Phase 2: train a reward model on rankings or ratings.

The language model with a scalar head scores each completion at its last real token (by the mask); a completion is
read once, not once for each of its pairs. `losses.py` has what is learned from the scores. Prompts are held out
to measure how often the better one of a pair gets the higher score, and how sure the model is when it is right.

At the end scores are normalised to mean 0 and standard deviation 1 on samples of the model that RL will start from,
and both figures are stored in the model's config. The result is an ordinary AutoModelForSequenceClassification.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.data.examples import pad_right
from rlhf_fast.data.limits import Limits
from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.errors import Interrupted, UserError
from rlhf_fast.feedback.encoded import EncodedRanking, encode_all
from rlhf_fast.feedback.schema import read_feedback
from rlhf_fast.models.activations import set_up_activations
from rlhf_fast.models.adapters import save_adapters
from rlhf_fast.models.batches import Batch, MicroBatch, in_groups, in_micro_batches
from rlhf_fast.models.dropout import switch_on_dropout
from rlhf_fast.models.fsdp import pad_to_ranks, shard_size, sharded
from rlhf_fast.models.heads import sequence_scores
from rlhf_fast.models.loading import (
    context_length,
    device,
    fit_padding,
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
    parameter_count,
    reading_limits,
    resolve_dtype,
    reward_parameter_count,
    set_score_normalizer,
)
from rlhf_fast.models.lora import add_lora, merged
from rlhf_fast.models.optim import AdamW
from rlhf_fast.models.padding import generation_config_of, give_own_padding
from rlhf_fast.rollout.builtin import end_ids
from rlhf_fast.rollout.rollout import SamplingParams
from rlhf_fast.rollout.sampler import SERVER_LOG, Served, check_servers, open_sampler
from rlhf_fast.run.autosave import Autosave, SaveOptions
from rlhf_fast.run.checkpoint import load_state, require_space, rng_state, seed_everything, set_rng_state
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.run.progress import Progress, StopFlag, Timer
from rlhf_fast.run.records import read_jsonl
from rlhf_fast.run.resume import finished_summary
from rlhf_fast.run.runtime import tune_process
from rlhf_fast.run.threads import threads
from rlhf_fast.run.verdicts import LiveVerdict, of_reward

from .config import RewardConfig
from .losses import PREPARE, calibration, calibration_error, pair_accuracy, ranking_loss

MAX_GRAD_NORM = 1.0
NORMALIZER_PROMPTS = 64
USUAL_LENGTHS = 0.9  # share of the rated completions that are no longer than what the normaliser samples
TRAIN_SHOWN = 256  # training rankings in train_pair_accuracy: to score all takes a quarter of the time of an epoch


def train_reward(config: RewardConfig, run: RunFolder) -> dict[str, Any]:
    """Train a reward model on `config.feedback_file` into `run`'s folder `model/`; returns the summary.

    Raises UserError for bad data, Interrupted after a Ctrl-C that was saved.
    """
    config.validate()
    config = resolved(config)
    if (finished := finished_summary(run, config)) is not None:
        return finished
    timer = Timer()
    rankings = read_feedback(config.feedback_file, config.strict, config.criterion)
    check_servers(config)
    seed_everything(config.seed)
    tune_process()
    with timer("load"):
        tokenizer, model, adapters = load(config)
    require_space(run.path, parameter_count(model), config.save_steps)
    fit_padding(tokenizer, model)
    ordered = config.loss != "regression"
    limits = reading_limits(model, Limits(config.max_length, config.overlong, config.strict))
    encoded = encode_all(tokenizer, rankings, limits, need_pairs=ordered, source=config.feedback_file)
    train, held_out = split(encoded, config)
    if config.loss in PREPARE:
        train = PREPARE[config.loss](train)
    run.save_config(config)

    with timer("train"):
        steps = _train(config, run, model, tokenizer.pad_token_id, train, timer)
    with timer("evaluate"):
        shown = train if mostly_of(config.model, train + held_out) else spread(train, TRAIN_SHOWN)
        train_scores = score_all(model, shown, tokenizer.pad_token_id, MicroBatch.of(config))
        held_out_scores = score_all(model, held_out, tokenizer.pad_token_id, MicroBatch.of(config))
    with timer("normalise"):
        log = run.path / SERVER_LOG
        mean, std = normalizer(config, model, tokenizer, shown + held_out, train_scores + held_out_scores, log)
    set_score_normalizer(model, mean, std)
    gap = read_position_gap(model, (held_out or train)[0], tokenizer.pad_token_id)
    with timer("save"):
        pad_token = _save(config, run, tokenizer, model, adapters)
        _write_samples(run, held_out, [(scores - mean) / std for scores in held_out_scores])

    summary = {
        "steps": steps,
        "rankings": len(train),
        "pairs": sum(len(ranking.pairs) for ranking in train),
        "heldout_rankings": len(held_out),
        "heldout_pairs": sum(len(ranking.pairs) for ranking in held_out),
        "train_pair_accuracy": pair_accuracy(shown, train_scores),
        "heldout_pair_accuracy": pair_accuracy(held_out, held_out_scores),
        "calibration": (bins := calibration(held_out, held_out_scores)),
        "calibration_error": calibration_error(bins),
        "read_position_gap": gap,
        "score_mean": mean,
        "score_std": std,
        "pad_token": pad_token,
        "seconds": timer.elapsed(),
        "seconds_by_part": timer.parts(),
    }
    if (accuracy := pair_accuracy(held_out, held_out_scores)) is not None:
        run.log({"eval/pair_accuracy": accuracy}, steps)
    run.finish(summary)
    return summary


def _save(config: RewardConfig, run: RunFolder, tokenizer: Any, model: Any, adapters: Any | None) -> str | None:
    """Write model/, and adapters/ with LoRA; returns the pad token, None if the tokenizer has none to pad with."""
    if adapters is not None:
        save_adapters(adapters, run, head="score")
        model = merged(adapters)
    policy = SimpleNamespace(generation_config=generation_config_of(config.model))
    saved = give_own_padding(model, tokenizer, end_ids(policy, tokenizer))
    run.save_model(model, saved)
    return None if model.config.pad_token_id is None else str(saved.pad_token)


def load(config: RewardConfig) -> tuple[Any, Any, Any | None]:
    """The tokenizer, the language model with a new head, and with LoRA the PeftModel around it."""
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    trust, four_bit = config.trust_remote_code, config.load_in_4bit
    model = load_reward_model(config.model, resolve_dtype(config.dtype), tokenizer, trust, four_bit, new_head=True)
    model = sharded(model, config.fsdp, config.fsdp_size)
    adapters = add_lora(model, config.lora_rank, head=model.score) if config.lora_rank else None
    if config.dropout:
        switch_on_dropout(model)
    set_up_activations(model, config.gradient_checkpointing, config.activation_offloading)
    return tokenizer, model, adapters


def split(
    rankings: Sequence[EncodedRanking], config: RewardConfig
) -> tuple[list[EncodedRanking], list[EncodedRanking]]:
    """(train, held out) by prompt, so that no prompt is in both; the choice depends on the seed alone."""
    prompts = sorted({str(ranking.source.prompt) for ranking in rankings})
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(config.seed)).tolist()
    count = math.ceil(config.eval_fraction * len(prompts))
    if config.eval_fraction and count >= len(prompts):
        raise UserError(
            f"{config.feedback_file}: {len(prompts)} different prompts are too few to hold out "
            f"{config.eval_fraction:.0%} of them; add prompts or set eval_fraction to 0"
        )
    held_out = {prompts[i] for i in order[:count]}
    train = [ranking for ranking in rankings if str(ranking.source.prompt) not in held_out]
    return train, [ranking for ranking in rankings if str(ranking.source.prompt) in held_out]


def forward_scores(model: Any, rankings: Sequence[EncodedRanking], pad_id: int) -> list[Tensor]:
    """One (K,) float32 tensor of scores for each ranking, from one forward pass over all of them."""
    sequences = [ids for ranking in rankings for ids in ranking.sequences]
    input_ids, attention_mask = (x.to(device()) for x in pad_right(sequences, pad_id))
    scores = sequence_scores(model, Batch(input_ids, attention_mask.bool(), attention_mask.bool()))
    return list(scores.split([len(ranking.sequences) for ranking in rankings]))


def micro_batches(rankings: Sequence[EncodedRanking], most: MicroBatch) -> list[list[EncodedRanking]]:
    """Split into micro-batches within `most` (at least one ranking)."""
    units = [(len(ranking.sequences), max(map(len, ranking.sequences))) for ranking in rankings]
    return [[rankings[i] for i in group] for group in in_groups(units, most)]


@torch.no_grad()
def score_all(model: Any, rankings: Sequence[EncodedRanking], pad_id: int, most: MicroBatch) -> list[Tensor]:
    """Scores (K,) of every ranking, on the CPU. Each rank computes its share and gets the scores of all."""
    model.eval()
    own: list[Tensor] = []
    for part in pad_to_ranks(micro_batches(rankings[ranks().index :: ranks().count], most), model, []):
        shown = part or rankings[:1]  # a rank without rankings still runs: the others need its shards
        own += [score.cpu() for score in forward_scores(model, shown, pad_id)][: len(part)]
    scores: list[Tensor] = [torch.empty(0)] * len(rankings)
    for rank, rank_scores in enumerate(ranks().every(own)):
        scores[rank :: ranks().count] = rank_scores
    return scores


def resolved(config: RewardConfig) -> RewardConfig:
    """A copy in which `lr` is a number, as config.yaml shows it and resuming compares it."""
    if config.lr is not None:
        return config
    count = reward_parameter_count(config.model, config.trust_remote_code)
    return replace(config, lr=usual_lr(count, config.lora_rank > 0))


def usual_lr(parameters: int, adapters: bool = False) -> float:
    """Learning rate for a model of so many weights; adapters learn with ten times that.

    A power law through 1.5e-4 at 135M weights (the demo has 2e-4) and about 1e-5 at 7B (Touvron et al. 2023, Llama 2,
    section 3.2.2).
    """
    lr = min(5e-4, 1.5e-4 * (1.35e8 / max(parameters, 1)) ** 0.65)
    return 10 * lr if adapters else lr


def _train(
    config: RewardConfig, run: RunFolder, model: Any, pad_id: int, rankings: Sequence[EncodedRanking], timer: Timer
) -> int:
    """Train `model` in place; returns the number of steps. Checkpoints hold what `timer` has counted."""
    head = list(model.score.parameters())
    trunk = [p for p in model.parameters() if all(p is not h for h in head)]
    assert config.lr is not None  # `resolved`
    groups = [{"params": trunk, "lr": config.lr}, {"params": head, "lr": config.head_lr}]
    optimizer = AdamW(groups, lr=config.lr, kind=config.optimizer)
    peaks = [group["lr"] for group in optimizer.param_groups]
    per_epoch = math.ceil(len(rankings) / config.batch_size)
    total = max(1, round(config.epochs * per_epoch))
    step = 0
    if (checkpoint := run.latest_checkpoint()) is not None:
        state = load_state(checkpoint, "step", "optimizer", "rng", shard_size=shard_size(model))
        optimizer.load_state_dict(state["optimizer"])
        set_rng_state(state["rng"])
        step = int(state["step"])
        timer.resume(state.get("timer"))
    run.truncate_metrics(step)
    verdict = LiveVerdict(of_reward, read_jsonl(run.path / "metrics.jsonl"))

    drawn = rng_state()  # when the last step ended: one that fails has drawn numbers, for dropout

    def save(step: int) -> None:
        state = {"step": step, "optimizer": optimizer.state_dict(), "rng": drawn, "timer": timer.state()}
        run.save_checkpoint(step, state)

    model.train()
    with (
        StopFlag() as stop,
        Progress("reward", total) as bar,
        Autosave(run, SaveOptions.of(config), [model], step, save) as autosave,
    ):
        optimizer.before_step(autosave.begin_change)
        while step < total:
            epoch, place = divmod(step, per_epoch)
            order = torch.randperm(len(rankings), generator=torch.Generator().manual_seed(config.seed + epoch)).tolist()
            batch = [rankings[i] for i in order[place * config.batch_size : (place + 1) * config.batch_size]]
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * (1 - step / total)
            threads().fit()
            metrics = _step(config, model, optimizer, batch, pad_id)
            step += 1
            drawn = rng_state()
            run.log({**metrics, "lr": optimizer.param_groups[0]["lr"]}, step)
            bar.update(step, verdict.after(metrics), **metrics)
            if autosave.after_step(step, stop.requested) and step < total:
                raise Interrupted(f"reward model stopped at step {step} of {total}; --resume goes on from there")
        autosave.finish(step)
        run.stop_requested = stop.requested
    return step


def _step(
    config: RewardConfig, model: Any, optimizer: AdamW, batch: Sequence[EncodedRanking], pad_id: int
) -> dict[str, float]:
    """One optimizer step on the mean loss of `batch`, in micro-batches, each rank on its share."""
    loss, right, pairs = 0.0, 0.0, 0
    for part in pad_to_ranks(micro_batches(batch[ranks().index :: ranks().count], MicroBatch.of(config)), model, []):
        shown = part or batch[:1]  # a rank without rankings still runs: the others need its shards
        scores = forward_scores(model, shown, pad_id)
        part_loss = ranking_loss(scores, shown, config.loss, config.centering) * bool(part) / len(batch)
        part_loss.backward()
        loss += float(part_loss.detach())
        count = sum(len(ranking.pairs) for ranking in part)
        right += (pair_accuracy(shown, scores) or 0.0) * count
        pairs += count
    loss, right, count_all = ranks().total([loss, right, pairs])
    norm = optimizer.step(MAX_GRAD_NORM)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise UserError(f"the reward model's loss is {loss} and its gradient norm {norm}; lower lr or head_lr")
    return {"loss": loss, "pair_accuracy": right / max(count_all, 1), "grad_norm": norm}


def normalizer(
    config: RewardConfig,
    model: Any,
    tokenizer: Any,
    rankings: Sequence[EncodedRanking],
    scores: Sequence[Tensor],
    log: Path,
) -> tuple[float, float]:
    """Mean and standard deviation of raw scores on samples of `config.model`, where RL will start.

    These are the rated completions if most of them name this model; else new ones are sampled. `log` is for the output
    of an engine that is started for it.
    """
    own = [s for ranking, s in zip(rankings, scores, strict=True) if ranking.source.model == config.model]
    if not mostly_of(config.model, rankings):
        policy = load_causal_lm(config.model, config.dtype, config.trust_remote_code, config.load_in_4bit)
        prompts = {str(r.source.prompt): r.sequences[0][: r.prompt_length] for r in rankings}
        lengths = sorted(len(ids) - ranking.prompt_length for ranking in rankings for ids in ranking.sequences)
        ids = list(prompts.values())[:NORMALIZER_PROMPTS]
        longest_prompt = max(map(len, ids))
        usual = lengths[int(USUAL_LENGTHS * (len(lengths) - 1))]
        longest = max(1, min(usual, context_length(policy) - longest_prompt))
        with open_sampler(config, Served(config.model, config.dtype, longest_prompt + longest), log) as sampler:
            rollout = sampler(
                policy,
                tokenizer,
                ids,
                SamplingParams(max_new_tokens=longest),
                seed=config.seed,
                samples_per_prompt=2,
            )
        batch = rollout.batch
        plan = batch.plan(config.micro_batch_size, tokens=config.micro_batch_tokens)
        own = [in_micro_batches(lambda part: sequence_scores(model, part), batch, plan).cpu()]
    every = torch.cat(list(own))
    return float(every.mean()), max(float(every.std(correction=0)), 1e-6)


def mostly_of(model: str, rankings: Sequence[EncodedRanking]) -> bool:
    """Whether most of the rated completions name `model` as the one that they were sampled from."""
    return 2 * sum(ranking.source.model == model for ranking in rankings) >= len(rankings)


def spread(rankings: Sequence[EncodedRanking], most: int) -> list[EncodedRanking]:
    """At most `most` of the rankings, at equal distances."""
    return list(rankings[:: max(1, math.ceil(len(rankings) / most))])


@torch.no_grad()
def read_position_gap(model: Any, ranking: EncodedRanking, pad_id: int) -> float:
    """Largest difference between normalised scores alone and in a padded batch: 0 if read at the last real token."""
    together = forward_scores(model, [ranking], pad_id)[0]
    single = [replace(ranking, sequences=[ids]) for ids in ranking.sequences]
    alone = torch.cat([forward_scores(model, [one], pad_id)[0] for one in single])
    return float((together - alone).abs().max())


def _write_samples(run: RunFolder, rankings: Sequence[EncodedRanking], scores: Sequence[Tensor]) -> None:
    """Write samples.jsonl: the held-out completions with their ratings and normalised scores."""
    rows = [
        {
            "prompt": ranking.source.prompt,
            "completion": completion,
            "goodness": goodness,
            "score": float(score[k]),
        }
        for ranking, score in zip(rankings, scores, strict=True)
        for k, (completion, goodness) in enumerate(zip(ranking.source.texts, ranking.source.goodness, strict=True))
    ]
    run.append_jsonl("samples.jsonl", rows, keep_lines=0)
