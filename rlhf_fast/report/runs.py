# SPDX-License-Identifier: Apache-2.0
"""`rlhf-fast report RUN ...`: the report of one run written anew, or several runs compared on one page.

The comparison has final figures, the options that differ, curves over one another, reward against KL frontiers, and
samples of the same prompts side by side. Like the report it needs nothing but the run folders.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_fast.data.examples import prompt_text
from rlhf_fast.errors import UserError
from rlhf_fast.run.checkpoint import write_text
from rlhf_fast.run.options import read_yaml
from rlhf_fast.run.records import read_jsonl
from rlhf_fast.run.terminal import printable

from . import plots
from .doctor import kind_of
from .elements import PAGE, STYLE, card, escaped, grid, section
from .page import PHASES, Phase, write_report
from .plots import Line

COLORS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#14b8a6", "#eab308", "#8b93a1")
CURVES = {  # phase -> (metric, title, caption)
    "sft": [("loss", "SFT: training loss", "Nats per completion token."), ("eval/nll", "SFT: held-out loss", "")],
    "reward": [("pair_accuracy", "Reward model: pair accuracy", "Training batches.")],
    "ppo": [
        ("objective/scores", "Reward", "Mean score of each step's samples."),
        ("eval/reward", "Held-out reward", "Every eval_steps."),
        ("objective/kl", "KL", "Nats per sequence from the reference."),
        ("objective/entropy", "Entropy", "Nats per token."),
        ("sample/length", "Length", "Tokens in a completion."),
    ],
}
FIGURES = {  # phase -> (key of its summary, title)
    "sft": [("loss_after", "held-out loss")],
    "reward": [("heldout_pair_accuracy", "pair accuracy")],
    "ppo": [
        ("objective", "objective"),
        ("steps", "steps"),
        ("reward_before", "reward before"),
        ("reward_after", "after"),
        ("gold_before", "gold before"),
        ("gold_after", "after"),
        ("kl_final", "KL"),
        ("entropy_after", "entropy"),
        ("seconds", "seconds"),
    ],
}
SAME = {"output_dir", "overwrite", "resume"}  # options that say nothing of a run
SHOWN_SAMPLES = 12


class Run(NamedTuple):
    """A run folder under the name by which the page calls it."""

    name: str
    folder: Path
    phases: dict[str, Phase]
    color: str


def open_runs(folders: Sequence[str | Path]) -> list[Run]:
    """The runs in these folders, of a pipeline or of one phase; UserError for a folder that holds none."""
    paths = [Path(folder) for folder in folders]
    shared = os.path.commonpath([path.absolute().parent for path in paths])
    runs = []
    for place, path in enumerate(paths):
        phases = {name: Phase(path / name) for name in PHASES if (path / name).is_dir()}
        kind = kind_of(path)
        if not phases and kind:
            phases = {kind: Phase(path)}
        if not phases:
            raise UserError(f"{path} holds no run: wanted one of the folders {', '.join(PHASES)}, or a phase's own")
        name = os.path.relpath(path.absolute(), shared)
        runs.append(Run(name, path, phases, COLORS[place % len(COLORS)]))
    return runs


def write_comparison(folders: Sequence[str | Path], output: str | Path) -> Path:
    """Write one page that compares the runs; returns its path."""
    runs = open_runs(folders)
    names = ", ".join(run.name for run in runs)
    body = [
        f"<header><h1>{escaped(names)}</h1><p class='lead'>{len(runs)} runs compared</p></header>",
        section("figures", "Figures at the end", _figures(runs)),
        section("options", "Options that differ", _options(runs)),
        section("curves", "Curves", grid(_frontiers(runs), *_curves(runs))),
        section("samples", "Held-out samples, side by side", _samples(runs)),
    ]
    path = Path(output)
    write_text(path, PAGE.format(title=escaped(f"{names}: rlhf_fast"), style=STYLE, body="\n".join(body)))
    return path


def figures_of(run: Run) -> dict[str, Any]:
    """Title -> figure, for those that the run has."""
    figures = {}
    for phase, entries in FIGURES.items():
        summary = run.phases[phase].summary if phase in run.phases else {}
        for key, title in entries:
            before = entries[entries.index((key, title)) - 1][1].partition(" ")[0]
            if summary.get(key) is not None:
                figures[f"{before} {title}" if title == "after" else title] = summary[key]
    return figures


def _figures(runs: Sequence[Run]) -> str:
    by_run = [figures_of(run) for run in runs]
    return _by_run(runs, list(dict.fromkeys(name for figures in by_run for name in figures)), by_run)


def _options(runs: Sequence[Run]) -> str:
    """Options of the whole run and of each phase that are not the same in all runs."""
    by_run = [_options_of(run) for run in runs]
    names = dict.fromkeys(name for options in by_run for name in options)
    differing = [name for name in names if len({str(options.get(name)) for options in by_run}) > 1]
    return _by_run(runs, differing, by_run)


def _options_of(run: Run) -> dict[str, Any]:
    path = run.folder / "config.yaml"
    tree = read_yaml(path) if path.exists() else {}
    options: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            options |= {f"{name}.{key}": inner for key, inner in value.items()}
        elif name not in SAME:
            options[name] = value
    return options


def _by_run(runs: Sequence[Run], names: Sequence[str], values: Sequence[dict[str, Any]]) -> str:
    """A table with a column for each run; an empty string without rows."""
    if not names:
        return ""
    head = "".join(f"<th style='color:{run.color}'>{escaped(run.name)}</th>" for run in runs)
    rows = "".join(
        f"<tr><th scope='row'>{escaped(name)}</th>{''.join(f'<td>{_shown(one.get(name))}</td>' for one in values)}</tr>"
        for name in names
    )
    return f"<table class='facts'><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _shown(value: Any) -> str:
    return "" if value is None else escaped(f"{value:.4g}" if isinstance(value, float) else value)


def _curves(runs: Sequence[Run]) -> list[str]:
    cards = []
    for phase, entries in CURVES.items():
        with_phase = [run for run in runs if phase in run.phases]
        for metric, title, caption in entries:
            lines = [run.phases[phase].line(metric, run.name, run.color) for run in with_phase]
            drawn = [line for line in lines if line.x]
            if drawn:
                cards.append(card(title, caption, plots.lines(drawn)))
    return cards


def _frontiers(runs: Sequence[Run]) -> str:
    """The reward that each run reached within a KL."""
    paths = []
    for run in runs:
        rows = run.phases["ppo"].metrics if "ppo" in run.phases else []
        both = [(row.get("objective/kl"), row.get("objective/scores")) for row in rows]
        points = [(kl, score) for kl, score in both if kl is not None and score is not None]
        if points:
            paths.append(Line(run.name, [kl for kl, _ in points], [score for _, score in points], run.color))
    caption = "Points: steps. Lines: the largest score within each KL; higher and further left is better."
    return card("Reward against KL", caption, plots.frontiers(paths, "KL", "score")) if paths else ""


def _samples(runs: Sequence[Run]) -> str:
    """The first completion of each prompt after training, for prompts that all runs with samples have."""
    with_samples, by_prompt = [], []
    for run in runs:
        first: dict[str, dict[str, Any]] = {}
        for row in read_jsonl(run.phases["ppo"].folder / "samples.jsonl") if "ppo" in run.phases else []:
            if row.get("when") == "after":
                first.setdefault(prompt_text(row["prompt"]), row)
        if first:
            with_samples.append(run)
            by_prompt.append(first)
    prompts = [prompt for prompt in by_prompt[0] if all(prompt in rows for rows in by_prompt)] if by_prompt else []
    if not prompts:
        return ""
    head = "".join(f"<th style='color:{run.color}'>{escaped(run.name)}</th>" for run in with_samples)
    rows = "".join(
        f"<tr><th scope='row'>{escaped(prompt)}</th>{''.join(_sample(rows[prompt]) for rows in by_prompt)}</tr>"
        for prompt in prompts[:SHOWN_SAMPLES]
    )
    return f"<table class='samples compared'><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _sample(row: dict[str, Any]) -> str:
    reward = f"<small>reward {row['reward']:+.2f}</small>" if "reward" in row else ""
    return f"<td>{escaped(row['completion'].strip())}{reward}</td>"


def main(arguments: Sequence[str]) -> int:
    """Parse the options of the subcommand, write the page, print where it is and the figures."""
    parser = argparse.ArgumentParser("rlhf-fast report", description="Write the report of a run, or compare several.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a pipeline run, or of one phase")
    parser.add_argument("--output", default="comparison.html", help="page of several runs (default comparison.html)")
    options = parser.parse_args(list(arguments))
    runs = open_runs(options.runs)
    if len(runs) == 1 and not kind_of(runs[0].folder):
        print(printable(f"report: {write_report(runs[0].folder)}"))
        return 0
    for run in runs:
        figures = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                   for name, value in figures_of(run).items()]  # fmt: skip
        print(printable(f"{run.name}: {', '.join(figures) or 'not finished'}"))
    try:
        print(printable(f"report: {write_comparison(options.runs, options.output)}"))
    except OSError as error:
        raise UserError(f"cannot write {options.output}: {error.strerror}") from None
    return 0
