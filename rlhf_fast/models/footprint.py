# SPDX-License-Identifier: Apache-2.0
"""What a model takes, from its configuration alone: numbers of weights, saved activations, KV cache, operations.

The model is built on PyTorch's "meta" device, which has shapes and no memory, and one pass over it counts what
autograd saves; so the figures are those of the model's own code.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from rlhf_fast.errors import UserError, first_line

from .fsdp import decoder_layers, head_of
from .gguf import resolve_model
from .lora import add_lora

NAME = "rlhf_fast_footprint"
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # their number, in the configs of models


@dataclass
class Footprint:
    """Counts for one language model; sizes in bytes are of weights of `width` bytes each."""

    model: Any  # on "meta"
    width: int

    @classmethod
    def of(cls, name: str, dtype: torch.dtype, lora_rank: int = 0) -> Footprint:
        """Of a Hugging Face id, a folder, or a config.json; no weight is read.

        Raises:
            OSError, ValueError: transformers cannot read the configuration.
            UserError: its weights are quantised, or it has no attention.
        """
        from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(name if name.endswith(".json") else resolve_model(name))
        if (method := _quantised(config)) is not None:
            raise UserError(
                f"the weights of {name!r} are quantised ({method}), which is not what is trained: name the model that "
                "they were made from; a plan quantises its weights itself (dtype nf4) if nothing else fits"
            )
        if not getattr(config.get_text_config(), "num_attention_heads", None):
            raise UserError(f"{name!r} is no model with attention heads, which is what a plan counts")
        AttentionInterface.register(NAME, _attend)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=NAME)
            if lora_rank:
                add_lora(model, lora_rank)
        return cls(model.train(), dtype.itemsize)

    @cached_property
    def weights(self) -> int:
        """All weights; shared ones count once."""
        return sum(p.numel() for p in self.model.parameters())

    @cached_property
    def trained(self) -> int:
        """Those that need a gradient: the adapters with LoRA, else all."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @cached_property
    def linear(self) -> int:
        """The weights of the decoder layers' linear layers, which are what NF4 quantises."""
        inside = (found for layer in decoder_layers(self.model) for found in layer.named_modules())
        return sum(x.weight.numel() for name, x in inside if isinstance(x, nn.Linear) and ".lora_" not in name)

    @cached_property
    def largest_layer(self) -> int:
        """The weights of the largest decoder layer, which FSDP gathers at a time."""
        return max(sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(self.model))

    @cached_property
    def head(self) -> int:
        """The weights of the language-model head."""
        return sum(p.numel() for p in head_of(self.model).parameters())

    @property
    def context(self) -> int | None:
        """Most tokens in a row, if the configuration has a limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @cached_property
    def vocabulary(self) -> int:
        """Rows of the head."""
        return int(self.model.config.get_text_config().vocab_size)

    @cached_property
    def hidden(self) -> int:
        """Width of the hidden states."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def cache_per_token(self) -> int:
        """Bytes of keys and values that generation keeps for a token; a sliding window is taken for a full one."""
        config = self.model.config.get_text_config()
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        return 2 * int(config.num_hidden_layers) * int(key_heads) * int(size) * self.width

    @cached_property
    def used(self) -> float:
        """The weights that a token is multiplied by: without the embedding, and of experts those that it goes to."""
        config = self.model.config.get_text_config()
        tied = config.tie_word_embeddings
        embedding = 0 if tied else self.model.get_input_embeddings().weight.numel()
        experts = sum(p.numel() for name, p in self.model.named_parameters() if ".experts." in name)
        count = next((n for n in (getattr(config, name, None) for name in EXPERTS) if n), 1)
        return self.weights - embedding - experts * (1 - min(1, getattr(config, "num_experts_per_tok", count) / count))

    def flops_per_token(self, length: int) -> float:
        """Operations of a forward pass: two a weight in use, and attention over `length` / 2 tokens."""
        return 2.0 * self.used + 2.0 * int(self.model.config.get_text_config().num_hidden_layers) * length * self.hidden

    def saved(self, rows: int, length: int, checkpointing: bool) -> int:
        """Bytes that autograd keeps from a forward pass over `rows` sequences of `length` tokens.

        With `checkpointing`: the input of every layer, and all of one layer at a time.
        """
        per_token = sum(self._saved_per_token)
        if checkpointing:
            layers = len(decoder_layers(self.model))
            per_token = per_token / layers + layers * self.hidden * self.width
        return int(per_token * rows * length)

    def offloaded(self, rows: int, length: int, checkpointing: bool) -> tuple[int, list[float]]:
        """With activations in CPU memory: bytes on the device, those of one layer, and of each tensor on the CPU."""
        layers = len(decoder_layers(self.model))
        inputs = [float(self.hidden * self.width)] * layers
        sizes = [size * rows * length for size in (inputs if checkpointing else self._saved_per_token)]
        return self.saved(rows, length, False) // layers, sizes

    @cached_property
    def largest_weight(self) -> int:
        """Numbers in the largest one."""
        return max(p.numel() for p in self.model.parameters())

    @cached_property
    def _saved_per_token(self) -> list[float]:
        """Bytes of each tensor that is saved."""
        count, width = 16, self.model.get_input_embeddings().weight.shape[1]
        with torch.device("meta"):
            inputs = torch.empty(1, count, width, dtype=self.model.dtype, requires_grad=True)
            positions = torch.arange(count)[None]
        kept = _Kept(self.model)
        try:
            with saved_tensors_hooks(kept.keep, lambda tensor: tensor):
                self.model.base_model(inputs_embeds=inputs, position_ids=positions, use_cache=False)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{type(self.model).__name__} does not run on shapes alone: {first_line(error)}") from None
        return [size / count for size in kept.sizes]


def _quantised(config: Any) -> str | None:
    """How the weights are quantised, if they are."""
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None
    found = given if isinstance(given, dict) else given.to_dict()
    return str(found.get("quant_method") or "in an unknown way")


class _Kept:
    """The bytes of the tensors that autograd saves, each storage once, without the model's own weights."""

    def __init__(self, model: nn.Module) -> None:
        self.sizes: list[int] = []
        self._seen: dict[int, Tensor] = {x.untyped_storage()._cdata: x for x in (*model.parameters(), *model.buffers())}

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = tensor  # kept, so that no other storage gets its number
            self.sizes.append(storage.nbytes())
        return tensor


class _Attention(torch.autograd.Function):
    """Shapes of a fused attention, and what it saves: queries, keys, values, the output and a number per row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any
) -> tuple[Tensor, None]:
    return _Attention.apply(query, key, value).transpose(1, 2), None  # type: ignore[no-untyped-call]
