# SPDX-License-Identifier: Apache-2.0
"""SIGKILLs at random moments of the whole pipeline: `python -m helpers.soak FOLDER [KILLS] [SEED]` in tests/.

The tiny pipeline is run once in one go. Then it is run again and again, killed after a random time and resumed until it
ends, until there were so many kills. Every file that holds a result must be the same, byte for byte.
"""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers  # noqa: F401  (imported once for all children)

import rlhf_fast.trainer.sft.hf_trainer  # noqa: F401
from helpers import phases
from helpers.killer import ending, kill_after
from rlhf_fast.run.options import load_config
from rlhf_fast.trainer import PipelineConfig, run_pipeline

TINY = Path(__file__).parents[2] / "examples" / "tiny"
SHORTER = {"sft.max_steps": 12, "reward.epochs": 1.0, "ppo.max_steps": 8, "save_steps": 1, "dtype": "float32"}
LONGEST = 3.0  # seconds that a run lives; some end before they have done anything, most within a phase


def spawn(data: Path, folder: Path) -> int:
    """A child that runs the pipeline, resuming where there is something to resume."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            files = {"sft.train_file": "sft", "sft.eval_file": "heldout", "collect.prompts_file": "few"}
            files |= {"ppo.prompts_file": "feedback_prompts", "ppo.eval_prompts_file": "fewer"}
            overrides = {**SHORTER, **{name: str(data / f"{file}.jsonl") for name, file in files.items()}}
            config = load_config(PipelineConfig, str(TINY / "tiny.yaml"), {**overrides, "model": str(data / "model")})
            run_pipeline(dataclasses.replace(config, output_dir=str(folder), resume=folder.exists()))
            code = 0
        finally:
            os._exit(code)
    return child


def results(folder: Path) -> Iterator[tuple[str, object]]:
    """Name and content of everything that the pipeline leaves, without times and the folder's own name."""
    own = str(folder).encode()
    for phase in ("sft", "reward", "ppo"):
        for path in sorted((folder / phase / "model").iterdir()):
            yield f"{phase}/model/{path.name}", path.read_bytes().replace(own, b"")
        yield f"{phase}/metrics", phases.metrics(folder / phase)
    for name in ("collect/feedback.jsonl", "ppo/samples.jsonl", "ppo/eval_after.json"):
        yield name, (folder / name).read_bytes().replace(own, b"")


def main(folder: Path, kills: int, seed: int) -> int:
    """Print how it went; the exit code is the number of pipelines whose results differ."""
    torch.set_num_threads(1)
    luck, done, wrong, runs = random.Random(seed), 0, 0, 0
    shutil.rmtree(folder, ignore_errors=True)
    sys.path.insert(0, str(TINY))
    import make_data

    make_data.make_tiny(folder / "data")
    phases.prepare(folder / "data")
    if ending(spawn(folder / "data", folder / "whole")) != "finished":
        print((folder / "whole.log").read_text())
        return 1
    whole = dict(results(folder / "whole"))
    while done < kills:
        cut, end = folder / f"cut-{runs}", ""
        while end != "finished":
            last = done >= kills
            child = spawn(folder / "data", cut)
            end = (
                ending(child) if last else kill_after(child, folder / "data" / "sft.jsonl", 0, luck.uniform(0, LONGEST))
            )
            done += end == "killed"
            if end == "failed":
                print((cut.with_suffix(".log")).read_text()[-3000:])
                return wrong + 1
        different = [name for name, value in results(cut) if whole[name] != value]
        wrong += bool(different)
        runs += 1
        print(
            f"pipeline {runs}: {done} kills so far,",
            f"different: {different}" if different else "same results",
            flush=True,
        )
    return wrong


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[2:]]
    sys.exit(main(Path(sys.argv[1]), *[*numbers, *(50, 0)[len(numbers) :]]))
