# SPDX-License-Identifier: Apache-2.0
"""Graphs exported where the extension is installed, run in processes that lack it: the same numbers, to float64."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import truths
from helpers.tools import native_is_built, randint, randn, upcast

import rlhf_fast as rf
from rlhf_fast.ops.linear import tiles

ROWS, HIDDEN, VOCABULARY = 6, 16, 300
OPTIONS = {"temperature": 0.7, "logit_scale": -1.6}  # a row's max of u and that of z differ
OUTPUTS = ("logprobs", "entropy", "logsumexp", "sum_sq_probs", "argmax")

WITHOUT_EXTENSION = """
import sys
sys.modules["rlhf_fast._C"] = None  # what an installation without a compiler leaves
import torch
from rlhf_fast import _ext
from rlhf_fast.ops.linear import tiles
assert _ext.why_not, "the extension was loaded"
tiles.CPU_TILE = 6 * 64 * 4  # several columns of tiles
inputs = torch.load("inputs.pt")
for name in sys.argv[1:]:
    torch.save(torch.export.load(f"{name}.pt2").module()(*inputs), f"{name}.pt")
"""


class Stats(torch.nn.Module):
    def forward(self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Any:
        return tuple(rf.linear_token_stats(hidden, weight, targets, outputs=OUTPUTS, **OPTIONS))


class FromLogits(torch.nn.Module):
    def forward(self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Any:
        return tuple(rf.token_stats(hidden @ weight.t(), targets, outputs=OUTPUTS, **OPTIONS))


def inputs_for(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    return (
        randn(ROWS, HIDDEN, generator=generator, scale=3.0),
        randn(VOCABULARY, HIDDEN, generator=generator),
        randint(VOCABULARY, ROWS, generator=generator),
    )


def test_without_the_extension(generator: torch.Generator, tmp_path: Path) -> None:
    if not native_is_built():
        pytest.skip("extension not built; tests/test_dispatch.py::test_native_backend_is_built says so once")
    inputs, modules = inputs_for(generator), {"Stats": Stats(), "FromLogits": FromLogits()}
    with rf.use_backend("native"):
        for name, module in modules.items():
            torch.export.save(torch.export.export(module, inputs), tmp_path / f"{name}.pt2")
        here = {name: module(*inputs) for name, module in modules.items()}
    torch.save(inputs, tmp_path / "inputs.pt")
    subprocess.run([sys.executable, "-c", WITHOUT_EXTENSION, *modules], check=True, timeout=120, cwd=tmp_path)
    true = truths.token_stats(upcast(inputs[0]) @ upcast(inputs[1]).t(), inputs[2], **OPTIONS)
    for module in modules:
        for name, there, value in zip(OUTPUTS, torch.load(tmp_path / f"{module}.pt"), here[module], strict=True):
            said = f"{module}: {name}"
            torch.testing.assert_close(there.double(), true[name].double(), rtol=1e-5, atol=1e-5, msg=said)
            torch.testing.assert_close(value.double(), true[name].double(), rtol=1e-5, atol=1e-5, msg=said)


@pytest.mark.parametrize("options", [
    {}, {"temperature": 0.7}, {"logit_scale": 1.6}, {"logit_scale": -0.5, "temperature": 1.3}, {"softcap": 5.0},
    {"temperature": 0.4, "logit_scale": -2.0, "softcap": 5.0}, {"vocab_size": 200}, {"per_row": True},
], ids=str)  # fmt: skip
def test_saved_statistics_mean_the_same(backend: str, options: dict[str, Any], generator: torch.Generator) -> None:
    """What a forward saves for its backward does not depend on the backend, so one may run each half of a graph."""
    logits = randn(ROWS, VOCABULARY, generator=generator, scale=4.0)
    ref = randn(ROWS, VOCABULARY, generator=generator, scale=4.0)
    targets = randint(200, ROWS, generator=generator)
    row_temperature = torch.rand(ROWS, generator=generator) + 0.5 if options.get("per_row") else None
    scalars = options.get("temperature", 1.0), options.get("logit_scale", 1.0), options.get("softcap", 0.0)
    columns = options.get("vocab_size", -1)
    ours = getattr(torch.ops, rf._dispatch.NAMESPACES[backend])
    for ops in (ours, torch.ops.rlhf_fast_torch):
        saved = ops.token_stats(logits, targets, None, row_temperature, *scalars, columns, 31, False)[-1]
        pair = (logits, ref, None, row_temperature, row_temperature)
        saved_kl = ops.token_kl(*pair, scalars[0], *scalars, columns, 0, 0.5)[1]
        if ops is ours:
            first, first_kl = saved, saved_kl
    torch.testing.assert_close(first, saved, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first_kl, saved_kl, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("namespace", ["rlhf_fast", "rlhf_fast_torch"])
def test_columns_of_tiles_in_any_namespace(namespace: str, generator: torch.Generator, monkeypatch: Any) -> None:
    """The merge of slices does not ask which namespace's operators filled them."""
    monkeypatch.setattr(tiles, "CPU_TILE", ROWS * 64 * 4)
    hidden, weight, targets = inputs_for(generator)
    with rf.use_backend("native" if namespace == "rlhf_fast" and native_is_built() else "torch"):
        got = rf.linear_token_stats(hidden, weight, targets, outputs=OUTPUTS, **OPTIONS)
    true = truths.token_stats(upcast(hidden) @ upcast(weight).t(), targets, **OPTIONS)
    for name, value in zip(OUTPUTS, got, strict=True):
        torch.testing.assert_close(value.double(), true[name].double(), rtol=1e-5, atol=1e-5, msg=name)
