# SPDX-License-Identifier: Apache-2.0
"""The sampling interface: parameters, result, and the protocol of samplers (`generate`, an engine, or your own)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_fast.data.encoding import decode_completion
from rlhf_fast.errors import UserError
from rlhf_fast.models.batches import Batch, Support
from rlhf_fast.models.fsdp import is_sharded
from rlhf_fast.run.options import SamplingOptions


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The distribution that completions are sampled from, softmax(logits / temperature), and where they end.

    Kept are the tokens with at least `min_p` times the probability of the likeliest (0: all), of these the `top_k`
    likeliest (0: all), of these the fewest whose probabilities sum to `top_p` of theirs (1: all). Log-probabilities are
    over the kept tokens.
    """

    max_new_tokens: int = 64  # including the end-of-sequence token
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    min_new_tokens: int = 0  # a completion cannot end before
    stop: tuple[str, ...] = ()  # texts that end a completion; removed from `Rollout.texts`, not from the tokens
    batch_size: int = 0  # completions sampled at once, which limits the memory of the KV cache; 0: all

    def __post_init__(self) -> None:
        """Raise UserError for values that conflict."""
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(f"min_new_tokens {self.min_new_tokens} is more than max_new_tokens {self.max_new_tokens}")
        if self.min_new_tokens and not self.truncated:
            raise UserError(
                "min_new_tokens takes the end out of what may be sampled, which is recorded with top_k, top_p or min_p "
                "only: set one of them"
            )

    @classmethod
    def of(cls, options: SamplingOptions) -> SamplingParams:
        """The parameters in a phase's options."""
        return cls(
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            min_new_tokens=options.min_new_tokens,
            stop=options.stop,
            batch_size=options.generation_batch_size,
        )

    @property
    def truncated(self) -> bool:
        """Whether some tokens cannot be sampled: a `Rollout` then has its `support`."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass
class Rollout:
    """Prompts with their completions, padded on the right; row p * samples_per_prompt + k is sample k of prompt p."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) bool, True = prompt or completion
    response_mask: Tensor  # (B, T) bool, True = token of the completion, including the EOS that ended it
    texts: list[str]  # (B,) completions without special tokens
    ended: Tensor  # (B,) bool, True = ended by itself with EOS
    support: Support | None = None  # the ids that top-k and top-p kept for each sampled token; None = all
    scores: Tensor | None = None  # (B,) if the completions are scored or rated
    rounding: Tensor | None = None  # (B,) each score is exact up to this; None: exact
    logprobs: Tensor | None = None  # (B, T) the engine's, of the completions' tokens; else 0
    score_parts: dict[str, Tensor] = field(default_factory=dict)  # metric -> (B,): the terms of the scores
    steps_behind: int = 0  # updates of the policy since the weights that it was sampled from

    @property
    def batch(self) -> Batch:
        """The models' input; its `mask` is that of the completions."""
        return Batch(self.input_ids, self.attention_mask, self.response_mask, self.support)

    def rows(self, index: Tensor) -> Rollout:
        """The rows with the indices `index` (n,), padded to the longest of them."""
        batch = self.batch.rows(index)
        return Rollout(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            response_mask=batch.mask,
            texts=[self.texts[row] for row in index.tolist()],
            ended=self.ended[index],
            support=batch.support,
            scores=None if self.scores is None else self.scores[index],
            rounding=None if self.rounding is None else self.rounding[index],
            logprobs=None if self.logprobs is None else self.logprobs[index, : batch.input_ids.shape[1]],
            score_parts={name: part[index] for name, part in self.score_parts.items()},
            steps_behind=self.steps_behind,
        )

    def to(self, device: torch.device | str) -> Rollout:
        """A copy on `device`."""
        tensors: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor | Support)
        }
        parts = {name: part.to(device) for name, part in self.score_parts.items()}
        return replace(self, **tensors, score_parts=parts)

    @staticmethod
    def concatenate(rollouts: Sequence[Rollout]) -> Rollout:
        """The rows of all rollouts, in order, padded to one width. All or none must have an optional tensor."""
        width = max(one.input_ids.shape[1] for one in rollouts)

        def columns(name: str) -> Tensor:
            return torch.cat([pad(getattr(one, name), (0, width - one.input_ids.shape[1])) for one in rollouts])

        def optional(name: str) -> list[Any]:
            values = [value for one in rollouts if (value := getattr(one, name)) is not None]
            if values and len(values) != len(rollouts):
                raise ValueError(f"{len(values)} of {len(rollouts)} rollouts have {name}: either all or none must")
            return values

        supports, scores, rounding = optional("support"), optional("scores"), optional("rounding")
        return Rollout(
            input_ids=columns("input_ids"),
            attention_mask=columns("attention_mask"),
            response_mask=columns("response_mask"),
            texts=[text for one in rollouts for text in one.texts],
            ended=torch.cat([one.ended for one in rollouts]),
            support=Support.concatenate(supports) if supports else None,
            scores=torch.cat(scores) if scores else None,
            rounding=torch.cat(rounding) if rounding else None,
            logprobs=columns("logprobs") if optional("logprobs") else None,
            score_parts={
                name: torch.cat([one.score_parts[name] for one in rollouts]) for name in rollouts[0].score_parts
            },
            steps_behind=rollouts[0].steps_behind,
        )


class Completions(NamedTuple):
    """Completions as sampled, not yet joined to their prompts."""

    tokens: Tensor  # (B, n) int64
    lengths: Tensor  # (B,) int64, at least 1: number of real tokens
    ended: Tensor  # (B,) bool
    support: Support | None  # of the real tokens, row by row
    logprobs: Tensor | None = None  # (B, n) float32, the engine's


def assemble(tokenizer: Any, prompts: list[list[int]], completions: Completions, stop: Sequence[str] = ()) -> Rollout:
    """A rollout on the CPU: prompt + completion in each row, padded on the right; equally many for each prompt."""
    samples = len(completions.tokens) // len(prompts)
    sampled, counts = completions.tokens.cpu(), completions.lengths.cpu().clone()
    lengths = torch.tensor([len(p) for p in prompts]).repeat_interleave(samples)
    width = int((lengths + counts).max())
    input_ids = torch.full((len(sampled), width), tokenizer.pad_token_id, dtype=torch.int64)
    logprobs = None if completions.logprobs is None else torch.zeros(len(sampled), width)
    texts = []
    for row, (start, count) in enumerate(zip(lengths.tolist(), counts.tolist(), strict=True)):
        input_ids[row, :start] = torch.tensor(prompts[row // samples])
        input_ids[row, start : start + count] = sampled[row, :count]
        if logprobs is not None and completions.logprobs is not None:
            logprobs[row, start : start + count] = completions.logprobs[row, :count].cpu()
        texts.append(decode_completion(tokenizer, prompts[row // samples], sampled[row, :count].tolist(), stop))
    support = completions.support
    if support is not None:  # a copy, as inference-mode tensors cannot be used in autograd
        support = support.take(torch.arange(int(counts.sum()), device=support.offsets.device)).to("cpu")
    columns = torch.arange(width)
    attention = columns < (lengths + counts)[:, None]
    return Rollout(
        input_ids=input_ids,
        attention_mask=attention,
        response_mask=attention & (columns >= lengths[:, None]),
        texts=texts,
        ended=completions.ended.cpu().clone(),
        support=support,
        logprobs=logprobs,
    )


class Sampler(Protocol):
    """Samples `samples_per_prompt` completions of each prompt (token ids, not empty) from the policy, with `params`.

    `prompts` are one rank's share: numbers `first_prompt` and following of `total_prompts`. The random numbers of a row
    must depend on `seed` and the row's index among all ranks' rows, so that the number of processes changes no sample.
    With fsdp the model is sharded; within `rlhf_fast.models.fsdp.unsharded(model)` each rank has all weights.
    """

    def __call__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: list[list[int]],
        params: SamplingParams,
        *,
        seed: int | None = None,
        samples_per_prompt: int = 1,
        first_prompt: int = 0,
        total_prompts: int | None = None,
    ) -> Rollout: ...


def needs_all_ranks(sampler: Sampler, model: Any) -> bool:
    """Whether every rank must call the sampler, even one that has no prompts left: its samples are then discarded."""
    return is_sharded(model) or getattr(sampler, "needs_all_ranks", False)
