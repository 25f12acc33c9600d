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
from rlhf_fast.models.fsdp import together
from rlhf_fast.models.heads import position_ids

from .rollout import Rollout


class Law(NamedTuple):
    """What is drawn from: softmax(logits / temperature), cut to the `top_k` likeliest and to `top_p` of the mass."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def cut(self) -> bool:
        return self.top_k > 0 or self.top_p < 1


def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    samples_per_prompt: int = 1,
    first_prompt: int = 0,
    total_prompts: int | None = None,
) -> Rollout:
    """Sample `samples_per_prompt` completions of each prompt (token ids, not empty); a `Sampler`.

    The random numbers of a row depend on `generator` (or `seed`) and the row's number alone, so the same seed gives
    the same luck to two models. Without either, torch's global generator is used. top_k 0 and top_p 1 cut nothing.
    """
    device = next(model.parameters()).device
    if generator is None and seed is not None:
        generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([len(p) for p in prompts])
    width = int(lengths.max())
    left = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = (torch.arange(width) >= width - lengths[:, None]).to(device)  # (P, width)
    total = (total_prompts or first_prompt + len(prompts)) * samples_per_prompt
    mine = slice(first_prompt * samples_per_prompt, (first_prompt + len(prompts)) * samples_per_prompt)
    law, end_ids = Law(temperature, top_k, top_p), ends(model, tokenizer)
    size = max_new_tokens, law, generator, samples_per_prompt, total, mine
    with together(model):
        tokens, kept = _sample(model, left, mask, end_ids, *size)
    tokens = tokens.cpu().clone()  # an ordinary tensor: autograd refuses those of inference mode
    return _assemble(tokenizer, prompts, tokens, kept, end_ids, samples_per_prompt, device)


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
    law: Law,
    generator: torch.Generator | None,
    samples: int,
    total: int,
    mine: slice,
) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """(P * samples, max_new_tokens) sampled ids, -1 after the end of a row; and of each step what the cut left: the
    tokens' places in that tensor, how many ids each kept, and these ids."""
    choose_attention(model)
    trunk, head = model.base_model, language_model_head(model)
    output = trunk(input_ids=prompts, attention_mask=mask.long(), position_ids=position_ids(mask), use_cache=True)
    cache = output.past_key_values
    cache.batch_repeat_interleave(samples)
    hidden = output.last_hidden_state[:, -1].repeat_interleave(samples, 0)  # (B, H)
    mask = mask.repeat_interleave(samples, 0)
    alive = torch.arange(len(hidden), device=prompts.device)  # rows still growing, in order
    sampled = prompts.new_full((len(hidden), max_new_tokens), -1)
    stop = prompts.new_tensor(end_ids)
    kept = []
    for step in range(max_new_tokens):
        uniform = torch.rand(total, generator=generator, dtype=torch.float64)[mine].to(prompts.device)[alive]
        chosen, cut = draw(_logits(hidden, head), uniform, law)
        sampled[alive, step] = chosen
        if cut is not None:
            kept.append((alive * max_new_tokens + step, cut.offsets.diff(), cut.ids))
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
    return sampled, kept


def _logits(hidden: Tensor, head: LanguageModelHead) -> Tensor:
    """(N, V) float32, with the scale and cap of the model."""
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias)
    if head.lora is not None:
        a, b, scale = head.lora
        logits = logits + scale * (hidden.to(a.dtype) @ a.mT @ b.mT).to(logits.dtype)
    logits = logits.float() * head.logit_scale
    return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap


def draw(logits: Tensor, uniform: Tensor, law: Law) -> tuple[Tensor, Support | None]:
    """(N,) ids drawn from logits (N, V), by inverting the distribution function at `uniform` (N,) in [0, 1); and the
    ids that each row could draw, if the law cuts."""
    probabilities = (logits / law.temperature).softmax(-1)
    if not law.cut:
        return _invert(probabilities, uniform), None
    probabilities, ids, kept = _likeliest(probabilities, law)
    place = _invert(probabilities * kept, uniform)
    # rounding may point behind the last kept one, whose probability is 0
    place = torch.minimum(place, kept.sum(-1) - 1)
    offsets = torch.nn.functional.pad(kept.sum(-1).cumsum(0), (1, 0))
    return ids.gather(1, place[:, None]).squeeze(1), Support(ids[kept], offsets)


def _invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    # float64, since float32 sums of 50 000 terms would favour the ids at the end; the last entry is the total
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    point = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True).squeeze(1).clamp_(max=probabilities.shape[1] - 1)


FIRST_LOOK = 1024  # sorting a whole vocabulary is slow, and top-p rarely keeps more than this


def _likeliest(probabilities: Tensor, law: Law) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities (N, K) in descending order, their ids, and which of them are kept: the `top_k` likeliest, then the
    fewest of these that have `top_p` of their mass (at least one)."""
    size = probabilities.shape[1]
    count = min(law.top_k or FIRST_LOOK, size)
    values, ids = probabilities.topk(count)
    mass = values.sum(-1, keepdim=True) if law.top_k else probabilities.sum(-1, keepdim=True)
    if not law.top_k and count < size and bool((values.sum(-1) < law.top_p * mass.squeeze(-1)).any()):
        values, ids = probabilities.sort(descending=True)
    before = values.cumsum(-1, dtype=torch.float64) - values
    kept = (before < law.top_p * mass) & (values > 0)
    kept[:, 0] = True
    return values, ids, kept


def _assemble(
    tokenizer: Any,
    prompts: list[list[int]],
    sampled: Tensor,
    kept: list[tuple[Tensor, Tensor, Tensor]],
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
    support = None
    if kept:  # from steps of rows to rows of steps
        places, sizes, ids = (torch.cat(parts) for parts in zip(*kept, strict=True))
        support = Support(ids, torch.nn.functional.pad(sizes.cumsum(0), (1, 0))).take(places.argsort())
    return Rollout(
        input_ids.to(device),
        attention.to(device),
        (attention & (columns >= lengths[:, None])).to(device),
        texts,
        torch.isin(final, torch.tensor(end_ids)).to(device),
        support,
    )
