# SPDX-License-Identifier: Apache-2.0
"""A run that fails has saved; one that is resumed says what changed; damage is found; a finished one can go on."""

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
from helpers import phases

from rlhf_fast.errors import UserError
from rlhf_fast.run import autosave
from rlhf_fast.run.checkpoint import checkpoints, folder_size, newest_intact_checkpoint
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.run.records import read_jsonl
from rlhf_fast.run.resume import finished_summary
from rlhf_fast.trainer.collection import FEEDBACK_FILE, _rows_done
from rlhf_fast.trainer.reward import train as reward_train
from rlhf_fast.trainer.rl import ppo
from rlhf_fast.trainer.sft.hf_trainer import Evaluation, SumTrainer

LEARN = ("sft", "reward", "grpo")


def job(job_data: Path, name: str, **options: Any) -> Any:
    return replace(phases.jobs(job_data)[name], save_steps=0, **options)


def steps_on_disk(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoints(folder)]


def fail_at(step: int, error: Exception, patch: pytest.MonkeyPatch) -> None:
    """The step after so many whole ones of any phase raises `error`."""
    calls = [0]

    def failing(function: Callable[..., Any], weight: int = 1) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] > step * weight:
                raise error
            return function(*args, **options)

        return call

    patch.setattr(ppo, "train_step", failing(ppo.train_step))
    patch.setattr(reward_train, "_step", failing(reward_train._step))
    patch.setattr(SumTrainer, "compute_loss", failing(SumTrainer.compute_loss, weight=2))  # two micro-batches a step


@pytest.mark.parametrize("name", LEARN)
def test_any_exception_saves_and_resume_ends_as_if_nothing_had_been(
    name: str, job_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = job(job_data, name)
    phases.run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        fail_at(2, RuntimeError("a fault of the machine"), patch)
        with pytest.raises(RuntimeError, match="a fault of the machine"):
            phases.run(config, tmp_path / "cut")
    assert steps_on_disk(tmp_path / "cut") == [2]
    assert "saved after 2 steps, --resume goes on from there" in capsys.readouterr().err
    phases.run(config, tmp_path / "cut", resume=True)
    whole, cut = (tmp_path / part / "model" / "model.safetensors" for part in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()
    assert phases.metrics(tmp_path / "whole") == phases.metrics(tmp_path / "cut")


def test_weights_that_are_not_finite_never_replace_good_ones(
    job_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the message names a checkpoint only if there is one."""
    config = replace(job(job_data, "grpo"), save_steps=1, max_steps=6)
    train_step, step = ppo.train_step, [0]

    def broken(agent: Any, *args: Any, **options: Any) -> Any:
        step[0] += 1
        metrics = train_step(agent, *args, **options)
        if step[0] == 3:
            next(agent.policy.parameters()).data[0, 0] = float("nan")
        return metrics

    monkeypatch.setattr(ppo, "train_step", broken)
    with pytest.raises(UserError, match="not finite after step 3; .* goes on from the checkpoint step-2"):
        phases.run(config, tmp_path / "run")
    assert steps_on_disk(tmp_path / "run") == [1, 2]
    step[0] = 0
    with pytest.raises(UserError, match="there is no older checkpoint: start over with --overwrite") as caught:
        phases.run(replace(config, save_steps=0), tmp_path / "other")
    assert "--resume" not in str(caught.value) and not steps_on_disk(tmp_path / "other")


@pytest.mark.parametrize("name", LEARN)
def test_it_saves_by_the_clock_and_keeps_the_newest(
    name: str, job_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    keep = RunFolder.save_checkpoint
    monkeypatch.setattr(
        RunFolder, "save_checkpoint", lambda run, step, state: (saved.append(step), keep(run, step, state))
    )
    monkeypatch.setattr(autosave, "SAVING_SHARE", 0)
    phases.run(job(job_data, name, save_minutes=1e-9, save_total_limit=1), tmp_path / "run")
    steps = phases.metrics(tmp_path / "run")[-1]["step"]
    assert steps_on_disk(tmp_path / "run") == [steps]
    assert name == "sft" or saved == [*range(1, int(steps) + 1)]


def test_nothing_is_saved_before_its_time_or_without_room(
    job_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    phases.run(job(job_data, "grpo", save_last=False), tmp_path / "run")
    assert not steps_on_disk(tmp_path / "run")
    monkeypatch.setattr(autosave, "free_space", lambda folder: 1000)
    phases.run(job(job_data, "grpo", save_minutes=1e-9), tmp_path / "full")
    assert not steps_on_disk(tmp_path / "full")
    assert capsys.readouterr().err.count("rlhf-fast: no checkpoint: one takes 0.00 GiB") == 1


def test_it_saves_once_there_is_room_again(
    job_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rooms = [1000, 1000]  # bytes free when the first step ends, which is read twice
    monkeypatch.setattr(autosave, "free_space", lambda folder: rooms.pop() if rooms else 2**40)
    monkeypatch.setattr(autosave, "SAVING_SHARE", 0)
    phases.run(job(job_data, "grpo", save_minutes=1e-9, save_last=False, max_steps=2), tmp_path / "run")
    assert steps_on_disk(tmp_path / "run") == [2]
    assert capsys.readouterr().err.count("rlhf-fast: no checkpoint: one takes 0.00 GiB") == 1


def test_the_clock_counts_what_shards_take_in_the_background(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    saver = autosave.Autosave(run, autosave.SaveOptions(0, 1e-9, False), [], 0, lambda step: None)
    assert saver.due(1)[0]
    run.shard_writer.seconds = 3600.0
    assert not saver.due(2)[0]


def test_a_checkpoint_may_be_removed_while_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, stat = [tmp_path / name for name in "ab"], Path.stat
    for file in files:
        file.write_bytes(b"12")

    def removed(path: Path, **options: Any) -> Any:
        found = stat(path, **options)
        if path in files:
            for file in files:
                file.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Path, "stat", removed)
    assert folder_size(tmp_path) == 2


@pytest.mark.parametrize("name", LEARN)
def test_a_finished_run_goes_on_with_more_steps(name: str, job_data: Path, tmp_path: Path) -> None:
    """Under a schedule that does not depend on the number of steps, as if it had never ended."""
    config = job(job_data, name)
    steps = {"sft": "max_steps", "reward": "epochs", "grpo": "max_steps"}[name]
    few, many = {"max_steps": (2, 3), "epochs": (0.4, 0.8)}[steps]
    phases.run(replace(config, **{steps: few}), tmp_path / "run")
    before = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    phases.run(replace(config, **{steps: few}), tmp_path / "run", resume=True)  # finished: nothing to do
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == before
    phases.run(replace(config, **{steps: many}), tmp_path / "run", resume=True)
    phases.run(replace(config, **{steps: many}), tmp_path / "whole")
    assert len(phases.metrics(tmp_path / "run")) >= len(phases.metrics(tmp_path / "whole"))
    got, wanted = (json.loads((tmp_path / part / "summary.json").read_text()) for part in ("run", "whole"))
    assert got["steps"] == wanted["steps"]
    if name == "grpo":
        got, wanted = ((tmp_path / part / "model" / "model.safetensors").read_bytes() for part in ("run", "whole"))
        assert got == wanted


@pytest.mark.parametrize("name", LEARN)
def test_fewer_steps_leave_a_finished_run_alone(
    name: str, job_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = job(job_data, name)
    phases.run(config, tmp_path / "run")
    files = {file: (tmp_path / "run" / file).read_bytes() for file in ("summary.json", "config.yaml")}
    fewer = {"epochs": config.epochs / 2} if name == "reward" else {"max_steps": config.max_steps - 1}
    phases.run(replace(config, **fewer), tmp_path / "run", resume=True)
    assert f"is finished, so {next(iter(fewer))} " in capsys.readouterr().err
    assert files == {file: (tmp_path / "run" / file).read_bytes() for file in files}


def test_a_stopped_run_may_end_where_it_is(job_data: Path, tmp_path: Path) -> None:
    """With max_steps no more than it has done: the model is saved, and the summary has the last step's figures."""
    config = job(job_data, "grpo", eval_prompts_file=None)
    phases.run(config, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()  # as if it had been stopped behind its last checkpoint
    phases.run(replace(config, max_steps=1), tmp_path / "run", resume=True)
    last = phases.metrics(tmp_path / "run")[-1]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["kl_final"] == last["objective/kl"]


def test_options_that_may_change_are_applied_and_named(
    job_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, options in {"grpo": {"lr": 1e-9, "kl_coef": 7.0}, "sft": {"lr": 1e-9}, "reward": {"lr": 1e-9}}.items():
        config = job(job_data, name)
        more = {"epochs": 1.6} if name == "reward" else {"max_steps": config.max_steps + 3}
        phases.run(config, tmp_path / name)
        capsys.readouterr()
        phases.run(replace(config, **options, **more), tmp_path / name, resume=True)
        assert f"lr 1e-09 (was {config.lr})" in capsys.readouterr().err
        last = phases.metrics(tmp_path / name)[-1]
        if name == "grpo":
            assert last["objective/kl_coef"] == 7.0
        else:
            rows = [row for row in phases.metrics(tmp_path / name) if "lr" in row]
            assert 0 < rows[-2]["lr"] <= 1e-9 < rows[0]["lr"] and rows[-1]["lr"] <= 1e-9
        assert "lr: 1.0e-09" in (tmp_path / name / "config.yaml").read_text()


@pytest.mark.parametrize("options", [{"objective": "rloo"}, {"seed": 3}, {"max_length": 40}, {"lora_rank": 2}])
def test_options_that_may_not_change_are_refused(options: dict[str, Any], job_data: Path, tmp_path: Path) -> None:
    config = job(job_data, "grpo")
    run = RunFolder.create(tmp_path / "run")
    assert finished_summary(run, config) is None
    run.save_config(config)
    ((name, value),) = options.items()
    resumed = RunFolder.create(tmp_path / "run", resume=True)
    with pytest.raises(UserError, match=rf"cannot go on with {name} {value} \(was .*\): put that back, or start over"):
        finished_summary(resumed, replace(config, **options))
    assert finished_summary(resumed, replace(config, micro_batch_size=3, output_dir="elsewhere")) is None


def test_data_that_changed_is_refused_and_data_that_moved_is_not(job_data: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes((job_data / "feedback_prompts.jsonl").read_bytes())
    config = job(job_data, "grpo", prompts_file=str(prompts))
    run = RunFolder.create(tmp_path / "run")
    finished_summary(run, config)
    run.save_config(config)
    resumed = RunFolder.create(tmp_path / "run", resume=True)
    moved = prompts.rename(tmp_path / "moved.jsonl")
    assert finished_summary(resumed, replace(config, prompts_file=str(moved))) is None
    moved.write_text(moved.read_text().replace("e", "a", 1))
    with pytest.raises(UserError, match=r"prompts_file: .*moved.jsonl is not what .* began with"):
        finished_summary(resumed, replace(config, prompts_file=str(moved)))


@pytest.mark.parametrize(("steps", "seconds"), [(3, 50.0), (4, 61.0)])
def test_a_run_whose_time_is_used_up_is_not_extended_by_steps_alone(
    steps: int, seconds: float, job_data: Path, tmp_path: Path
) -> None:
    """Nothing would be trained, and the figures of the finished run would be lost."""
    config = job(job_data, "grpo", max_steps=4, max_seconds=60.0, min_steps=2)
    run = RunFolder.create(tmp_path / "run")
    finished_summary(run, config)
    run.save_config(config)
    (run.path / "checkpoints" / f"step-{steps}").mkdir(parents=True)
    run.write_json("summary.json", {"steps": steps, "max_steps": 4, "seconds": seconds})
    run.write_json("eval_after.json", {"reward": 1.0})
    files = {path: path.read_bytes() for path in run.path.glob("*.*")}
    resumed = RunFolder.create(run.path, resume=True)
    with pytest.raises(UserError, match=f"max_seconds 60 is used up after {steps} steps: raise it too"):
        finished_summary(resumed, replace(config, max_steps=8))
    assert {path: path.read_bytes() for path in run.path.glob("*.*")} == files
    assert finished_summary(resumed, replace(config, max_steps=8, max_seconds=90.0)) is None
    assert not (run.path / "summary.json").exists()


def test_a_finished_run_with_time_left_is_extended_by_steps_alone(job_data: Path, tmp_path: Path) -> None:
    for name, min_steps, seconds in (("early", 2, 50.0), ("owed", 6, 70.0)):  # min_steps counts in spite of the time
        config = job(job_data, "grpo", max_steps=4, max_seconds=60.0, min_steps=min_steps)
        run = RunFolder.create(tmp_path / name)
        finished_summary(run, config)
        run.save_config(config)
        (run.path / "checkpoints" / "step-4").mkdir(parents=True)
        run.write_json("summary.json", {"steps": 4, "max_steps": 4, "seconds": seconds})
        assert finished_summary(RunFolder.create(run.path, resume=True), replace(config, max_steps=8)) is None


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([], [{"step": 2, "eval/reward": 1.0}]),
        ([{"step": 1, "x": 3.0}], [{"step": 1, "x": 3.0}, {"step": 2, "eval/reward": 1.0}]),
        ([{"step": 2, "x": 3.0}], [{"step": 2, "x": 3.0, "eval/reward": 1.0}]),
    ],
)
def test_figures_are_added_to_the_row_of_their_step(
    before: list[dict[str, float]], after: list[dict[str, float]], tmp_path: Path
) -> None:
    run = RunFolder.create(tmp_path / "run")
    run.append_jsonl("metrics.jsonl", before)
    run.log_to_last({"eval/reward": 1.0}, 2)
    assert phases.metrics(run.path) == after


def test_sft_evaluates_a_step_once(tmp_path: Path) -> None:
    """In a run of an earlier version the evaluation's row may come before that of the step."""
    run = RunFolder.create(tmp_path / "run")
    run.append_jsonl("metrics.jsonl", [{"step": 2, "eval/nll": 3.0}, {"step": 2, "loss": 3.0}])
    evaluation = Evaluation(run, 2, lambda: 4.0)
    evaluation.on_train_begin(None, SimpleNamespace(global_step=2, max_steps=9), None)
    assert len(phases.metrics(run.path)) == 2
    evaluation.on_train_begin(None, SimpleNamespace(global_step=4, max_steps=9), None)
    assert phases.metrics(run.path)[2:] == [{"step": 4, "eval/nll": 4.0}]


@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_a_damaged_byte_is_found_in_every_file_of_a_checkpoint(
    name: str, job_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(job(job_data, name), save_steps=1, max_steps=2)
    phases.run(config, tmp_path / "run")
    older, newest = checkpoints(tmp_path / "run")
    files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
    assert len(files) >= 3
    for file in files:
        whole = (newest / file).read_bytes()
        middle = len(whole) // 2
        (newest / file).write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        assert newest_intact_checkpoint(tmp_path / "run") == older
        error = capsys.readouterr().err
        assert str(newest) in error and "is damaged" in error and (file.name in error or file.name == "checksums.json")
        newest.with_name(newest.name + ".damaged").rename(newest)
        (newest / file).write_bytes(whole)
    assert newest_intact_checkpoint(tmp_path / "run") == newest
    for path in (older, newest):
        (path / "checksums.json").unlink()
    with pytest.raises(UserError, match="is damaged: its file checksums.json .* there is no older one"):
        newest_intact_checkpoint(tmp_path / "run")


def test_two_runs_in_one_folder_are_one_too_many(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    code = (
        "import sys; from rlhf_fast.run.folder import RunFolder\n"
        "RunFolder.create(sys.argv[1], overwrite=sys.argv[2] == 'overwrite', resume=sys.argv[2] == 'resume')"
    )

    def other(how: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, str(tmp_path / "run"), how]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    run.append_jsonl("metrics.jsonl", [{"step": 1}])
    for how in ("resume", "overwrite"):
        done = other(how)
        assert "another process uses the run folder" in done.stderr and done.returncode != 0
    assert (run.path / "metrics.jsonl").exists()
    run.close()
    assert other("overwrite").returncode == 0 and not (run.path / "metrics.jsonl").exists()


def test_lines_are_kept_whatever_the_texts_hold(tmp_path: Path) -> None:
    """Line separators of Unicode within a text end no line of the file, and a lone surrogate is no error."""
    run = RunFolder.create(tmp_path / "run")
    rows = [{"text": f"a{separator}b"} for separator in ("\u2028", "\x85", "\x0b", "\ud800")]
    run.append_jsonl("samples.jsonl", rows, 0)
    run.append_jsonl("samples.jsonl", [{"text": "end"}], len(rows))
    lines = (run.path / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line) for line in lines] == [*rows, {"text": "end"}]


def test_a_line_cut_within_a_character_is_left_out_and_a_damaged_one_named(tmp_path: Path) -> None:
    run, file = RunFolder.create(tmp_path / "run"), tmp_path / "run" / "metrics.jsonl"
    run.log({"loss": 1.0}, 1)
    whole = file.read_bytes()
    file.write_bytes(whole + '{"step": 2, "rewards/é'.encode()[:-1])  # killed between two bytes of one character
    assert read_jsonl(file) == [{"step": 1, "loss": 1.0}] and run.last_metrics() == {"step": 1, "loss": 1.0}
    run.truncate_metrics(1)
    assert file.read_bytes() == whole
    file.write_bytes(whole[:-1])  # as a person writes it, without a line break at the end
    assert read_jsonl(file) == [{"step": 1, "loss": 1.0}]
    for damaged, reason in ((b'{"step": \xff1}\n', "not UTF-8"), (b'{"step": \n', "not valid JSON")):
        file.write_bytes(whole + damaged + whole)
        with pytest.raises(UserError, match=rf"metrics.jsonl:2: {reason}"):
            read_jsonl(file)
    feedback = tmp_path / "run" / FEEDBACK_FILE
    line = json.dumps({"prompt": "é", "completions": ["a", "b"]}, ensure_ascii=False).encode()
    feedback.write_bytes(line + b"\n" + line[: line.index("é".encode()) + 1])
    assert [prompt for prompt, _ in _rows_done(run)] == ["é"] and feedback.read_bytes() == line + b"\n"


def test_a_clock_set_back_changes_nothing(job_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1e9]

    def backwards() -> float:
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr("time.time", backwards)
    monkeypatch.setattr(autosave, "SAVING_SHARE", 0)
    phases.run(job(job_data, "grpo", max_steps=1, save_minutes=1e-9, save_last=False), tmp_path / "run")
    assert steps_on_disk(tmp_path / "run") == [1]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["seconds"] > 0
