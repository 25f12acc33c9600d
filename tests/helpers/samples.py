# SPDX-License-Identifier: Apache-2.0
"""A few calls of every public op, for the promises that all of them make (see test_contract.py).

Each sample is a function of its differentiable inputs alone, everything else is closed over, so that one test can run
it eagerly, compiled, under autocast, twice, or through a second derivative without knowing which op it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import rlhf_fast as rf
from helpers.tools import randint, randn, random_mask
from rlhf_fast import _dispatch

ALL_OUTPUTS = ("logprobs", "entropy", "logsumexp", "sum_sq_probs", "argmax")


class Sample(NamedTuple):
    """`call(**inputs)` runs the op; `differentiable` says whether gradients flow to the inputs."""

    op: str
    inputs: dict[str, Tensor]
    call: Callable[..., Any]
    differentiable: bool = True


ROWS, WIDTH, HIDDEN = (3, 4), 37, 8


def build(name: str, dtype: torch.dtype, seed: int = 0, rows: tuple[int, int] = ROWS) -> Sample:
    """The sample called `name`, with random inputs of `dtype`."""
    return SAMPLES[name](torch.Generator().manual_seed(seed), dtype, rows)


def _logprobs(g: torch.Generator, dtype: torch.dtype, rows: tuple[int, int]) -> Sample:
    targets = randint(WIDTH, *rows, generator=g)
    inputs = {"logits": randn(*rows, WIDTH, generator=g, dtype=dtype, scale=2)}
    return Sample("token_logprobs", inputs, lambda logits: rf.token_logprobs(logits, targets))


def _logprobs_inplace(g: torch.Generator, dtype: torch.dtype, rows: tuple[int, int]) -> Sample:
    """`* 1` makes the logits an intermediate result, as a head's are, so that they may be overwritten."""
    targets = randint(WIDTH, *rows, generator=g)
    inputs = {"logits": randn(*rows, WIDTH, generator=g, dtype=dtype, scale=2)}
    return Sample(
        "token_logprobs", inputs, lambda logits: rf.token_logprobs(logits * 1, targets, inplace_backward=True)
    )


def _stats(g: torch.Generator, dtype: torch.dtype, rows: tuple[int, int]) -> Sample:
    targets = randint(31, *rows, 2, generator=g)
    mask = random_mask(*rows, generator=g)
    temperature = 0.5 + torch.rand(rows, generator=g)
    options: dict[str, Any] = {"mask": mask, "temperature": temperature, "softcap": 5.0, "logit_scale": 0.7}
    inputs = {"logits": randn(*rows, WIDTH, generator=g, dtype=dtype, scale=2)}
    return Sample(
        "token_stats",
        inputs,
        lambda logits: tuple(rf.token_stats(logits, targets, outputs=ALL_OUTPUTS, vocab_size=31, **options)),
    )


def _entropy(g: torch.Generator, dtype: torch.dtype, rows: tuple[int, int]) -> Sample:
    inputs = {"logits": randn(*rows, WIDTH, generator=g, dtype=dtype, scale=2)}
    return Sample("token_stats", inputs, lambda logits: rf.token_stats(logits, None, outputs=("entropy",)).entropy)


def _kl(kind: str) -> Callable[[torch.Generator, torch.dtype, tuple[int, int]], Sample]:
    def make(g: torch.Generator, dtype: torch.dtype, rows: tuple[int, int]) -> Sample:
        mask = random_mask(*rows, generator=g)
        inputs = {k: randn(*rows, WIDTH, generator=g, dtype=dtype) for k in ("logits", "ref_logits")}
        return Sample("token_kl", inputs, lambda **x: rf.token_kl(**x, kind=kind, mask=mask, temperature=0.8))

    return make


def _kl_and_grad(g: torch.Generator, dtype: torch.dtype, rows: tuple[int, int]) -> Sample:
    mask, grad_kl = random_mask(*rows, generator=g), randn(*rows, generator=g)
    inputs = {k: randn(*rows, WIDTH, generator=g, dtype=dtype) for k in ("logits", "ref_logits")}
    return Sample(
        "token_kl_and_grad",
        inputs,
        lambda **x: rf.token_kl_and_grad(**x, grad_kl=grad_kl, mask=mask, softcap=5.0)[0],  # the other is of x's dtype
        differentiable=False,
    )


def _approx_kl(g: torch.Generator, dtype: torch.dtype, rows: tuple[int, int]) -> Sample:
    mask = random_mask(*rows, generator=g)
    names = ("logprobs", "ref_logprobs", "importance_ratio")
    inputs = {k: randn(*rows, generator=g).abs().to(dtype) for k in names}
    return Sample("approx_kl", inputs, lambda **x: rf.approx_kl(**x, estimator="k3", clamp=2.0, mask=mask))


def _straight_through(g: torch.Generator, dtype: torch.dtype, rows: tuple[int, int]) -> Sample:
    inputs = {k: randn(*rows, generator=g).to(dtype) for k in ("logprobs", "ref_logprobs")}
    return Sample("approx_kl", inputs, lambda **x: rf.approx_kl(**x, gradient="straight_through"))


def _gae(g: torch.Generator, dtype: torch.dtype, rows: tuple[int, int]) -> Sample:
    mask, dones, truncated = (random_mask(*rows, generator=g) for _ in range(3))
    lam = torch.rand(rows[0], generator=g)
    inputs = {k: randn(*rows, generator=g, dtype=dtype) for k in ("rewards", "values", "bootstrap_values")}
    return Sample(
        "gae",
        inputs,
        lambda **x: rf.gae(**x, mask=mask, dones=dones, truncated=truncated, lam=lam, value_lam=1.0),
        differentiable=False,
    )


def _gae_row_flags(g: torch.Generator, dtype: torch.dtype, rows: tuple[int, int]) -> Sample:
    mask, truncated = random_mask(*rows, generator=g), random_mask(rows[0], generator=g)
    inputs = {k: randn(*rows, generator=g, dtype=dtype) for k in ("rewards", "values")}
    inputs["bootstrap_values"] = randn(rows[0], generator=g, dtype=dtype)
    return Sample("gae", inputs, lambda **x: rf.gae(**x, mask=mask, truncated=truncated), differentiable=False)


def _gae_packed(g: torch.Generator, dtype: torch.dtype, rows: tuple[int, int]) -> Sample:
    total = rows[0] * rows[1]
    cu_seqlens = torch.tensor([0, 1, total // 2, total // 2, total], dtype=torch.int32)
    inputs = {k: randn(total, generator=g, dtype=dtype) for k in ("rewards", "values")}
    return Sample("gae", inputs, lambda **x: rf.gae(**x, cu_seqlens=cu_seqlens, mask_mode="zero"), differentiable=False)


def _vtrace(g: torch.Generator, dtype: torch.dtype, rows: tuple[int, int]) -> Sample:
    mask, dones, truncated = (random_mask(*rows, generator=g) for _ in range(3))
    inputs = {
        k: randn(*rows, generator=g, dtype=dtype) for k in ("rewards", "values", "log_ratios", "bootstrap_values")
    }
    return Sample(
        "vtrace", inputs, lambda **x: rf.vtrace(**x, mask=mask, dones=dones, truncated=truncated), differentiable=False
    )


def _retrace(mode: str) -> Callable[[torch.Generator, torch.dtype, tuple[int, int]], Sample]:
    """carry of rows, zero of packed sequences."""

    def make(g: torch.Generator, dtype: torch.dtype, rows: tuple[int, int]) -> Sample:
        total = rows[0] * rows[1]
        shape = rows if mode == "carry" else (total,)
        mask, dones, truncated = (random_mask(*shape, generator=g) for _ in range(3))
        names = ("rewards", "q_values", "values", "log_ratios", "bootstrap_values")
        inputs = {k: randn(*shape, generator=g, dtype=dtype) for k in names}
        options: dict[str, Any] = {"mask": mask, "dones": dones, "truncated": truncated, "lam": 0.9, "mask_mode": mode}
        if mode == "zero":
            options["cu_seqlens"] = torch.tensor([0, 1, total // 2, total // 2, total], dtype=torch.int32)
        return Sample("retrace", inputs, lambda **x: rf.retrace(**x, **options), differentiable=False)

    return make


def _ppo_advantages(g: torch.Generator, dtype: torch.dtype, rows: tuple[int, int]) -> Sample:
    mask = random_mask(*rows, generator=g)
    inputs = {k: randn(*rows, generator=g, dtype=dtype) for k in ("logprobs", "ref_logprobs", "values")}
    inputs["scores"] = randn(rows[0], generator=g, dtype=dtype)
    return Sample(
        "ppo_advantages",
        inputs,
        lambda **x: tuple(rf.ppo_advantages(**x, mask=mask, kl_coef=0.1)),
        differentiable=False,
    )


def _masked_whiten(g: torch.Generator, dtype: torch.dtype, rows: tuple[int, int]) -> Sample:
    mask = random_mask(*rows, generator=g)
    inputs = {"values": randn(*rows, generator=g, dtype=dtype)}
    return Sample("masked_whiten", inputs, lambda values: rf.masked_whiten(values, mask), differentiable=False)


def _linear(masked: bool) -> Callable[[torch.Generator, torch.dtype, tuple[int, int]], Sample]:
    def make(g: torch.Generator, dtype: torch.dtype, rows: tuple[int, int]) -> Sample:
        targets = randint(WIDTH, *rows, generator=g)
        mask = random_mask(*rows, generator=g) if masked else None
        inputs = {
            "hidden": randn(*rows, HIDDEN, generator=g, dtype=dtype),
            "weight": randn(WIDTH, HIDDEN, generator=g, dtype=dtype),
            "bias": randn(WIDTH, generator=g, dtype=dtype),
        }

        def stats(**x: Tensor) -> tuple[Tensor | None, Tensor | None]:
            both = rf.linear_token_stats(**x, targets=targets, mask=mask, temperature=0.7)
            return both.logprobs, both.entropy

        def logprobs(**x: Tensor) -> Tensor:
            return rf.linear_token_logprobs(**x, targets=targets)

        return Sample(
            "linear_token_stats" if masked else "linear_token_logprobs", inputs, stats if masked else logprobs
        )

    return make


def _head(g: torch.Generator, dtype: torch.dtype, rows: tuple[int, int], side: str = "") -> dict[str, Tensor]:
    return {
        f"{side}hidden": randn(*rows, HIDDEN, generator=g, dtype=dtype),
        f"{side}weight": randn(WIDTH, HIDDEN, generator=g, dtype=dtype, scale=0.5),
    }


def _linear_lora(g: torch.Generator, dtype: torch.dtype, rows: tuple[int, int]) -> Sample:
    targets = randint(WIDTH, *rows, 2, generator=g)
    factors = {"a": randn(3, HIDDEN, generator=g, dtype=dtype), "b": randn(WIDTH, 3, generator=g, dtype=dtype)}

    def call(a: Tensor, b: Tensor, **x: Tensor) -> Tensor:
        return rf.linear_token_logprobs(**x, targets=targets, lora=(a, b, 0.5), softcap=5.0)

    return Sample("linear_token_logprobs", {**_head(g, dtype, rows), **factors}, call)


def _linear_kl(g: torch.Generator, dtype: torch.dtype, rows: tuple[int, int]) -> Sample:
    mask = random_mask(*rows, generator=g)
    inputs = {**_head(g, dtype, rows), **_head(g, dtype, rows, "ref_")}
    return Sample("linear_token_kl", inputs, lambda **x: rf.linear_token_kl(**x, mask=mask, temperature=0.8))


def _policy_loss(g: torch.Generator, dtype: torch.dtype, rows: tuple[int, int]) -> Sample:
    targets, mask = randint(WIDTH, *rows, generator=g), random_mask(*rows, generator=g)
    old, advantages, ref = (randn(*rows, generator=g) for _ in range(3))
    sampled = {"targets": targets, "old_logprobs": old - 3, "advantages": advantages, "mask": mask}
    options: dict[str, Any] = {"ref_logprobs": ref - 3, "kl_coef": 0.1, "entropy_coef": 0.01}

    def call(**x: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(rf.linear_policy_loss(**x, **sampled, **options))

    return Sample("linear_policy_loss", _head(g, dtype, rows), call)


def _sampled(g: torch.Generator, dtype: torch.dtype, rows: tuple[int, int]) -> Sample:
    targets, count = randint(WIDTH, *rows, generator=g), rows[0] * rows[1]
    ids = ((targets.view(-1, 1) + torch.tensor([5, 0, 11])) % WIDTH).flatten()
    offsets = torch.arange(count + 1) * 3
    return Sample(
        "linear_sampled_logprobs",
        _head(g, dtype, rows),
        lambda **x: rf.linear_sampled_logprobs(**x, targets=targets, support_ids=ids, support_offsets=offsets),
    )


SAMPLES: dict[str, Callable[[torch.Generator, torch.dtype, tuple[int, int]], Sample]] = {
    "token_logprobs": _logprobs,
    "token_logprobs_inplace": _logprobs_inplace,
    "token_stats": _stats,
    "token_stats_entropy": _entropy,
    "token_kl_reverse": _kl("reverse"),
    "token_kl_forward": _kl("forward"),
    "token_kl_jsd": _kl("jsd"),
    "token_kl_tv": _kl("tv"),
    "token_kl_and_grad": _kl_and_grad,
    "approx_kl": _approx_kl,
    "approx_kl_straight_through": _straight_through,
    "gae": _gae,
    "gae_row_flags": _gae_row_flags,
    "gae_packed": _gae_packed,
    "vtrace": _vtrace,
    "retrace": _retrace("carry"),
    "retrace_packed_zero": _retrace("zero"),
    "ppo_advantages": _ppo_advantages,
    "masked_whiten": _masked_whiten,
    "linear_token_logprobs": _linear(masked=False),
    "linear_token_stats": _linear(masked=True),
    "linear_token_logprobs_lora": _linear_lora,
    "linear_token_kl": _linear_kl,
    "linear_policy_loss": _policy_loss,
    "linear_sampled_logprobs": _sampled,
}


def with_kernels() -> list[str]:
    """The samples whose op has kernels, and not a reference alone."""
    return [name for name in SAMPLES if _dispatch.KERNEL_OF[build(name, torch.float32).op]]
