# SPDX-License-Identifier: Apache-2.0
"""AdamW whose arithmetic is float32 whatever the weights are.

A bfloat16 weight near 1 cannot take a step below 2^-8, so a learning rate of 1e-5 would change nothing. The optimizer
therefore keeps a float32 copy of every low-precision weight (the master), steps that, and rounds it into the model.
Gradients of micro-batches are added up in float32 too, as soon as a backward has made them, and so are those of ranks.
Of weights that are cut over the ranks each steps its own rows, and saves them whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from rlhf_fast.run.ranks import ranks
from rlhf_fast.run.shards import cut_like, gathered, is_cut, joined, own_part


class AdamW:
    """Fused `torch.optim.AdamW` on float32 masters; plain fused AdamW where the weights are float32 already.

    `groups` are parameters or dicts like those of torch.optim ({"params": ..., "lr": ...}).
    """

    def __init__(
        self,
        groups: Iterable[Parameter] | Sequence[dict[str, Any]],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        """Copy low-precision weights; parameters that need no gradient are left out."""
        listed = list(groups)
        dicts = [dict(g) for g in listed if isinstance(g, dict)] or [{"params": listed}]
        self.pairs: list[tuple[Parameter, Tensor]] = []  # (weight of the model, what the optimizer steps)
        for group in dicts:
            weights = [p for p in group["params"] if p.requires_grad]
            masters = [_master(p) for p in weights]
            self.pairs += zip(weights, masters, strict=True)
            group["params"] = masters
        for weight, master in self.pairs:
            if master is not weight:
                weight.register_post_accumulate_grad_hook(_into(master))
        self.optimizer = torch.optim.AdamW(dicts, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the torch optimizer, for learning-rate schedules."""
        return self.optimizer.param_groups

    @torch.no_grad()
    def step(self, max_norm: float | None = None) -> float:
        """Sum the gradients over the ranks, clip to `max_norm`, step, and clear; returns the norm before clipping.

        A norm that is not finite is returned and nothing is stepped: the caller stops the run.
        """
        masters = [master for _, master in self.pairs]
        if ranks().count > 1:
            for master in masters:
                if master.grad is None:  # this rank had no row in the minibatch
                    master.grad = torch.zeros_like(master)
            # FSDP has added up those of weights that are cut
            ranks().sum_(master.grad for weight, master in self.pairs if not is_cut(weight) and master.grad is not None)
        norm = self._norm()
        torch.nn.utils.clip_grads_with_norm_(masters, float("inf") if max_norm is None else max_norm, norm)
        if torch.isfinite(norm):
            self.optimizer.step()
            low = [(own_part(weight), master) for weight, master in self.pairs if master.dtype != weight.dtype]
            if low:
                torch._foreach_copy_([weight for weight, _ in low], [master for _, master in low])
        self.zero_grad()
        return float(norm)

    def _norm(self) -> Tensor:
        """Of the whole gradient: ranks have the same of some weights and their own part of others."""
        grads = [(is_cut(weight), master.grad) for weight, master in self.pairs if master.grad is not None]
        parts = [grad for cut, grad in grads if cut]
        norm = torch.nn.utils.get_total_norm([grad for cut, grad in grads if not cut])
        if not parts:
            return norm
        squares = torch.nn.utils.get_total_norm(parts).square()
        ranks().sum_([squares])
        return (squares + norm.to(squares.device).square()).sqrt()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for weight, master in self.pairs:
            weight.grad = None
            master.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Moments and float32 weights (masters, or the weights themselves), in a form that `save_state` can hold."""
        inner = self.optimizer.state_dict()
        return {
            "moments": {
                str(i): {name: gathered(joined(x, self.pairs[i][0])) if x.dim() else x for name, x in moments.items()}
                for i, moments in inner["state"].items()
            },
            "weights": {str(i): gathered(joined(master, weight)) for i, (weight, master) in enumerate(self.pairs)},
            "lrs": [group["lr"] for group in self.param_groups],
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave, the model's weights included."""
        groups = self.optimizer.state_dict()["param_groups"]
        for group, lr in zip(groups, state["lrs"], strict=True):
            group["lr"] = lr
        moments = {
            int(i): {name: own_part(cut_like(x, self.pairs[int(i)][0])) if x.dim() else x for name, x in kept.items()}
            for i, kept in state["moments"].items()
        }
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        for i, (weight, master) in enumerate(self.pairs):
            master.copy_(own_part(cut_like(state["weights"][str(i)], weight)))
            if master is not weight:
                own_part(weight).copy_(master)


def _master(weight: Parameter) -> Parameter:
    """What is stepped: the weight itself or this rank's part of it (the same memory) if in float32, else a copy."""
    if weight.dtype == torch.float32 and not is_cut(weight):
        return weight
    return Parameter(own_part(weight).detach().float())


def _into(master: Tensor) -> Callable[[Tensor], None]:
    """A hook that moves a weight's gradient into that of its float32 master."""

    def move(weight: Tensor) -> None:
        assert weight.grad is not None
        if master.grad is None:
            master.grad = own_part(weight.grad).float()
        else:
            master.grad.add_(own_part(weight.grad))
        weight.grad = None

    return move
