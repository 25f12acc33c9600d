# SPDX-License-Identifier: Apache-2.0
"""Phase 2a: several completions of each prompt, and what people (or a rater function) think of them.

One line of a feedback file is one prompt with its K completions:

    {"prompt": text or messages, "completions": [text, ...], "ended": [bool, ...],
     "ratings": [number, ...] and/or "ranks": [int, ...], "annotator": text, "sampling": {...}, "model": text}

Higher ratings are better, rank 1 is best, equal numbers are ties; where a line has both, the ranks count.
`ended` tells which completions ended by themselves (all, when it is missing). Only the prompt, the
completions and one of ratings and ranks are needed, so a file written by hand is as good as a collected one.
Lines are appended as they come: a run that stops loses nothing, and `--resume` goes on behind the last line.
"""

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

from .config import CollectConfig
from .data import Prompt, PromptLine, check_prompt, encode_prompt, prompt_text, read_lines, read_prompts
from .errors import Interrupted, UserError
from .run import Progress, RunFolder, StopFlag, Timer

FEEDBACK_FILE = "feedback.jsonl"
Rater = Callable[[Prompt, list[str]], list[float]]


@dataclass(frozen=True)
class Ranking:
    """One line of a feedback file, checked. `goodness` (K,): higher is better, equal is a tie."""

    prompt: Prompt
    completions: list[str]
    ended: list[bool]
    goodness: list[float]
    where: str

    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse) for each of the C(K, 2) pairs that is not a tie."""
        pairs = []
        for i, j in combinations(range(len(self.goodness)), 2):
            if self.goodness[i] != self.goodness[j]:
                pairs.append((i, j) if self.goodness[i] > self.goodness[j] else (j, i))
        return pairs


def read_feedback(path: str | Path) -> list[Ranking]:
    """The rated lines of a feedback file; lines that nobody has rated yet are left out.

    Raises UserError for a malformed line (file and line named) or if no line is rated.
    """
    rankings = [ranking for ranking in read_lines(path, _ranking) if ranking is not None]
    if not rankings:
        raise UserError(
            f'{path}: no line is rated yet; write "ratings" (higher is better) or "ranks" (1 is best) into it'
        )
    return rankings


def _ranking(row: dict[str, Any], where: str) -> Ranking | None:
    prompt = check_prompt(row.get("prompt"), where)
    completions = row.get("completions")
    if not isinstance(completions, list) or len(completions) < 2 or not all(isinstance(c, str) for c in completions):
        raise UserError(f'{where}: "completions" must be a list of two or more texts, got {repr(completions)[:60]}')
    size = len(completions)
    ended = row.get("ended")
    if ended is None:
        ended = [True] * size
    elif not isinstance(ended, list) or len(ended) != size or not all(isinstance(e, bool) for e in ended):
        raise UserError(f'{where}: "ended" must be {size} booleans, one for each completion, got {repr(ended)[:60]}')
    if row.get("ranks") is not None:
        ranks = _numbers(row["ranks"], "ranks", size, where)
        if any(rank < 1 or rank != int(rank) for rank in ranks):
            raise UserError(f'{where}: "ranks" must be whole numbers from 1 (best), got {row["ranks"]!r}')
        return Ranking(prompt, completions, ended, [-rank for rank in ranks], where)
    if row.get("ratings") is not None:
        return Ranking(prompt, completions, ended, _numbers(row["ratings"], "ratings", size, where), where)
    return None


def _numbers(values: Any, name: str, size: int, where: str) -> list[float]:
    if isinstance(values, list) and len(values) == size and all(map(_is_number, values)):
        return [float(value) for value in values]
    raise UserError(
        f'{where}: "{name}" must be {size} finite numbers, one for each completion, got {repr(values)[:60]}'
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def load_rater(spec: str) -> Rater:
    """The function that `module:function` or `file.py:function` names, its results checked at every call.

    A call raises UserError naming the prompt if the function raises or does not return one finite number a
    completion.
    """
    source, _, name = spec.rpartition(":")
    function = getattr(_load_module(source, spec), name, None)
    if not callable(function):
        raise UserError(f"rater {spec!r}: {source} has no function {name!r}")

    def rate(prompt: Prompt, completions: list[str]) -> list[float]:
        shown = f"rater {spec!r} on the prompt {prompt_text(prompt)[:80]!r}"
        try:
            ratings = [float(rating) for rating in function(prompt, completions)]
        except Exception as error:
            raise UserError(f"{shown} raised {type(error).__name__}: {error}") from error
        if len(ratings) != len(completions):
            raise UserError(f"{shown} returned {len(ratings)} ratings for {len(completions)} completions")
        for rating, completion in zip(ratings, completions, strict=True):
            if not math.isfinite(rating):
                raise UserError(f"{shown} returned {rating} for {completion[:80]!r}; ratings must be finite")
        return ratings

    return rate


def _load_module(source: str, spec: str) -> ModuleType:
    if not source:
        raise UserError(f"rater must be module:function or file.py:function, got {spec!r}")
    try:
        if not source.endswith(".py"):
            return importlib.import_module(source)
        if not Path(source).is_file():
            raise UserError(f"rater {spec!r}: there is no file {source}")
        found = importlib.util.spec_from_file_location(Path(source).stem, source)
        assert found is not None and found.loader is not None  # a .py file always has a loader
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        return module
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"rater {spec!r}: importing {source} raised {type(error).__name__}: {error}") from error


def collect(config: CollectConfig, run: RunFolder) -> dict[str, Any]:
    """Sample K completions of every prompt, have them rated, append them to the run's `feedback.jsonl`.

    Returns the summary: file, prompts, completions, share that ended by themselves, mean rating, seconds.
    """
    from .models import context_length, load_causal_lm, load_tokenizer

    config.validate()
    lines = read_prompts(config.prompts_file)
    rater = load_rater(config.rater) if config.rater else None
    done = _rows_done(run, lines)
    timer = Timer()
    if done < len(lines):
        with timer("load"):
            tokenizer = load_tokenizer(config.model)
            model = load_causal_lm(config.model, config.dtype).eval()
        room = min(config.max_length, context_length(model)) - config.max_new_tokens + 1
        encoded = [encode_prompt(tokenizer, line.prompt, max_length=room, where=line.where) for line in lines]
        with StopFlag() as stop, Progress("collect", len(lines)) as bar:
            per_batch = max(1, config.micro_batch_size // config.samples_per_prompt)
            for start in range(done, len(lines), per_batch):
                batch = slice(start, start + per_batch)
                rows = _sample(config, model, tokenizer, lines[batch], encoded[batch], start, timer)
                _rate_and_append(run, rows, rater, timer)
                bar.update(min(start + per_batch, len(lines)))
                if stop.requested:
                    raise Interrupted(f"stopped after {start + len(rows)} of {len(lines)} prompts; --resume goes on")
    summary = _summary(run, timer)
    run.write_json("summary.json", summary)
    return summary


def _rows_done(run: RunFolder, lines: list[PromptLine]) -> int:
    """How many prompts `feedback.jsonl` holds already; a last line cut short by a kill is taken away."""
    path = run.path / FEEDBACK_FILE
    if not path.exists():
        return 0
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    if not whole:
        return 0
    prompts = read_lines(path, lambda row, where: (row.get("prompt"), where))
    for (prompt, where), line in zip(prompts, lines, strict=False):
        if prompt != line.prompt:
            raise UserError(
                f"{where}: holds another prompt than {line.where}; resume with the prompts file it began with"
            )
    return len(prompts)


def _sample(
    config: CollectConfig,
    model: Any,
    tokenizer: Any,
    lines: list[PromptLine],
    prompts: list[list[int]],
    start: int,
    timer: Timer,
) -> list[dict[str, Any]]:
    """One row a prompt. The seed depends on the position alone, for a resumed run to sample the same."""
    from .rollout import generate

    with timer("generate"):
        rollout = generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=config.seed * 1_000_003 + start,
            samples_per_prompt=config.samples_per_prompt,
        )
    k = config.samples_per_prompt
    sampling = {
        "temperature": config.temperature,
        "max_new_tokens": config.max_new_tokens,
        "seed": config.seed,
    }
    return [
        {
            "prompt": line.prompt,
            "completions": rollout.texts[i * k : (i + 1) * k],
            "ended": rollout.ended[i * k : (i + 1) * k].tolist(),
            "annotator": f"simulated rater {config.rater}" if config.rater else None,
            "sampling": sampling,
            "model": config.model,
        }
        for i, line in enumerate(lines)
    ]


def _rate_and_append(run: RunFolder, rows: list[dict[str, Any]], rater: Rater | None, timer: Timer) -> None:
    for row in rows:
        with timer("rate"):
            row["ratings"] = rater(row["prompt"], row["completions"]) if rater else None
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
