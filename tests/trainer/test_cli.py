# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints when all is well, and one message without a traceback when it is not."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_fast import cli
from rlhf_fast.errors import Interrupted, UserError
from rlhf_fast.report import chat
from rlhf_fast.trainer import CollectConfig, PPOConfig, SFTConfig

WITHOUT = """
import os, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
from rlhf_fast.cli import main
for arguments in {commands}:
    child = os.fork()
    if child == 0:
        sys.exit(main(arguments))
    print("exit", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def run_without(blocked: set[str], *commands: list[str]) -> subprocess.CompletedProcess[str]:
    """Command lines, each in a fork of a Python that has no such libraries; prints how each ended."""
    code = WITHOUT.format(blocked=blocked, commands=commands)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"]):
        assert cli.main(arguments) == 0
        text = capsys.readouterr().out
        assert all(
            f"\n  {name} " in text for name in ("init", "run", "sft", "collect", "reward", "ppo", "chat", "info")
        )


def test_info_needs_torch_alone() -> None:
    everything = {"transformers", "datasets", "accelerate", "safetensors", "rich", "tensorboard", "tyro", "yaml"}
    result = run_without(everything, ["info"])
    assert result.stdout.endswith("exit 0\n"), result.stderr
    for word in ("rlhf_fast ", "torch ", "CPU: ", "linear_token_logprobs", "why not a faster one"):
        assert word in result.stdout


def test_without_the_trainer_libraries_it_says_what_to_install() -> None:
    commands = ("sft", "ppo", "run", "chat")
    result = run_without({"transformers"}, *([command, "x"] for command in commands))
    assert result.stdout == "exit 2\n" * len(commands)
    wanted = [f"rlhf-fast {command} needs transformers: pip install 'rlhf-fast[trainer]'" for command in commands]
    assert result.stderr.splitlines() == wanted


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["rewrad"]) == 2
    assert capsys.readouterr().err == "rlhf-fast rewrad: there is no such command; did you mean 'reward'?\n"
    assert cli.main(["zzz"]) == 2
    assert "usage: rlhf-fast COMMAND" in capsys.readouterr().err


def test_flags_override_the_file_wherever_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("train_file: a.jsonl\nlr: 1e-3\nseed: 4\n")
    for arguments in (["--config", str(path), "--lr", "0.5"], ["--lr", "0.5", f"--config={path}"]):
        config = cli.parse(SFTConfig, arguments, "x")
        assert (config.lr, config.seed, config.train_file) == (0.5, 4, str(tmp_path / "a.jsonl"))
    with pytest.raises(UserError, match="--config wants the name"):
        cli.parse(SFTConfig, ["--config"], "x")


def test_help_of_a_command_shows_what_each_option_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.parse(PPOConfig, ["--help"], "rlhf-fast ppo")
    assert not stopped.value.code
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--kl-coef {None}|FLOAT Coefficient of the KL from the reference model" in text


def test_wrong_input_is_one_message_and_exit_code_2(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str], write_jsonl: Callable[..., str]
) -> None:
    data = write_jsonl("data.jsonl", {"prompt": "a", "completion": " b"})
    full = tmp_path / "full"
    full.mkdir()
    (full / "kept.txt").write_text("kept")
    file = ["--train-file", data]
    cases = {
        "Perhaps you meant": ["sft", "--bach-size", "3"],
        "unknown key 'lrr'; did you mean 'lr'?": ["sft", "--config", write_jsonl("c.yaml", {"lrr": 1})],
        "train_file must be the name of a JSONL file, got ''": ["sft"],
        "lr must be greater than 0, got -1.0": ["sft", *file, "--lr", "-1"],
        "exists and is not empty": ["sft", *file, "--output-dir", str(full)],
        "cannot be written": ["sft", *file, "--output-dir", f"{data}/run"],
        "none.jsonl": ["sft", "--train-file", "none.jsonl", "--output-dir", str(tmp_path / "r"), "--model", "m"],
    }
    for message, arguments in cases.items():
        assert cli.main(arguments) == 2, message
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
    assert (full / "kept.txt").read_text() == "kept" and list(full.iterdir()) == [full / "kept.txt"]


def test_an_interrupted_run_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(command: str, arguments: list[str]) -> int:
        raise Interrupted("stopped after 3 steps; --resume goes on")

    monkeypatch.setattr(cli, "_command", stopped)
    assert cli.main(["ppo"]) == 130
    assert capsys.readouterr().err == "rlhf-fast ppo: stopped after 3 steps; --resume goes on\n"


def test_a_disk_that_fills_up_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(command: str, arguments: list[str]) -> int:
        raise RuntimeError("I/O error: No space left on device (os error 28)")  # as safetensors puts it

    monkeypatch.setattr(cli, "_command", full)
    assert cli.main(["ppo"]) == 2
    assert capsys.readouterr().err.endswith("No space left on device (os error 28); what was saved before is whole\n")


def test_ctrl_c_in_the_middle_of_a_step_saves_and_the_run_resumes(tmp_path: Path, tiny: Path) -> None:
    """The real thing: a process, a signal, an exit code, a second process."""
    import signal
    import time

    from rlhf_fast.models import loading as models

    reward = models.load_reward_model(str(tiny / "model"), "float32", new_head=True)
    reward.save_pretrained(tmp_path / "reward")
    run = tmp_path / "run"
    options = {
        "--model": tiny / "model",
        "--reward-model": tmp_path / "reward",
        "--prompts-file": tiny / "feedback_prompts.jsonl",
        "--max-new-tokens": 8,
        "--max-length": 32,
        "--dtype": "float32",
        "--output-dir": run,
    }
    command = [sys.executable, "-m", "rlhf_fast.cli", "ppo", *(str(word) for pair in options.items() for word in pair)]
    first = subprocess.Popen([*command, "--max-steps", "100000"], stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 120
        while first.poll() is None and time.monotonic() < until:
            if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") >= 3:
                break
            time.sleep(0.05)
        first.send_signal(signal.SIGINT)
        _, error = first.communicate(timeout=60)
    finally:
        first.kill()
    assert first.returncode == 130 and "--resume goes on" in error and "Traceback" not in error
    done = int(next((run / "checkpoints").iterdir()).name.removeprefix("step-"))
    second = subprocess.run(
        [*command, "--max-steps", str(done + 2), "--resume"], capture_output=True, text=True, timeout=120
    )
    assert second.returncode == 0, second.stderr
    assert json.loads((run / "summary.json").read_text())["steps"] == done + 2
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, done + 3))


def test_chat_answers_with_the_result_of_a_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "sft").mkdir(parents=True)
    (tmp_path / "run" / "sft" / "model").symlink_to(tiny / "model")
    assert chat.find_model(str(tmp_path / "run")) == str(tmp_path / "run" / "sft" / "model")
    assert chat.find_model("some/id") == "some/id"
    monkeypatch.setattr("sys.stdin", io.StringIO("ann wants animals\nben likes colors\n\nnot read\n"))
    assert cli.main(["chat", str(tmp_path / "run"), "--max-new-tokens", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("an empty line quits") and len(lines) == 4
    assert len(lines[1].removeprefix("> ").split()) <= 5
    assert cli.main(["chat", str(tmp_path / "run"), "--temperature", "0"]) == 2


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """As in `rlhf-fast ppo --help | head`."""
    with subprocess.Popen(
        [sys.executable, "-m", "rlhf_fast", "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 1


def test_collect_also_calls_them_completions() -> None:
    parsed = cli.parse(CollectConfig, ["--completions", "7"], "rlhf-fast collect")
    assert parsed.samples_per_prompt == 7
