# SPDX-License-Identifier: Apache-2.0
"""Sampling completions from softmax(logits / temperature), nothing cut off.

A loop of our own around the model's forward and its KV cache, because three things that cost time are known here:
each prompt is read once and its cache is shared out to its samples, the head runs at the last position only, and rows
that have ended leave the batch. Prompts are padded on the left, with position_ids that do not count the pads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .heads import LogitOptions, head, logit_options, position_ids


@dataclass
class Rollout:
    """Prompts with their completions, padded on the right; row p * samples_per_prompt + k is sample k of prompt p."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) bool, True = prompt or completion
    response_mask: Tensor  # (B, T) bool, True = token of the completion, the EOS that ended it included
    texts: list[str]  # (B,) completions without special tokens
    ended: Tensor  # (B,) bool, True = ended by itself with EOS


def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    samples_per_prompt: int = 1,
) -> Rollout:
    """Sample `samples_per_prompt` completions of each prompt (token ids, not empty).

    The random numbers of a row depend on `generator` (or `seed`) and the row's number alone, so the same seed gives
    the same luck to two models. Without either, torch's global generator is used.
    """
    device = next(model.parameters()).device
    if generator is None and seed is not None:
        generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([len(p) for p in prompts])
    width = int(lengths.max())
    left = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = (torch.arange(width) >= width - lengths[:, None]).to(device)  # (P, width)
    tokens = _sample(
        model, left, mask, ends(model, tokenizer), max_new_tokens, temperature, generator, samples_per_prompt
    )
    tokens = tokens.cpu().clone()  # an ordinary tensor: autograd refuses those of inference mode
    return _assemble(tokenizer, prompts, tokens, ends(model, tokenizer), samples_per_prompt, device)


def ends(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end a completion: those of the model's generation config and the tokenizer's EOS."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return sorted({int(i) for i in [*listed, tokenizer.eos_token_id] if i is not None})


@torch.inference_mode()
def _sample(
    model: Any,
    prompts: Tensor,  # (P, width), padded on the left
    mask: Tensor,  # (P, width)
    end_ids: list[int],
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator | None,
    samples: int,
) -> Tensor:
    """(P * samples, max_new_tokens) sampled ids; -1 after the end of a row."""
    trunk, (weight, bias), options = model.base_model, head(model), logit_options(model)
    output = trunk(input_ids=prompts, attention_mask=mask.long(), position_ids=position_ids(mask), use_cache=True)
    cache = output.past_key_values
    cache.batch_repeat_interleave(samples)
    hidden = output.last_hidden_state[:, -1].repeat_interleave(samples, 0)  # (B, H)
    mask = mask.repeat_interleave(samples, 0)
    total = len(hidden)
    alive = torch.arange(total, device=prompts.device)  # rows still growing, in order
    sampled = prompts.new_full((total, max_new_tokens), -1)
    stop = prompts.new_tensor(end_ids)
    for step in range(max_new_tokens):
        uniform = torch.rand(total, generator=generator, dtype=torch.float64).to(prompts.device)[alive]
        logits = torch.nn.functional.linear(hidden, weight, bias)
        chosen = draw(logits, uniform, temperature, options)
        sampled[alive, step] = chosen
        keep = (~torch.isin(chosen, stop)).nonzero().squeeze(1)
        if len(keep) == 0 or step + 1 == max_new_tokens:
            break
        if len(keep) < len(alive):
            alive, mask, chosen = alive[keep], mask[keep], chosen[keep]
            cache.batch_select_indices(keep)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = mask.sum(1, keepdim=True) - 1
        output = trunk(
            input_ids=chosen[:, None],
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        hidden = output.last_hidden_state[:, -1]
    return sampled


def draw(logits: Tensor, uniform: Tensor, temperature: float, options: LogitOptions) -> Tensor:
    """(N,) ids drawn from logits (N, V), by inverting the distribution function at `uniform` (N,) in [0, 1)."""
    logits = logits.float() * options.logit_scale
    if options.softcap is not None:
        logits = torch.tanh(logits / options.softcap) * options.softcap
    # float64, since float32 sums of 50 000 terms would favour the ids at the end; the last entry is the total
    cumulative = (logits / temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
    point = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)


def _assemble(
    tokenizer: Any, prompts: list[list[int]], sampled: Tensor, end_ids: list[int], samples: int, device: torch.device
) -> Rollout:
    """Put each prompt and what was sampled after it side by side, padding on the right."""
    lengths = torch.tensor([len(p) for p in prompts]).repeat_interleave(samples)
    counts = (sampled >= 0).sum(1)
    width = int((lengths + counts).max())
    input_ids = torch.full((len(sampled), width), tokenizer.pad_token_id, dtype=torch.int64)
    for row, (start, count) in enumerate(zip(lengths.tolist(), counts.tolist(), strict=True)):
        input_ids[row, :start] = torch.tensor(prompts[row // samples])
        input_ids[row, start : start + count] = sampled[row, :count]
    columns = torch.arange(width)
    attention = columns < (lengths + counts)[:, None]
    final = sampled.gather(1, (counts - 1)[:, None]).squeeze(1)
    texts = [tokenizer.decode(row[row >= 0], skip_special_tokens=True) for row in sampled]
    return Rollout(
        input_ids.to(device),
        attention.to(device),
        (attention & (columns >= lengths[:, None])).to(device),
        texts,
        torch.isin(final, torch.tensor(end_ids)).to(device),
    )
