# SPDX-License-Identifier: Apache-2.0
"""The sampler that options ask for."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.models.gguf import resolve_model
from rlhf_fast.models.loading import resolve_dtype
from rlhf_fast.run.options import SamplerOptions
from rlhf_fast.run.progress import notice

from .builtin import generate
from .engine import EngineSampler
from .rollout import Sampler
from .vllm_in_process import SHARE_OF_GPU, VLLMInProcess
from .vllm_process import Running, Server, find_vllm, running, served_length
from .vllm_server import VLLMServers

SERVER_LOG = "engine.log"  # in a run's folder


class Served(NamedTuple):
    """What an engine that is started here is to serve."""

    model: str
    dtype: str
    max_length: int = 0  # tokens of a prompt and its completion; 0: up to 4096


@contextmanager
def open_sampler(options: SamplerOptions, policy: Served, log: Path) -> Iterator[Sampler]:
    """The sampler of the options. A server that is started for it (its output goes to `log`) ends with the block.

    All ranks must call it. Enter it before models are loaded: what is wrong with a server is then known at once.

    Raises:
        EngineError: a server cannot be started or reached, or has wrong settings.
    """
    if options.sampler == "builtin":
        yield generate
    elif options.sampler == "vllm":
        with closing(VLLMInProcess(*_server(policy)[:3])) as engine:
            yield EngineSampler(engine)
    elif options.engine_url:
        yield EngineSampler(VLLMServers(options.engine_url, transfer=options.engine_weights))
    else:
        with ExitStack() as stack:
            url = ranks().once(lambda: stack.enter_context(_started(policy, log)).url)
            notice(f"vLLM samples at {url}, and writes to {log}")
            yield EngineSampler(VLLMServers([url]))


def _started(policy: Served, log: Path) -> AbstractContextManager[Running]:
    vllm, server = find_vllm(), _server(policy)
    if not vllm.cpu:  # it would take nine tenths of the GPU, where the trainer's models are loaded next
        server = server._replace(more=("--gpu-memory-utilization", str(SHARE_OF_GPU)))
    return running(vllm, server, log)


def _server(policy: Served) -> Server:
    model = resolve_model(policy.model)
    dtype = str(resolve_dtype(policy.dtype)).removeprefix("torch.")
    return Server(model, dtype, served_length(model, policy.max_length))


def server_log() -> Path:
    """A file for the output of a server that no run has a folder for."""
    return Path(tempfile.gettempdir()) / f"rlhf-fast-engine-{os.getpid()}.log"


def check_servers(options: SamplerOptions) -> None:
    """Raise EngineError if a server of the options cannot be used: for what samples at the end of its work only."""
    if options.engine_url:
        VLLMServers(options.engine_url)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--sampler` and `--engine-url` of a command that is no phase."""
    parser.add_argument(
        "--sampler",
        choices=["builtin", "vllm-server", "vllm"],
        default="builtin",
        help="docs/engine.md (default builtin)",
    )
    parser.add_argument("--engine-url", nargs="+", default=[], help="its servers; none: one is started")
    parser.add_argument(
        "--engine-weights", choices=["file", "broadcast"], default="file", help="how they get weights (default file)"
    )


def options_of(arguments: argparse.Namespace) -> SamplerOptions:
    """The options of what `add_arguments` has added."""
    options = SamplerOptions(arguments.sampler, tuple(arguments.engine_url), arguments.engine_weights)
    options.validate()
    return options
