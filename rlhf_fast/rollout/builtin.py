# SPDX-License-Identifier: Apache-2.0
"""The built-in sampler: completions from softmax(logits / temperature), with top-k, top-p and min-p.

A loop of our own around the model's forward and its KV cache, because it saves time: each prompt is read once and its
cache is copied to its samples, the head runs at the last position only, finished rows leave the batch, the cache grows
in place, and on a CPU the weights are packed into oneDNN's layout once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.data.encoding import end_of_turn
from rlhf_fast.integrations.lm_head import LanguageModelHead, language_model_head
from rlhf_fast.models.attention import choose_attention
from rlhf_fast.models.batches import Support
from rlhf_fast.models.fsdp import unsharded

from .decoder import Decoder, reads_padded_prompts
from .distribution import draw
from .packed_weights import Linear, packed_weights
from .rollout import Completions, Rollout, SamplingParams, assemble

WORTH_PACKING = 8  # tokens per row: packing the weights takes as long as two or three steps
STILL_GROWING = 0.75  # remove finished rows when the others are at most this share; removing copies the cache


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
    numbers to two models. Without a seed one is drawn from torch's global generator.

    Raises:
        UserError: the model gives other hidden states with its cache than without.
    """
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    total = (total_prompts or first_prompt + len(prompts)) * samples_per_prompt
    ends = Ends(end_ids(model, tokenizer), params, tokenizer)
    per_wave = max(1, params.batch_size // samples_per_prompt) if params.batch_size else len(prompts)
    with unsharded(model), torch.inference_mode():
        waves = _waves(prompts, per_wave, reads_padded_prompts(model))
        choose_attention(model)
        head = language_model_head(model)
        most = samples_per_prompt * max(map(len, waves)) if params.max_new_tokens > WORTH_PACKING else 0
        with packed_weights(model, head, most) as linear:
            sampled = []
            for wave in waves:
                read = [prompts[p] for p in wave]
                decoder = Decoder(model, read, tokenizer.pad_token_id, samples_per_prompt, params.max_new_tokens)
                own = [(first_prompt + p) * samples_per_prompt + k for p in wave for k in range(samples_per_prompt)]
                numbers = RandomNumbers(torch.Generator().manual_seed(seed), total, torch.tensor(own))
                sampled.append(_sample(decoder, partial(_logits, linear, head), params, numbers, ends))
    # Outside of inference mode: autograd refuses its tensors, and what is made from them here is ordinary again.
    rollouts = [
        assemble(tokenizer, [prompts[p] for p in wave], completions, params.stop)
        for wave, completions in zip(waves, sampled, strict=True)
    ]
    rollout = rollouts[0] if len(waves) == 1 else Rollout.concatenate(rollouts)
    order = torch.tensor([p for wave in waves for p in wave]).argsort()
    if not torch.equal(order, torch.arange(len(prompts))):
        rollout = rollout.rows((order[:, None] * samples_per_prompt + torch.arange(samples_per_prompt)).flatten())
    return rollout.to(model.device)


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end a completion: EOS of the model's generation config, of the tokenizer and of the chat template."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return sorted({int(i) for i in [*listed, tokenizer.eos_token_id, end_of_turn(tokenizer)] if i is not None})


def _waves(prompts: list[list[int]], size: int, padded: bool) -> list[list[int]]:
    """Indices of the prompts that are read together: at most `size`, and of one length unless they may be `padded`."""
    groups: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(0 if padded else len(prompt), []).append(number)
    return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]


class RandomNumbers(NamedTuple):
    """One random number per row and step; a row's do not depend on its rank or wave."""

    generator: torch.Generator
    total: int  # rows of all ranks
    own: Tensor  # (B,) indices of these rows among all

    def next(self) -> Tensor:
        """(B,) float64 in [0, 1), the next number of each row."""
        return torch.rand(self.total, generator=self.generator, dtype=torch.float64)[self.own]


class Ends:
    """Where a completion ends: at an id, or where its text holds a stop string; neither before `min_new_tokens`."""

    def __init__(self, ids: list[int], params: SamplingParams, tokenizer: Any) -> None:
        """`ids` are the tokens that end a completion."""
        self.ids, self.stop, self.least, self.tokenizer = ids, params.stop, params.min_new_tokens, tokenizer
        self.tail = 16 + 4 * max(map(len, self.stop), default=0)  # tokens that may hold a stop string

    def forbidden(self, step: int) -> list[int]:
        """Ids that cannot be drawn as token number `step` of a completion."""
        return self.ids if step < self.least else []

    def reached(self, sampled: Tensor) -> Tensor:
        """(B,) bool: which of the completions so far (B, n) have ended."""
        ended = torch.isin(sampled[:, -1], torch.tensor(self.ids, device=sampled.device))
        if self.stop and sampled.shape[1] >= self.least:
            tails = sampled[:, -self.tail :].tolist()
            texts = [self.tokenizer.decode(tail, skip_special_tokens=True) for tail in tails]
            stopped = [any(stop in text for stop in self.stop) for text in texts]
            ended |= torch.tensor(stopped, device=sampled.device)
        return ended


def _sample(
    decoder: Decoder, logits: Callable[[Tensor], Tensor], params: SamplingParams, numbers: RandomNumbers, ends: Ends
) -> Completions:
    """Sample completions of the rows in `decoder`, which has read their prompts."""
    device, count = decoder.hidden.device, len(decoder.hidden)
    tokens = torch.full((count, params.max_new_tokens), -1, device=device)
    lengths = torch.full((count,), params.max_new_tokens, device=device)
    ended = torch.zeros(count, dtype=torch.bool, device=device)
    rows = torch.arange(count, device=device)  # rows in the decoder, in order
    places, supports = [], []  # flat indices into `tokens`, and the supports there
    for step in range(params.max_new_tokens):
        uniform = numbers.next().to(device)[rows]
        drawn, support = draw(logits(decoder.hidden), uniform, params, ends.forbidden(step))
        tokens[rows, step] = drawn
        if support is not None:
            places.append(rows * params.max_new_tokens + step)
            supports.append(support)
        now = rows[ends.reached(tokens[rows, : step + 1]) & ~ended[rows]]
        ended[now], lengths[now] = True, step + 1
        growing = (~ended[rows]).nonzero().squeeze(1)
        if len(growing) == 0 or step + 1 == params.max_new_tokens:
            break
        if len(growing) <= STILL_GROWING * len(rows):
            rows, drawn = rows[growing], drawn[growing]
            decoder.keep(growing)
        decoder.step(drawn)
    support = None
    if supports:  # sort from step-major to row-major order, without tokens after a row's end
        place = torch.cat(places)
        order = place.argsort()
        within = place[order] % params.max_new_tokens < lengths[place[order] // params.max_new_tokens]
        support = Support.concatenate(supports).take(order[within])
    return Completions(tokens=tokens, lengths=lengths, ended=ended, support=support)


def _logits(linear: Linear, head: LanguageModelHead, hidden: Tensor) -> Tensor:
    """(N, V) float32 logits, with the model's scale and softcap."""
    logits = linear(hidden)
    if head.lora is not None:
        a, b, scale = head.lora
        logits = logits + scale * (hidden.to(a.dtype) @ a.mT @ b.mT).to(logits.dtype)
    logits = logits.float()
    if head.logit_scale != 1:
        logits = logits * head.logit_scale
    return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap
