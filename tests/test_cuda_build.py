# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels as nvcc builds them, on a machine without a GPU: they link, load, register, and do not spill.

What cannot be seen here is whether they run; tests/emulator does part of that, and `make gpu-check` all of it.
"""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from helpers import codegen
from helpers.tools import native_is_built

from rlhf_fast import _ext, _triton

WANTED = shutil.which("nvcc") is not None and os.environ.get("RLHF_FAST_CUDA") != "0" and native_is_built()
pytestmark = pytest.mark.skipif(not WANTED, reason="no nvcc here, or RLHF_FAST_CUDA=0: no CUDA kernels are expected")

OPERATORS = [name for names in _triton.FAMILIES.values() for name in names]

# Kernels that stream rows or tokens, and the 16-byte accesses that each holds at least.
HOT = {
    "token_stats_kernel": {"LDG.E.128": 4},
    "token_stats_backward_kernel": {"LDG.E.128": 2, "STG.E.128": 2},
    "token_kl_kernel": {"LDG.E.128": 4, "STG.E.128": 2},
    "approx_kl_kernel": {"LDG.E.128": 3, "STG.E.128": 2},
    "approx_kl_backward_kernel": {"LDG.E.128": 3, "STG.E.128": 2},
    "gae_kernel": {"LDG.E.128": 2, "STG.E.128": 4},
    "gae_rows_kernel": {"LDG.E.128": 4, "STG.E.128": 4},
    "vtrace_kernel": {"LDG.E.128": 3, "STG.E.128": 4},
    "ppo_advantages_kernel": {"LDG.E.128": 3, "STG.E.128": 8},
    "whiten_kernel": {"LDG.E.128": 1, "STG.E.128": 2},
    "whiten_moments_kernel": {"LDG.E.128": 1},
}


def test_every_operator_has_a_cuda_kernel() -> None:
    """The extension linked with its CUDA kernels and loaded beside a PyTorch without CUDA."""
    assert _ext.build_info()["cuda"], "the build left the CUDA kernels out"
    assert [name for name in OPERATORS if not _ext.has_kernel(name, "cuda")] == []


def test_a_cuda_kernel_without_a_gpu_is_not_chosen() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    x = torch.randn(2, 5)
    with torch.no_grad():
        assert torch.ops.rlhf_fast.whiten_moments(x, x > 0).shape == (3,)


@pytest.fixture(scope="module")
def disassembler() -> None:
    if codegen.cuobjdump() is None:
        pytest.fail("cuobjdump is missing: pip install triton (the extra 'test' has it)")


@pytest.mark.parametrize("arch", codegen.ARCHS)
def test_no_kernel_spills(disassembler: None, arch: str) -> None:
    usage = {name: used for (built_for, name), used in codegen.resources().items() if built_for == arch}
    assert len(usage) > 20, f"few kernels for {arch}: {sorted(usage)}"
    assert {name: used for name, used in usage.items() if used.stack or used.local} == {}


@pytest.mark.parametrize("arch", codegen.ARCHS)
def test_hot_loops_go_by_sixteen_bytes(disassembler: None, arch: str) -> None:
    counts = codegen.wide_accesses(arch)
    for kernel, wanted in HOT.items():
        mine = {name: found for name, found in counts.items() if f"{len(kernel)}{kernel}" in name}
        assert mine, f"{kernel} is not in the build"
        for name, found in mine.items():
            short = {kind: found[kind] for kind, least in wanted.items() if found[kind] < least}
            assert not short, f"{name}: {short}, wanted at least {wanted}"
            assert found["LDL"] == found["STL"] == 0, f"{name} uses local memory"


# Rows of different 16-byte phase: the loop that shifts has two such loads for each row, beside the loop without.
SHIFTED = {
    "token_stats_backward_kernel<BFloat16, false, false>": 8,
    "token_kl_kernel<BFloat16, false, 0>": 30,
    "token_kl_kernel<BFloat16, true, 0>": 18,  # with a softcap
}


def test_rows_of_another_phase_go_by_sixteen_bytes(disassembler: None) -> None:
    counts = codegen.wide_accesses("sm_90")
    readable = codegen._readable(set(counts))
    found = {readable[name]: kinds["LDG.E.128"] for name, kinds in counts.items()}
    for kernel, least in SHIFTED.items():
        assert found[kernel] >= least, f"{kernel}: {found[kernel]} loads of 16 bytes"


# Instructions of the hot loops on sm_90, of four loads of 16 bytes each; what nvcc 13.0 made of them, and a little.
LONGEST = {
    "token_stats_kernel<BFloat16, false, true>": [330],
    "token_stats_kernel<BFloat16, false, false>": [226],
    "token_stats_backward_kernel<BFloat16, false, false>": [300],
    "token_stats_backward_kernel<BFloat16, false, true>": [398],
    "token_kl_kernel<BFloat16, false, 0>": [380, 296, 198],  # the fold, then the gradient of either side
    "gae_rows_kernel<float, 1>": [702],
}


def test_hot_loops_do_not_grow(disassembler: None) -> None:
    if "release 13.0" not in os.popen("nvcc --version").read():
        pytest.skip("the counts are nvcc 13.0's")
    loops = codegen.hot_loops("sm_90")
    readable = codegen._readable(set(loops))
    found = {readable[name]: of_kernel for name, of_kernel in loops.items()}
    for kernel, longest in LONGEST.items():
        assert [loop.loads for loop in found[kernel]] == [4] * len(longest), f"{kernel}: {found[kernel]}"
        long = [loop for loop, most in zip(found[kernel], longest, strict=True) if loop.instructions > most]
        assert not long, f"{kernel}: {long} with at most {longest}"


# All instructions on sm_90 of kernels without such a loop; likewise.
LARGEST = {
    "gae_kernel<float, 1>": 1704,
    "gae_kernel<float, 2>": 2264,
    "ppo_advantages_kernel<float>": 2496,
    "vtrace_kernel<float>": 1768,
}


def test_kernels_do_not_grow(disassembler: None) -> None:
    if "release 13.0" not in os.popen("nvcc --version").read():
        pytest.skip("the counts are nvcc 13.0's")
    lengths = codegen._lengths("sm_90")
    found = {name: lengths[mangled] for mangled, name in codegen._readable(set(lengths)).items()}
    assert {name: found[name] for name, most in LARGEST.items() if found[name] > most} == {}


def test_the_page_is_that_of_this_build(disassembler: None) -> None:
    if "release 13.0" not in os.popen("nvcc --version").read():
        pytest.skip("docs/codegen.md was written with nvcc 13.0")
    assert codegen.PAGE.read_text() == codegen.page(), "python tests/helpers/codegen.py writes it anew"
