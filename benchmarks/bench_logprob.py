# SPDX-License-Identifier: Apache-2.0
"""token_logprobs and token_stats. Bytes: the logits once forward; once more read and once written backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import peers
import torch
from common import PROVIDERS, Call, Case, backward, compiled, eager_logprobs, eager_logprobs_entropy, on, versus
from torch import Tensor

import rlhf_fast as rf

BYTES = {torch.float32: 4, torch.bfloat16: 2}


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.empty(shape).normal_(0, 3, generator=generator).to(dtype)
    return logits, torch.randint(shape[-1], shape[:-1], generator=generator)


def forward(*shape: int, dtype: torch.dtype = torch.float32) -> Case:
    moved = torch.Size(shape).numel() * BYTES[dtype]
    name = f"token_logprobs forward {' x '.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"

    def build() -> dict[str, Call]:
        return versus(rf.token_logprobs, eager_logprobs, *inputs(shape, dtype), peers=peers.logprobs())

    return Case(name, (*PROVIDERS, "TRL"), build, moved)


def stats(rows: int, width: int) -> Case:
    def build() -> dict[str, Call]:
        logits, targets = inputs((rows, width))
        calls = versus(rf.token_stats, eager_logprobs_entropy, logits, targets, peers=peers.logprobs_entropy())
        calls["native, log-probs alone"] = on("native", partial(rf.token_logprobs, logits, targets))
        return calls

    name = f"token_stats (logprobs, entropy) forward {rows} x {width} float32"
    return Case(name, (*PROVIDERS, "TRL", "native, log-probs alone"), build, rows * width * 4)


def half_masked(rows: int, width: int) -> Case:
    """Eager gathers the real rows first: the honest baseline, which must copy them. Ours skips the others."""

    def build() -> dict[str, Call]:
        logits, targets = inputs((rows, width))
        mask = torch.arange(rows) % 2 == 0
        compact = lambda: eager_logprobs(logits[mask], targets[mask])  # noqa: E731
        return {"native": on("native", partial(rf.token_logprobs, logits, targets, mask=mask)), "eager": compact}

    name = f"token_logprobs forward {rows} x {width} float32, half of the rows real"
    return Case(name, ("native", "eager"), build, rows * width * 2)


def forward_backward(rows: int, width: int) -> Case:
    """The logits are an intermediate result, as a head's are; ours may overwrite them, eager has no such option.

    The in-place gradient leaves garbage in `logits` for the next round, of the same size: the time does not change.
    """

    def build() -> dict[str, Call]:
        logits, targets = inputs((rows, width))
        logits.requires_grad_()
        functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "eager": eager_logprobs,
            "compile": compiled(eager_logprobs),
            **peers.logprobs(),
            "native": rf.token_logprobs,
            "native, in place": partial(rf.token_logprobs, inplace_backward=True),
        }
        calls = {name: backward(partial(f, logits, targets), [logits]) for name, f in functions.items()}
        return {name: on("native", call) if name.startswith("native") else call for name, call in calls.items()}

    name = f"token_logprobs forward + backward {rows} x {width} float32"
    return Case(name, ("native", "eager", "compile", "TRL", "native, in place"), build, 3 * rows * width * 4)


CASES = [
    forward(1024, 49152),
    forward(1024, 49152, dtype=torch.bfloat16),
    half_masked(1024, 49152),
    forward(256, 151936, dtype=torch.bfloat16),
    forward(8, 32, 1000),
    forward(16, 128),
    stats(512, 49152),
    forward_backward(512, 49152),
]


def test_logprob(compare: Callable[[Case, str], None], case: Case, provider: str) -> None:
    compare(case, provider)
