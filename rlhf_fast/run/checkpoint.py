# SPDX-License-Identifier: Apache-2.0
"""Writing that survives a kill: files and folders are written under a temporary name, synced, and renamed.

Training state is a nested dict of tensors and plain JSON values; tensors go to `state.safetensors`, the rest to
`state.json`, tensors sharded over the ranks to `shards/` (shards.py). Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.distributed.dtensors import is_dtensor
from rlhf_fast.errors import UserError

from . import shards
from .progress import notice

_TENSOR, _SHARDS = "__tensor__", "__shards__"
SURROGATES = "backslashreplace"  # writes a lone surrogate as its JSON escape
CHECKSUMS = "checksums.json"  # in every checkpoint


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: a reader sees the old content or all of the new."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", encoding="utf-8", errors=SURROGATES) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON by `write_text`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """A new folder to fill, renamed to `path` (replacing it) when the block ends; removed if the block fails."""
    aside = begin_aside(path)
    try:
        yield aside
        put_in_place(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def begin_aside(path: Path) -> Path:
    """A new empty folder beside `path`, for `put_in_place`."""
    aside = path.with_name(path.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def put_in_place(aside: Path, path: Path) -> None:
    """Sync a filled folder to the disk and rename it to `path`, replacing that."""
    sync_folder(aside)
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.replace(old)
    aside.replace(path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """fsync a folder and every file in it, so that after a crash a renamed folder has its files."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def free_space(folder: Path) -> int:
    """Free bytes on the disk of a folder."""
    return shutil.disk_usage(folder).free


def folder_size(folder: Path) -> int:
    """Total bytes of the files in a folder, which may be removed meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += (Path(place) / name).stat().st_size
    return total


def require_space(folder: Path, parameters: int, save_steps: int) -> None:
    """Stop if the disk cannot hold the float32 model and its checkpoints (weights and two moments each)."""
    checkpoints = 3 if save_steps else 1  # two old ones while a third is written; Ctrl-C writes one
    needed, free = parameters * (4 + 12 * checkpoints), free_space(folder)
    if free < needed:
        raise UserError(
            f"the disk of {folder} has {free / 2**30:.2f} GiB free, but the model and its checkpoints may take "
            f"{needed / 2**30:.2f}; free some, or name another folder with --output-dir"
        )


def write_checksums(folder: Path) -> None:
    """Write the CRC-32 of every file of a folder into it, for `damaged_file`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    write_json(folder / CHECKSUMS, {str(path.relative_to(folder)): _checksum(path) for path in files})


def damaged_file(folder: Path) -> str | None:
    """The first file of a checkpoint that is missing or whose checksum is wrong; None if all are intact."""
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        for name, checksum in checksums.items():
            if _checksum(folder / name) != checksum:
                return str(name)
    except OSError as error:
        return Path(error.filename or CHECKSUMS).name
    except (ValueError, AttributeError):
        return CHECKSUMS
    known = {*checksums, CHECKSUMS}
    return None if {"state.json", "trainer_state.json"} & known else CHECKSUMS


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            value = zlib.crc32(block, value)
    return value


class Parts(NamedTuple):
    """A training state, by where its parts are written."""

    plain: Any  # with a reference in place of each tensor
    tensors: dict[str, Tensor]
    shards: dict[str, Tensor]  # DTensors

    @classmethod
    def of(cls, state: Any) -> Parts:
        """Of nested dicts and lists of tensors and JSON values."""
        parts = cls(None, {}, {})
        return parts._replace(plain=_take_tensors(state, "state", parts))


def save_state(folder: str | Path, state: Parts | dict[str, Any]) -> None:
    """Save nested dicts and lists of tensors and JSON values in `folder`; `ShardWriter` writes what is sharded."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = state if isinstance(state, Parts) else Parts.of(state)
    save_file({name: x.cpu().contiguous() for name, x in parts.tensors.items()}, folder / "state.safetensors")
    write_json(folder / "state.json", parts.plain)


def load_state(folder: str | Path, *names: str, shard_size: int | None = None) -> dict[str, Any]:
    """Load what `save_state` saved; UserError if a file is missing or damaged, or lacks one of `names`.

    What is sharded on disk is read whole, or, if `shard_size` ranks share a model, as DTensors with this rank's rows.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        plain = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "state.safetensors")
        described: dict[str, Any] = {}
        _find_shards(plain, described)
        if described:
            tensors |= shards.load(folder, described, shard_size)
        state: dict[str, Any] = _put_tensors(plain, tensors)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"the checkpoint {folder} cannot be read ({error}); remove it to resume from an older one"
        ) from None
    if missing := [name for name in names if name not in state]:
        raise UserError(
            f"the checkpoint {folder} has no {', '.join(missing)}: another version wrote it, or another phase; resume "
            "with that version, or start over with --overwrite"
        )
    return state


def _take_tensors(value: Any, name: str, parts: Parts) -> Any:
    """`value` with every tensor moved into `parts` and replaced by its name."""
    if isinstance(value, Tensor):
        if is_dtensor(value):
            parts.shards[name] = value.detach()
            return {_SHARDS: shards.describe(name, value)}
        parts.tensors[name] = value.detach()
        return {_TENSOR: name}
    if isinstance(value, dict):
        return {key: _take_tensors(item, f"{name}.{key}", parts) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_take_tensors(item, f"{name}.{i}", parts) for i, item in enumerate(value)]
    return value


def _find_shards(value: Any, described: dict[str, Any]) -> None:
    if isinstance(value, dict) and set(value) == {_SHARDS}:
        described[value[_SHARDS]["name"]] = value[_SHARDS]
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _find_shards(item, described)


def _put_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        if set(value) == {_SHARDS}:
            return tensors[value[_SHARDS]["name"]]
        return {key: _put_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_put_tensors(item, tensors) for item in value]
    return value


def rng_state() -> dict[str, Any]:
    """The state of every global random generator: python, numpy, torch, CUDA."""
    import numpy

    version, keys, gauss = random.getstate()
    generator = numpy.random.get_state(legacy=True)
    assert isinstance(generator, tuple)  # legacy=True
    kind, words, position, has_gauss, cached = generator
    return {
        "python": [version, list(keys), gauss],
        "numpy": [kind, torch.from_numpy(words.astype("int64")), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned."""
    import numpy

    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, words, *rest = state["numpy"]
    numpy.random.set_state((kind, words.numpy().astype("uint32"), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (all devices)."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder/checkpoints`, oldest first."""
    paths = [p for p in (folder / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("step-")))


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the largest step in `folder/checkpoints`, or None."""
    return next(reversed(checkpoints(folder)), None)


def newest_intact_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint without a damaged file, or None if there is none at all.

    Damaged ones are renamed, so that they are not used later. UserError if all are damaged.
    """
    for unfinished in (folder / "checkpoints").glob("step-*.tmp"):  # of a run that was killed
        shutil.rmtree(unfinished, ignore_errors=True)
    damaged = ""
    for path in reversed(checkpoints(folder)):
        file = damaged_file(path)
        if file is None:
            return path
        aside = path.with_name(path.name + ".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        path.replace(aside)
        damaged = f"the checkpoint {path} is damaged: its file {file} is missing or not as it was written"
        notice(f"{damaged}; trying the one before")
    if damaged:
        raise UserError(f"{damaged}, and there is no older one; start over with --overwrite")
    return None


def remove_old_checkpoints(folder: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints of `folder/checkpoints`."""
    for path in checkpoints(folder)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
