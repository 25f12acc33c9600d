# SPDX-License-Identifier: Apache-2.0
"""Kills jobs of phases.py by SIGKILL and resumes them: `python -m helpers.killer DATA FOLDER SEED JOB ...` in tests/.

Each run is a fork of this process, which has imported everything and computed nothing. Prints how each child ended.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers  # noqa: F401  (imported once for all children)

import rlhf_fast.trainer.sft.hf_trainer  # noqa: F401
from helpers import phases
from rlhf_fast.run.folder import RunFolder

CALLS = 20_000  # of Python functions: about a step of the tiny task


def spawn(config: Any, folder: Path, prepare: Callable[[], None] | None = None) -> int:
    """A child that does the job, resuming where there is something to resume."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if prepare is not None:
                prepare()
            phases.run(config, folder, resume=folder.exists())
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def ending(child: int) -> str:
    """finished, killed, or failed."""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {0: "finished", -signal.SIGKILL: "killed"}.get(status, "failed")


def kill_after(child: int, file: Path, lines: int, delay: float) -> str:
    """Kill the child `delay` seconds after `file` has so many lines."""
    while not (file.exists() and file.read_bytes().count(b"\n") >= lines):
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)  # of a child that has ended, nothing: it is still to be waited for
    return ending(child)


def die_after(name: str, lines: int, calls: int) -> Callable[[], None]:
    """Die `calls` calls of Python functions after file `name` got so many lines, before it gets another.

    Counted in calls and not in seconds: a machine that is faster or busier than another dies at the same place.
    """

    def prepare() -> None:
        append, left = RunFolder.append_jsonl, [lines, calls]

        def count(frame: Any, event: str, argument: Any) -> None:
            left[1] -= event == "call"
            if left[1] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def counted(run: RunFolder, file: str, *args: Any, **options: Any) -> None:
            if file == name and not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            append(run, file, *args, **options)
            if file == name:
                left[0] -= 1
                if not left[0]:
                    sys.setprofile(count)

        RunFolder.append_jsonl = counted  # type: ignore[method-assign]

    return prepare


def die_while_saving() -> None:
    """The next checkpoint has half its tensors when the end comes."""
    save_file = safetensors.torch.save_file

    def half(tensors: Any, filename: Any, *args: Any, **options: Any) -> None:
        save_file(tensors, filename, *args, **options)
        os.truncate(filename, os.path.getsize(filename) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    safetensors.torch.save_file = half


def die_within_a_line() -> None:
    """The next line that is appended has its first half when the end comes."""

    def half(run: RunFolder, name: str, rows: Any, keep_lines: int | None = None) -> None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with (run.path / name).open("a") as file:
            file.write(text[: len(text) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    RunFolder.append_jsonl = half  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    data, folder, seed, names = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    luck = random.Random(seed)
    ends: dict[str, list[str]] = {}
    for name in names:
        config, cut = phases.jobs(data)[name], folder / "cut" / name
        ends[name] = [ending(spawn(config, folder / "whole" / name))]
        file = "feedback.jsonl" if name == "collect" else "metrics.jsonl"
        # when the second step is logged the first one's checkpoint is there
        lines = luck.randint(1, 9) if name == "collect" else 3 if name in ("sft", "lora") else 2
        deaths = [die_within_a_line, die_after(file, lines, luck.randint(0, CALLS))]
        for prepare in (*deaths, *((die_while_saving,) if name != "collect" else ()), die_within_a_line):
            ends[name].append(ending(spawn(config, cut, prepare)))
        ends[name].append(ending(spawn(config, cut)))
    print(json.dumps(ends))
