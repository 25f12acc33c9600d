# SPDX-License-Identifier: Apache-2.0
"""The optimizers behind the option `optimizer`: torch's fused AdamW, the same with its state in CPU memory, and the
8-bit one of bitsandbytes (Dettmers et al. 2021, arXiv 2110.02861). All step float32 weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from rlhf_fast.distributed.dtensors import local_shard
from rlhf_fast.distributed.portions import portions
from rlhf_fast.errors import UserError
from rlhf_fast.run.options import OptimizerKind

PORTION = 16 * 2**20  # weights that are converted to float32, or whose state is on the device, at the same time
LEAST_8BIT = 4096  # a smaller weight keeps moments of 32 bits, as bitsandbytes has it
MOMENTS = ("exp_avg", "exp_avg_sq")
BITSANDBYTES = (0, 50)  # the oldest version whose moments are tested; also in pyproject.toml

Pairs = Sequence[tuple[Parameter, Tensor]]  # weights of the model, and what is stepped for each of them


def build(kind: OptimizerKind, groups: list[dict[str, Any]], pairs: Pairs, **adam: Any) -> torch.optim.Optimizer:
    """The optimizer over `groups` of what is stepped; `adam`: lr, betas, eps, weight_decay.

    Raises:
        UserError: adamw-8bit without bitsandbytes, or with an old one.
    """
    if kind == "adamw-8bit":
        return _eight_bit(groups, {stepped for weight, stepped in pairs if weight.numel() >= LEAST_8BIT}, adam)
    cls = OffloadedAdamW if kind == "adamw-offload" else torch.optim.AdamW
    return cls(groups, fused=True, **adam)


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW with its moments, and the master weights that it is given, in CPU memory (pinned for a GPU).

    A step copies the state of a few weights at a time to their device and back, so it computes what torch's does, bit
    for bit. A single weight's state is never divided.
    """

    def __init__(self, groups: Iterable[Any], **adam: Any) -> None:
        """Arguments are those of torch.optim.AdamW."""
        super().__init__(groups, **adam)
        self.hosts: dict[Tensor, Tensor] = {}  # master -> its content; its own storage is empty between steps
        self.stepped: Callable[[list[Tensor]], None] = lambda weights: None  # called while their state is there

    def move_to_host(self, masters: Iterable[Tensor]) -> None:
        """Take over master weights, which nothing else may read any more but in `stepped`."""
        for master in masters:
            self.hosts[master] = copy_to_host(master.detach())
            master.untyped_storage().resize_(0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step the weights that have a gradient."""
        found = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        gradients = {p: p.grad for p in found}
        for p in found:
            p.grad = None  # torch steps what has a gradient
        for portion in portions(found, PORTION):
            hosts = [self._fetch(p) for p in portion]
            for p in portion:
                p.grad = gradients[p]
            super().step()
            self.stepped(portion)
            for p, saved in zip(portion, hosts, strict=True):
                p.grad = None
                self._put_back(p, saved)
        for p in found:
            p.grad = gradients[p]

    def _fetch(self, p: Tensor) -> dict[str, Tensor]:
        """Copy the state to the device; returns the moments in CPU memory, none before the first step creates them."""
        if (master := self.hosts.get(p)) is not None:
            p.untyped_storage().resize_(master.nbytes)
            p.detach().copy_(master, non_blocking=True)
        state = self.state[p]
        hosts = {name: state[name] for name in MOMENTS if name in state}
        state.update({name: host.to(p.device, non_blocking=True, copy=True) for name, host in hosts.items()})
        return hosts

    def _put_back(self, p: Tensor, hosts: dict[str, Tensor]) -> None:
        if (master := self.hosts.get(p)) is not None:
            master.copy_(p.detach())
            p.untyped_storage().resize_(0)
        state = self.state[p]
        for name in MOMENTS:
            state[name] = hosts[name].copy_(state[name]) if name in hosts else copy_to_host(state[name])


def copy_to_host(tensor: Tensor, pin: bool = False) -> Tensor:
    """A copy in CPU memory; pinned for a tensor of a GPU, or if `pin`."""
    return torch.empty_like(tensor, device="cpu", pin_memory=pin or tensor.is_cuda).copy_(tensor)


def eight_bit_package(needed: str) -> Any:
    """bitsandbytes; UserError, which begins with `needed`, without it or of an older version than the extra has."""
    try:
        import bitsandbytes
    except ImportError:
        raise UserError(f"{needed}: pip install 'rlhf-fast[8bit]'") from None
    if tuple(map(int, bitsandbytes.__version__.split(".")[:2])) < BITSANDBYTES:
        wanted = ".".join(map(str, BITSANDBYTES))
        raise UserError(
            f"{needed}, {wanted} or later, and this is {bitsandbytes.__version__}: pip install 'rlhf-fast[8bit]'"
        )
    return bitsandbytes


def _eight_bit(groups: list[dict[str, Any]], large: set[Tensor], adam: dict[str, Any]) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW; `large` weights have 8-bit moments, whichever part of them this rank has."""
    bitsandbytes = eight_bit_package("optimizer adamw-8bit needs the package bitsandbytes")
    base: Any = bitsandbytes.optim.AdamW8bit

    class EightBitAdamW(base):  # type: ignore[misc]
        def get_config(self, gindex: int, pindex: int, group: Any) -> dict[str, Any]:
            weight = self.param_groups[gindex]["params"][pindex]
            least = 0 if weight in large else weight.numel() + 1
            return {**super().get_config(gindex, pindex, group), "min_8bit_size": least}

        def update_step(self, group: Any, p: Tensor, gindex: int, pindex: int) -> None:
            if p.numel():  # a rank may have no rows of a weight
                super().update_step(group, p, gindex, pindex)
            else:
                self.state[p]["step"] += 1

    made: Any = EightBitAdamW
    return made(groups, **adam)


def pinned_bytes(size: float) -> int:
    """What a pinned tensor of so many bytes takes: PyTorch's allocator rounds up to a power of two, each by itself."""
    return 1 << (math.ceil(size) - 1).bit_length() if size > 0 else 0


def state_bytes(kind: OptimizerKind, weights: float, masters: bool) -> tuple[float, float]:
    """Bytes on the device, and in CPU memory, of the state of so many weights between steps, maybe with masters."""
    master = 4.0 if masters else 0.0
    if kind == "adamw-8bit":
        return weights * (master + 2.0 + 8.0 / 256), 0.0
    each = weights * (master + 8.0)
    return (0.0, each) if kind == "adamw-offload" else (each, 0.0)


def over_shards(kind: OptimizerKind, groups: list[dict[str, Any]], **adam: Any) -> tuple[torch.optim.Optimizer, Pairs]:
    """An optimizer for float32 weights whose `step` takes their gradients, of sharded ones this rank's rows.

    For a trainer that has summed and clipped the gradients itself. Returns it with its pairs.
    """
    pairs: list[tuple[Parameter, Tensor]] = []
    for group in groups:
        stepped = [Parameter(local_shard(p)) if local_shard(p) is not p else p for p in group["params"]]
        pairs += zip(group["params"], stepped, strict=True)
        group["params"] = stepped
    made = build(kind, groups, pairs, **adam)
    shards = [(weight, stepped) for weight, stepped in pairs if weight is not stepped]
    if shards:  # torch may call a hook several times a step
        made.register_step_pre_hook(lambda *_: _take_gradients(shards))
        made.register_step_post_hook(lambda *_: _drop_gradients(shards))
    return made, pairs


def _take_gradients(shards: Pairs) -> None:
    for weight, stepped in shards:
        if weight.grad is not None:
            stepped.grad, weight.grad = local_shard(weight.grad), None


def _drop_gradients(shards: Pairs) -> None:
    for _, stepped in shards:
        stepped.grad = None
