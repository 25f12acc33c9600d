# SPDX-License-Identifier: Apache-2.0
"""Run folders, checkpoints, signals: nothing is overwritten silently, nothing is left half written."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.run.checkpoint import (
    folder_aside,
    load_state,
    require_space,
    rng_state,
    save_state,
    seed_everything,
    set_rng_state,
    write_json,
)
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.run.progress import Progress, StopFlag, Timer
from rlhf_fast.run.resume import finished_summary
from rlhf_fast.trainer import SFTConfig


def test_an_existing_folder_is_refused_emptied_or_used(tmp_path: Path) -> None:
    path = tmp_path / "run"
    RunFolder.create(path).append_jsonl("rows.jsonl", [{"a": 1}])
    with pytest.raises(UserError, match="exists and is not empty; .*--resume.*--overwrite"):
        RunFolder.create(path)
    assert (path / "rows.jsonl").exists()
    assert (RunFolder.create(path, resume=True).path / "rows.jsonl").exists()
    RunFolder.create(path, overwrite=True)
    assert not (path / "rows.jsonl").exists()
    RunFolder.create(path)  # nothing but the marker: a run that failed before it wrote anything is no obstacle


def test_a_start_that_failed_before_anything_was_done_is_no_obstacle(tmp_path: Path) -> None:
    """A wrong data file is named after the digests of the inputs have been written."""
    for _ in range(2):
        run = RunFolder.create(tmp_path / "run")
        assert finished_summary(run, SFTConfig(train_file="nowhere.jsonl")) is None
        run.close()
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(UserError, match="exists and is not empty"):
        RunFolder.create(tmp_path / "run")


def test_a_folder_that_is_no_run_folder_is_never_emptied(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not a run folder"):
        RunFolder.create(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        RunFolder.create(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written .*Not a directory"):
        RunFolder.create(tmp_path / "file" / "run")

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="cannot be written .No space left on device"):
        RunFolder.create(tmp_path / "run")


def test_metrics_go_to_jsonl_and_tensorboard(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    for step in (1, 2, 3):
        run.log({"loss/policy_avg": torch.tensor(0.5 * step), "bad": float("nan")}, step)
    run.close()
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert rows[1] == {"step": 2, "loss/policy_avg": 1.0, "bad": None}
    assert list((run.path / "tensorboard").iterdir())

    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a line
    run.truncate_metrics(2)
    assert len((run.path / "metrics.jsonl").read_text().splitlines()) == 2


def test_tensorboard_forgets_the_steps_that_a_resumed_run_repeats(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume, steps, value in ((False, (1, 2, 3, 4), 1.0), (True, (3,), 2.0)):
        run = RunFolder.create(tmp_path / "run", resume=resume)
        run.truncate_metrics(2)
        for step in steps:
            run.log({"loss": value}, step)
        run.close()
        (file,) = (run.path / "tensorboard").glob("events.*.*.*.*")
        file.rename(file.with_name(f"events.out.tfevents.{int(resume)}"))  # they are read in the order of their names
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_the_configuration_is_kept(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    run.save_config(SFTConfig(train_file="a.jsonl", lr=0.5))
    text = (run.path / "config.yaml").read_text()
    assert "train_file: a.jsonl\n" in text and "lr: 0.5\n" in text


def test_trackers_get_the_configuration_and_every_metric(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = SFTConfig(train_file="a.jsonl", lr=0.5, trackers=("tensorboard", "tensorboard"))
    config.validate()
    run = RunFolder.create(tmp_path / "run")
    run.save_config(config)
    for step in (1, 2):
        run.log({"loss/policy_avg": torch.tensor(0.5 * step), "lr": 0.1}, step)
    run.close()
    (settings,) = run.path.glob("run/*/hparams.yml")  # TensorBoard's own way: a folder for the project, here "run"
    assert "train_file: a.jsonl\n" in settings.read_text() and "lr: '0.5'\n" in settings.read_text()
    seen = EventAccumulator(str(run.path / "run")).Reload()
    assert [(event.step, event.value) for event in seen.Scalars("loss/policy_avg")] == [(1, 0.5), (2, 1.0)]
    assert [event.step for event in seen.Scalars("lr")] == [1, 2]


def test_a_tracker_that_is_not_there_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorbord", "wandb"):
        monkeypatch.setattr("accelerate.tracking._available_trackers", ["tensorboard"])
        with pytest.raises(UserError, match=rf"trackers: '{name}' is not among .* installed here: \['tensorboard'\]"):
            SFTConfig(train_file="a.jsonl", trackers=("tensorboard", name)).validate()


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    with pytest.raises(TypeError):
        run.save_checkpoint(1, {"step": object()})
    assert not list((run.path / "checkpoints").iterdir())
    for step in (2, 9, 10, 30):
        run.save_checkpoint(step, {"step": step})
    (run.path / "checkpoints" / "step-99.tmp").mkdir()  # what a kill may leave
    assert run.latest_checkpoint() is None  # not asked to resume
    resumed = RunFolder.create(run.path, resume=True)
    newest = resumed.latest_checkpoint()
    assert newest is not None and newest.name == "step-30" and load_state(newest) == {"step": 30}
    assert not (run.path / "checkpoints" / "step-9").exists() and (run.path / "checkpoints" / "step-10").exists()


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    for text in ("first", "second"):
        with folder_aside(run.path / "model") as folder:
            (folder / "weights").write_text(text)
    with pytest.raises(RuntimeError), folder_aside(run.path / "model") as folder:
        (folder / "weights").write_text("third")
        raise RuntimeError
    assert (run.path / "model" / "weights").read_text() == "second"
    assert {path.name for path in run.path.iterdir()} == {".rlhf_fast", "model"}


def test_a_disk_too_small_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**30))
    require_space(tmp_path, 2**26, save_steps=0)  # 1 GiB: the model, and a checkpoint of three times its size
    with pytest.raises(UserError, match=r"has 1.00 GiB free, .* may take 2.50; free some, or name another"):
        require_space(tmp_path, 2**26, save_steps=10)


def test_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {
        "step": 3,
        "name": "ä",
        "moments": {"0": {"exp_avg": torch.randn(3, 2), "step": torch.tensor(3.0)}},
        "list": [1.5, None, torch.arange(4), torch.ones(2, dtype=torch.bfloat16)],
    }
    save_state(tmp_path, state)
    back = load_state(tmp_path)
    assert back["step"] == 3 and back["name"] == "ä" and back["list"][:2] == [1.5, None]
    assert torch.equal(back["moments"]["0"]["exp_avg"], state["moments"]["0"]["exp_avg"])  # type: ignore[index]
    assert torch.equal(back["list"][2], torch.arange(4)) and back["list"][3].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_a_damaged_state_is_refused(tmp_path: Path, name: str) -> None:
    save_state(tmp_path, {"a": torch.ones(3)})
    (tmp_path / name).write_bytes(b"xx")
    with pytest.raises(UserError, match="cannot be read .*remove it to resume from an older one"):
        load_state(tmp_path)


def test_a_state_of_another_version_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path, {"step": 3})
    assert load_state(tmp_path, "step") == {"step": 3}
    with pytest.raises(UserError, match="has no asked, policy: another version wrote it.*--overwrite"):
        load_state(tmp_path, "asked", "step", "policy")


def test_random_generators_come_back(tmp_path: Path) -> None:
    seed_everything(5)
    save_state(tmp_path, rng_state())
    first = (random.random(), numpy.random.rand(), torch.rand(1))
    set_rng_state(load_state(tmp_path))
    assert (random.random(), numpy.random.rand(), torch.rand(1)) == first


def test_a_json_file_that_cannot_be_read_is_an_error_of_the_user(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    with pytest.raises(UserError, match="cannot read"):
        run.read_json("none.json")
    write_json(run.path / "a.json", {"x": [1]})
    assert run.read_json("a.json") == {"x": [1]} and not list(run.path.glob("*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_the_second_one_ends(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopFlag() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_the_timer_adds_up_parts_and_laps() -> None:
    timer = Timer()
    for _ in range(2):
        with timer("part"):
            pass
    assert set(timer.lap()) == {"time/part"} and timer.lap() == {}
    assert 0 <= timer.totals["part"] <= timer.elapsed()


def test_progress_without_a_terminal_prints_the_last_step(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("ppo", 2) as bar:
        bar.update(1, kl=0.5)
        bar.update(2, kl=1.25)
    assert capsys.readouterr().out == "ppo 2/2 kl 1.25\n"
