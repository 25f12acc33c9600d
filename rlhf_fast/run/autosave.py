# SPDX-License-Identifier: Apache-2.0
"""When a run saves: every N steps or minutes, on Ctrl-C, at the end, and on an error that leaves no step half done."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch

from rlhf_fast.distributed.dtensors import is_dtensor, local_shard
from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.errors import Interrupted, UserError

from .checkpoint import folder_size, free_space, newest_checkpoint, remove_old_checkpoints
from .folder import RunFolder
from .options import RunOptions
from .progress import notice

NOT_FINITE = "the weights are not finite and were not saved"
HALF_DONE = "the step had begun to change the weights, which were not saved"
BYTES_PER_WEIGHT = 12  # a float32 weight and two moments
SAVING_SHARE = 20  # saving by the clock takes at most 1 / SAVING_SHARE of the time between two saves


class SaveOptions(NamedTuple):
    """When to save."""

    steps: int  # between two saves; 0: the clock decides
    minutes: float  # between two saves; 0: the clock never does
    last: bool  # also at the end

    @classmethod
    def of(cls, options: RunOptions) -> SaveOptions:
        """Those of a phase."""
        return cls(options.save_steps, options.save_minutes, options.save_last)


class Autosave:
    """`with Autosave(...) as autosave:` around the loop of a phase, whose steps end with `autosave.after_step(step)`.

    On an exception in the block, the current state is saved if it is that of a whole step, all weights are finite and
    it is not on disk already, and the exception is raised again. The message of a UserError then says where `--resume`
    would begin.

    A step calls `begin_change` before it changes anything that is saved. From then to the end of the step the state is
    neither that of this step nor that of the one before, so it is not saved, and the checkpoint before is named.
    """

    def __init__(
        self, run: RunFolder, options: SaveOptions, models: Sequence[Any], step: int, save: Callable[[int], None]
    ) -> None:
        """`models` (None is skipped) are trained, `step` steps are done, `save(step)` writes a checkpoint."""
        self.run, self.options, self.save, self.step = run, options, save, step
        self.weights = [p for model in models if model is not None for p in model.parameters() if p.requires_grad]
        self.room_is_short = False
        self.changing = False
        self._seconds = 0.0  # duration of the last save
        self._saved_at = time.monotonic()  # not the wall clock, which may be set back

    def __enter__(self) -> Autosave:
        return self

    def begin_change(self) -> None:
        """The step under way changes weights or other saved state from now on."""
        self.changing = True

    def end_change(self, step: int) -> None:
        """The state is that after `step` steps: all of it is changed, and the step's metrics are on disk."""
        self.step, self.changing = step, False

    def after_step(self, step: int, stop_requested: bool = False) -> bool:
        """Save if it is due. Returns True on every rank if a rank was asked to stop; the run is saved then."""
        self.end_change(step)
        wanted, stopping = self.due(step, stop_requested)
        if wanted:
            self.save_now(step)
        return stopping

    def due(self, step: int, stop_requested: bool = False) -> tuple[bool, bool]:
        """Whether to save after `step` steps, and whether to stop; the same on every rank."""
        interval, minutes, _ = self.options
        elapsed = time.monotonic() - self._saved_at
        saving = max(self._seconds, self.run.shard_writer.seconds)  # shards are written after `save` has returned
        by_clock = ranks().main and 0 < minutes * 60 <= elapsed and elapsed > SAVING_SHARE * saving
        # one collective: a signal between two of them would end the run unsaved
        by_clock = by_clock and self._has_room()
        stopping, by_clock = (bool(count) for count in ranks().total([float(stop_requested), float(by_clock)]))
        if by_clock:
            self._saved_at = time.monotonic()
        return stopping or by_clock or (interval > 0 and step % interval == 0), stopping

    def save_now(self, step: int) -> None:
        """Write a checkpoint of `step`; UserError if a weight is not finite, to keep good checkpoints."""
        self.check_finite(step)
        start = time.monotonic()
        self.save(step)
        self._seconds, self._saved_at = time.monotonic() - start, time.monotonic()

    def check_finite(self, step: int) -> None:
        """UserError if a weight is not finite."""
        if not self._finite():
            raise UserError(f"a weight of the model is not finite after step {step}; lower the learning rate")

    def finish(self, step: int) -> None:
        """Write the last checkpoint, from which `--resume` with more steps can continue; wait until it is written."""
        self.step = step
        self.run.shard_writer.wait()
        if not self._is_on_disk(step) and self.keeps_last():
            self.save_now(step)
            self.run.shard_writer.wait()

    def keeps_last(self) -> bool:
        """Whether a checkpoint of the last step is wanted and the disk has room for it; the same on every rank."""
        return self.options.last and ranks().once(self._has_room)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, Interrupted):
            self.run.shard_writer.wait()
        if not isinstance(error, Exception) or isinstance(error, Interrupted):
            return
        message = self._save_after(error)
        if message.startswith(NOT_FINITE) and not isinstance(error, UserError):
            raise UserError(f"after step {self.step} {message}. Lower the learning rate") from error
        if isinstance(error, UserError):
            error.args = (f"{error}; {message}",)
        else:
            notice(message)

    def _save_after(self, error: Exception) -> str:
        """Save after an exception if possible; returns a message for the user."""
        together = ranks().all_raised(error)
        if not together:
            ranks().leave()
        with suppress(UserError):  # of an older checkpoint, or of this one, which is then not on disk
            self.run.shard_writer.wait()
        reason = "" if self._is_on_disk(self.step) else self._saving_failed(together)
        if not reason:
            return f"saved after {self.step} steps, --resume goes on from there"
        newest = newest_checkpoint(self.run.path)
        if newest is None and reason == HALF_DONE:
            return f"{reason}, and there is no checkpoint yet: --resume starts over at step 0"
        if newest is None:
            return f"{reason}, and there is no older checkpoint: start over with --overwrite"
        return f"{reason}; --resume goes on from the checkpoint {newest.name}"

    def _saving_failed(self, together: bool) -> str:
        """Save; returns why that was impossible, or nothing. `together`: all ranks do it."""
        if not together and any(map(is_dtensor, self.weights)):
            return "weights that are sharded over processes cannot be saved once one of them has failed"
        try:
            if not self._finite():
                return NOT_FINITE
            if ranks().any(self.changing):
                return HALF_DONE
            self.save(self.step)
            self.run.shard_writer.wait()
        except Exception as failure:  # report the first error, not this one
            return f"saving failed as well ({failure})"
        return ""

    @torch.no_grad()
    def _finite(self) -> bool:
        return not ranks().any(not all(bool(local_shard(weight).isfinite().all()) for weight in self.weights))

    def _is_on_disk(self, step: int) -> bool:
        return self._checkpoint(step).is_dir()

    def _checkpoint(self, step: int) -> Path:
        return self.run.path / "checkpoints" / f"step-{step}"

    def _has_room(self) -> bool:
        """Whether the disk has room for one more checkpoint; removes all but the newest if it has not."""
        newest = newest_checkpoint(self.run.path)
        size = folder_size(newest) if newest else BYTES_PER_WEIGHT * sum(weight.numel() for weight in self.weights)
        if free_space(self.run.path) <= size and newest and ranks().main:
            remove_old_checkpoints(self.run.path, keep=1)
        if free_space(self.run.path) > size:
            return True
        if not self.room_is_short:
            self.room_is_short = True
            notice(
                f"no checkpoint: one takes {size / 2**30:.2f} GiB, and the disk of {self.run.path} has less free. "
                "The run goes on, and saves once there is room"
            )
        return False
