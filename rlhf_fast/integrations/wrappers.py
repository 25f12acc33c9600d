# SPDX-License-Identifier: Apache-2.0
"""Calling our own code as the forward of a model that DDP or FSDP2 wraps.

DDP prepares the averaging of gradients, and FSDP2 gathers parameters, in code around the forward of what they wrap.
Calling the model's parts from outside passes that by: gradients are never averaged, and parameters are this rank's
part alone. So the wrapped module's forward is replaced for one call (as Lightning and TRL do it).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed
from torch import nn

Result = TypeVar("Result")


def unwrapped(model: Any) -> Any:
    """The model inside DDP and its like, which keep it as `module`."""
    inner = getattr(model, "module", None)
    return inner if isinstance(inner, nn.Module) and not hasattr(model, "get_output_embeddings") else model


def is_fsdp2(module: Any) -> bool:
    """Whether `torch.distributed.fsdp.fully_shard` was applied to this module itself."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def as_forward_of(model: Any, function: Callable[..., Result], *args: Any) -> Result:
    """`function(*args)`; if `model` is wrapped by DDP or FSDP2, in place of its forward, with all that they do."""
    inner = unwrapped(model)
    if inner is model and not is_fsdp2(model):
        return function(*args)
    own = vars(inner).get("forward")
    inner.forward = function
    try:
        return model(*args)  # type: ignore[no-any-return]
    finally:
        if own is None:
            del inner.forward
        else:
            inner.forward = own
