# SPDX-License-Identifier: Apache-2.0
"""Empty stand-ins for packages that OpenRLHF imports and a CPU cannot have."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

#: What importing openrlhf.models and its experience maker asks for. openrlhf.trainer.ray starts vLLM at import.
OPENRLHF_NEEDS = (
    "deepspeed",
    "flash_attn",
    "flash_attn.bert_padding",
    "flash_attn.utils",
    "flash_attn.utils.distributed",
    "openrlhf.trainer.ray",
    "openrlhf.trainer.ray.launcher",
)


@contextmanager
def stubbed(*names: str) -> Iterator[None]:
    """Modules of these names, where they are not loaded already, for as long as the imports inside take."""
    made = [name for name in names if name not in sys.modules]
    for name in made:
        stub = MagicMock()
        stub.__spec__ = ModuleSpec(name, None)
        sys.modules[name] = stub
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]
