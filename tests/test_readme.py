# SPDX-License-Identifier: Apache-2.0
"""The loop that the README shows runs as it stands, and survives tokens that drifted far."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import rlhf_fast as rf

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.parametrize("drift", [0.0, 200.0, -200.0, 1e4])
def test_the_loop(drift: float) -> None:
    code = next(
        block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "ppo_advantages" in block
    )
    g = torch.Generator().manual_seed(0)
    names: dict[str, Any] = {
        "torch": torch, "rf": rf, "hidden": torch.randn(2, 5, 8, generator=g, requires_grad=True),
        "weight": torch.randn(11, 8, generator=g), "ref_hidden": torch.randn(2, 5, 8, generator=g),
        "ref_weight": torch.randn(11, 8, generator=g), "tokens": torch.randint(11, (2, 5), generator=g),
        "mask": torch.ones(2, 5, dtype=torch.bool), "scores": torch.randn(2, generator=g),
        "values": torch.randn(2, 5, generator=g),
    }  # fmt: skip
    first, second = code.split("\nlogprobs = ", 1)
    exec(first, names)
    names["old_logprobs"][:, 1] -= drift
    exec("logprobs = " + second, names)
    assert bool(names["loss"].isfinite()) and bool(names["hidden"].grad.isfinite().all())
    assert bool(names["hidden"].grad.any())
