# SPDX-License-Identifier: Apache-2.0
"""A vLLM server as a child: `rlhf-fast engine`, and one that a phase starts for itself. The vLLM is a stub."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import fake_vllm

from rlhf_fast.errors import UserError
from rlhf_fast.rollout import vllm_process
from rlhf_fast.rollout.engine import EngineError
from rlhf_fast.rollout.vllm_process import EXTENSION, PYTHON_VARIABLE, VLLM, Server, find_vllm, running
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.trainer import CollectConfig, collection

SERVER = Server("some/model", "float32", 64)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it with the kind of server."""

    def made(kind: str = "answers") -> VLLM:
        for name, value in fake_vllm.environment(tmp_path, kind).items():
            monkeypatch.setenv(name, value)
        return find_vllm(sys.executable)

    return made


def started(folder: Path) -> dict[str, Any]:
    until = time.monotonic() + 60
    while not (folder / "started.json").exists() and time.monotonic() < until:
        time.sleep(0.05)
    return dict(json.loads((folder / "started.json").read_text()))


def ended(pid: int) -> bool:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_a_server_is_started_with_what_is_needed_and_ends_with_the_block(
    install: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm = install()
    assert vllm == VLLM(sys.executable, cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # as on many a cluster
    with running(vllm, SERVER._replace(more=["--swap-space", "1"]), tmp_path / "log") as engine:
        found = started(tmp_path)
        assert engine.url.startswith("http://127.0.0.1:") and engine.process.poll() is None
    assert ended(found["pid"])
    line, environment = " ".join(found["arguments"]), found["environment"]
    for words in (
        "--model some/model", "--served-model-name policy", "--host 127.0.0.1", "--dtype float32", "--max-model-len 64",
        "--logprobs-mode processed_logprobs", "--max-logprobs -1", "--generation-config vllm", "--enforce-eager",
        "--no-enable-chunked-prefill", "--max-num-batched-tokens 2048",
        "--worker-extension-cls rlhf_fast_vllm_worker.Sync", "--swap-space 1",
    ):  # fmt: skip
        assert words in line
    assert environment["VLLM_SERVER_DEV_MODE"] == "1" and environment["PYTHONPATH"].startswith(f"{EXTENSION}:")
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind" and "WORLD_SIZE" not in environment


def test_what_keeps_a_server_from_starting_is_said(
    install: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EngineError, match=rf"port {port} of 127.0.0.1 cannot be used .*--port"):
            running(install(), SERVER._replace(port=port)).__enter__()
    with pytest.raises(EngineError, match=r"did not start \(exit code 1\).*\n.*starting\nno room for the KV cache"):
        running(install("dies"), SERVER, tmp_path / "log").__enter__()
    (tmp_path / "started.json").unlink(missing_ok=True)

    readings = itertools.count()

    def clock() -> float:
        """The time is over once the server has begun, and not before; the first reading is the beginning."""
        return 3.0 if next(readings) and (tmp_path / "started.json").exists() else 0.0

    monkeypatch.setattr(vllm_process, "time", SimpleNamespace(monotonic=clock, sleep=time.sleep))
    with pytest.raises(EngineError, match="was not ready after 3 s"):
        running(install("waits"), SERVER, tmp_path / "log", patience=3.0).__enter__()
    assert ended(started(tmp_path)["pid"])


def test_a_python_without_vllm_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="has no vLLM: `make engine-venv`"):
        find_vllm()
    monkeypatch.setenv(PYTHON_VARIABLE, str(tmp_path / "python"))
    with pytest.raises(UserError, match="cannot run the Python .*No such file"):
        find_vllm()


@pytest.mark.skipif(sys.platform != "linux", reason="the signal at a parent's death is Linux's")
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_the_command_serves_until_it_ends_however_it_ends(install: Any, tiny: Path, tmp_path: Path, end: int) -> None:
    install()
    command = [sys.executable, "-m", "rlhf_fast", "engine", str(tiny / "model"), "--port", "0", "--dtype", "float32"]
    process = subprocess.Popen([*command, "--", "--swap-space", "2"], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        assert any("ready: --sampler vllm-server --engine-url http://127.0.0.1:" in line for line in lines)
        found = started(tmp_path)
        process.send_signal(end)
        assert process.wait(120) == (0 if end == signal.SIGINT else -signal.SIGKILL)
    finally:
        process.kill()
        process.stderr.close()  # type: ignore[union-attr]
    assert ended(found["pid"])
    assert found["arguments"][-2:] == ["--swap-space", "2"]
    assert "--max-model-len 64" in " ".join(found["arguments"])  # the model's own


def test_a_phase_starts_a_server_for_itself(
    install: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("samples")
    monkeypatch.setenv(PYTHON_VARIABLE, sys.executable)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    lines = (tiny / "heldout.jsonl").read_text().splitlines()[:3]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    config = CollectConfig(
        model=str(tiny / "model"), dtype="float32", max_length=32, prompts_file=str(tmp_path / "prompts.jsonl"),
        samples_per_prompt=2, max_new_tokens=4, sampler="vllm-server",
    )  # fmt: skip
    summary = collection.collect(config, RunFolder.create(tmp_path / "run"))
    found = started(tmp_path)
    assert summary["completions"] == 6 and ended(found["pid"])
    assert "--max-model-len 32" in " ".join(found["arguments"])
    assert "starting" in (tmp_path / "run" / "engine.log").read_text()
    assert dataclasses.asdict(config)["engine_url"] == () and os.environ.get("VLLM_SERVER_DEV_MODE") is None
