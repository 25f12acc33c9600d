# SPDX-License-Identifier: Apache-2.0
"""Faults of the machine in the middle of a run: what was saved is whole, and --resume ends as if nothing had been."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import transformers.modeling_utils
from helpers import phases

from rlhf_fast.distributed.ranks import Ranks
from rlhf_fast.errors import UserError
from rlhf_fast.feedback.raters import RaterError, finite_numbers
from rlhf_fast.run.checkpoint import checkpoints, damaged_file
from rlhf_fast.trainer import PPOConfig
from rlhf_fast.trainer.rl import remote_reward

# Every kind of file that a run of RL writes, and which write of it fails.
WRITES = {
    "config.yaml": 1,
    "eval_before.json": 1,
    "samples.jsonl": 2,
    "metrics.jsonl": 2,
    "state.safetensors": 2,
    "state.json": 2,
    "checksums.json": 2,
    "model.safetensors": 1,
    "eval_after.json": 1,
    "summary.json": 1,
}


class Failing:
    """A file of which half of the first write reaches the disk."""

    def __init__(self, file: Any, error: OSError) -> None:
        self.file, self.error = file, error

    def write(self, text: str) -> int:
        self.file.write(text[: len(text) // 2])
        raise self.error

    def __enter__(self) -> Failing:
        self.file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.file.__exit__(*error)


def fail_writes(name: str, which: int, error: OSError, patch: pytest.MonkeyPatch) -> None:
    """From the `which`-th write of a file of this name on, each writes half and raises `error`."""
    count = [0]
    really_open, save_file = Path.open, safetensors.torch.save_file

    def fails(path: str | Path) -> bool:
        if Path(path).name.removesuffix(".tmp") != name:
            return False
        count[0] += 1
        return count[0] >= which

    def opened(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        file = really_open(path, mode, *args, **options)
        return Failing(file, error) if mode in ("w", "a") and fails(path) else file

    def saved(tensors: Any, filename: Any, *args: Any, **options: Any) -> None:
        save_file(tensors, filename, *args, **options)
        if fails(filename):
            os.truncate(filename, os.path.getsize(filename) // 2)
            raise error

    patch.setattr(Path, "open", opened)
    patch.setattr(safetensors.torch, "save_file", saved)
    patch.setattr(transformers.modeling_utils, "safe_save_file", saved)


@pytest.fixture(scope="module")
def config(job_data: Path) -> PPOConfig:
    return replace(phases.jobs(job_data)["grpo"], save_steps=1, max_steps=2)


@pytest.fixture(scope="module")
def whole(config: PPOConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    phases.run(config, folder)
    return folder


@pytest.mark.parametrize(
    ("name", "code"),
    [*((name, errno.ENOSPC) for name in WRITES), ("metrics.jsonl", errno.EROFS), ("state.json", errno.EROFS)],
)
def test_a_disk_that_is_full_or_read_only_half_way(
    name: str, code: int, config: PPOConfig, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        fail_writes(name, WRITES[name], OSError(code, os.strerror(code)), patch)
        with pytest.raises(OSError, match=os.strerror(code)):
            phases.run(config, run)
    assert all(damaged_file(path) is None for path in checkpoints(run))
    assert not (run / "summary.json").exists()
    phases.run(config, run, resume=True)
    for file in ("model/model.safetensors", "eval_before.json", "eval_after.json", "samples.jsonl"):
        assert (run / file).read_bytes() == (whole / file).read_bytes(), file
    assert phases.metrics(run) == phases.metrics(whole)


@pytest.mark.parametrize(
    ("job", "name", "which", "result"),
    [
        ("collect", "feedback.jsonl", 3, "feedback.jsonl"),
        ("sft", "state.safetensors", 2, "model/model.safetensors"),
        ("sft", "model.safetensors", 1, "model/model.safetensors"),
        ("reward", "state.safetensors", 2, "model/model.safetensors"),
    ],
)
def test_a_disk_that_is_full_half_way_in_the_other_phases(
    job: str, name: str, which: int, result: str, job_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = phases.jobs(job_data)[job]
    phases.run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        fail_writes(name, which, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), patch)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            phases.run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()
    phases.run(config, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / result).read_bytes() == (tmp_path / "whole" / result).read_bytes()


class Server(ThreadingHTTPServer):
    """A reward server that rates by the number of characters; it stops answering after so many requests."""

    daemon_threads = True

    def __init__(self, answers: int, then: Callable[[], None]) -> None:
        super().__init__(("127.0.0.1", 0), Rates)
        self.answers, self.then, self.requests, self.released = answers, then, 0, Event()
        Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/rate"


class Rates(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["completions"]
        self.server.requests += 1
        if self.server.requests > self.server.answers:
            self.server.released.wait()
            return
        if self.server.requests == self.server.answers:
            self.server.then()
        body = json.dumps({"rewards": [len(text) / 10 for text in texts]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Quiet."""


def test_a_reward_server_that_hangs_is_tried_again_and_stops_the_run_saved(
    config: PPOConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its silence is never a reward: resumed by one that answers, the run ends as if nothing had been."""
    config = replace(config, reward_model="", eval_prompts_file=None, max_steps=3)
    monkeypatch.setattr(remote_reward, "WAITS", (0.0, 0.0))
    with Server(1000, lambda: None) as server:
        phases.run(replace(config, reward_functions=(server.url,)), tmp_path / "whole")
        server.shutdown()
    with Server(1, lambda: monkeypatch.setattr(remote_reward, "TIMEOUT", 0.2)) as server:
        job = replace(config, reward_functions=(server.url,))
        with pytest.raises(UserError, match=r"timed out.*tried 3 times; saved after 1 steps, --resume goes on"):
            phases.run(job, tmp_path / "hung")
        assert server.requests == 1 + 3
        assert len(phases.metrics(tmp_path / "hung")) == 1
        server.answers = 1000  # it is well again
        server.released.set()
        monkeypatch.setattr(remote_reward, "TIMEOUT", 120.0)
        phases.run(job, tmp_path / "hung", resume=True)
        server.shutdown()
    models = [tmp_path / name / "model" / "model.safetensors" for name in ("hung", "whole")]
    assert models[0].read_bytes() == models[1].read_bytes()


HANGS = """
import os, threading
calls = 0

def rate(prompt, completions):
    global calls
    calls += 1
    if calls == 6:
        os.environ["RLHF_FAST_CALL_SECONDS"] = "0.2"
    if calls == 7:
        threading.Event().wait()
    return [float(len(completion)) for completion in completions]
"""


@pytest.fixture
def free_alarm() -> Iterator[None]:
    """SIGALRM as a command finds it; pytest's time limit uses it."""
    before, timer = signal.signal(signal.SIGALRM, signal.SIG_DFL), signal.setitimer(signal.ITIMER_REAL, 0)
    yield
    signal.signal(signal.SIGALRM, before)
    signal.setitimer(signal.ITIMER_REAL, *timer)


def test_a_rater_that_hangs_stops_the_run_saved(
    config: PPOConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_alarm: None
) -> None:
    """Four prompts a step, so in the second step; nothing is rated 0."""
    (tmp_path / "hangs.py").write_text(HANGS)
    monkeypatch.setenv("RLHF_FAST_CALL_SECONDS", "0")
    functions = (f"{tmp_path}/hangs.py:rate",)
    config = replace(config, reward_model="", eval_prompts_file=None, reward_functions=functions)
    with pytest.raises(UserError, match=r"raised TimeoutError: no answer after 0.2 s .* saved after 1 steps"):
        phases.run(config, tmp_path / "run")
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-1"]
    assert len(phases.metrics(tmp_path / "run")) == 1


def test_a_function_that_catches_the_time_out_gives_no_rewards(
    monkeypatch: pytest.MonkeyPatch, free_alarm: None
) -> None:
    def judged() -> list[float]:
        try:
            Event().wait()
        except Exception:
            return [0.0]
        return [1.0]

    monkeypatch.setenv("RLHF_FAST_CALL_SECONDS", "0.05")
    with pytest.raises(RaterError, match=r"TimeoutError: no answer after 0.05 s \(RLHF_FAST_CALL_SECONDS; 0: no limit"):
        finite_numbers(judged, ["a"], "f", "rewards")
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL


def test_the_time_limit_keeps_out_of_the_way(monkeypatch: pytest.MonkeyPatch, free_alarm: None) -> None:
    """Of a handler that the function has installed, and of threads, which cannot have one."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(finite_numbers, lambda: [1.0], ["a"], "f", "rewards").result() == [1.0]
    own = signal.default_int_handler

    def installs() -> list[float]:
        signal.signal(signal.SIGALRM, own)
        return [1.0]

    assert finite_numbers(installs, ["a"], "f", "rewards") == [1.0]
    assert signal.getsignal(signal.SIGALRM) is own
    monkeypatch.setenv("RLHF_FAST_CALL_SECONDS", "soon")
    with pytest.raises(UserError, match="must be a number of seconds, or 0 for no limit, got 'soon'"):
        finite_numbers(lambda: [1.0], ["a"], "f", "rewards")


def test_processes_wait_longer_for_one_another_than_a_call_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def state(**options: Any) -> SimpleNamespace:
        given.update(options)
        return SimpleNamespace(process_index=0, num_processes=1, device="cpu")

    monkeypatch.setattr("accelerate.PartialState", state)
    for seconds, wait in (("1800", 2400), ("5", 1800), ("7200", 7800), ("0", 86400)):
        monkeypatch.setenv("RLHF_FAST_CALL_SECONDS", seconds)
        Ranks()
        assert given["timeout"].total_seconds() == wait


DIES = """
import os
calls = 0

def reward(prompt, completions):
    global calls
    calls += 1
    if os.environ.get("RANK") == "1" and os.environ.get("DIES") and calls > 4:  # two prompts a step: in the third step
        os._exit(9)
    return [float(len(completion)) for completion in completions]
"""


def test_when_a_process_dies_the_main_one_saves(job_data: Path, tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text(DIES)
    command = f"""ppo --model {job_data}/model --prompts-file {job_data}/few.jsonl --reward-functions
        {tmp_path}/dies.py:reward --objective grpo --dtype float32 --max-length 32 --max-new-tokens 6 --max-steps 4
        --prompts-per-step 4 --samples-per-prompt 2 --output-dir {tmp_path}/run""".split()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rlhf_fast"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    died = subprocess.run(
        [*launch, *command], capture_output=True, text=True, timeout=200, env={**environment, "DIES": "1"}
    )
    assert died.returncode != 0
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-2"], died.stderr[-3000:]
    assert died.stderr.count("saved after 2 steps, --resume goes on from there") == 1
    resumed = subprocess.run(
        [sys.executable, "-m", "rlhf_fast", *command, "--resume"], capture_output=True, text=True, env=environment
    )
    assert resumed.returncode == 0, resumed.stderr
    assert [row["step"] for row in phases.metrics(tmp_path / "run")] == [1, 2, 3, 4]
