# SPDX-License-Identifier: Apache-2.0
"""`rlhf-fast data check FILE`: list the wrong lines of a data file, count what it holds, and measure agreement."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_fast.data.dropped import grouped
from rlhf_fast.data.examples import Demonstration, completion_text, demonstration, prompt_line
from rlhf_fast.data.files import read_rows
from rlhf_fast.errors import UserError
from rlhf_fast.run.terminal import printable

from .agreement import agreement, by_pair_of_annotators
from .schema import Ranking, each_ranking, holds_feedback, latest_lines

SHOWN_ERRORS = 20  # different reasons


@dataclass
class Findings:
    """The result of `check`: figures to print, in order, and one message for each wrong line."""

    kind: str
    figures: dict[str, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


def check(path: str | Path) -> Findings:
    """Read the whole file. Its first valid line tells whether it holds feedback, demonstrations or prompts."""
    keys: set[str] = next((set(row) for row, _ in read_rows(path) if isinstance(row, dict)), set())
    if holds_feedback(path) or not keys & {"prompt", "messages", "text"}:
        findings = _feedback(path)
    else:
        findings = _examples(path, "demonstrations" if keys & {"completion", "messages", "text"} else "prompts")
    if findings.errors:
        findings.figures["columns of the first row"] = ", ".join(sorted(keys)) or "none"
    return findings


def _examples(path: str | Path, kind: str) -> Findings:
    findings = Findings(kind)
    parse = demonstration if kind == "demonstrations" else prompt_line
    good = []
    for row, where in read_rows(path):
        try:
            if isinstance(row, UserError):
                raise row
            good.append(parse(row, where))
        except UserError as error:
            findings.errors.append(str(error))
    findings.figures[kind] = str(len(good))
    findings.figures["different prompts"] = str(len({str(example.prompt) for example in good}))
    if kind == "demonstrations":
        lengths = [len(completion_text(example.completion)) for example in good if isinstance(example, Demonstration)]
        findings.figures["characters in a completion"] = f"{sum(lengths) / max(1, len(lengths)):.0f} on average"
    return findings


def _feedback(path: str | Path) -> Findings:
    findings = Findings("feedback")
    rankings: list[Ranking] = []
    for ranking in each_ranking(path):
        if isinstance(ranking, UserError):
            findings.errors.append(str(ranking))
        else:
            rankings.append(ranking)
    latest = latest_lines(rankings)
    rated = [ranking for ranking in latest if ranking.goodness]
    compared = sum(len(r.goodness) * (len(r.goodness) - 1) // 2 for r in rated)
    pairs = sum(len(r.pairs()) for r in rated)
    sizes = Counter(len(r.completions) for r in latest)
    names = Counter(r.annotator or "nobody named" for r in rated)
    findings.figures |= {
        "lines": f"{len(latest)}, of which {len(rated)} are rated",
        "replaced by later lines": str(len(rankings) - len(latest)),
        "different prompts": str(len({str(r.prompt) for r in latest})),
        "completions of a prompt": ", ".join(f"{size} ({count} lines)" for size, count in sorted(sizes.items())),
        "pairs": f"{pairs}, and {compared - pairs} ties",
        "ratings": f"in {sum(r.ratings is not None for r in rated)} lines",
        "annotators": ", ".join(f"{name} ({count})" for name, count in names.most_common()),
        "the same text twice in a line": str(sum(len(set(r.texts)) < len(r.texts) for r in latest)),
        "lines of ties alone, which teach nothing": str(sum(not r.pairs() for r in rated)),
    }
    criteria = Counter(name for r in latest for name in r.criteria)
    if criteria:
        findings.figures["criteria"] = ", ".join(f"{name} ({count} lines)" for name, count in criteria.most_common())
    if (overall := agreement(rated)) is None:
        findings.figures["agreement"] = "not measured: no two annotators have rated the same completions"
    else:
        findings.figures["agreement"] = _shown(*overall)
        for (first, second), shared in by_pair_of_annotators(rated).items():
            findings.figures[f"agreement of {first} and {second}"] = _shown(*shared)
    for name in criteria:
        if (value := agreement([by for r in latest if (by := r.by(name)).goodness])) is not None:
            findings.figures[f"agreement on {name}"] = _shown(*value)
    return findings


def _shown(pairs: int, raw: float, alpha: float | None) -> str:
    return f"{raw:.0%} of {pairs} pairs" + ("" if alpha is None else f", Krippendorff's alpha {alpha:.2f}")


def main(arguments: Sequence[str]) -> int:
    """Print what `check` finds; exit code 2 if a line is wrong."""
    parser = argparse.ArgumentParser("rlhf-fast data", description="Validate a data file and count what it holds.")
    parser.add_argument("action", choices=["check"])
    parser.add_argument("file", help="JSONL, JSON, Parquet, CSV, or datasets:NAME[:SPLIT]")
    findings = check(parser.parse_args(list(arguments)).file)
    print(f"{findings.kind}:")
    for name, value in findings.figures.items():
        print(printable(f"  {name}: {value}"))
    for message in grouped(findings.errors, SHOWN_ERRORS):
        print(printable(message))
    print(f"{len(findings.errors)} wrong lines" if findings.errors else "no line is wrong")
    return 2 if findings.errors else 0
