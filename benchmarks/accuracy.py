# SPDX-License-Identifier: Apache-2.0
"""Largest error against float64 on the same inputs: ours on every backend, eager PyTorch, and the peers.

Inputs are ordinary logits, logits with forbidden tokens (-inf), and logits that share an offset of 1e4. "NaN" or "inf"
stands where an answer is not finite though the true one is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import peers
import torch
from common import eager_gae, eager_kl, eager_logprobs, eager_logprobs_entropy, on
from torch import Tensor

import rlhf_fast as rf

ROWS, WIDTH = 64, 32000
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Functions = dict[str, Callable[..., Any]]


def logits(kind: str, generator: torch.Generator) -> Tensor:
    x = torch.empty(ROWS, WIDTH).normal_(0, 3, generator=generator)
    if kind == "with -inf":
        x[torch.rand(ROWS, WIDTH, generator=generator) < 0.3] = -torch.inf
        x[:, 0] = 0.0  # the target: allowed everywhere
    return x + 1e4 if kind == "offset 1e4" else x


def kl_inputs(dtype: torch.dtype, kind: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    policy = logits(kind, generator)
    ref = policy + torch.empty(ROWS, WIDTH).normal_(0, 0.3, generator=generator)
    return policy.to(dtype), ref.to(dtype)


def exact_kl(p: Tensor, q: Tensor) -> Tensor:
    logp, logq = torch.log_softmax(p, -1), torch.log_softmax(q, -1)
    return torch.where(logp == -torch.inf, 0.0, logp.exp() * (logp - logq)).sum(-1)


def exact_entropy(x: Tensor) -> Tensor:
    logp = torch.log_softmax(x, -1)
    return -torch.where(logp == -torch.inf, 0.0, logp.exp() * logp).sum(-1)


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.detach().clone().requires_grad_()
    function(leaf).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def ours(function: Callable[..., Any]) -> Functions:
    return {"native": on_backend("native", function), "torch": on_backend("torch", function)}


def on_backend(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: on(name, lambda: function(*args))()


def in_dtype(x: Tensor, targets: Tensor) -> Tensor:
    """What many loops do: log_softmax in the logits' own dtype."""
    return torch.log_softmax(x, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def softmax_rows(dtype: torch.dtype, kind: str, g: torch.Generator) -> Iterator[tuple[str, Tensor, tuple, Functions]]:
    x, targets = logits(kind, g).to(dtype), torch.zeros(ROWS, dtype=torch.int64)
    wide = x.double()
    functions = {**ours(rf.token_logprobs), "eager": eager_logprobs, "eager, own dtype": in_dtype, **peers.logprobs()}
    yield "token_logprobs", torch.log_softmax(wide, -1)[:, 0], (x, targets), functions
    second = {n: lambda *a, f=f: f(*a)[1] for n, f in peers.logprobs_entropy().items()}
    functions = {
        **ours(lambda y, t: rf.token_stats(y, t).entropy),
        "eager": lambda y, t: eager_logprobs_entropy(y, t)[1],
        **second,
    }
    yield "entropy", exact_entropy(wide), (x, targets), functions
    grads = {
        name: lambda y, t, f=f: gradient(lambda z: f(z, t), y)
        for name, f in {**ours(rf.token_logprobs), "eager": eager_logprobs, **peers.logprobs()}.items()
    }
    truth = gradient(lambda z: torch.log_softmax(z, -1)[:, 0], wide)
    yield "token_logprobs, gradient", truth, (x, targets), grads
    p, q = kl_inputs(dtype, kind, g)
    yield "token_kl reverse", exact_kl(p.double(), q.double()), (p, q), {**ours(rf.token_kl), "eager": eager_kl}


def token_rows(dtype: torch.dtype, g: torch.Generator) -> Iterator[tuple[str, Tensor, tuple, Functions]]:
    rewards, values = (torch.randn(16, 1024, generator=g).to(dtype) for _ in range(2))
    mask = torch.rand(16, 1024, generator=g) < 0.9
    wide = rewards.double(), values.double()
    with_mask = lambda r, v, m: rf.gae(r, v, mask=m)[0]  # noqa: E731
    truth = torch.where(mask, eager_gae(*wide, mask)[0], 0.0)
    eager = lambda r, v, m: torch.where(m, eager_gae(r, v, m)[0], 0)  # noqa: E731
    yield "gae (masks carried)", truth, (rewards, values, mask), {**ours(with_mask), "eager": eager}
    every = torch.ones_like(mask)
    functions = {**ours(with_mask), "eager": lambda *a: eager_gae(*a)[0]}
    for name, f in peers.gae().items():
        functions[name] = lambda r, v, m, f=f: f(r, v, m)[0]
    yield "gae (no mask)", eager_gae(*wide, every)[0], (rewards, values, every), functions
    old, new = (-3 * torch.rand(16, 1024, generator=g).to(dtype) for _ in range(2))
    d = old.double() - new.double()
    k3 = lambda x, y: rf.approx_kl(x, y, estimator="k3")  # noqa: E731
    plain = lambda x, y: (y - x).exp() - 1 - (y - x)  # noqa: E731
    yield "approx_kl k3", (-d).exp() - 1 + d, (old, new), {**ours(k3), "eager": plain}


def error(actual: Tensor, truth: Tensor) -> float | str:
    """Largest absolute error, or what stands where a finite answer should."""
    actual = actual.detach().double()
    wrong = actual[truth.isfinite() & ~actual.isfinite()]
    if wrong.numel():
        return "NaN" if bool(wrong.isnan().any()) else "inf"
    finite = truth.isfinite()
    return (actual[finite] - truth[finite]).abs().max().item()


def measure() -> Iterator[dict[str, Any]]:
    """One row per op, dtype and kind of input: the error of every provider."""
    for dtype_name, dtype in DTYPES.items():
        generator = torch.Generator().manual_seed(0)
        rows = [(k, *row) for k in ("ordinary",) for row in token_rows(dtype, generator)]
        for kind in ("ordinary", "with -inf", "offset 1e4"):
            rows += [(kind, *row) for row in softmax_rows(dtype, kind, generator)]
        for kind, op, truth, args, functions in rows:
            errors = {name: _error_of(f, args, truth) for name, f in functions.items()}
            yield {"op": op, "dtype": dtype_name, "inputs": kind, "errors": errors}


def _error_of(function: Callable[..., Any], args: tuple, truth: Tensor) -> float | str:
    try:
        return error(function(*args), truth)
    except Exception as failure:  # a peer that refuses the inputs: the table says so
        return type(failure).__name__
