# SPDX-License-Identifier: Apache-2.0
"""Sampling completions from softmax(logits / temperature), whole or cut to the likeliest tokens.

A loop of our own around the model's forward and its KV cache, because three things that cost time are known here:
each prompt is read once and its cache is shared out to its samples, the head runs at the last position only, and rows
that have ended leave the batch. Prompts are padded on the left, with position_ids that do not count the pads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.integrations.causal_lm import LanguageModelHead, language_model_head
from rlhf_fast.models.attention import choose_attention
from rlhf_fast.models.batches import Support
from rlhf_fast.models.fsdp import unsharded
from rlhf_fast.models.heads import position_ids

from .rollout import Rollout, SamplingParams


def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    params: SamplingParams,
    *,
    seed: int | None = None,
    samples_per_prompt: int = 1,
    first_prompt: int = 0,
    total_prompts: int | None = None,
) -> Rollout:
    """Sample `samples_per_prompt` completions of each prompt (token ids, not empty); a `Sampler`.

    The random numbers of a row depend on `seed` and the row's number alone, so the same seed gives the same random
    numbers to two models. Without a seed torch's global generator is used.
    """
    device = next(model.parameters()).device
    lengths = torch.tensor([len(p) for p in prompts])
    width = int(lengths.max())
    left = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = (torch.arange(width) >= width - lengths[:, None]).to(device)  # (P, width)
    rows = RandomRows(
        generator=None if seed is None else torch.Generator().manual_seed(seed),
        total=(total_prompts or first_prompt + len(prompts)) * samples_per_prompt,
        own=slice(first_prompt * samples_per_prompt, (first_prompt + len(prompts)) * samples_per_prompt),
    )
    end_ids = ends(model, tokenizer)
    with unsharded(model):
        tokens, places, supports = _sample(model, left, mask, end_ids, params, samples_per_prompt, rows)
    # Outside of inference mode again: autograd refuses its tensors, and those made from them here are ordinary ones.
    tokens, support = tokens.cpu().clone(), None
    if supports:
        support = Support.concatenate(supports).take(torch.cat(places).argsort())  # from steps to rows
    return _assemble(tokenizer, prompts, tokens, support, end_ids, samples_per_prompt, device)


class RandomRows(NamedTuple):
    """One random number a row and step, the same for a row whichever rank it is on."""

    generator: torch.Generator | None  # None: torch's own
    total: int  # rows of all ranks
    own: slice  # this rank's of them

    def next(self) -> Tensor:
        """(B,) float64 in [0, 1) of this rank's rows."""
        return torch.rand(self.total, generator=self.generator, dtype=torch.float64)[self.own]


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
    params: SamplingParams,
    samples: int,
    random: RandomRows,
) -> tuple[Tensor, list[Tensor], list[Support]]:
    """(P * samples, max_new_tokens) sampled ids, -1 after the end of a row; and of each step, if top-k or top-p left
    ids out, the flat places there of what was sampled, and the ids that were kept."""
    choose_attention(model)
    trunk, head = model.base_model, language_model_head(model)
    output = trunk(input_ids=prompts, attention_mask=mask.long(), position_ids=position_ids(mask), use_cache=True)
    cache = output.past_key_values
    cache.batch_repeat_interleave(samples)
    hidden = output.last_hidden_state[:, -1].repeat_interleave(samples, 0)  # (B, H)
    mask = mask.repeat_interleave(samples, 0)
    alive = torch.arange(len(hidden), device=prompts.device)  # rows still growing, in order
    sampled = prompts.new_full((len(hidden), params.max_new_tokens), -1)
    stop = prompts.new_tensor(end_ids)
    places, supports = [], []
    for step in range(params.max_new_tokens):
        uniform = random.next().to(prompts.device)[alive]
        tokens, support = draw(_logits(hidden, head), uniform, params)
        sampled[alive, step] = tokens
        if support is not None:
            places.append(alive * params.max_new_tokens + step)
            supports.append(support)
        growing = (~torch.isin(tokens, stop)).nonzero().squeeze(1)
        if len(growing) == 0 or step + 1 == params.max_new_tokens:
            break
        if len(growing) < len(alive):
            alive, mask, tokens = alive[growing], mask[growing], tokens[growing]
            cache.batch_select_indices(growing)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        output = trunk(
            input_ids=tokens[:, None],
            attention_mask=mask.long(),
            position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
        )
        hidden = output.last_hidden_state[:, -1]
    return sampled, places, supports


def _logits(hidden: Tensor, head: LanguageModelHead) -> Tensor:
    """(N, V) float32, with the scale and cap of the model."""
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias)
    if head.lora is not None:
        a, b, scale = head.lora
        logits = logits + scale * (hidden.to(a.dtype) @ a.mT @ b.mT).to(logits.dtype)
    logits = logits.float() * head.logit_scale
    return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap


def draw(logits: Tensor, uniform: Tensor, params: SamplingParams) -> tuple[Tensor, Support | None]:
    """(N,) ids drawn from logits (N, V), by inverting the distribution function at `uniform` (N,) in [0, 1); and the
    ids that each row could draw, if top-k or top-p leave some out."""
    probabilities = (logits / params.temperature).softmax(-1)
    if not params.truncated:
        return _invert(probabilities, uniform), None
    probabilities, ids, keep = _likeliest(probabilities, params)
    place = _invert(probabilities * keep, uniform)
    # rounding may point behind the last of them, whose probability is 0
    place = torch.minimum(place, keep.sum(-1) - 1)
    return ids.gather(1, place[:, None]).squeeze(1), Support.of_counts(ids[keep], keep.sum(-1))


def _invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    # float64, since float32 sums of 50 000 terms would favour the ids at the end; the last entry is the total
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    point = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True).squeeze(1).clamp_(max=probabilities.shape[1] - 1)


FIRST_LOOK = 1024  # sorting a whole vocabulary is slow, and top-p rarely keeps more than this


def _likeliest(probabilities: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities (N, K) in descending order, their ids, and which of them are kept: the `top_k` likeliest, then the
    fewest of these that have `top_p` of their mass (at least one)."""
    size = probabilities.shape[1]
    count = min(params.top_k or FIRST_LOOK, size)
    values, ids = probabilities.topk(count)
    mass = values.sum(-1, keepdim=True) if params.top_k else probabilities.sum(-1, keepdim=True)
    if not params.top_k and count < size and bool((values.sum(-1) < params.top_p * mass.squeeze(-1)).any()):
        values, ids = probabilities.sort(descending=True)
    before = values.cumsum(-1, dtype=torch.float64) - values
    keep = (before < params.top_p * mass) & (values > 0)
    keep[:, 0] = True
    return values, ids, keep


def _assemble(
    tokenizer: Any,
    prompts: list[list[int]],
    sampled: Tensor,
    support: Support | None,
    end_ids: list[int],
    samples: int,
    device: torch.device,
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
        input_ids=input_ids.to(device),
        attention_mask=attention.to(device),
        response_mask=(attention & (columns >= lengths[:, None])).to(device),
        texts=texts,
        ended=torch.isin(final, torch.tensor(end_ids)).to(device),
        support=support,
    )
