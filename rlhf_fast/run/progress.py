# SPDX-License-Identifier: Apache-2.0
"""Messages, progress bar, timer and stop signal, for every phase."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from rlhf_fast.distributed.ranks import ranks

from .terminal import printable


def notice(message: str) -> None:
    """Print a message on standard error, in the main process."""
    if ranks().main:
        print(f"rlhf-fast: {printable(message)}", file=sys.stderr, flush=True)


class StopFlag:
    """`with StopFlag() as stop:` the first SIGINT or SIGTERM sets `stop.requested`; a second one ends at once."""

    def __init__(self) -> None:
        """The signal handlers are installed when the block is entered."""
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
        self._lap: dict[str, float] = {}
        self.start = time.perf_counter()
        self._open: dict[str, float] = {}  # parts under way -> when they began
        self._before = 0.0  # seconds of earlier launches, and by part
        self._parts_before: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add the time of the block to `part`."""
        start = self._open[part] = time.perf_counter()
        try:
            yield
        finally:
            self._open.pop(part, None)
            seconds = time.perf_counter() - start
            self.totals[part] = self.totals.get(part, 0.0) + seconds
            self._lap[part] = self._lap.get(part, 0.0) + seconds

    def lap(self) -> dict[str, float]:
        """Seconds by part since the last lap as metrics `time/part`."""
        lap, self._lap = self._lap, {}
        return {f"time/{part}": seconds for part, seconds in lap.items()}

    def since_start(self) -> float:
        """Seconds since the timer was created, in this launch."""
        return time.perf_counter() - self.start

    def elapsed(self) -> float:
        """Seconds of this launch and of those before it, up to the checkpoint that each was resumed from."""
        return self._before + self.since_start()

    def parts(self) -> dict[str, float]:
        """The same by part, with those under way."""
        now = time.perf_counter()
        launches = (self._parts_before, self.totals, {name: now - start for name, start in self._open.items()})
        names = dict.fromkeys(name for parts in launches for name in parts)
        return {name: sum(parts.get(name, 0.0) for parts in launches) for name in names}

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"seconds": self.elapsed(), "parts": self.parts()}

    def resume(self, state: dict[str, Any] | None) -> None:
        """Go on counting from what `state` returned; None, of a checkpoint without it, changes nothing."""
        if state is not None:
            self._before, self._parts_before = float(state["seconds"]), dict(state["parts"])


class Progress:
    """A progress bar; if the output is not a terminal, a line every ten seconds instead.

    with Progress("ppo", total=60) as bar:
        bar.update(step, "good so far", reward=0.3, kl=1.2)
    """

    def __init__(self, description: str, total: int) -> None:
        """`total` steps."""
        from rich.console import Console, RenderableType
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars
        from rich.text import Text

        class Bar(Bars):
            verdict = ""

            def get_renderables(self) -> Iterator[RenderableType]:
                """The bar, and below it what the doctor says."""
                yield from super().get_renderables()
                if self.verdict:
                    level = self.verdict.partition(":")[0]
                    yield Text(f"  doctor: {self.verdict}", style={"bad": "red", "look": "yellow"}.get(level, "dim"))

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
            disable=not (console.is_terminal and ranks().main),
        )
        self._task = self._bar.add_task(description, total=total, figures="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, done: int, verdict: str = "", **figures: float) -> None:
        """Show `done` steps, the latest figures, and what `run/verdicts.py` says of them."""
        text = " ".join(f"{name} {value:.3g}" for name, value in figures.items())
        self._bar.verdict = printable(verdict)
        self._bar.update(self._task, completed=done, figures=text)
        last = done >= self.total
        if self._bar.disable and ranks().main and (last or time.monotonic() - self._printed > 10):
            judged = f"; {printable(verdict)}" if verdict else ""
            print(f"{self.description} {done}/{self.total} {text}".rstrip() + judged, flush=True)
            self._printed = time.monotonic()
