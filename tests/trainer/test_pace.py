# SPDX-License-Identifier: Apache-2.0
"""Steps get smaller before they get fewer, and threads are as many as the CPUs have time for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import phases

from rlhf_fast import _spin
from rlhf_fast.errors import Interrupted
from rlhf_fast.models.batches import MicroBatch
from rlhf_fast.rollout.evaluate import figures_of
from rlhf_fast.rollout.rollout import SamplingParams
from rlhf_fast.run import progress
from rlhf_fast.run import threads as threads_module
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.run.records import read_jsonl
from rlhf_fast.run.threads import Threads
from rlhf_fast.trainer.reward import train as reward_train
from rlhf_fast.trainer.rl import evaluation, ppo
from rlhf_fast.trainer.rl.config import PPOConfig
from rlhf_fast.trainer.rl.evaluation import Evaluator
from rlhf_fast.trainer.rl.pace import Pace
from rlhf_fast.trainer.rl.settings import Settings
from rlhf_fast.trainer.sft import train as sft_train


class Clock:
    """A phase whose steps take so many seconds a prompt, with its timer."""

    def __init__(self, each: float, **options: Any) -> None:
        self.each, self.now = each, 0.0
        self.timer = SimpleNamespace(totals={"evaluate": 10.0, "load": 5.0, "step": 0.0}, elapsed=lambda: self.now)
        values = {"prompts_per_step": 8, "samples_per_prompt": 4, "num_minibatches": 2, "max_steps": 16}
        settings = Settings(PPOConfig(**{**values, **options}))  # type: ignore[arg-type]
        self.pace = Pace(settings.duration, settings.sizes, self.timer)  # type: ignore[arg-type]

    def run(self, steps: int) -> list[int]:
        """Prompts of each step, of at most so many."""
        self.now, prompts = 15.0, []
        while len(prompts) < steps and not self.pace.ended(len(prompts)):
            prompts.append(self.pace.sizes.prompts)
            self.now += self.each * prompts[-1]
            self.timer.totals["step"] += self.each * prompts[-1]
        return prompts


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch has GNU's OpenMP on Linux alone")
def test_the_wait_policy_is_set_before_torch_is_loaded() -> None:
    """In every phase, as all begin with an import of rlhf_fast; OpenMP prints what it read."""
    code = "from rlhf_fast.trainer import PPOConfig; import os; print('left', os.environ.get('GOMP_SPINCOUNT'))"
    unset = {name: value for name, value in os.environ.items() if name not in _spin.POLICIES}
    for given, spins, left in (({}, _spin.SPINS, None), ({"GOMP_SPINCOUNT": "77"}, "77", "77")):
        shown = subprocess.run(
            [sys.executable, "-c", code],
            env={**unset, **given, "OMP_DISPLAY_ENV": "verbose"}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert f"GOMP_SPINCOUNT = '{spins}'" in shown.stderr and f"left {left}" in shown.stdout


def test_steps_get_smaller_before_they_get_fewer(capsys: pytest.CaptureFixture[str]) -> None:
    assert Clock(1.6, max_seconds=400).run(16) == [8] * 16  # 13 s a step: all is well
    assert "15 more steps of 12.8 s: the phase ends at about" in capsys.readouterr().err
    slow = Clock(6.0, max_seconds=400)
    prompts = slow.run(16)
    assert len(prompts) == 16 and prompts[0] == 8 and 2 <= min(prompts) < 8 and slow.now + 15 < 420
    error = capsys.readouterr().err
    assert "a step takes 48 s, too long for 15 more within max_seconds 400" in error and error.count("too long") == 1


def test_no_phase_ends_before_ten_steps_unless_told_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert Clock(15.8, max_seconds=400).run(16) == [8] + [2] * 9  # 126 s a step, as it was seen
    assert "the time limit of 400 s ends the phase after 10 steps" in capsys.readouterr().err
    assert Clock(15.8, max_seconds=400, min_steps=1).run(16) == [8] + [2] * 7
    assert len(Clock(15.8, max_seconds=400, max_steps=4).run(4)) == 4
    assert Clock(15.8).run(16) == [8] * 16  # no limit


def test_a_burst_of_load_is_made_up_for() -> None:
    clock = Clock(6.0, max_seconds=400)
    prompts = clock.run(3)
    clock.each = 0.5
    assert prompts[-1] < 8
    while not clock.pace.ended(len(prompts)) and len(prompts) < 16:
        prompts.append(clock.pace.sizes.prompts)
        clock.now += clock.each * prompts[-1]
        clock.timer.totals["step"] += clock.each * prompts[-1]
    assert len(prompts) == 16 and prompts[-1] == 8


def test_the_last_evaluation_gets_smaller_with_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    """The evaluation before took ten seconds; 48 prompts, as the demo has."""
    for each, limit in ((1.6, 400), (15.8, 0)):  # all is well; no limit
        clock = Clock(each, max_seconds=limit)
        clock.run(16)
        assert clock.pace.held_out(48) == 48
    assert "held-out" not in capsys.readouterr().err
    slow = Clock(15.8, max_seconds=400)
    slow.run(16)
    assert slow.pace.held_out(48) == 12  # the time is up, so a fourth
    slow.now = 393.9  # six seconds for what takes ten, and a fifth more
    assert slow.pace.held_out(48) == 24 and slow.pace.held_out(1) == 1
    assert "6 s are left of max_seconds 400: the last evaluation takes 24 of 48 held-out prompts" in (
        capsys.readouterr().err
    )
    slow.each *= 4  # from now on everything takes four times as long
    slow.timer.totals["step"] += slow.each * slow.pace.sizes.prompts
    slow.pace.ended(11)
    slow.now = 375.9
    assert slow.pace.held_out(48) == 24
    resumed = Clock(15.8, max_seconds=400)
    resumed.timer.totals["evaluate"] = 0.0  # read back from the run's folder
    resumed.run(16)
    assert resumed.pace.held_out(48) == 48  # how long that takes is not known


def test_a_smaller_last_evaluation_leaves_more_to_the_steps() -> None:
    """Of 100 s, a whole evaluation of 60 would leave the least to each step, two prompts."""
    clock = Clock(2.0, max_seconds=100, max_steps=5, min_steps=1)
    clock.timer.totals["evaluate"], clock.timer.totals["load"] = 60.0, 5.0
    assert clock.run(5) == [8, 3, 3, 4, 4]


def test_a_resumed_phase_has_the_time_that_is_left(
    job_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a clock that stands still but for 450 s an update. Steps of both launches count for min_steps."""
    now, learn = [0.0], ppo.update

    def slow(*args: Any, **options: Any) -> Any:
        now[0] += 450.0
        return learn(*args, **options)

    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: now[0], monotonic=lambda: 0.0))
    monkeypatch.setattr(ppo, "update", slow)
    options: dict[str, Any] = {"max_seconds": 1000.0, "max_steps": 4, "min_steps": 2, "save_steps": 0}
    config = replace(phases.jobs(job_data)["grpo"], eval_samples=1, **options)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(ppo, "StopFlag", stop_at(2))
        phases.run(config, tmp_path / "run")
    phases.run(config, tmp_path / "run", resume=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "the time limit of 1000 s ends the phase after 2 steps" in capsys.readouterr().err
    assert summary["steps"] == 2 and summary["seconds"] == summary["seconds_by_part"]["update"] == 900.0


def test_what_is_known_of_steps_and_evaluation_survives_a_resume() -> None:
    clock, other = Clock(15.8, max_seconds=400), Clock(15.8, max_seconds=400)
    whole = Clock(15.8, max_seconds=400)
    wanted, found = whole.run(16), clock.run(3)
    other.timer.totals["evaluate"] = 0.0  # read back from the run's folder
    other.pace.resume(json.loads(json.dumps(clock.pace.state())))
    other.now = clock.now
    while len(found) < 16 and not other.pace.ended(len(found)):
        found.append(other.pace.sizes.prompts)
        other.now += other.each * found[-1]
        other.timer.totals["step"] += other.each * found[-1]
    assert found == wanted
    other.now = whole.now = 393.9
    assert other.pace.held_out(48) == whole.pace.held_out(48) == 24


@pytest.mark.parametrize("name", ["sft", "reward"])
def test_the_seconds_of_a_phase_are_those_of_all_launches(
    name: str, job_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: Any
) -> None:
    now, fit = [0.0], threads_module.Threads.fit
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: now[0], monotonic=lambda: 0.0))

    def slow(threads: Threads) -> None:
        now[0] += 100.0
        fit(threads)

    monkeypatch.setattr(Threads, "fit", slow)  # once a step
    config = replace(phases.jobs(job_data)[name], save_steps=0)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr({"sft": sft_train, "reward": reward_train}[name], "StopFlag", stop_at(2))
        phases.run(config, tmp_path / "run")
    phases.run(config, tmp_path / "run", resume=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["seconds"] == now[0] and summary["seconds_by_part"]["train"] == 100.0 * summary["steps"] > 200


def test_before_and_after_are_of_the_same_prompts(
    job_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(phases.jobs(job_data)["grpo"], max_steps=1, save_steps=0)
    phases.run(config, tmp_path / "all")
    monkeypatch.setattr(Pace, "held_out", lambda pace, prompts: prompts - 4)
    phases.run(config, tmp_path / "two")
    (whole, rows), (cut, fewer) = (
        (json.loads((folder / "summary.json").read_text()), read_jsonl(folder / "samples.jsonl"))
        for folder in (tmp_path / "all", tmp_path / "two")
    )
    samples, names = config.eval_samples, ("reward", "gold", "kl", "entropy", "length", "ended", "distinct")
    assert len(rows) == 12 * samples and len(fewer) == (6 + 2) * samples  # all before, of which two count
    for when in ("before", "after"):
        of_all = [row for row in rows if row["when"] == when]
        same = [row for row in fewer if row["when"] == when][: 2 * samples]
        assert [row["completion"] for row in same] == [row["completion"] for row in of_all[: 2 * samples]]
        figures = figures_of(same)
        for name in names:
            assert cut[f"{name}_{when}"] == pytest.approx(figures[name])
            assert whole[f"{name}_{when}"] == pytest.approx(figures_of(of_all)[name])
    assert cut["reward_before"] != pytest.approx(whole["reward_before"])
    first, second = ((tmp_path / name / "eval_before.json").read_bytes() for name in ("all", "two"))
    assert first == second
    # A run that goes on with time for all of them evaluates all.
    (tmp_path / "two" / "summary.json").unlink()
    monkeypatch.undo()
    phases.run(config, tmp_path / "two", resume=True)
    again = json.loads((tmp_path / "two" / "summary.json").read_text())
    for when in ("before", "after"):
        assert {name: again[f"{name}_{when}"] for name in names} == pytest.approx(
            {name: whole[f"{name}_{when}"] for name in names}
        )


Judged = Callable[..., Evaluator]


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Judged:
    """Evaluators with keep_best on four held-out prompts, whose evaluations have the `rewards` given in turn; `saved`
    lists how many were left whenever a model was saved."""

    def measure(
        evaluator: Evaluator, held_out: Any, count: int | None
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        rewards = evaluator.agent.rewards
        rows: list[dict[str, Any]] = [{"reward": reward, "completion": "a b"} for reward in rewards.pop(0)]
        assert len(rows) == (4 if count is None else count)
        return figures_of(rows), rows

    monkeypatch.setattr(Evaluator, "_measure", measure)
    monkeypatch.setattr(evaluation, "save_policy", lambda agent, run: agent.saved.append(len(agent.rewards)))
    options = evaluation.EvalOptions(SamplingParams(), samples=1, micro_batch=MicroBatch(1, 0), every=2, keep_best=True)
    held_out: Any = SimpleNamespace(lines=[None] * 4, ids=[None] * 4)

    def make(*rewards: list[float], step: int | None = None) -> Evaluator:
        run = RunFolder.create(tmp_path / "run", resume=step is not None)
        agent: Any = SimpleNamespace(rewards=list(rewards), saved=[])
        evaluator = Evaluator(agent, held_out, options, run, None)
        if step is not None:
            evaluator.resume(step)
        return evaluator

    return make


def test_the_best_policy_is_the_best_of_the_prompts_that_both_were_evaluated_on(judged: Judged) -> None:
    """There is time for two prompts at the end of a run without an evaluation before."""
    evaluator = judged([0, 0, 8, 8], [2, 2])
    before, after = evaluator.at_end(1, evaluator.at("before"), lambda prompts: 2)
    assert before["reward"] == 0.0 and after["reward"] == 2.0 and evaluator.best == (1, 2.0)
    assert [row["reward"] for row in read_jsonl(evaluator.run.path / "samples.jsonl")] == [0, 0, 8, 8, 2, 2]
    resumed = judged([1, 1, 9, 9], step=1)
    resumed.at_step(4)
    before, after = resumed.at_end(4, resumed.at("before"), lambda prompts: pytest.fail("nothing is evaluated again"))
    assert before["reward"] == 0.0 and after["reward"] == 2.0 and not resumed.agent.saved


def test_a_part_of_the_prompts_does_not_replace_a_model_that_was_best_of_all(
    judged: Judged, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(1.0, max_seconds=100)
    clock.pace._evaluation, clock.now = 10.0, 98.0
    evaluator = judged([0, 0, 8, 8], [1, 1, 5, 5], [2, 2])
    before = evaluator.at("before")
    evaluator.at_step(2)
    before, after = evaluator.at_end(3, before, clock.pace.held_out)
    assert evaluator.best == (2, 3.0) and before["reward"] == 4.0 and after["reward"] == 3.0
    assert [row["reward"] for row in read_jsonl(evaluator.run.path / "samples.jsonl")] == [0, 0, 8, 8, 1, 1, 5, 5]
    assert "2 s are left of max_seconds 100, too little to evaluate the last policy" in capsys.readouterr().err
    clock.now = 50.0
    resumed = judged([1, 1, 9, 9], step=2)
    _, after = resumed.at_end(3, resumed.at("before"), clock.pace.held_out)
    assert resumed.best == (3, 5.0) and after["reward"] == 5.0


def test_a_run_of_the_version_before_keeps_its_best_model(judged: Judged) -> None:
    """It has best.json, but not what that model sampled."""
    old = judged([0, 0, 8, 8], [5, 5, 5, 5])
    old.at("before")
    old.at_step(2)
    (old.run.path / "best_samples.jsonl").unlink()
    resumed = judged([1, 1, 9, 2], [6, 6, 6, 6], step=2)
    assert resumed.best == (2, 5.0)
    resumed.at_step(4)
    before, after = resumed.at_end(4, resumed.at("before"), lambda prompts: pytest.fail("nothing is evaluated again"))
    assert resumed.best == (2, 5.0) and not resumed.agent.saved
    assert before["reward"] == 4.0 and after["reward"] == 5.0
    resumed.at_step(6)
    assert resumed.best == (6, 6.0) and resumed.agent.saved == [0]


@pytest.mark.parametrize(("samples", "minibatches", "smallest"), [(1, 4, 4), (3, 3, 3), (4, 8, 4)])
def test_minibatches_still_divide_the_samples(samples: int, minibatches: int, smallest: int) -> None:
    clock = Clock(100.0, max_seconds=1, samples_per_prompt=samples, num_minibatches=minibatches, prompts_per_step=12)
    prompts = clock.run(3)
    assert prompts == [12, smallest, smallest] and smallest * samples % minibatches == 0


@pytest.fixture
def cpus(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Two CPUs; `others` is how much of them others use, `own` how much this process does."""
    load = {"others": 0.0, "own": 0.0, "now": 0.0, "worked": 0.0, "mine": 0.0}
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads_module, "_quota", lambda: 2**31)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})

    def sample() -> tuple[float, float, float]:
        load["now"] += 1.0
        load["worked"] += load["others"] + load["own"]
        load["mine"] += load["own"]
        return load["now"], load["worked"], load["mine"]

    monkeypatch.setattr(threads_module, "_sample", sample)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    return load


def test_threads_follow_the_load(cpus: dict[str, float], capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(2)
    threads = Threads()
    for others, own, wanted in ((0.1, 0, 2), (0.0, 2, 2), (0.9, 1.1, 1), (1.0, 1, 1), (2.0, 0.5, 1), (0.0, 1, 2)):
        cpus["others"], cpus["own"] = others, own
        threads.fit()
        assert torch.get_num_threads() == wanted, others
    assert capsys.readouterr().err.count("working with 1 of 2 threads") == 1


def test_what_the_user_set_is_the_most(cpus: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    threads = Threads()
    threads.fit()
    assert torch.get_num_threads() == 1
    torch.set_num_threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    fixed = Threads()
    cpus["others"] = 2.0
    fixed.fit()
    assert torch.get_num_threads() == 2


def test_a_sample_counts_what_this_process_does() -> None:
    first = threads_module._sample()
    sum(i * i for i in range(3_000_000))
    second = threads_module._sample()
    assert first is not None and second is not None
    assert second[0] > first[0] and second[1] >= first[1] and second[2] > first[2]


def test_without_proc_nothing_is_touched(cpus: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    monkeypatch.setattr(threads_module, "_sample", lambda: None)
    threads = Threads()
    threads.fit()
    assert torch.get_num_threads() == 2 and threads.fixed


def test_a_quota_of_the_container_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, quota in (("200000 100000", 2), ("50000 100000", 1), ("max 100000", 2**31)):
        monkeypatch.setattr(Path, "read_text", lambda path, text=text: text)
        assert threads_module._quota() == quota
