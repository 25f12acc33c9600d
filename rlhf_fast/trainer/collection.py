# SPDX-License-Identifier: Apache-2.0
"""`rlhf-fast collect`: sample several completions of each prompt into a feedback file, rated by a function or not yet.

Lines are appended at once: a run that stops loses nothing, and `--resume` continues after the last line.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from rlhf_fast.data.encoding import vocabulary_id
from rlhf_fast.data.examples import PromptLine, read_prompts
from rlhf_fast.data.files import read_lines
from rlhf_fast.data.limits import Limits, encode_prompts
from rlhf_fast.data.messages import Chat, Prompt
from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.errors import Interrupted, UserError
from rlhf_fast.feedback.raters import Rater, load_rater
from rlhf_fast.run.checkpoint import write_text
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.run.options import FILE, RunOptions, SamplerOptions, SamplingOptions
from rlhf_fast.run.progress import Progress, StopFlag, Timer
from rlhf_fast.run.records import whole_lines
from rlhf_fast.run.resume import finished_summary
from rlhf_fast.run.threads import threads

FEEDBACK_FILE = "feedback.jsonl"


@dataclass
class CollectOptions(SamplerOptions, SamplingOptions):
    """Several completions of each prompt, rated by a function or left for a person to rate."""

    CHANGEABLE = frozenset({"rater"})
    EXTENDS = frozenset({"prompts_file"})
    KEEPS_CHECKPOINTS = False

    prompts_file: Annotated[str, FILE] = ""
    """JSONL of prompts: {"prompt": text or messages} on each line."""
    rater: str | None = None
    """`module:function` or `file.py:function`: f(prompt, completions) -> ratings. None: a person rates them later."""


@dataclass
class CollectConfig(CollectOptions, RunOptions):
    """Sample several completions of each prompt and have them rated."""

    def validate(self) -> None:
        """Raise UserError if an option is out of its range, or does not go with another."""
        super().validate()
        if self.push_to_hub:
            raise UserError("push_to_hub uploads models, and collect makes none")

    def check_extension(self, folder: Path) -> None:
        """UserError if the feedback in `folder` is of prompts that the prompts file does not hold in this order."""
        done = _prompts_in(folder / FEEDBACK_FILE)
        lines = read_prompts(self.prompts_file, self.strict)
        if len(lines) > len(done):  # some may have been left out, as too long
            later = iter(lines)
            lines = [next((x for x in later if x.prompt == done[i][0]), lines[i]) for i in range(len(done))]
        _check_same(done, lines)


def collect(config: CollectConfig, run: RunFolder) -> dict[str, Any]:
    """Sample K completions of every prompt, have them rated, append them to the run's `feedback.jsonl`.

    Returns the summary: file, prompts, completions, share that ended by themselves, mean rating, seconds.
    """
    from rlhf_fast.rollout.rollout import SamplingParams

    config.validate()
    SamplingParams.of(config)  # refuses what does not go together
    if (finished := finished_summary(run, config)) is not None:
        return finished
    lines = read_prompts(config.prompts_file, config.strict)
    rater = load_rater(config.rater) if config.rater else None
    if rater is not None:
        rater.check_columns(lines)
    timer = Timer()
    sampled_before = _rows_done(run)
    if len(sampled_before) >= len(lines):
        _check_same(sampled_before, lines)
    else:
        _collect(config, run, lines, sampled_before, rater, timer)
    ranks().wait()
    summary = _summary(run, timer)
    run.write_json("summary.json", summary)
    return summary


class Policy(NamedTuple):
    """What is sampled from, and by what."""

    model: Any
    tokenizer: Any
    sampler: Any


def _collect(
    config: CollectConfig,
    run: RunFolder,
    lines: list[PromptLine],
    sampled_before: list[tuple[Prompt, str]],
    rater: Rater | None,
    timer: Timer,
) -> None:
    """Sample and rate the prompts that are left."""
    from rlhf_fast.models.loading import fit_padding, load_causal_lm, load_tokenizer, reading_limits
    from rlhf_fast.rollout.sampler import SERVER_LOG, Served, open_sampler

    served = Served(config.model, config.dtype, config.max_length)
    with open_sampler(config, served, run.path / SERVER_LOG) as sampler:
        with timer("load"):
            tokenizer = load_tokenizer(config.model, config.trust_remote_code)
            model = load_causal_lm(config.model, config.dtype, config.trust_remote_code).eval()
            fit_padding(tokenizer, model)
        policy = Policy(model, tokenizer, sampler)
        limits = reading_limits(model, Limits(config.max_length, config.overlong, config.strict))
        lines, encoded = encode_prompts(tokenizer, lines, limits, config.max_new_tokens, config.prompts_file)
        _check_same(sampled_before, lines)
        done = len(sampled_before)
        run.save_config(config)
        with StopFlag() as stop, Progress("collect", len(lines)) as bar:
            per_rank = max(1, config.micro_batch_size // config.samples_per_prompt)
            together = per_rank * ranks().count
            for start in range(done // together * together, len(lines), together):
                threads().fit()
                own = slice(start + ranks().index * per_rank, start + (ranks().index + 1) * per_rank)
                sampled = _sample(config, policy, lines[own], encoded[own] or encoded[:1], own.start, timer)
                rows = [row for part in ranks().every(sampled) for row in part]
                new = rows[max(0, done - start) :]
                columns = [line.columns for line in lines[start + len(rows) - len(new) : start + len(rows)]]
                ranks().once(partial(_rate_and_append, run, new, columns, rater, timer))
                bar.update(min(start + together, len(lines)))
                if ranks().any(stop.requested) and start + len(rows) < len(lines):
                    raise Interrupted(f"stopped after {start + len(rows)} of {len(lines)} prompts; --resume goes on")
            run.stop_requested = stop.requested


def _rows_done(run: RunFolder) -> list[tuple[Prompt, str]]:
    """(prompt, place) of each line of `feedback.jsonl`; a last line truncated by a kill is removed."""
    path = run.path / FEEDBACK_FILE
    if not path.exists():
        return []
    complete_lines = "".join(line + "\n" for line in whole_lines(path))
    size = path.stat().st_size
    ranks().wait()
    if len(complete_lines.encode()) != size and ranks().main:
        write_text(path, complete_lines)
    ranks().wait()
    return _prompts_in(path) if complete_lines else []


def _prompts_in(path: Path) -> list[tuple[Prompt, str]]:
    """(prompt, place) of each line of a feedback file."""
    return read_lines(path, lambda row, where: (row["prompt"], where), strict=True)


def _check_same(done: list[tuple[Prompt, str]], lines: list[PromptLine]) -> None:
    """UserError unless the `done` prompts are the first of `lines`."""
    for (prompt, where), line in zip(done, lines, strict=False):
        if prompt != line.prompt:
            raise UserError(
                f"{where}: holds another prompt than {line.where}; resume with the prompts file it began with"
            )


def _sample(
    config: CollectConfig, policy: Policy, lines: list[PromptLine], prompts: list[list[int]], start: int, timer: Timer
) -> list[dict[str, Any]]:
    """One row per line; a rank without lines samples for a sampler that all ranks must call.

    The seed depends on the position alone, so that a resumed run samples the same.
    """
    from rlhf_fast.rollout.rollout import SamplingParams, needs_all_ranks

    model, tokenizer, sampler = policy
    if not lines and not needs_all_ranks(sampler, model):
        return []
    params = SamplingParams.of(config)
    with timer("generate"):
        rollout = sampler(
            model,
            tokenizer,
            prompts,
            params,
            seed=config.seed * 1_000_003 + start,
            samples_per_prompt=config.samples_per_prompt,
        )
    k = config.samples_per_prompt
    rows = zip(rollout.input_ids.cpu(), rollout.response_mask.cpu(), strict=True)
    ids = [row[mask].tolist() for row, mask in rows]
    sampling = {**vars(params), "stop": list(params.stop), "seed": config.seed}
    del sampling["batch_size"]  # changes no sample
    return [
        {
            "prompt": line.prompt,
            **(line.prompt.columns() if isinstance(line.prompt, Chat) else {}),
            "completions": rollout.texts[i * k : (i + 1) * k],
            "completion_ids": ids[i * k : (i + 1) * k],
            "vocabulary": vocabulary_id(tokenizer),
            "ended": rollout.ended[i * k : (i + 1) * k].tolist(),
            "annotator": f"simulated rater {config.rater}" if config.rater else None,
            "sampling": sampling,
            "model": config.model,
        }
        for i, line in enumerate(lines)
    ]


def _rate_and_append(
    run: RunFolder, rows: list[dict[str, Any]], columns: list[dict[str, Any]], rater: Rater | None, timer: Timer
) -> None:
    for row, others in zip(rows, columns, strict=True):
        with timer("rate"):
            row["ratings"] = rater(row["prompt"], row["completions"], **others) if rater else None
        run.append_jsonl(FEEDBACK_FILE, [row])


def _summary(run: RunFolder, timer: Timer) -> dict[str, Any]:
    rows = read_lines(run.path / FEEDBACK_FILE, lambda row, where: row)
    ratings = [rating for row in rows for rating in row["ratings"] or []]
    ended = [e for row in rows for e in row["ended"]]
    return {
        "file": str(run.path / FEEDBACK_FILE),
        "prompts": len(rows),
        "completions": len(ended),
        "ended": sum(ended) / len(ended),
        "mean_rating": sum(ratings) / len(ratings) if ratings else None,
        "seconds": timer.elapsed(),
        "seconds_by_part": timer.totals,
    }
