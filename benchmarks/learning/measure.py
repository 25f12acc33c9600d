# SPDX-License-Identifier: Apache-2.0
"""Learning curves beside independent implementations, on one tiny task: `make measure-learning`.

    python benchmarks/learning/measure.py                     every task, five seeds: docs/learning.md
    python benchmarks/learning/measure.py --tasks grpo rloo   these alone; what was measured before is kept
    python benchmarks/learning/measure.py --report            draw what is there

PPO stands beside `ppo_single_file.py`, the others beside TRL. A curve is a file in runs/learning/results.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

FOLDER = Path("runs/learning")
TASKS = ("sft", "reward", "dpo", "ppo", "grpo", "rloo")
SIDES = ("rlhf_fast", "other")


def learner(task: str, side: str) -> Any:
    """A function (Task, seed) -> curve."""
    if side == "rlhf_fast":
        import learn_ours

        return partial(learn_ours.online, task) if task in ("ppo", "grpo", "rloo") else getattr(learn_ours, task)
    if task == "ppo":
        import ppo_single_file

        return ppo_single_file.learn
    import learn_trl

    return partial(learn_trl.online, task) if task in ("grpo", "rloo") else getattr(learn_trl, task)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    parser.add_argument("--again", action="store_true", help="measure also what is there already")
    parser.add_argument("--report", action="store_true", help="only draw what is there")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    results = FOLDER / "results"
    results.mkdir(parents=True, exist_ok=True)
    if not options.report:
        from task import Task

        from rlhf_fast.run.quiet import quiet
        from rlhf_fast.run.runtime import tune_process

        quiet()
        tune_process()
        task = Task(FOLDER / "task")
        for seed in options.seeds:
            for name in options.tasks:
                for side in options.sides:
                    path = results / f"{name}-{side}-{seed}.json"
                    if path.exists() and not options.again:
                        continue
                    start = time.perf_counter()
                    curve = learner(name, side)(task, seed=seed)
                    seconds = time.perf_counter() - start
                    path.write_text(json.dumps({"curve": curve, "seconds": seconds}))
                    last = {key: round(value, 3) for key, value in curve[-1].items()}
                    print(f"{name} {side} seed {seed}: {seconds:.0f} s, {last}", flush=True)
    import curves

    curves.report(results, Path("docs/learning.png"))


if __name__ == "__main__":
    main()
