# SPDX-License-Identifier: Apache-2.0
"""AdamW in float32 arithmetic, whatever the dtype of the weights.

A bfloat16 weight near 1 cannot change by less than 2^-8, so a learning rate of 1e-5 would have no effect. The optimizer
therefore has a float32 copy of every low-precision weight (the master), steps that, and rounds it into the model.
Gradients of micro-batches and of ranks are summed in float32 as well, after each backward. If there is only one
backward, its gradient stays in low precision, in half the memory, and is converted a few weights at a time in `step`.
Of sharded weights each rank steps and saves its own rows. What steps the float32 weights is in `optimizers.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from rlhf_fast.distributed.dtensors import as_dtensor, copies, is_dtensor, local_shard, shard_like
from rlhf_fast.distributed.portions import portions
from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.run.options import OptimizerKind

from .moments import restore_moments, saved_moments
from .optimizers import PORTION, OffloadedAdamW, build


class AdamW:
    """AdamW of one of the kinds in `optimizers.py`, on float32 masters, or on the weights if they are float32 already.

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
        kind: OptimizerKind = "adamw",
    ) -> None:
        """Copy low-precision weights; parameters that need no gradient are left out."""
        listed = list(groups)
        dicts = [dict(g) for g in listed if isinstance(g, dict)] or [{"params": listed}]
        self.pairs: list[tuple[Parameter, Tensor]] = []  # (weight of the model, its master)
        for group in dicts:
            weights = [p for p in group["params"] if p.requires_grad]
            masters = [_master(p) for p in weights]
            self.pairs += zip(weights, masters, strict=True)
            group["params"] = masters
        self.single: dict[Tensor, Tensor] = {}  # master -> low-precision gradient, if there was one backward so far
        for weight, master in self.pairs:
            if master is not weight:
                weight.register_post_accumulate_grad_hook(self._gradient_hook(master))
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self.optimizer = build(kind, dicts, self.pairs, **adam)
        self._weights = {master: weight for weight, master in self.pairs}
        self._offloaded: dict[Tensor, Tensor] = {}  # master -> its content, if that is in CPU memory
        if isinstance(self.optimizer, OffloadedAdamW):
            self.optimizer.move_to_host(master for weight, master in self.pairs if master.dtype != weight.dtype)
            self.optimizer.stepped, self._offloaded = self._round, self.optimizer.hosts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The torch optimizer's groups, for learning-rate schedules."""
        return self.optimizer.param_groups

    def before_step(self, call: Callable[[], None]) -> None:
        """Have `call()` called before a step changes anything, maybe several times a step."""
        self.optimizer.register_step_pre_hook(lambda *_: call())

    @torch.no_grad()
    def step(self, max_norm: float | None = None) -> float:
        """Sum the gradients over the ranks, clip to `max_norm`, step, and clear; returns the norm before clipping.

        If the norm is not finite, nothing is stepped: the caller stops the run.
        """
        masters = [master for _, master in self.pairs]
        if ranks().count > 1:
            for master in masters:
                self._to_float32(master)
                if master.grad is None:  # this rank had no rows in the minibatch
                    master.grad = torch.zeros_like(master)
            # gradients of sharded weights were summed by FSDP
            ranks().sum_(
                master.grad for weight, master in self.pairs if not is_dtensor(weight) and master.grad is not None
            )
        norm = self._norm()
        limit = float("inf") if max_norm is None else max_norm
        if torch.isfinite(norm):
            for stepped in self._portions():
                torch.nn.utils.clip_grads_with_norm_(stepped, limit, norm)
                self.optimizer.step()
                if not isinstance(self.optimizer, OffloadedAdamW):  # which does so itself, while it has the masters
                    self._round(stepped)
                for master in stepped:
                    master.grad = None
        self.zero_grad()
        return float(norm)

    def _round(self, masters: Sequence[Tensor]) -> None:
        """Round masters into the model."""
        low = [master for master in masters if master.dtype != self._weights[master].dtype]
        if low:
            torch._foreach_copy_([local_shard(self._weights[master]) for master in low], low)

    def _portions(self) -> Iterator[list[Tensor]]:
        """Masters: first those whose gradients are float32 already, then the others, converted a few at a time.

        torch's optimizer skips a master without a gradient, so each call steps one portion.
        """
        if ready := [master for _, master in self.pairs if master.grad is not None]:
            yield ready
        for portion in portions([master for _, master in self.pairs if master in self.single], PORTION):
            for master in portion:
                self._to_float32(master)
            yield portion

    def _gradient_hook(self, master: Tensor) -> Callable[[Tensor], None]:
        """A hook that moves the gradient of a low-precision weight to its float32 master."""

        def take(weight: Tensor) -> None:
            assert weight.grad is not None
            gradient, weight.grad = local_shard(weight.grad), None
            if master in self.single or master.grad is not None:
                self._to_float32(master)
                assert master.grad is not None
                master.grad.add_(gradient)
            else:
                self.single[master] = gradient

        return take

    def _to_float32(self, master: Tensor) -> None:
        """Convert the low-precision gradient of a single backward to float32."""
        if master in self.single:
            master.grad = self.single.pop(master).float()

    def _norm(self) -> Tensor:
        """Norm of the full gradient: replicated weights count once, shards are summed over the ranks."""
        gradients = [(is_dtensor(weight), self.single.get(master, master.grad)) for weight, master in self.pairs]
        replicated = [grad for is_shard, grad in gradients if grad is not None and not is_shard]
        shards = [grad for is_shard, grad in gradients if grad is not None and is_shard]
        norm = _total_norm(replicated)
        if not shards:
            return norm
        squares = _total_norm(shards).square()
        ranks().sum_([squares])
        squares /= next(copies(weight) for weight, _ in self.pairs if is_dtensor(weight))
        return (squares + norm.to(squares.device).square()).sqrt()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.single.clear()
        for weight, master in self.pairs:
            weight.grad = None
            master.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Moments and float32 weights (masters, or the weights themselves), in a form that `save_state` can write.

        Those of sharded weights are sharded in the same way.
        """
        return {
            "moments": saved_moments(self.optimizer, self.pairs),
            "weights": {
                str(i): as_dtensor(self._offloaded.get(master, master), weight)
                for i, (weight, master) in enumerate(self.pairs)
            },
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, with the model's weights; learning rates stay those of the options.

        It may come from another kind of optimizer.
        """
        restore_moments(self.optimizer, self.pairs, state["moments"])
        for i, (weight, master) in enumerate(self.pairs):
            content = self._offloaded.get(master, master)
            content.copy_(local_shard(shard_like(state["weights"][str(i)], weight)))
            if master is not weight:
                local_shard(weight).copy_(content)


def _master(weight: Parameter) -> Parameter:
    """The master of a weight: a float32 weight itself (the local shard if it is sharded), else a float32 copy."""
    if weight.dtype == torch.float32 and not is_dtensor(weight):
        return weight
    return Parameter(local_shard(weight).detach().float())


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """Total norm, summed in float32; `torch.nn.utils.get_total_norm` does not do that for bfloat16."""
    if not gradients:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, torch.float32)))
