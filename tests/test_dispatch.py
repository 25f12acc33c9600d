# SPDX-License-Identifier: Apache-2.0
"""Which backend serves a call: use_backend, RLHF_FAST_BACKEND, RLHF_FAST_CPU, rf.backends(); and that they agree."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_cuda import machine
from helpers.samples import SAMPLES, build, with_kernels
from helpers.tools import native_is_built, native_is_wanted
from test_contract import Recorder, assert_same, run
from torch import Tensor

import rlhf_fast as rf
from rlhf_fast import _dispatch, _ext, _triton
from rlhf_fast.ops import codes

PUBLIC_OPS = {
    "token_logprobs",
    "token_stats",
    "token_kl",
    "token_kl_and_grad",
    "approx_kl",
    "gae",
    "vtrace",
    "retrace",
    "ppo_advantages",
    "masked_whiten",
    "linear_token_logprobs",
    "linear_token_stats",
    "linear_token_kl",
    "linear_policy_loss",
    "linear_sampled_logprobs",
}
ROOT = Path(__file__).parent.parent

needs_native = pytest.mark.skipif(not native_is_built(), reason="extension not built; see the next test")


def test_native_backend_is_built() -> None:
    """Without this, a build that quietly failed would skip half of the suite. RLHF_FAST_EXT=0 says it was meant."""
    assert native_is_built() or not native_is_wanted(), _ext.why_not


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with these environment variables, and none of ours that choose a backend."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RLHF_FAST_BACKEND", "RLHF_FAST_CPU")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )


def namespaces_called(name: str = "token_stats", dtype: torch.dtype = torch.float32) -> set[str]:
    with Recorder() as recorder:
        run(build(name, dtype))
    return {func.namespace for func, _, _ in recorder.calls}


def test_torch_backend_by_name() -> None:
    for name in SAMPLES:
        with rf.use_backend("torch"):
            assert namespaces_called(name) == {"rlhf_fast_torch"}


@needs_native
def test_native_backend_by_name_and_by_auto() -> None:
    for name in with_kernels():
        for backend in ("native", "auto"):
            with rf.use_backend(backend):
                assert namespaces_called(name) == {"rlhf_fast"}


def test_auto_gives_float64_to_the_reference() -> None:
    for name in SAMPLES:
        with rf.use_backend("auto"):
            assert namespaces_called(name, torch.float64) == {"rlhf_fast_torch"}


def test_a_forced_backend_that_cannot_serve_raises() -> None:
    for sample in (build(name, torch.float64) for name in SAMPLES):
        with rf.use_backend("native"), pytest.raises(RuntimeError, match=rf"^rlhf_fast\.{sample.op}: .*native"):
            run(sample)
        with rf.use_backend("triton"), pytest.raises(RuntimeError, match=rf"^rlhf_fast\.{sample.op}: .*[tT]riton"):
            run(sample)


def test_use_backend_nests_and_restores() -> None:
    def served() -> str:
        return rf.backends()[0].backend

    outside = served()
    with rf.use_backend("torch"):
        assert served() == "torch"
        with rf.use_backend("auto"):
            assert served() == outside or os.environ.get("RLHF_FAST_BACKEND")
        assert served() == "torch"
    with pytest.raises(ZeroDivisionError), rf.use_backend("torch"):
        raise ZeroDivisionError
    assert served() == outside


def test_use_backend_refuses_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="auto, native, triton, torch.*, got 'cuda'"), rf.use_backend("cuda"):
        pass


def test_backward_runs_where_its_forward_ran() -> None:
    sample = build("token_logprobs", torch.float32)
    with rf.use_backend("torch"):
        leaf = sample.inputs["logits"].clone().requires_grad_()
        out = sample.call(logits=leaf)
    with rf.use_backend("auto"), Recorder() as recorder:
        out.sum().backward()
    assert {func.namespace for func, _, _ in recorder.calls} == {"rlhf_fast_torch"}


def test_backends_lists_every_op_and_says_why() -> None:
    with rf.use_backend("auto"):
        table = rf.backends()
    assert {row.op for row in table} == PUBLIC_OPS
    assert {row.device for row in table} >= {"cpu"}
    for row in table:
        assert row.backend.startswith("native") or row.why_not_faster, row
        assert row.op in str(table) and row.backend in str(table)
    if native_is_built():
        on_cpu = [row for row in table if row.device == "cpu" and _dispatch.KERNEL_OF[row.op]]
        assert all(row.backend == f"native ({_ext.cpu_capability()})" for row in on_cpu)
    with rf.use_backend("torch"):
        assert all(row.backend == "torch" and row.why_not_faster for row in rf.backends())


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """pretended_gpu(native=..., triton=..., capability=...): what a machine with such a GPU would answer."""

    def pretend(native: bool = True, triton: bool = True, capability: tuple[int, int] = (9, 0)) -> None:
        kernels = {(kernel, "cuda") for kernel in _dispatch.KERNEL_OF.values()}
        monkeypatch.setattr(_dispatch, "_native", frozenset(kernels if native else ()))
        monkeypatch.setattr(_ext, "why_not", "")
        monkeypatch.setattr(_ext, "LEFT_OUT", {} if native else {"cuda": "No nvcc found"})
        monkeypatch.setattr(_ext, "_gpu_refused", {})
        monkeypatch.setattr(_ext, "_native_refused", {})
        monkeypatch.setattr(_ext, "_why_not_native", lambda index: "")  # tests/fake_cuda has the probe
        monkeypatch.setattr(_triton, "installed", triton)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    return pretend


class OnGpu:
    device, dtype = torch.device("cuda"), torch.bfloat16


def test_auto_on_a_gpu_goes_by_speed_and_says_why_not_faster(pretended_gpu: Callable[..., None]) -> None:
    def served() -> tuple[str, str, str]:
        with rf.use_backend("auto"):
            row = next(row for row in rf.backends() if (row.op, row.device) == ("token_kl", "cuda"))
            return _dispatch.select("token_kl", OnGpu()).name, row.backend, row.why_not_faster  # type: ignore[arg-type]

    pretended_gpu()
    assert served() == ("rlhf_fast", "native", "")
    pretended_gpu(native=False)
    assert served() == ("rlhf_fast_triton", "triton", "native: this build holds no cuda kernels (No nvcc found)")
    pretended_gpu(native=False, triton=False)
    namespace, backend, reason = served()
    assert (namespace, backend) == ("rlhf_fast_torch", "torch")
    assert "no cuda kernels" in reason and "Triton is not installed" in reason
    pretended_gpu(capability=(7, 5))
    namespace, backend, reason = served()
    assert (namespace, backend) == ("rlhf_fast_torch", "torch")
    assert reason.count("compute capability 7.5, and the kernels need 8.0") == 2


def test_a_gpu_backend_by_name_serves_or_raises(pretended_gpu: Callable[..., None]) -> None:
    gpu: Any = OnGpu()
    pretended_gpu()
    with rf.use_backend("triton"):
        assert _dispatch.select("gae", gpu).name == "rlhf_fast_triton"
    pretended_gpu(capability=(7, 0))
    for backend in ("native", "triton"):
        with rf.use_backend(backend), pytest.raises(RuntimeError, match=r"^rlhf_fast\.gae: .*capability 7\.0"):
            _dispatch.select("gae", gpu)


def test_a_gpu_is_queried_while_a_first_call_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile traces first must not take kernels that the GPU, or its driver, is too old for."""
    queried: list[tuple[str, int]] = []

    def refuse(what: str) -> Callable[[int], str]:
        def answer(index: int) -> str:
            queried.append((what, index))
            return what

        return answer

    there = {"is_available": lambda: True, "current_device": lambda: 0}
    gpu, xpu = SimpleNamespace(**there), SimpleNamespace(**there, get_device_capability=lambda index: {})
    monkeypatch.setattr(_ext, "torch", SimpleNamespace(version=torch.version, cuda=gpu))  # dynamo needs the true one
    monkeypatch.setattr(_triton, "torch", SimpleNamespace(xpu=xpu))
    monkeypatch.setattr(_triton, "_float64", {0: False})
    monkeypatch.setattr(_triton, "installed", True)
    monkeypatch.setattr(_ext, "_gpu_refused", {1: ""})
    monkeypatch.setattr(_ext, "_native_refused", {})
    monkeypatch.setattr(_ext, "_why_not_capability", refuse("too old"))
    monkeypatch.setattr(_ext, "_why_not_native", refuse("an old driver"))

    def reasons(x: Tensor) -> tuple[Tensor, str, str, str]:
        of_gpu = _ext.why_not_gpu("cuda", 0), _ext.why_not_native_gpu("cuda", 1)
        return x + 1, *of_gpu, _triton.why_not("whiten", "xpu", 0)

    found = torch.compile(reasons, backend="eager", fullgraph=True)(torch.zeros(1))
    assert found[1:] == ("too old", "an old driver", "this Intel GPU has no float64, in which the kernel sums")
    assert queried == [("too old", 0), ("an old driver", 1)]


def test_rocm_and_xpu_take_triton(pretended_gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    class OnXpu(OnGpu):
        device = torch.device("xpu")

    xpu: Any = OnXpu()
    pretended_gpu(capability=(0, 0))
    assert _dispatch.select("gae", xpu).name == "rlhf_fast_triton"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(_ext, "has_kernel", lambda op, device: True)
    _dispatch.find_native_kernels()
    gpu: Any = OnGpu()
    assert _dispatch.select("gae", gpu).name == "rlhf_fast_triton"


def test_environment_chooses_the_backend() -> None:
    shown = python("import rlhf_fast as rf; print({row.backend for row in rf.backends()})", RLHF_FAST_BACKEND="torch")
    assert shown.stdout.strip() == "{'torch'}", shown.stderr


def test_unknown_names_in_the_environment_raise_at_import() -> None:
    refused = python("import rlhf_fast", RLHF_FAST_BACKEND="cuda")
    assert refused.returncode != 0
    assert (
        "ValueError: RLHF_FAST_BACKEND: backend must be one of auto, native, triton, torch, got 'cuda'"
        in refused.stderr
    )
    refused = python("import rlhf_fast", RLHF_FAST_CPU="sse9")
    assert refused.returncode != 0
    assert "RLHF_FAST_CPU" in refused.stderr and "default, avx2, avx512" in refused.stderr


def test_nothing_but_torch_is_imported() -> None:
    """`import rlhf_fast` stays light: no transformers, no numpy of its own, no build tools."""
    code = (
        "import sys, torch; before = set(sys.modules); import rlhf_fast;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names);"
        "print(sorted(new - {'rlhf_fast', 'torch'}))"
    )
    shown = python(code)
    assert shown.stdout.strip() == "[]", shown.stdout + shown.stderr


# The same calls in a fresh process under each instruction set: what a user of RLHF_FAST_CPU gets.
BUNDLE = """
import sys
sys.argv, sys.path = ["", {out!r}], [{tests!r}, *sys.path]
import torch
from helpers.samples import build, with_kernels
from test_contract import run
import rlhf_fast as rf
from rlhf_fast import _ext
with rf.use_backend("native"):
    results = {{name: run(build(name, torch.float32, rows=(5, 33))) for name in with_kernels()}}
torch.save({{"cpu": _ext.cpu_capability(), **results}}, sys.argv[1])
"""


@needs_native
@pytest.mark.parametrize("instruction_set", ["default", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_to_rounding(instruction_set: str, tmp_path: Path) -> None:
    done = python(BUNDLE.format(out=str(tmp_path / "out.pt"), tests=str(ROOT / "tests")), RLHF_FAST_CPU=instruction_set)
    assert done.returncode == 0, done.stderr
    bundle = torch.load(tmp_path / "out.pt")
    if bundle["cpu"] != instruction_set:
        pytest.skip(f"this host has no {instruction_set}")
    for name in with_kernels():
        with rf.use_backend("torch"):
            assert_same(bundle[name], run(build(name, torch.float32, rows=(5, 33))), atol=1e-5)


def test_option_codes_are_those_of_the_kernels() -> None:
    """rlhf_fast/ops/codes.py and csrc/math.h hold the same numbers."""
    header = (ROOT / "csrc" / "math.h").read_text()
    numbers = {name: int(value) for name, value in re.findall(r"\bk(\w+) = (\d+)", header)}
    for table in (codes.OUTPUTS, codes.KL_KINDS, codes.ESTIMATORS, codes.GRADIENTS):
        for name, code in table.items():
            assert numbers["".join(part.capitalize() for part in name.split("_"))] == code, name


def test_leaving_autograd_out_is_invisible() -> None:
    """`call` skips autograd's layer only where nothing could want it; functorch still meets it."""
    logits, targets = torch.randn(4, 9), torch.tensor([1, 2, 3, 4])
    leaf = logits.clone().requires_grad_()
    assert rf.token_logprobs(leaf, targets).requires_grad
    assert not rf.token_logprobs(logits, targets).requires_grad
    with torch.no_grad():
        assert not rf.token_logprobs(leaf, targets).requires_grad
    with pytest.raises(RuntimeError):  # not supported, and it may not pass for a constant
        torch.func.grad(lambda x: rf.token_logprobs(x, targets).sum())(logits)


def test_every_list_of_ops_names_all_of_them() -> None:
    """Definitions fill the tables; what cannot be derived (CMake, samples, public names) is compared with them."""
    root = Path(__file__).parent.parent
    defined = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("rlhf_fast_torch::")
    }
    public = {name for name in rf.__all__ if inspect.isfunction(getattr(rf, name))} - {"backends", "use_backend"}
    assert set(_dispatch.KERNEL_OF) == public
    assert set(_dispatch.KERNEL_OF.values()) - {""} <= defined
    without_kernels = {op for op, kernel in _dispatch.KERNEL_OF.items() if not kernel}
    assert {build(name, torch.float32).op for name in SAMPLES} == public
    launched = [name for names in _triton.FAMILIES.values() for name in names]
    with_kernels = {name for name in defined if name.removesuffix("_backward") not in without_kernels}
    with_kernels.discard("decode_attention")  # for CPUs only, and defined where it is imported
    assert sorted(launched) == sorted(name for name in with_kernels if not name.startswith("linear_"))
    if _triton.installed:
        for family, names in _triton.FAMILIES.items():
            module = importlib.import_module(f"rlhf_fast.kernels.{family}")
            assert all(callable(getattr(module, name, None)) for name in names), family
    sources = {path.stem for path in (root / "csrc/cuda").glob("*.cu")}
    built = set(re.findall(r"csrc/cuda/(\w+)\.cu\b", (root / "CMakeLists.txt").read_text()))
    assert built == sources == set(machine.FAMILIES)
