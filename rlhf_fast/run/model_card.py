# SPDX-License-Identifier: Apache-2.0
"""The model card of a trained model: README.md of its folder, as the Hugging Face hub shows it.

Texts of models, files and people are shown as code, in which neither markup nor HTML means anything; secrets are left
out.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .terminal import printable

KINDS = {  # class of the configuration -> title, task on the hub
    "SFTConfig": ("supervised fine-tuning", "text-generation"),
    "RewardConfig": ("a reward model", "text-classification"),
    "PPOConfig": ("reinforcement learning from a reward", "text-generation"),
}
DATA = (
    *("train_file", "eval_file", "feedback_file", "prompts_file", "eval_prompts_file", "ptx_file"),
    *("criterion", "reward_model", "reward_functions", "rater"),
)
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the name "smollm2" stands for
FIGURES = {  # key of a summary -> what it is
    "loss": "held-out loss, nats per token",
    "reward": "held-out reward",
    "gold": "held-out rating by the rater",
    "kl": "KL from the reference, nats per sequence",
    "entropy": "entropy, nats per token",
    "kl_final": "KL from the reference at the end, nats per sequence",
    "heldout_pair_accuracy": "held-out pair accuracy",
    "train_pair_accuracy": "training pair accuracy",
}
NO_FIGURES = {"seconds", "read_position_gap"}
PACKAGES = ("rlhf-fast", "torch", "transformers", "peft")
SAMPLES, SAMPLE_CHARACTERS = 3, 600


class Trained(NamedTuple):
    """What a card tells."""

    kind: str  # a key of KINDS
    options: Mapping[str, Any]
    summary: Mapping[str, Any]  # empty before the end
    samples: Sequence[Mapping[str, Any]]  # {"prompt", "completion"} of the trained model


def write_card(folder: Path, trained: Trained) -> None:
    """Write README.md into the folder of a model."""
    from huggingface_hub import ModelCard, ModelCardData

    title, task = KINDS[trained.kind]
    objective = trained.options.get("objective") or trained.options.get("loss") or ""
    base = base_model(str(trained.options["model"]))
    data = ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag=task,
        tags=["rlhf", "rlhf_fast", *([str(objective)] if objective else [])],
    )
    parts = [
        f"# A model trained by rlhf_fast: {title}",
        _facts(trained, base, str(objective)),
        _figures(trained.summary),
        _scores(trained.summary) if trained.kind == "RewardConfig" else "",
        _samples(trained.samples),
        _how(),
    ]
    text = "\n\n".join(part for part in parts if part)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").save(folder / "README.md")


def base_model(name: str) -> str | None:
    """The id on the hub of the model that training began with; None if it is not known.

    A model of ours names its own base in its card.
    """
    if name == "smollm2":
        return SMOLLM2
    if Path(name).exists():
        from huggingface_hub import ModelCard

        try:
            base = ModelCard.load(Path(name) / "README.md", ignore_metadata_errors=True).data.base_model
        except Exception:  # whatever its README holds: a card must not cost a model
            return None
        return base if isinstance(base, str) else None
    return name if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else None


def _facts(trained: Trained, base: str | None, objective: str) -> str:
    options = trained.options
    rows = {"base model": base or "", "trained from": options["model"], "objective or loss": objective}
    rows |= {name: options.get(name) or "" for name in DATA}
    if options.get("lora_rank"):
        rows["adapters"] = f"rank {options['lora_rank']}; merged in here, and by themselves in the folder adapters"
    return _table(("", ""), [(name.replace("_", " "), _code(_listed(value))) for name, value in rows.items() if value])


def _figures(summary: Mapping[str, Any]) -> str:
    """Those measured before and after, then the others."""
    both, single = [], []
    for key, value in summary.items():
        name = key.removesuffix("_after")
        if not isinstance(value, int | float) or isinstance(value, bool) or key in NO_FIGURES:
            continue
        if key.endswith("_after"):
            both.append((_meaning(name), _number(summary.get(f"{name}_before")), _number(value)))
        elif not key.endswith("_before"):
            single.append((_meaning(key), _number(value)))
    tables = []
    if both:
        tables.append(_table(("", "before", "after"), both))
    if single:
        tables.append(_table(("", ""), single))
    return "## Figures\n\n" + "\n\n".join(tables) if tables else ""


def _scores(summary: Mapping[str, Any]) -> str:
    """How other programs read the scores of a reward model."""
    text = (
        "## Reading its scores\n\nThe score of a text is `(logit - score_mean) / score_std`, both in `config.json`; "
        "the logit is that of its last token, the one that ends the completion. "
    )
    if "pad_token" not in summary:
        return text
    if summary["pad_token"] is None:
        return text + (
            "The tokenizer has no pad token that ends no completion, so `config.json` names none: transformers then "
            "scores one text at a time. Programs that pad with the end-of-sequence token, as TRL does, read the logit "
            "of the token before it."
        )
    return text + (
        f"Pad with {_code(str(summary['pad_token']))}, as the tokenizer here does: transformers and TRL read the last "
        "token that is not the pad token, and no completion ends with this one."
    )


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    if not samples:
        return ""
    shown = []
    for row in samples[:SAMPLES]:
        prompt = row["prompt"] if isinstance(row["prompt"], str) else json.dumps(row["prompt"], ensure_ascii=False)
        shown.append(f"Prompt:\n\n{_block(prompt)}\n\nCompletion:\n\n{_block(str(row['completion']))}")
    return "## Samples of held-out prompts\n\n" + "\n\n".join(shown)


def _how() -> str:
    """The command and the versions."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    table = _table(("", ""), [(name, _code(version)) for name, version in versions.items()])
    program, *arguments = sys.argv
    ours = Path(program).name in ("rlhf-fast", "rlhf_fast") or Path(program).parent.name == "rlhf_fast"
    command = f"Command:\n\n{_block(shlex.join(['rlhf-fast', *arguments]), cut=False)}\n\n" if ours else ""
    return f"## How it was made\n\n{command}{table}"


def _meaning(key: str) -> str:
    return FIGURES.get(key) or _plain(key.replace("_", " "))


def _plain(text: str) -> str:
    """A name as text: whatever could be markup is left out."""
    return re.sub(r"[^\w ./+-]", "", printable(text))


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def _code(text: str) -> str:
    """One line of text as code in a table.

    Readers disagree on which bars end a cell after a backslash, so such a line has none: HTML entities are no markup.
    """
    line = " ".join(printable(text).split())
    if "|" in line:
        entities = re.sub(r"[^\w ]", lambda match: f"&#{ord(match[0])};", line)
        return f"<code>{entities}</code>"
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{ticks} {line} {ticks}" if "`" in line else f"`{line}`"


def _block(text: str, cut: bool = True) -> str:
    """Text as an indented block of code, which no line of it can end."""
    shown = printable(text)
    if cut and len(shown) > SAMPLE_CHARACTERS:
        shown = shown[:SAMPLE_CHARACTERS] + " ..."
    return "\n".join(f"    {line}" for line in shown.expandtabs(4).split("\n") or [""])
