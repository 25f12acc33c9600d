# SPDX-License-Identifier: Apache-2.0
"""An error in the middle of a step: what is saved is never half of a step, and --resume ends as if nothing had been."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import phases

from rlhf_fast.errors import Interrupted, UserError
from rlhf_fast.models.optim import AdamW
from rlhf_fast.run.checkpoint import checkpoints
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.trainer import SFTConfig, collection, pipeline
from rlhf_fast.trainer.reward import train as reward_train
from rlhf_fast.trainer.rl import evaluation, learn, ppo
from rlhf_fast.trainer.sft import train as sft_train
from rlhf_fast.trainer.sft.hf_trainer import SumTrainer

FAILS_IN = 3  # the fourth step: the newest checkpoint is then that of the second one
NOT_SAVED = "had begun to change the weights, which were not saved"


@pytest.fixture(scope="module")
def whole(job_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    """The folder of a job that was done in one go."""
    folders: dict[str, Path] = {}

    def run(config: Any) -> Path:
        if repr(config) not in folders:
            phases.run(config, folders.setdefault(repr(config), tmp_path_factory.mktemp("whole") / "run"))
        return folders[repr(config)]

    return run


def assert_same(cut: Path, whole: Path) -> None:
    names = [name for name in ("eval_after.json", "samples.jsonl") if (whole / name).exists()]
    for name in ("model/model.safetensors", *names):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    assert phases.metrics(cut) == phases.metrics(whole)


class Fault:
    """Fails once armed: at the `which`-th call of a function from then on, before or after it does its work."""

    def __init__(self, owner: Any, name: str, which: int, patch: pytest.MonkeyPatch, *, late: bool = False) -> None:
        self.left = 0
        function = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            fails = self.left == 1
            self.left = max(0, self.left - 1)
            result = None if fails and not late else function(*args, **options)
            if fails:
                raise RuntimeError("a fault of the machine")
            return result

        self.which = which
        patch.setattr(owner, name, call)

    def arm(self) -> None:
        self.left = self.which


def of_rl(job_data: Path) -> Any:
    return replace(phases.jobs(job_data)["ppo"], max_steps=4, save_steps=2, eval_steps=1, kl_target=0.1)


# What fails in the fourth step: (module, function, at which call in the step), the checkpoints then, and what is said.
RL_FAULTS: dict[str, tuple[tuple[Any, str, int], list[int], str]] = {
    "its second optimizer step": ((learn, "learn", 2), [2], f"{NOT_SAVED}; --resume goes on from the"),
    "a check after the update": ((ppo, "rollout_metrics", 1), [2], f"{NOT_SAVED}; --resume goes on from"),
    "before the update": ((ppo, "score", 1), [2, 3], "saved after 3 steps, --resume goes on from there"),
    "its evaluation": ((evaluation, "evaluate", 1), [2, 4], "saved after 4 steps, --resume goes on from there"),
}


@pytest.mark.parametrize("fault", RL_FAULTS)
def test_rl_repeats_a_step_that_failed(
    fault: str,
    whole: Callable[[Any], Path],
    job_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (owner, name, which), saved, message = RL_FAULTS[fault]
    config = of_rl(job_data)
    wanted = whole(config)
    with monkeypatch.context() as patch:
        armed, step = Fault(owner, name, which, patch), ppo.train_step

        def train_step(*args: Any) -> Any:
            if args[4] == FAILS_IN:
                armed.arm()
            return step(*args)

        patch.setattr(ppo, "train_step", train_step)
        with pytest.raises(RuntimeError, match="a fault of the machine"):
            phases.run(config, tmp_path / "cut")
    assert [int(path.name.removeprefix("step-")) for path in checkpoints(tmp_path / "cut")] == saved
    assert message in capsys.readouterr().err
    phases.run(config, tmp_path / "cut", resume=True)
    assert_same(tmp_path / "cut", wanted)


def test_an_error_in_the_first_update_leaves_nothing_to_go_on_from(
    job_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The critic's head has been fitted to the first samples by then, which must not happen twice."""
    config = replace(phases.jobs(job_data)["ppo"], eval_prompts_file=None)
    monkeypatch.setattr(ppo, "update", lambda *args, **options: (_ for _ in ()).throw(UserError("no update")))
    with pytest.raises(UserError, match=f"no update; .*{NOT_SAVED}, and there is no checkpoint yet: --resume starts"):
        phases.run(config, tmp_path / "run")
    assert not checkpoints(tmp_path / "run")


def test_an_error_before_the_first_update_of_a_policy_alone_has_changed_nothing(
    job_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(phases.jobs(job_data)["grpo"], eval_prompts_file=None)
    monkeypatch.setattr(ppo, "update", lambda *args, **options: (_ for _ in ()).throw(UserError("no update")))
    with pytest.raises(UserError, match="no update; saved after 0 steps, --resume goes on from there"):
        phases.run(config, tmp_path / "run")


@pytest.fixture(scope="module")
def with_dropout(job_data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model, whose forward draws random numbers in training: a step that fails has drawn some."""
    folder = tmp_path_factory.mktemp("dropout") / "model"
    shutil.copytree(job_data / "model", folder)
    options = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**options, "attention_dropout": 0.3}))
    return str(folder)


# What fails in the fourth step, when it has done its work (late) or before, and the newest checkpoint then.
FAULTS: dict[str, tuple[Any, str, int, bool, int]] = {
    "sft in the forward": (SumTrainer, "compute_loss", 2 * FAILS_IN + 1, True, 3),
    "sft after the optimizer": (SumTrainer, "_get_learning_rate", FAILS_IN + 1, False, 2),
    "sft in an evaluation": (sft_train, "evaluate", 1 + FAILS_IN, False, 3),
    "reward after the forward": (AdamW, "step", FAILS_IN + 1, False, 3),
    "reward after the optimizer": (AdamW, "step", FAILS_IN + 1, True, 2),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_other_phases_repeat_it_too(
    fault: str,
    whole: Callable[[Any], Path],
    with_dropout: str,
    job_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner, name, which, late, saved = FAULTS[fault]
    phase = fault.partition(" ")[0]
    more = {"eval_steps": 1} if phase == "sft" else {}
    config = replace(phases.jobs(job_data)[phase], model=with_dropout, save_steps=2, dropout=True, **more)
    with monkeypatch.context() as patch:
        Fault(owner, name, which, patch, late=late).arm()
        with pytest.raises(RuntimeError, match="a fault of the machine"):
            phases.run(config, tmp_path / "cut")
    assert int(checkpoints(tmp_path / "cut")[-1].name.removeprefix("step-")) == saved
    phases.run(config, tmp_path / "cut", resume=True)
    assert_same(tmp_path / "cut", whole(config))


@pytest.mark.parametrize(
    ("name", "module", "one_step"),
    [
        ("sft", sft_train, {"max_steps": 1}),
        ("collect", collection, {"micro_batch_size": 48}),
        ("reward", reward_train, {"epochs": 0.1}),
        ("grpo", ppo, {"max_steps": 1, "eval_prompts_file": None}),
    ],
)
def test_a_stop_in_the_last_step_is_no_reason_to_stop(
    name: str,
    module: Any,
    one_step: dict[str, Any],
    job_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_at: Callable[[int], Any],
) -> None:
    """Nothing is left to go on with. In a pipeline, no later phase begins."""
    config = replace(phases.jobs(job_data)[name], **one_step)
    monkeypatch.setattr(module, "StopFlag", stop_at(1))
    phases.run(config, tmp_path / "run")
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_pipeline_stops_behind_a_phase_that_was_asked_to(tmp_path: Path) -> None:
    def asked(config: Any, run: RunFolder) -> dict[str, Any]:
        run.stop_requested = True
        return {"steps": 1}

    run = RunFolder.create(tmp_path / "run")
    with pytest.raises(Interrupted, match="stopped after reward, which is finished; --resume goes on"):
        pipeline._phase("reward", asked, SFTConfig(), run)
    assert json.loads((tmp_path / "run" / "reward" / "summary.json").read_text())["steps"] == 1
    assert pipeline._phase("ppo", asked, SFTConfig(), run)["steps"] == 1
