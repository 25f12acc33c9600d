# SPDX-License-Identifier: Apache-2.0
"""What every phase does around its learning: run folder, metrics, progress bar, clock, stop signal."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from .checkpoint import (
    folder_aside,
    load_state,
    newest_checkpoint,
    remove_old_checkpoints,
    rng_state,
    save_state,
    seed_everything,
    set_rng_state,
    write_json,
    write_text,
)
from .errors import UserError

__all__ = [
    "Progress",
    "RunFolder",
    "StopFlag",
    "Timer",
    "load_state",
    "notice",
    "rng_state",
    "save_state",
    "seed_everything",
    "set_rng_state",
]


MARKER = ".rlhf_fast"  # in every run folder, so that --overwrite never empties any other


def notice(message: str) -> None:
    """Tell the user something in passing, on standard error."""
    print(f"rlhf-fast: {message}", file=sys.stderr, flush=True)


class RunFolder:
    """A folder of one phase or of a whole pipeline; made by `create` or `child`.

    config.yaml metrics.jsonl tensorboard/ samples.jsonl checkpoints/step-N/ model/ summary.json
    """

    def __init__(self, path: Path, resume: bool = False) -> None:
        """Wrap a folder that exists; use `create`."""
        self.path = path
        self.resume = resume
        self._board: Any = None

    @classmethod
    def create(cls, path: str | Path, *, overwrite: bool = False, resume: bool = False) -> RunFolder:
        """Make the folder. One that holds files already is refused, emptied (`overwrite`) or used (`resume`)."""
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise UserError(f"the run folder {path} is a file; name another with --output-dir")
        try:
            if not resume and path.is_dir() and {item.name for item in path.iterdir()} - {MARKER}:
                if not overwrite:
                    raise UserError(
                        f"the run folder {path} exists and is not empty; "
                        "name another with --output-dir, or pass --resume to go on in it or --overwrite to empty it"
                    )
                if not (path / MARKER).exists():
                    raise UserError(
                        f"{path} is not a run folder of ours (it holds no {MARKER}), so --overwrite does not empty it; "
                        "name another with --output-dir"
                    )
                _empty(path)
            path.mkdir(parents=True, exist_ok=True)
            (path / MARKER).write_bytes(b"made by rlhf_fast: --overwrite may empty this folder\n")
        except OSError as error:
            raise UserError(
                f"the run folder {path} cannot be written ({error.strerror}); name another with --output-dir"
            ) from None
        return cls(path, resume)

    def child(self, name: str) -> RunFolder:
        """The folder of one phase of a pipeline."""
        return RunFolder.create(self.path / name, resume=self.resume)

    def save_config(self, config: Any) -> None:
        """Write a dataclass as config.yaml."""
        import yaml

        write_text(self.path / "config.yaml", yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append numbers to metrics.jsonl and to TensorBoard (where it is installed)."""
        row = {"step": step, **{name: _plain(value) for name, value in metrics.items()}}
        self.append_jsonl("metrics.jsonl", [row])
        for name, value in metrics.items():
            self._tensorboard().add_scalar(name, float(value), step)

    def append_jsonl(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append one JSON object a line to a file of the folder."""
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def truncate_metrics(self, step: int) -> None:
        """Forget metrics after `step`, which a resumed run will log again."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            rows = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            write_text(path, "".join(line + "\n" for line in rows))

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file of the folder in one piece."""
        write_json(self.path / name, value)

    def read_json(self, name: str) -> Any:
        """Read a JSON file of the folder; UserError if it is missing or damaged."""
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {self.path / name}: {error}") from None

    @contextmanager
    def checkpoint(self, step: int, keep: int = 2) -> Iterator[Path]:
        """A folder to fill that becomes checkpoints/step-N when the block ends; older ones but `keep` go."""
        with folder_aside(self.path / "checkpoints" / f"step-{step}") as folder:
            yield folder
        remove_old_checkpoints(self.path, keep)

    def latest_checkpoint(self) -> Path | None:
        """The newest checkpoint if the run was asked to resume and there is one."""
        return newest_checkpoint(self.path) if self.resume else None

    @contextmanager
    def folder(self, name: str) -> Iterator[Path]:
        """A folder to fill, put in place in one piece: `with run.folder("model") as f: model.save_pretrained(f)`."""
        with folder_aside(self.path / name) as folder:
            yield folder

    def close(self) -> None:
        """Flush TensorBoard."""
        if self._board is not None:
            self._board.close()
            self._board = None

    def _tensorboard(self) -> Any:
        if self._board is None:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(self.path / "tensorboard"))  # type: ignore[no-untyped-call]
            except ImportError:
                self._board = _NoBoard()
        return self._board


class _NoBoard:
    """Stands in where tensorboard is not installed; metrics.jsonl has everything."""

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Drop it."""

    def close(self) -> None:
        """Nothing to flush."""


def _empty(path: Path) -> None:
    for item in path.iterdir():
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        else:
            item.unlink()


def _plain(value: Any) -> float | None:
    """A number that strict JSON can hold."""
    number = float(value)
    return number if math.isfinite(number) else None


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a half-written last line


class StopFlag:
    """`with StopFlag() as stop:` the first SIGINT or SIGTERM sets `stop.requested`; a second one ends at once."""

    def __init__(self) -> None:
        """Nothing is installed until the block is entered."""
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopFlag:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not the main thread: the caller owns the signals
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        notice("stopping: the run is saved after this step (once more to stop at once)")


class Timer:
    """Seconds by named part: `with timer("generate"): ...`, then `timer.lap()` for the metrics of a step."""

    def __init__(self) -> None:
        """Start with nothing measured."""
        self.totals: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self._lap: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add the time of the block to `part`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self.totals[part] = self.totals.get(part, 0.0) + seconds
            self.counts[part] = self.counts.get(part, 0) + 1
            self._lap[part] = self._lap.get(part, 0.0) + seconds

    def lap(self) -> dict[str, float]:
        """Seconds by part since the last lap as metrics `time/part`."""
        lap, self._lap = self._lap, {}
        return {f"time/{part}": seconds for part, seconds in lap.items()}

    def elapsed(self) -> float:
        """Seconds since the timer was made."""
        return time.perf_counter() - self._start


class Progress:
    """One progress bar; where the output is no terminal, a line every ten seconds instead.

    with Progress("ppo", total=60) as bar:
        bar.update(step, reward=0.3, kl=1.2)
    """

    def __init__(self, description: str, total: int) -> None:
        """`total` steps, of any kind."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        console = Console()
        self.description, self.total = description, total
        self._printed = time.monotonic()
        self._bar = Bar(
            TextColumn("[bold]{task.description:>8}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(description, total=total, figures="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, done: int, **figures: float) -> None:
        """Show that `done` of the steps are done, and the newest figures."""
        text = " ".join(f"{name} {value:.3g}" for name, value in figures.items())
        self._bar.update(self._task, completed=done, figures=text)
        last = done >= self.total
        if self._bar.disable and (last or time.monotonic() - self._printed > 10):
            print(f"{self.description} {done}/{self.total} {text}".rstrip(), flush=True)
            self._printed = time.monotonic()
