# SPDX-License-Identifier: Apache-2.0
"""What a vLLM server needs of us, in each of its workers: `--worker-extension-cls rlhf_fast_vllm_worker.Sync`.

This file is imported by vLLM, with its folder on PYTHONPATH, in an environment that has no rlhf_fast: it imports
nothing of ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from safetensors import safe_open

DISTRIBUTED: Any = torch.distributed  # its types lack some of its members
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


class Sync:
    """Its methods become the worker's, and `/collective_rpc` calls them on every tensor-parallel rank."""

    reload_weights: Any  # the worker's
    vllm_config: Any
    rank: int  # among the server's workers
    device: Any
    rlhf_fast_group: Any  # of the trainer and all workers, once joined
    rlhf_fast_device: Any
    rlhf_fast_weight_version = 0  # of the weights it was started with

    def rlhf_fast_load(self, path: str, version: int) -> dict[str, int]:
        """Take the weights of a safetensors file, named as in a transformers checkpoint."""
        with safe_open(path, "pt") as file:
            self.reload_weights(weights_iterator=((name, file.get_tensor(name)) for name in file.keys()))  # noqa: SIM118
        self.rlhf_fast_weight_version = version
        return self.rlhf_fast_state()

    def rlhf_fast_join(self, host: str, port: int, first: int, count: int, backend: str, seconds: float) -> Any:
        """Join the group of the trainer, rank 0, and `count` - 1 workers; the first of this server has rank `first`."""
        limit = timedelta(seconds=seconds)
        store = DISTRIBUTED.TCPStore(host, port, count, is_master=False, timeout=limit)
        rank = first + self.rank
        if backend == "nccl":
            nccl = DISTRIBUTED.ProcessGroupNCCL
            options = nccl.Options()
            options._timeout = limit
            self.rlhf_fast_group = nccl(store, rank, count, options)
        else:
            self.rlhf_fast_group = DISTRIBUTED.ProcessGroupGloo(store, rank, count, limit)
        self.rlhf_fast_device = self.device if backend == "nccl" else torch.device("cpu")
        return self.rlhf_fast_state()

    def rlhf_fast_receive(self, tensors: list[list[Any]], version: int) -> dict[str, int]:
        """Take the weights that the trainer broadcasts: `tensors` has name, dtype and shape of each, in order."""
        weights = self.rlhf_fast_broadcasts(tensors)
        try:
            self.reload_weights(weights_iterator=weights)
        finally:
            for _ in weights:  # what the model has no use for, or an error left, or all others would wait
                pass
        self.rlhf_fast_weight_version = version
        return self.rlhf_fast_state()

    def rlhf_fast_broadcasts(self, tensors: list[list[Any]]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, weight) as they arrive."""
        for name, dtype, shape in tensors:
            weight = torch.empty(shape, dtype=getattr(torch, dtype), device=self.rlhf_fast_device)
            self.rlhf_fast_group.broadcast(weight.reshape(-1).view(torch.uint8), 0).wait()
            yield name, weight

    def rlhf_fast_take(self, weights: dict[str, Any], version: int) -> dict[str, int]:
        """Take weights of this process, where the engine is in the trainer's."""
        self.reload_weights(weights_iterator=iter(weights.items()))
        self.rlhf_fast_weight_version = version
        return self.rlhf_fast_state()

    def rlhf_fast_state(self) -> dict[str, int]:
        """Which weights it has, and the sizes of its model, as far as its config names them."""
        config = self.vllm_config.model_config.hf_text_config
        sizes = {name: getattr(config, name, None) for name in SIZES}
        return {
            "weight_version": self.rlhf_fast_weight_version,
            **{name: size for name, size in sizes.items() if isinstance(size, int)},
        }
