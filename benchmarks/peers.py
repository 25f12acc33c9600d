# SPDX-License-Identifier: Apache-2.0
"""What other projects do: called where they can be imported (the extra `[peers]`), else the algorithm written again.

verl and OpenRLHF import vLLM, Ray or a GPU's libraries on the way to their GAE, so their loops stand here in our own
words, step for step the same operations. Liger's kernels are Triton and need a GPU: see benchmarks/gpu.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import eager_gae
from torch import Tensor

WHY_NOT: dict[str, str] = {}  # peer -> why it does not run here


def _imported(name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # whatever a peer raises on import: it does not run here, and the tables say so
        WHY_NOT[name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        return None


def _trl() -> Any:
    from trl.trainer import utils

    return utils


def _torchrl() -> Any:
    from torchrl.objectives.value import functional

    return functional


def logprobs() -> dict[str, Callable[..., Any]]:
    """(logits (N, V), targets (N,)) -> (N,)."""
    trl = _imported("TRL", _trl)
    return {} if trl is None else {"TRL": trl.selective_log_softmax}


def logprobs_entropy() -> dict[str, Callable[..., Any]]:
    trl = _imported("TRL", _trl)
    if trl is None:
        return {}
    return {
        "TRL": lambda logits, targets: (trl.selective_log_softmax(logits, targets), trl.entropy_from_logits(logits))
    }


def openrlhf_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """OpenRLHF's (and TRL's) loop: masked tokens count, with reward and value 0."""
    real = mask.to(rewards.dtype)
    rewards, values = rewards * real, values * real
    length, running, backwards = rewards.shape[1], 0.0, []
    for t in range(length - 1, -1, -1):
        following = values[:, t + 1] if t + 1 < length else 0.0
        running = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * running
        backwards.append(running)
    advantages = torch.stack(backwards[::-1], dim=1)
    return advantages, advantages + values


def gae() -> dict[str, Callable[..., Any]]:
    """(rewards, values, mask (B, T)) -> (advantages, returns). torchrl has no masks inside rows: it gets none."""
    found: dict[str, Callable[..., Any]] = {"verl's loop": eager_gae, "OpenRLHF's loop": openrlhf_gae}
    torchrl = _imported("torchrl", _torchrl)
    if torchrl is not None:

        def vectorised(rewards: Tensor, values: Tensor, mask: Tensor) -> Any:
            following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
            ends = torch.zeros_like(mask)
            ends[:, -1] = True
            columns = (x.unsqueeze(-1) for x in (values, following, rewards, ends, ends))
            made = torchrl.vec_generalized_advantage_estimate(1.0, 0.95, *columns)
            return tuple(x.squeeze(-1) for x in made)

        found["torchrl"] = vectorised
    return found
