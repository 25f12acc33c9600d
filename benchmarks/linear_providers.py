# SPDX-License-Identifier: Apache-2.0
"""Who computes log-probs and policy losses from hidden states: ours, eager PyTorch, and the peers that are importable.

Baselines get the real rows alone, dense: the masked ones are dropped before the matmul for everybody.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from common import Call, backward, eager_linear_logprobs, on
from torch import Tensor

import rlhf_fast as rf


class Shape(NamedTuple):
    rows: int = 1024
    hidden: int = 576
    vocabulary: int = 49152


class Problem:
    """Random hidden states, head and targets, of which a share of the rows is real."""

    def __init__(self, shape: Shape, dtype: torch.dtype, share: float, frozen_head: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.mask = torch.arange(shape.rows) < share * shape.rows
        self.hidden = torch.randn(shape.rows, shape.hidden, generator=generator).to(dtype).requires_grad_()
        weight = torch.empty(shape.vocabulary, shape.hidden).normal_(generator=generator).mul_(0.05)
        self.weight = weight.to(dtype).requires_grad_(not frozen_head)
        self.targets = torch.randint(shape.vocabulary, (shape.rows,), generator=generator)
        self.real_hidden = self.hidden.detach()[self.mask].clone().requires_grad_()
        self.real_targets = self.targets[self.mask]
        self.old = -10.8 + 0.1 * torch.randn(shape.rows, generator=generator)
        self.advantages = torch.randn(shape.rows, generator=generator)

    @property
    def bytes(self) -> int:
        return self.weight.nbytes + self.real_hidden.nbytes

    def call(self, function: Callable[[], Tensor], direction: str) -> Call:
        if direction == "forward":
            return torch.no_grad()(function)
        leaves = [self.hidden, self.real_hidden, self.weight]
        return backward(function, [x for x in leaves if x.requires_grad])


def logprob_providers(p: Problem, direction: str, memory_budget: int | None = None) -> dict[str, Call]:
    """Per-token log-probs; `direction` is "forward" or "forward + backward"."""
    compact = (p.real_hidden, p.weight, p.real_targets)
    ours = partial(rf.linear_token_logprobs, p.hidden, p.weight, p.targets, mask=p.mask, memory_budget=memory_budget)
    functions: dict[str, Callable[[], Tensor]] = {
        "native": ours,
        "torch": ours,
        "eager": partial(eager_linear_logprobs, *compact),
        "bare matmul": partial(torch.nn.functional.linear, p.real_hidden, p.weight),
    }
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        functions["F.linear_cross_entropy"] = partial(
            torch.nn.functional.linear_cross_entropy, *compact, reduction="none"
        )
    functions.update(_trl(p))
    functions.update(_cce(p))
    calls = {name: p.call(function, direction) for name, function in functions.items()}
    return {name: on(name, call) if name in ("native", "torch") else call for name, call in calls.items()}


def _trl(p: Problem) -> dict[str, Callable[[], Tensor]]:
    """TRL's head for GRPO, with the chunk size that its trainers use."""
    if importlib.util.find_spec("trl") is None:
        return {}
    try:
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk
        from trl.trainer.utils import _ChunkedLogProbFunction as function
    except ImportError:  # another version keeps it elsewhere
        return {}
    arguments = (p.real_hidden, p.weight, None, p.real_targets, 1.0, chunk, None, 1.0, ())
    return {"TRL": lambda: function.apply(*arguments)[0]}


def _cce(p: Problem) -> dict[str, Callable[[], Tensor]]:
    """Apple's cut cross-entropy; on a CPU its torch_compile path is the only one."""
    if importlib.util.find_spec("cut_cross_entropy") is None:
        return {}
    from cut_cross_entropy import linear_cross_entropy

    impl = "torch_compile" if p.weight.device.type == "cpu" else "cce"
    return {"CCE": lambda: linear_cross_entropy(p.real_hidden, p.weight, p.real_targets, reduction="none", impl=impl)}


def eager_policy_loss(hidden: Tensor, weight: Tensor, targets: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """PPO's clipped loss, mean over tokens, through the whole logits."""
    ratio = (eager_linear_logprobs(hidden, weight, targets) - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


def policy_providers(p: Problem) -> dict[str, Call]:
    """PPO's loss and its gradients: in one op, as a loss on our log-probs, and eagerly."""
    ours = lambda: (
        rf.linear_policy_loss(  # noqa: E731
            p.hidden, p.weight, p.targets, p.old, p.advantages, mask=p.mask
        ).loss
    )

    def two_phase() -> Tensor:
        ratio = (rf.linear_token_logprobs(p.hidden, p.weight, p.targets, mask=p.mask) - p.old).exp()
        gain = torch.minimum(ratio * p.advantages, ratio.clamp(0.8, 1.2) * p.advantages)
        return -gain[p.mask].mean()

    real = (p.real_hidden, p.weight, p.real_targets, p.old[p.mask], p.advantages[p.mask])
    return {
        "native": on("native", p.call(ours, "forward + backward")),
        "loss on linear_token_logprobs": on("native", p.call(two_phase, "forward + backward")),
        "eager": p.call(partial(eager_policy_loss, *real), "forward + backward"),
    }


def sampled_providers(p: Problem, kept: int) -> dict[str, Call]:
    """Log-probs renormalised over `kept` ids a row, forward: gathering, and eagerly through the whole logits."""
    rows = p.targets.numel()
    ids = (p.targets.unsqueeze(-1) + 97 * torch.arange(kept)) % p.weight.shape[0]
    offsets = torch.arange(rows + 1) * kept

    def eager() -> Tensor:
        logits = torch.nn.functional.linear(p.hidden, p.weight).float().gather(-1, ids)
        return logits.log_softmax(-1)[:, 0]

    ours = partial(rf.linear_sampled_logprobs, p.hidden, p.weight, p.targets, ids.flatten(), offsets)
    return {"native": on("native", p.call(ours, "forward")), "eager": p.call(eager, "forward")}
