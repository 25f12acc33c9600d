# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: created safely, written atomically, with metrics on disk and in TensorBoard."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rlhf_fast.distributed.dtensors import full_state_dict
from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.errors import UserError

from .checkpoint import (
    SURROGATES,
    Parts,
    begin_aside,
    folder_aside,
    newest_intact_checkpoint,
    put_in_place,
    remove_old_checkpoints,
    save_state,
    write_checksums,
    write_json,
    write_text,
)
from .hub_upload import open_repository, upload
from .lock import lock, unlock
from .model_card import KINDS, Trained, write_card
from .progress import notice
from .records import read_jsonl, whole_lines
from .shards import ShardWriter
from .terminal import redacted
from .trackers import Trackers

UPLOADED = "uploaded.json"  # place in a repository -> address of the commit that brought the model there
INPUTS = "inputs.json"  # digests of the files and models that a run started with; alone, nothing has been done yet
MARKER = ".rlhf_fast"  # in every run folder, so that --overwrite empties no other; locked during a run


class RunFolder:
    """The folder of one phase or of a pipeline, from `create` or `child`. Only the main rank writes.

    config.yaml metrics.jsonl tensorboard/ samples.jsonl checkpoints/step-N/ model/ adapters/ summary.json
    """

    def __init__(self, path: Path, resume: bool = False) -> None:
        """Wrap an existing folder; use `create` instead."""
        self.path = path
        self.resume = resume
        self.part = False  # of a pipeline, which uploads the models of all phases at its end
        self.keep = 2  # checkpoints
        self.stop_requested = False  # in the phase's last step, after which it ends as usual
        self.changed: frozenset[str] = frozenset()  # options that differ from those the run started with
        self.shard_writer = ShardWriter()
        self._resume_from: Path | None = None
        self._config: Any = None
        self._board: Any = None
        self._purge_step: int | None = None  # TensorBoard forgets what earlier launches logged from here on
        self._trackers: Trackers | None = None

    @classmethod
    def create(cls, path: str | Path, *, overwrite: bool = False, resume: bool = False) -> RunFolder:
        """Create the folder. One that holds files is refused, emptied (`overwrite`) or continued (`resume`)."""
        path = Path(path)
        if ranks().main:
            cls._make(path, overwrite, resume)
        ranks().wait()
        return cls(path, resume)

    @staticmethod
    def _make(path: Path, overwrite: bool, resume: bool) -> None:
        if path.exists() and not path.is_dir():
            raise UserError(f"the run folder {path} is a file; name another with --output-dir")
        try:
            if not resume and path.is_dir() and {item.name for item in path.iterdir()} - {MARKER, INPUTS}:
                if not overwrite:
                    raise UserError(
                        f"the run folder {path} exists and is not empty; "
                        "name another with --output-dir, or pass --resume to go on in it or --overwrite to empty it"
                    )
                if not (path / MARKER).exists():
                    raise UserError(
                        f"{path} is not a run folder (it holds no {MARKER}), so --overwrite does not empty it; "
                        "name another with --output-dir"
                    )
            path.mkdir(parents=True, exist_ok=True)
            (path / MARKER).write_bytes(b"made by rlhf_fast: --overwrite may empty this folder\n")
            lock(path / MARKER)
            if overwrite:
                _empty(path)
            with (path / MARKER).open("a", encoding="utf-8") as file:
                file.write(_launch() + "\n")
        except OSError as error:
            raise UserError(
                f"the run folder {path} cannot be written ({error.strerror}); name another with --output-dir"
            ) from None

    def child(self, name: str) -> RunFolder:
        """The folder of one phase of a pipeline."""
        child = RunFolder.create(self.path / name, resume=self.resume)
        child.part = True
        return child

    def save_config(self, config: Any, tracked: bool = True) -> None:
        """Write a dataclass as config.yaml; if the folder's metrics are `tracked`, open its trackers and repository."""
        import yaml

        self.keep, self._config = config.save_total_limit, config
        if tracked and config.push_to_hub:
            ranks().once(lambda: open_repository(config.push_to_hub))
        if ranks().main:
            self._trackers = Trackers(self.path, config) if tracked else None
            write_text(self.path / "config.yaml", yaml.safe_dump(redacted(dataclasses.asdict(config)), sort_keys=False))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append numbers to metrics.jsonl, to TensorBoard (where it is installed) and to the trackers."""
        self.append_jsonl("metrics.jsonl", [{"step": step, **_row(metrics)}])
        self._show(metrics, step)

    def log_to_last(self, metrics: Mapping[str, float], step: int) -> None:
        """Add numbers to the row of `step` if that is the last one of metrics.jsonl, else append a row."""
        if not metrics or not ranks().main:
            return
        rows = read_jsonl(self.path / "metrics.jsonl")
        if not rows or rows[-1].get("step") != step:
            self.log(metrics, step)
        else:
            self.append_jsonl("metrics.jsonl", [{**rows[-1], **_row(metrics)}], keep_lines=len(rows) - 1)
            self._show(metrics, step)

    def _show(self, metrics: Mapping[str, float], step: int) -> None:
        """Give numbers to TensorBoard (where it is installed) and to the trackers."""
        if not ranks().main:
            return
        for name, value in metrics.items():
            self._tensorboard().add_scalar(name, float(value), step)
        if self._trackers is not None:
            self._trackers.log(metrics, step)

    def append_jsonl(self, name: str, rows: Sequence[Mapping[str, Any]], keep_lines: int | None = None) -> None:
        """Append one JSON object a line to a file; with `keep_lines`, first truncate the file to that many lines."""
        if not ranks().main:
            return
        path, text = self.path / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if keep_lines is None:
            with path.open("a", encoding="utf-8", errors=SURROGATES) as file:
                file.write(text)
        else:
            old_lines = whole_lines(path)[:keep_lines] if keep_lines else []
            write_text(path, "".join(line + "\n" for line in old_lines if line) + text)

    def truncate_metrics(self, step: int) -> None:
        """Remove metrics after `step`, which a resumed run will log again; TensorBoard is told to drop them."""
        if self.resume:
            self._purge_step = step + 1
        path = self.path / "metrics.jsonl"
        if ranks().main and path.exists():
            rows = [line for line in whole_lines(path) if _step_of(line) <= step]
            write_text(path, "".join(line + "\n" for line in rows))

    def last_metrics(self) -> dict[str, float]:
        """Those of the last step that was logged; none if nothing was."""
        rows = read_jsonl(self.path / "metrics.jsonl")
        return rows[-1] if rows else {}

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file of the folder atomically."""
        if ranks().main:
            write_json(self.path / name, value)

    def read_json(self, name: str) -> Any:
        """Read a JSON file of the folder; UserError if it is missing or damaged."""
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {self.path / name}: {error}") from None

    def save_checkpoint(self, step: int, state: Mapping[str, Any]) -> None:
        """Write checkpoints/step-N atomically and keep the newest `self.keep`.

        All ranks wait until it is written. If the state holds sharded tensors, they wait only until those are copied:
        the checkpoint appears later, and `shard_writer.wait` raises the errors of writing it.
        """
        self.shard_writer.wait()  # whose errors come before this checkpoint replaces anything
        path, parts = self.path / "checkpoints" / f"step-{step}", Parts.of(dict(state))
        if parts.shards:
            aside = ranks().once(lambda: _begun(path, parts))
            self.shard_writer.start(aside, parts.shards, lambda: self._publish(aside, path))
            return
        if ranks().main:
            with folder_aside(path) as folder:
                save_state(folder, parts)
                write_checksums(folder)
            remove_old_checkpoints(self.path, self.keep)
        ranks().wait()

    def _publish(self, aside: Path, path: Path) -> None:
        """Let a checkpoint appear, of which every rank has written its part; the main process does it."""
        if ranks().main:
            write_checksums(aside)
            put_in_place(aside, path)
            remove_old_checkpoints(self.path, self.keep)

    def latest_checkpoint(self) -> Path | None:
        """The newest intact checkpoint if the run resumes and there is one, else None; the same at each call.

        UserError if there are checkpoints and all are damaged.
        """
        if self.resume and self._resume_from is None:
            self._resume_from = ranks().once(lambda: newest_intact_checkpoint(self.path))
        return self._resume_from

    def save_model(self, model: Any, tokenizer: Any) -> None:
        """Write model/, as transformers loads it, and its card, atomically. All ranks wait until it is written."""
        state = full_state_dict(model)
        if ranks().main:
            own_config = getattr(model, "while_saving", nullcontext)  # set by `switch_off_dropout`
            with own_config(), folder_aside(self.path / "model") as folder:
                model.save_pretrained(folder, state_dict=state)
                tokenizer.save_pretrained(folder)
                self._write_card(folder, {})
        ranks().wait()

    def save_adapters(self, write: Callable[[Path], None]) -> None:
        """Have `write(folder)` fill adapters/, beside the model that they are merged into, atomically."""
        if ranks().main:
            with folder_aside(self.path / "adapters") as folder:
                write(folder)
                self._write_card(folder, {})

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json and the figures in the cards, for which all ranks wait; then upload what was asked for."""
        self.write_json("summary.json", summary)
        if ranks().main:
            for folder in (self.path / "model", self.path / "adapters"):
                if folder.is_dir():
                    self._write_card(folder, summary)
        ranks().wait()
        if self._config is not None and not self.part:
            self.upload(self._config.push_to_hub)

    def upload(self, repository: str) -> None:
        """Upload model/ and adapters/ to the repository, unless they are there; "" uploads nothing.

        The main process alone does it. A large upload takes longer than other processes may wait for one that is to
        communicate, so call it where nothing is left for them to do.
        """
        if not ranks().main or not repository:
            return
        path = self.path / UPLOADED
        done: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
        for name, inside in (("model", ""), ("adapters", "adapters")):
            folder, place = self.path / name, f"{repository}/{inside}".rstrip("/")
            if not folder.is_dir() or place in done:
                continue
            stale = () if inside or (self.path / "adapters").is_dir() else ("adapters/adapter_*",)
            if address := upload(repository, folder, inside, stale):
                notice(f"{folder} is at {address}")
                write_json(path, done := {**done, place: address})

    def _write_card(self, folder: Path, summary: Mapping[str, Any]) -> None:
        kind = type(self._config).__name__
        if kind in KINDS:
            samples = [row for row in read_jsonl(self.path / "samples.jsonl") if row.get("when") == "after"]
            write_card(folder, Trained(kind, redacted(dataclasses.asdict(self._config)), summary, samples))

    def close(self) -> None:
        """Flush TensorBoard and the trackers, and unlock the folder."""
        unlock(self.path / MARKER)
        if self._trackers is not None:
            self._trackers.close()
            self._trackers = None
        if self._board is not None:
            self._board.close()
            self._board = None

    def _tensorboard(self) -> Any:
        if self._board is None:
            try:
                from torch.utils.tensorboard import SummaryWriter

                folder, purge = str(self.path / "tensorboard"), self._purge_step
                self._board = SummaryWriter(folder, purge_step=purge)  # type: ignore[no-untyped-call]
            except ImportError:
                self._board = _NoBoard()
        return self._board


class _NoBoard:
    """Replaces TensorBoard if that is not installed; metrics.jsonl has everything."""

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Nothing to flush."""


def _begun(path: Path, parts: Parts) -> Path:
    """The folder beside `path` with all that is not sharded."""
    aside = begin_aside(path)
    try:
        save_state(aside, parts)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return aside


def is_restart(path: str | Path) -> bool:
    """Whether this launch of torchrun has used the run folder before: it restarts all processes if one ends."""
    try:
        return bool(_launch()) and _launch() in (Path(path) / MARKER).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return False


def _launch() -> str:
    """A name of this launch by torchrun, the same after a restart; empty without torchrun."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"launched by torchrun {run} {os.getppid()}" if run else ""


def _empty(path: Path) -> None:
    for item in path.iterdir():
        if item.name == MARKER:
            continue
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        else:
            item.unlink()


def _row(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Numbers for JSON, None where one is not finite: strict JSON has no NaN or infinity."""
    numbers = {name: float(value) for name, value in metrics.items()}
    return {name: number if math.isfinite(number) else None for name, number in numbers.items()}


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a half-written last line
