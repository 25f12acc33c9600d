# SPDX-License-Identifier: Apache-2.0
"""Checks of `--resume`: whether the run is finished, and whether options or data have changed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.errors import UserError

from .checkpoint import newest_checkpoint, write_json
from .folder import INPUTS, UPLOADED, RunFolder
from .options import RunOptions, read_yaml
from .progress import notice
from .terminal import redacted

SAMPLE = 2**20  # bytes read at three places of a model's file; reading all would take seconds
NEVER_COMPARED = {"output_dir", "overwrite", "resume"}


def finished_summary(run: RunFolder, config: RunOptions, may_extend: bool = True) -> dict[str, Any] | None:
    """The summary of a finished run; None if there is work left. Call it before loading anything.

    Compares the options with those in config.yaml: allowed changes are printed and written, others raise UserError, as
    does changed data. With more steps (`config.EXTENDS`) a finished run continues from its last checkpoint, if
    `may_extend`.
    """
    tell_if_new(run)
    summary, run.changed = ranks().once(lambda: _finished_summary(run, config, may_extend))
    if summary is not None and not run.part:
        run.upload(config.push_to_hub)  # which may have failed, or is wanted now
    return summary


def tell_if_new(run: RunFolder) -> None:
    """Say that a run that was asked to resume has nothing to go on from, as its folder's name may be mistyped."""
    if run.resume and not run.part and not (run.path / "config.yaml").exists():
        notice(f"nothing to resume in {run.path}: starting from the beginning")


def _finished_summary(
    run: RunFolder, config: RunOptions, may_extend: bool
) -> tuple[dict[str, Any] | None, frozenset[str]]:
    """The same for one process, and the names of the changed options."""
    if not run.resume or not (run.path / INPUTS).exists():
        write_json(run.path / INPUTS, _digests(config))
    if not run.resume:
        return None, frozenset()
    changes = _changes(run, config)
    finished = (run.path / "summary.json").exists()
    _refuse(run, config, changes)
    more = {name: changes[name] for name in config.EXTENDS & changes.keys() if _more(*changes[name])}
    # Where it may not, the same file with more rows is no reason to stop what goes on from its result.
    extended = finished and any(may_extend or before != now for before, now in more.values())
    if extended:
        _check_extension(run, config, may_extend)
        _check_time(run, config, changes)
    elif finished:
        changes.pop("push_to_hub", None)  # a finished model can be uploaded
        effect = f"so {_listed(changes)} changes nothing" if changes else "nothing is left to train"
        notice(f"{run.path} is finished, {effect}")
        summary: dict[str, Any] = run.read_json("summary.json")
        return summary, frozenset()
    if changes:
        notice(f"going on in {run.path} with {_listed(changes)}")
    run.save_config(config, tracked=False)
    write_json(run.path / INPUTS, _digests(config))
    if extended:
        for name in ("summary.json", "eval_after.json", UPLOADED):
            (run.path / name).unlink(missing_ok=True)
    return None, frozenset(changes)


def _changes(run: RunFolder, config: RunOptions) -> dict[str, tuple[Any, Any]]:
    """Option -> (before, now), for those that differ from config.yaml; a renamed file is not a change, another content
    of a file is."""
    path = run.path / "config.yaml"
    before = read_yaml(path) if path.exists() else {}
    now = json.loads(json.dumps(redacted(dataclasses.asdict(config))))  # tuples are lists in YAML
    same, others = _inputs(run, config)
    return {
        name: (before[name], value)
        for name, value in now.items()
        if name in before and (before[name] != value or name in others) and name not in NEVER_COMPARED | same
    }


def _refuse(run: RunFolder, config: RunOptions, changes: dict[str, tuple[Any, Any]]) -> None:
    """UserError for a change that is not allowed."""
    fixed = {
        name: change
        for name, change in changes.items()
        if not config.may_change(name) or (name == "dtype" and "nf4" in change)  # quantised weights differ
    }
    if fixed:
        raise UserError(f"{run.path} cannot go on with {_listed(fixed)}: put that back, or start over with --overwrite")


def _check_extension(run: RunFolder, config: RunOptions, may_extend: bool) -> None:
    if not may_extend:
        raise UserError(
            f"{run.path} is finished and later phases began from its result: name another --output-dir to train it "
            "longer"
        )
    if config.KEEPS_CHECKPOINTS and newest_checkpoint(run.path) is None:
        raise UserError(
            f"{run.path} is finished and has no checkpoint to go on from (it ran with save_last off, or its disk was "
            "full): start over with --overwrite"
        )
    config.check_extension(run.path)


def _check_time(run: RunFolder, config: RunOptions, changes: dict[str, tuple[Any, Any]]) -> None:
    """UserError if a finished run is to get more steps but `max_seconds`, of all its launches, leaves no time for one.

    Then nothing would be trained, and its figures after training would be replaced by those of fewer prompts.
    """
    limit = getattr(config, "max_seconds", 0)
    if not limit or "max_seconds" in changes:
        return
    summary = run.read_json("summary.json")
    steps = summary.get("steps", 0)
    used_up = steps < summary.get("max_steps", 0) or summary.get("seconds", 0) >= limit
    if used_up and steps >= getattr(config, "min_steps", 0):
        raise UserError(
            f"max_seconds {limit:g} is used up after {steps} steps: raise it too, or set it to 0 for no limit"
        )


def _more(before: Any, now: Any) -> bool:
    """Whether a changed option of `EXTENDS` gives more to do; with 0 for "no limit", or for "another option decides".

    A file with another content may: the phase compares its rows with what is done.
    """
    return isinstance(now, str) or now > before or now == 0


def _listed(changes: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(
        f"{name} {now} ({'with another content' if before == now else f'was {before}'})"
        for name, (before, now) in changes.items()
    )


def _inputs(run: RunFolder, config: RunOptions) -> tuple[set[str], set[str]]:
    """Options whose file or model has the same content as at the start, under any name, and those with another.

    UserError if one has another that may not.
    """
    path = run.path / INPUTS
    before: dict[str, str] = run.read_json(INPUTS) if path.exists() else {}
    now = _digests(config)
    same = {name for name in now if before.get(name) == now[name]}
    others = (before.keys() & now.keys()) - same
    for name in sorted(others):
        if not config.may_change(name):
            raise UserError(
                f"{name}: {getattr(config, name)} is not what {run.path} began with; put the old one back, or start "
                "over with --overwrite"
            )
    return same, others


def _digests(config: RunOptions) -> dict[str, str]:
    """Option -> digest of the file or model folder that it names."""
    digests = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, str) and value and (field.name.endswith("_file") or field.name.endswith("model")):
            path = Path(value)
            if path.is_file() and not field.name.endswith("model"):
                with path.open("rb") as file:
                    digests[field.name] = hashlib.file_digest(file, "sha256").hexdigest()
            elif path.is_dir():
                digests[field.name] = _model_digest(path)
    return digests


def _model_digest(folder: Path) -> str:
    """Digest of names, sizes and sampled bytes of the weight and configuration files."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors"), *folder.glob("*.gguf")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for place in sorted({0, size // 2, max(0, size - SAMPLE)}):
                file.seek(place)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()
