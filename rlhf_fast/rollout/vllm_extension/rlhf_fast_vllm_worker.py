# SPDX-License-Identifier: Apache-2.0
"""What a vLLM server needs of us, in each of its workers: `--worker-extension-cls rlhf_fast_vllm_worker.Sync`.

This file is imported by vLLM, with its folder on PYTHONPATH, in an environment that has no rlhf_fast: it imports
nothing of ours.
"""

from __future__ import annotations

from typing import Any

from safetensors import safe_open

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


class Sync:
    """Its methods become the worker's, and `/collective_rpc` calls them on every tensor-parallel rank."""

    reload_weights: Any  # the worker's
    vllm_config: Any
    rlhf_fast_weight_version = 0  # of the weights it was started with

    def rlhf_fast_load(self, path: str, version: int) -> dict[str, int]:
        """Take the weights of a safetensors file, named as in a transformers checkpoint."""
        with safe_open(path, "pt") as file:
            self.reload_weights(weights_iterator=((name, file.get_tensor(name)) for name in file.keys()))  # noqa: SIM118
        self.rlhf_fast_weight_version = version
        return self.rlhf_fast_state()

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
