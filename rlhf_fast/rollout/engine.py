# SPDX-License-Identifier: Apache-2.0
"""Sampling by an inference engine: it loads the policy's weights, samples, and returns log-probs and supports."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.errors import UserError
from rlhf_fast.models.batches import Support
from rlhf_fast.models.fsdp import unsharded

from .background import started
from .builtin import end_ids
from .engine_weights import policy_weights
from .rollout import Completions, Rollout, SamplingParams, assemble


class EngineError(UserError):
    """An engine is gone, hangs or gives a wrong answer; the message names it and what to do."""


class Completion(NamedTuple):
    """One sampled completion."""

    tokens: list[int]  # including the token that ended it
    logprobs: list[float]  # of the tokens, under the distribution they were drawn from
    kept: list[list[int]] | None  # the ids that could be drawn for each token; None = all
    ended: bool  # by an end token or stop string, not by the limit
    weight_version: int  # the `load` whose weights it was sampled with


@dataclass(frozen=True)
class Request:
    """A request to an engine: `samples` completions of each prompt, sample k with seed + k."""

    prompts: list[list[int]]
    seeds: Sequence[int]
    samples: int
    params: SamplingParams
    end_ids: Sequence[int]


class Engine(Protocol):
    """An inference engine, in this process or a server. Every call raises EngineError if it fails."""

    elsewhere: bool  # works while this process does something else
    of_each_rank: bool  # each rank has its own, which is given the weights there; else the first rank's load serves all

    def check(self, config: Any) -> None:
        """Refuse a policy of this transformers config if the engine has another architecture."""

    def load(self, weights: dict[str, Tensor], version: int) -> None:
        """Sample with these weights from now on, and drop all caches of the old ones."""

    def complete(self, request: Request) -> list[list[Completion]]:
        """The completions of each prompt."""

    def close(self) -> None:
        """Release the engine."""


class Timed(NamedTuple):
    """The completions of each prompt, and when an engine began and ended to sample them (`time.perf_counter`)."""

    groups: list[list[Completion]]
    began: float
    ended: float


class Pending:
    """Completions that an engine is sampling; `EngineSampler.start` returns it."""

    def __init__(self, work: Future[Timed], tokenizer: Any, request: Request, version: int) -> None:
        """`work` is done by another thread; `version` is that of the weights it must be done with."""
        self._work, self._tokenizer, self._request, self._version = work, tokenizer, request, version

    def wait(self) -> None:
        """Wait until the engine has ended or failed."""
        wait([self._work])

    def result(self) -> tuple[Rollout, Timed]:
        """The samples, on the CPU, and when they were sampled. All ranks must call this.

        Raises:
            EngineError: the engine failed on a rank.
        """
        timed = ranks().all_or_none(self._work.result)
        return _rollout(self._tokenizer, self._request, timed.groups, self._version), timed


class EngineSampler:
    """A `Sampler` that uses an engine, and sends it the policy's weights before sampling if they have changed.

    `Rollout.logprobs` are the engine's. They differ by rounding from the trainer's, which the losses use.
    """

    needs_all_ranks = True  # at every call: the first rank sends the gathered weights

    def __init__(self, engine: Engine) -> None:
        """Wrap `engine`; weights are sent at the first call."""
        self.engine = engine
        self.version = 0  # of the weights that the engine has; 0: none of ours
        self._sent: list[int] = []
        self._pending: Pending | None = None  # the last one that was started

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
    ) -> Rollout:
        """Sample; see `Sampler`. The same seed gives the same samples whatever the number of ranks and servers."""
        self.sync(model)
        more: dict[str, Any] = {"seed": seed, "samples_per_prompt": samples_per_prompt, "first_prompt": first_prompt}
        request = _request(model, tokenizer, prompts, params, **more)
        groups = ranks().all_or_none(lambda: self.engine.complete(request))
        return _rollout(tokenizer, request, groups, self.version).to(model.device)

    def start(
        self, model: Any, tokenizer: Any, prompts: list[list[int]], params: SamplingParams, **more: Any
    ) -> Pending:
        """Begin to sample from the weights that the model has now, while it goes on to learn; arguments as above."""
        self.sync(model)
        request = _request(model, tokenizer, prompts, params, **more)
        self._pending = Pending(started(self._timed, request), tokenizer, request, self.version)
        return self._pending

    def _timed(self, request: Request) -> Timed:
        began = time.perf_counter()
        return Timed(self.engine.complete(request), began, time.perf_counter())

    def sync(self, model: Any) -> None:
        """Send the weights if they differ from the engine's. All ranks must call this; the first one sends."""
        if self._pending is not None:
            self._pending.wait()  # each rank for its own requests, before the first rank sends
        now = _digest(model)
        if not ranks().any(now != self._sent):  # a sharded weight may have changed on another rank only
            return
        if not self.version:  # begins at random: a server may have had weights of another run, or of this one before
            self.version = ranks().every(secrets.randbits(48))[0]
        self.version += 1
        with unsharded(model):
            (ranks().all_or_none if self.engine.of_each_rank else ranks().once)(lambda: self._load(model))
        self._sent = now

    def _load(self, model: Any) -> None:
        self.engine.check(model.config)
        self.engine.load(policy_weights(model), self.version)


def _request(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    params: SamplingParams,
    *,
    seed: int | None = None,
    samples_per_prompt: int = 1,
    first_prompt: int = 0,
    total_prompts: int | None = None,  # of all ranks; seeds do not depend on it
) -> Request:
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)
    # An engine draws sample k of a prompt with the prompt's seed + k, so seeds are samples_per_prompt apart.
    base = int(torch.randint(2**48, (), generator=generator))
    seeds = [base + (first_prompt + i) * samples_per_prompt for i in range(len(prompts))]
    return Request(prompts, seeds, samples_per_prompt, params, end_ids(model, tokenizer))


def _rollout(tokenizer: Any, request: Request, groups: list[list[Completion]], version: int) -> Rollout:
    """The rollout on the CPU; EngineError if the completions are of other weights than `version`."""
    completions = [one for group in groups for one in group]
    stale = {one.weight_version for one in completions} - {version}
    if stale:
        raise EngineError(
            f"the engine sampled with weights {sorted(stale)}, wanted {version}: does another run use it? "
            "Give each run an engine of its own"
        )
    return assemble(tokenizer, request.prompts, _as_tensors(completions), request.params.stop)


@torch.no_grad()
def _digest(model: Any) -> list[int]:
    """A hash of each weight (of this rank's shard if it is sharded). Torch's version counters miss fused optimizers."""
    parts = [getattr(parameter, "_local_tensor", parameter) for parameter in model.parameters()]
    return [int(torch.hash_tensor(part).item()) if part.numel() else 0 for part in parts]


def _as_tensors(completions: Sequence[Completion]) -> Completions:
    lengths = torch.tensor([len(one.tokens) for one in completions])
    width = int(lengths.max())
    tokens = torch.full((len(completions), width), -1)
    logprobs = torch.zeros(len(completions), width)
    for row, one in enumerate(completions):
        tokens[row, : len(one.tokens)] = torch.tensor(one.tokens)
        logprobs[row, : len(one.tokens)] = torch.tensor(one.logprobs)
    support = None
    if completions[0].kept is not None:
        kept = [ids for one in completions for ids in one.kept or []]
        support = Support.of_counts(
            torch.tensor([i for ids in kept for i in ids]), torch.tensor([len(ids) for ids in kept])
        )
    ended = torch.tensor([one.ended for one in completions])
    return Completions(tokens=tokens, lengths=lengths, ended=ended, support=support, logprobs=logprobs)
