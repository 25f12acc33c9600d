# SPDX-License-Identifier: Apache-2.0
"""Run our own code as the forward of a model wrapped by DDP or FSDP2.

DDP prepares gradient averaging, and FSDP2 gathers parameters, in code around the forward of the wrapped module. Calling
the model's parts directly would skip that: gradients would not be averaged, and parameters would be this rank's shard
only. So the wrapped module's forward is replaced for one call, as Lightning and TRL do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed
from torch import nn

Result = TypeVar("Result")


def unwrapped(model: Any) -> Any:
    """The model inside DDP and similar wrappers, which keep it as `module`."""
    inner = getattr(model, "module", None)
    return inner if isinstance(inner, nn.Module) and not hasattr(model, "get_output_embeddings") else model


def is_fsdp2(module: Any) -> bool:
    """Whether `torch.distributed.fsdp.fully_shard` was applied to this module itself."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def as_forward_of(model: Any, function: Callable[..., Result], *args: Any) -> Result:
    """`function(*args)`; if DDP or FSDP2 wraps `model`, called as its forward, so that they do their work around it."""
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
