# SPDX-License-Identifier: Apache-2.0
"""Patch an existing trainer to use our ops, with one line each to apply and to undo it; see docs/integrations.md.

Importing this imports no trainer. `RLHF_FAST_DISABLE=1` turns all patches off.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._patch import Patch
    from .openrlhf import apply_rlhf_fast_to_openrlhf
    from .transformers import patch_loss
    from .trl import apply_rlhf_fast_to_trl
    from .verl import apply_rlhf_fast_to_verl

__all__ = [
    "Patch",
    "apply_rlhf_fast_to_openrlhf",
    "apply_rlhf_fast_to_trl",
    "apply_rlhf_fast_to_verl",
    "patch_loss",
]

# Imported on first use: `python -m rlhf_fast.integrations.openrlhf` must not find itself imported already.
_HOME = {
    "Patch": "_patch",
    "apply_rlhf_fast_to_openrlhf": "openrlhf",
    "apply_rlhf_fast_to_trl": "trl",
    "apply_rlhf_fast_to_verl": "verl",
    "patch_loss": "transformers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
