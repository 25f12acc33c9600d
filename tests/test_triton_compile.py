# SPDX-License-Identifier: Apache-2.0
"""What the Triton compiler makes of the kernels, with no GPU at hand: 16-byte accesses, no spills, no recompiling.

In the suite everything for one architecture and the main kernels for the others; `make check-triton` compiles
everything for all, with the installed Triton and with those that PyTorch from 2.10 on brings.

One process per architecture, without the interpreter, calls the launch functions themselves on CPU tensors. A launch is
caught where Triton would run it, so what is compiled is what the launcher passes: argument types, divisibility by 16,
constants, warps. Nothing is executed.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

KERNELS = Path(__file__).parent.parent / "kernels"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
V = 131_072
PROCESSORS = 132  # of the GPU that the launchers believe in

# ------------------------------------------------------------------------------------------- the table


class Case(NamedTuple):
    """A call of a family's launch function, and the 16-byte accesses each kernel must have at least."""

    call: Callable[[Any, torch.dtype], object]  # given the module rlhf_fast.kernels.<family>
    family: str
    loads: dict[str, int]  # kernel: number of 16-byte loads
    stores: dict[str, int] = {}  # noqa: RUF012
    main: bool = False  # compiled for every architecture


PLAIN = (1.0, 1.0, 0.0, -1)  # temperature, logit_scale, softcap, vocab_size
CAPPED = (1.0, 1.0, 30.0, -1)
PADDED = (1.0, 1.0, 0.0, 50_257)


def _rows(n: int, dtype: torch.dtype = torch.float32, *more: int) -> torch.Tensor:
    return torch.empty((n, *more), dtype=dtype)


def stats(
    outputs: int, n: int = 8192, width: int = V, options: tuple[Any, ...] = PLAIN, k: int = 1
) -> Callable[[Any, torch.dtype], object]:
    """token_stats with the outputs of these bits."""
    return lambda op, dtype: op.token_stats(
        _rows(n, dtype, width), _rows(n, torch.int64, k), _rows(n, torch.bool), None, *options, outputs, False
    )


def stats_backward(
    entropy: bool, n: int = 8192, width: int = V, options: tuple[Any, ...] = PLAIN
) -> Callable[[Any, torch.dtype], object]:
    """In-place gradient of logprobs, and of entropy."""
    grads = (_rows(n), _rows(n) if entropy else None, None)
    return lambda op, dtype: op.token_stats_backward_(
        *grads, _rows(n, dtype, width), _rows(n, torch.int64), _rows(n, torch.bool), None,
        _rows(n) if entropy else None, _rows(n, torch.float32, 2), *options,
    )  # fmt: skip


def _pair(n: int, dtype: torch.dtype) -> tuple[Any, ...]:
    return (_rows(n, dtype, V), _rows(n, dtype, V), _rows(n, torch.bool), None, None)


def kl(kind: int, n: int = 8192) -> Callable[[Any, torch.dtype], object]:
    return lambda op, dtype: op.token_kl(*_pair(n, dtype), 1.0, *PLAIN, kind, 0.5)


def kl_backward(kind: int, both: bool = False) -> Callable[[Any, torch.dtype], object]:
    return lambda op, dtype: op.token_kl_backward(
        _rows(8192), *_pair(8192, dtype), _rows(8192, torch.float32, 6), 1.0, *PLAIN, kind, 0.5, True, both
    )


def kl_and_grad(kind: int) -> Callable[[Any, torch.dtype], object]:
    return lambda op, dtype: op.token_kl_and_grad(_rows(8192), *_pair(8192, dtype), 1.0, *PLAIN, kind, 0.5)


def approx_kl(op: Any, dtype: torch.dtype) -> None:
    tokens = [_rows(64, dtype, 1024) for _ in range(3)]
    op.approx_kl(*tokens, _rows(64, torch.bool, 1024), 2, 0, 1.0)
    op.approx_kl_backward(_rows(64, torch.float32, 1024), *tokens, _rows(64, torch.bool, 1024), 2, 0, 1.0)


Shape = tuple[int, ...]
SETTINGS = (0.99, 0.95, 1.0, True)  # gamma, lam, value_lam, carry


def gae(
    shape: Shape = (256, 8192), flags: bool = False, sequences: int | None = None, dtype: torch.dtype | None = None
) -> Callable[[Any, torch.dtype], object]:
    """With a mask; flags: and with all there is. Of float32 unless told, as half of it has 8-byte loads."""

    def call(op: Any, _: torch.dtype) -> None:
        tokens = [torch.empty(shape, dtype=dtype or torch.float32) for _ in range(3)]
        real, dones, truncated = (torch.empty(shape, dtype=torch.bool) for _ in range(3))
        ends = None if sequences is None else torch.empty(sequences + 1, dtype=torch.int64)
        if flags:
            lams = (_rows(shape[0]), _rows(shape[0]))
            op.gae(*tokens[:2], real, dones, truncated, tokens[2], ends, *lams, *SETTINGS)
        else:
            op.gae(*tokens[:2], real, None, None, None, ends, None, None, 0.99, 0.95, 0.95, True)

    return call


def vtrace(shape: Shape = (256, 8192), sequences: int | None = None) -> Callable[[Any, torch.dtype], object]:
    tokens = [torch.empty(shape) for _ in range(4)]
    flags = [torch.empty(shape, dtype=torch.bool) for _ in range(3)]
    ends = None if sequences is None else torch.empty(sequences + 1, dtype=torch.int64)
    return lambda op, _: op.vtrace(*tokens[:3], *flags, tokens[3], ends, 0.99, 0.95, 1.0, 1.0, True)


def ppo(shape: Shape = (256, 8192), estimator: int = 2) -> Callable[[Any, torch.dtype], object]:
    tokens = [torch.empty(shape) for _ in range(3)]
    real = torch.empty(shape, dtype=torch.bool)
    return lambda op, _: op.ppo_advantages(_rows(shape[0]), *tokens, real, 0.1, estimator, 0.99, 0.95, 5.0)


def whiten(op: Any, _: torch.dtype) -> None:
    values, real = _rows(256, torch.float32, 8192), _rows(256, torch.bool, 8192)
    op.whiten(values, real, op.whiten_moments(values, real), True)


CASES = {
    "logprobs": Case(stats(1), "logprob", {"token_stats_fold": 4}),
    "logprobs_entropy": Case(stats(3), "logprob", {"token_stats_fold": 4}, main=True),
    "all_outputs_k": Case(stats(31, k=5), "logprob", {"token_stats_fold": 4}),
    "few_rows": Case(stats(31, n=64, width=262_144), "logprob", {"token_stats_fold": 4}),
    "padded": Case(stats(3, width=50_304, options=PADDED), "logprob", {"token_stats_fold": 4}),
    "padded_backward": Case(
        stats_backward(True, width=50_304, options=PADDED),
        "logprob",
        {"token_stats_gradient": 4},
        {"token_stats_gradient": 2},
    ),
    "softcap": Case(stats(3, options=CAPPED), "logprob", {"token_stats_fold": 4}),
    "backward": Case(
        stats_backward(False), "logprob", {"token_stats_gradient": 4}, {"token_stats_gradient": 2}, main=True
    ),
    "backward_entropy": Case(
        stats_backward(True), "logprob", {"token_stats_gradient": 4}, {"token_stats_gradient": 2}, main=True
    ),
    "backward_softcap": Case(
        stats_backward(True, options=CAPPED), "logprob", {"token_stats_gradient": 4}, {"token_stats_gradient": 2}
    ),
    "kl_reverse": Case(kl(0), "kl", {"token_kl_fold": 4}, main=True),
    "kl_forward": Case(kl(1), "kl", {"token_kl_fold": 4}),
    "kl_few_rows": Case(kl(0, n=64), "kl", {"token_kl_fold": 4}),
    "kl_jsd": Case(kl(2), "kl", {"token_stats_fold": 4, "token_kl_terms": 2}),
    "kl_tv": Case(kl(3), "kl", {"token_stats_fold": 4, "token_kl_terms": 2}),
    "kl_backward": Case(kl_backward(0), "kl", {"token_kl_gradient": 4}, {"token_kl_gradient": 1}, main=True),
    "kl_backward_both": Case(kl_backward(1, both=True), "kl", {"token_kl_gradient": 4}, {"token_kl_gradient": 2}),
    "kl_backward_jsd": Case(kl_backward(2), "kl", {"token_kl_gradient": 4}, {"token_kl_gradient": 1}),
    "kl_and_grad": Case(kl_and_grad(0), "kl", {"token_kl_fold": 8}, {"token_kl_fold": 1}, main=True),
    "approx_kl": Case(
        approx_kl,
        "kl",
        {"approx_kl_value": 3, "approx_kl_gradient": 5},
        {"approx_kl_value": 2, "approx_kl_gradient": 4},
    ),
    "gae": Case(gae(), "gae", {"gae_rows": 8}, {"gae_rows": 4}, main=True),
    "gae_half": Case(gae(dtype=torch.bfloat16), "gae", {}, {"gae_rows": 2}),
    "gae_short": Case(gae((4096, 128)), "gae", {"gae_rows": 4}, {"gae_rows": 2}),
    "gae_flags": Case(gae(flags=True), "gae", {"gae_rows": 6}, {"gae_rows": 2}, main=True),
    "gae_few_rows": Case(gae((2, V)), "gae", {"gae_rows": 8}, {"gae_rows": 4}),
    "gae_packed": Case(gae((V,), sequences=256), "gae", {}),
    "gae_packed_few": Case(gae((V,), sequences=3), "gae", {"gae_rows": 4}, {"gae_rows": 2}),
    "vtrace": Case(vtrace(), "vtrace", {"vtrace_rows": 3}, {"vtrace_rows": 2}, main=True),
    "vtrace_short": Case(vtrace((4096, 128)), "vtrace", {"vtrace_rows": 3}, {"vtrace_rows": 2}),
    "vtrace_packed": Case(vtrace((V,), sequences=256), "vtrace", {}),
    "ppo": Case(ppo(), "ppo", {"ppo_rows": 6}, {"ppo_rows": 4}, main=True),
    "ppo_few_rows": Case(ppo((2, V), estimator=0), "ppo", {"ppo_rows": 6}, {"ppo_rows": 4}),
    "whiten": Case(whiten, "whiten", {"block_moments": 4, "whiten_block": 4}, {"whiten_block": 4}, main=True),
}

# Calls of a family that must share one compiled kernel: nothing but run-time numbers differs.
ALIKE: dict[str, tuple[str, str, list[Callable[[Any, torch.dtype], object]]]] = {
    "stats": ("logprob", "token_stats_fold", [
        stats(3),
        stats(3, n=8191),
        stats(3, width=151_936),
        stats(3, n=5003, width=32_000, options=(0.7, 3.0, 0.0, -1)),
    ]),
    "backward": ("logprob", "token_stats_gradient", [
        stats_backward(True, options=CAPPED),
        stats_backward(True, n=777, width=256_000, options=(0.3, 0.5, 4.0, -1)),
    ]),
    "gae": ("gae", "gae_rows", [gae(), gae((64, 100_004)), gae((301, 2052))]),
    "ppo": ("ppo", "ppo_rows", [ppo(), ppo((65, 40_004)), ppo((301, 1028))]),
}  # fmt: skip
ODD = stats(3, width=V - 1)  # rows that begin at any address

# Architecture: everything, or the main kernels in bf16.
EVERYTHING = os.environ.get("RLHF_FAST_COMPILE") == "everything"
ARCHITECTURES = {name: EVERYTHING or name == "sm_90" for name in ("sm_80", "sm_90", "sm_100", "gfx942", "gfx1100")}
LANES = {"gfx942": 64}  # of a warp, where not 32


# ------------------------------------------------------------------------------------------- the compiling process


class NoDevice:
    """What Triton asks of its driver on the way to a compiled kernel."""

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        if self.architecture.startswith("sm_"):
            return GPUTarget("cuda", int(self.architecture.removeprefix("sm_")), 32)
        return GPUTarget("hip", self.architecture, LANES.get(self.architecture, 32))


def compile_all(architecture: str) -> dict[str, list[dict[str, Any]]]:
    """Every case's kernels, in launch order, by "case/dtype"."""
    import importlib

    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from rlhf_fast.kernels import common

    launched: list[dict[str, Any]] = []
    run = JITFunction.run

    def catch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        launched.append({"programs": grid[0], **_facts(self.__name__, compiled)})
        return compiled

    driver.set_active(NoDevice(architecture))
    JITFunction.run = catch
    common.processors = lambda device: PROCESSORS
    common.warp_lanes = lambda device: LANES.get(architecture, 32)

    def caught(family: str, call: Callable[[Any, torch.dtype], object], dtype: torch.dtype) -> list[dict[str, Any]]:
        call(importlib.import_module(f"rlhf_fast.kernels.{family}"), dtype)
        kernels = launched.copy()
        launched.clear()
        return kernels

    results = {}
    everything = ARCHITECTURES[architecture]
    for dtype_name, dtype in DTYPES.items():
        for name, case in CASES.items():
            if everything or (case.main and dtype_name == "bf16"):
                results[f"{name}/{dtype_name}"] = caught(case.family, case.call, dtype)
    if everything:
        results["odd"] = caught("logprob", ODD, torch.bfloat16)
        for name, (family, _, calls) in ALIKE.items():
            results[f"alike {name}"] = [kernel for call in calls for kernel in caught(family, call, torch.bfloat16)]
    return results


def _facts(name: str, compiled: Any) -> dict[str, Any]:
    facts = _nvidia(compiled.asm) if "ptx" in compiled.asm else _amd(compiled.asm["amdgcn"])
    return {"kernel": name, "hash": compiled.hash, **facts}


def _nvidia(asm: dict[str, Any]) -> dict[str, int]:
    """From the PTX, and from the machine code as the disassembler that Triton ships reads it."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = {name: int(re.findall(rf"\b{name}:(\d+)", text)[-1]) for name in ("REG", "STACK", "LOCAL")}
    return {
        "loads": len(re.findall(r"ld\.global\S*\.v4\.[bfu]32", asm["ptx"])),
        "stores": len(re.findall(r"st\.global\S*\.v4\.[bfu]32", asm["ptx"])),
        "spilled": len(re.findall(r"\b(?:ld|st)\.local", asm["ptx"])) + used["STACK"] + used["LOCAL"],
        "registers": used["REG"],
    }


def _amd(text: str) -> dict[str, int]:
    """From the assembly and the notes at its end. Scalar registers spill into lanes of vector ones, not into memory."""
    notes = {name: int(value) for name, value in re.findall(r"\.(\w+): +(\d+)$", text, re.MULTILINE)}
    spills = ("vgpr_spill_count", "private_segment_fixed_size")
    return {
        "loads": len(re.findall(r"\b(?:global|buffer)_load_(?:dwordx4|b128)\b", text)),
        "stores": len(re.findall(r"\b(?:global|buffer)_store_(?:dwordx4|b128)\b", text)),
        "spilled": sum(notes[name] for name in spills),
        "registers": notes["vgpr_count"],
    }


# ------------------------------------------------------------------------------------------- the tests


@functools.cache
def compiled_for(architecture: str) -> dict[str, list[dict[str, Any]]]:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, __file__, architecture], env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr[-4000:]
    results: dict[str, list[dict[str, Any]]] = json.loads(process.stdout)
    return results


every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@every_architecture
def test_sixteen_bytes_at_once(architecture: str) -> None:
    for key, kernels in compiled_for(architecture).items():
        case = CASES.get(key.split("/")[0])
        if case is None:
            continue
        for what, wanted in (("loads", case.loads), ("stores", case.stores)):
            found = {kernel["kernel"]: kernel[what] for kernel in kernels}
            assert wanted.keys() <= found.keys(), f"{key}: launched {sorted(found)}"
            for name, count in wanted.items():
                assert found[name] >= count, f"{key}: {name} has {found[name]} 16-byte {what}, wanted {count}"


@every_architecture
def test_nothing_spills(architecture: str) -> None:
    for key, kernels in compiled_for(architecture).items():
        for kernel in kernels:
            assert kernel["spilled"] == 0, f"{key}: {kernel}"
            if architecture.startswith("sm_"):
                assert kernel["registers"] <= 128, f"{key}: {kernel}"  # two blocks of 256 threads a processor


def test_rows_at_odd_addresses_are_the_exception() -> None:
    """The count above can fail: a vocabulary that 16 does not divide has no 16-byte loads."""
    assert [kernel["loads"] for kernel in compiled_for("sm_90")["odd"]] == [0]


@pytest.mark.parametrize("name", ALIKE)
def test_lengths_and_values_do_not_recompile(name: str) -> None:
    _, kernel_name, calls = ALIKE[name]
    kernels = [kernel for kernel in compiled_for("sm_90")[f"alike {name}"] if kernel["kernel"] == kernel_name]
    assert len(kernels) == len(calls)
    assert len({kernel["hash"] for kernel in kernels}) == 1


def test_few_rows_fill_the_device() -> None:
    """64 rows of 262 144 are cut up, and merged in a second kernel; 8192 rows are not."""
    few, many = compiled_for("sm_90")["few_rows/bf16"], compiled_for("sm_90")["logprobs/bf16"]
    assert [kernel["kernel"] for kernel in few] == ["token_stats_fold", "token_stats_combine"]
    assert few[0]["programs"] >= 4 * PROCESSORS
    assert [(kernel["kernel"], kernel["programs"]) for kernel in many] == [("token_stats_fold", 8192)]


def test_every_launched_kernel_is_in_the_table() -> None:
    launches = re.compile(r"launch\(\s*(?:\w+\.)?(?!kernel\b)(\w+),")
    launched = {name for path in KERNELS.glob("*.py") for name in launches.findall(path.read_text())}
    compiled = {kernel["kernel"] for kernels in compiled_for("sm_90").values() for kernel in kernels}
    assert launched and launched <= compiled, f"not compiled here: {sorted(launched - compiled)}"


if __name__ == "__main__":
    json.dump(compile_all(sys.argv[1]), sys.stdout)
