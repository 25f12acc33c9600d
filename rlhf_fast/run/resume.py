# SPDX-License-Identifier: Apache-2.0
"""What `--resume` finds: a run that is finished, options that changed since it began, data that did."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.errors import UserError

from .checkpoint import newest_checkpoint, write_json
from .folder import RunFolder
from .options import RunOptions, read_yaml
from .progress import notice
from .terminal import redacted

INPUTS = "inputs.json"  # digests of the files and models that the run began with
SAMPLE = 2**20  # bytes of a model's file that are read at three places; a whole one would take seconds
NEVER_COMPARED = {"output_dir", "overwrite", "resume"}


def finished_summary(run: RunFolder, config: RunOptions, may_extend: bool = True) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do; None if there is work. To be called before anything is loaded.

    Compares the options with those in config.yaml: a change that may be is named and written, one that may not be
    raises UserError, as does data that is not what the run began with. More steps (`config.EXTENDS`) have a finished
    run go on from its last checkpoint, if it `may_extend`.
    """
    summary, run.changed = ranks().once(lambda: _finished_summary(run, config, may_extend))
    return summary


def _finished_summary(
    run: RunFolder, config: RunOptions, may_extend: bool
) -> tuple[dict[str, Any] | None, frozenset[str]]:
    """The same in one process, and the names of the options that changed."""
    if not run.resume or not (run.path / INPUTS).exists():
        write_json(run.path / INPUTS, _digests(config))
    if not run.resume:
        return None, frozenset()
    changes = _changes(run, config)
    finished = (run.path / "summary.json").exists()
    _refuse(run, config, changes)
    extended = finished and not config.EXTENDS.isdisjoint(changes)
    if extended:
        _check_extension(run, config, may_extend)
    elif finished:
        if changes:
            notice(f"{run.path} is finished, so {_listed(changes)} changes nothing")
        summary: dict[str, Any] = run.read_json("summary.json")
        return summary, frozenset()
    if changes:
        notice(f"going on in {run.path} with {_listed(changes)}")
    run.save_config(config, tracked=False)
    write_json(run.path / INPUTS, _digests(config))
    if extended:
        for name in ("summary.json", "eval_after.json"):
            (run.path / name).unlink(missing_ok=True)
    return None, frozenset(changes)


def _changes(run: RunFolder, config: RunOptions) -> dict[str, tuple[Any, Any]]:
    """Option -> (before, now), of those that differ from config.yaml; a file under another name is no change."""
    path = run.path / "config.yaml"
    before = read_yaml(path) if path.exists() else {}
    now = json.loads(json.dumps(redacted(dataclasses.asdict(config))))  # tuples are lists in YAML
    same = _same_inputs(run, config)
    return {
        name: (before[name], value)
        for name, value in now.items()
        if name in before and before[name] != value and name not in NEVER_COMPARED | same
    }


def _refuse(run: RunFolder, config: RunOptions, changes: dict[str, tuple[Any, Any]]) -> None:
    """UserError for a change that a run cannot take."""
    fixed = {
        name: change
        for name, change in changes.items()
        if not config.may_change(name) or (name == "dtype" and "nf4" in change)  # quantised weights are other weights
    }
    if fixed:
        raise UserError(f"{run.path} cannot go on with {_listed(fixed)}: put that back, or begin anew with --overwrite")


def _check_extension(run: RunFolder, config: RunOptions, may_extend: bool) -> None:
    if not may_extend:
        raise UserError(
            f"{run.path} is finished and later phases began from its result: name another --output-dir to train it "
            "longer"
        )
    if config.KEEPS_CHECKPOINTS and newest_checkpoint(run.path) is None:
        raise UserError(
            f"{run.path} is finished and has no checkpoint to go on from (it ran with save_last off, or its disk was "
            "full): begin anew with --overwrite"
        )


def _listed(changes: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name} {now} (was {before})" for name, (before, now) in changes.items())


def _same_inputs(run: RunFolder, config: RunOptions) -> set[str]:
    """Options that name the same file or model as when the run began, under whatever name; UserError if one changed."""
    path = run.path / INPUTS
    before: dict[str, str] = run.read_json(INPUTS) if path.exists() else {}
    now = _digests(config)
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name] and not config.may_change(name):
            raise UserError(
                f"{name}: {getattr(config, name)} is not what {run.path} began with; put the old one back, or begin "
                "anew with --overwrite"
            )
    return {name for name in now if before.get(name) == now[name]}


def _digests(config: RunOptions) -> dict[str, str]:
    """Option -> digest of the file or model folder that it names."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, str) and value and (field.name.endswith("_file") or field.name.endswith("model")):
            path = Path(value)
            if path.is_file() and not field.name.endswith("model"):
                with path.open("rb") as file:
                    found[field.name] = hashlib.file_digest(file, "sha256").hexdigest()
            elif path.is_dir():
                found[field.name] = _model_digest(path)
    return found


def _model_digest(folder: Path) -> str:
    """Of names, sizes and samples of the files that are weights or configuration."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors"), *folder.glob("*.gguf")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for place in sorted({0, size // 2, max(0, size - SAMPLE)}):
                file.seek(place)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()
