# SPDX-License-Identifier: Apache-2.0
"""What sampling gives, and what anything that samples must be: `generate` of this package, or an engine of yours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf_fast.models.batches import Support


@dataclass
class Rollout:
    """Prompts with their completions, padded on the right; row p * samples_per_prompt + k is sample k of prompt p."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) bool, True = prompt or completion
    response_mask: Tensor  # (B, T) bool, True = token of the completion, the EOS that ended it included
    texts: list[str]  # (B,) completions without special tokens
    ended: Tensor  # (B,) bool, True = ended by itself with EOS
    support: Support | None = None  # None = nothing was cut off
    scores: Tensor | None = None  # (B,) of completions that came with a rating


class Sampler(Protocol):
    """Samples completions of prompts (token ids) from the policy's law softmax(logits / temperature), cut by top-k and
    top-p. Only the prompts that number `first_prompt` and on of `total_prompts` are given: the random numbers of a row
    must depend on `generator` and the row's number among all, so that the number of processes changes no sample.
    With fsdp the model is cut over the processes: `sharding.together(model)` has all weights while it lasts."""

    def __call__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        samples_per_prompt: int = 1,
        first_prompt: int = 0,
        total_prompts: int | None = None,
    ) -> Rollout: ...
