# SPDX-License-Identifier: Apache-2.0
"""accelerate's trackers (wandb, mlflow, ...), which log the metrics in addition to metrics.jsonl."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_fast.errors import UserError

from .progress import notice
from .terminal import redacted


class Trackers:
    """The open trackers of `config.trackers`; without any it does nothing.

    Not through an `Accelerator`: the first one fixes the precision of the process, and SFT's Trainer creates its own.
    """

    def __init__(self, folder: Path, config: Any) -> None:
        """Start them for the run in `folder` and log its configuration."""
        self._open: list[Any] = []
        for name in dict.fromkeys(config.trackers):
            from accelerate.tracking import LOGGER_TYPE_TO_CLASS

            cls = LOGGER_TYPE_TO_CLASS[name]
            tracker = cls(folder.name, folder) if cls.requires_logging_directory else cls(folder.name)
            tracker.start()
            tracker.store_init_configuration(
                {k: str(value) for k, value in redacted(dataclasses.asdict(config)).items()}
            )
            self._open.append(tracker)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics of one step."""
        self._each(lambda tracker: tracker.log({name: float(value) for name, value in metrics.items()}, step=step))

    def close(self) -> None:
        """Write what is still in memory."""
        self._each(lambda tracker: tracker.finish())
        self._open = []

    def _each(self, call: Callable[[Any], Any]) -> None:
        """`call(tracker)` for each; one that fails is left out from then on, as metrics.jsonl has everything."""
        for tracker in list(self._open):
            try:
                call(tracker)
            except Exception as error:
                self._open.remove(tracker)
                notice(
                    f"the tracker {tracker.name} failed and is left out from now on: {type(error).__name__}: {error}"
                )


def check_trackers(names: Sequence[str]) -> None:
    """UserError for a name that accelerate does not know, or whose package is not installed."""
    from accelerate.tracking import get_available_trackers

    installed = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in installed:
            raise UserError(
                f"trackers: {name!r} is not among the trackers that accelerate found installed here: {installed}"
            )
