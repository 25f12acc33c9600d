# SPDX-License-Identifier: Apache-2.0
"""What the bindings do on their way to a GPU, seen by the fake runtime. Run by tests/test_fake_cuda.py in a process of
its own, since the CUDA kernels of that process are exchanged for good.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda.machine import Launch, Machine, OnTheHost, launches, on_device
from helpers.samples import build, with_kernels
from torch import Tensor
from torch.utils._pytree import tree_map

import rlhf_fast as rf
from rlhf_fast import _dispatch, _ext, _triton

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from gpu import driver  # noqa: E402

STREAM = 0x1000  # of device 0; see torch_cuda.cpp
DEVICE = 1
PROCESSORS = 132
# linear_ ops compute within an operator of ours, on which PyTorch has no kernels; they use the same of ours as others.
DIRECT = sorted(name for name in with_kernels() if not name.startswith("linear_"))


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("fake_cuda"))


@pytest.fixture(scope="session")
def started(machine: Machine) -> Machine:
    machine.load_torch_cuda()
    return machine


@pytest.fixture
def gpu(started: Machine) -> Iterator[Machine]:
    started.forget()
    yield started
    started.pretend()
    started.capture(False)


def launched(gpu: Machine) -> list[Launch]:
    return launches(gpu.lines())


def logits(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return on_device(torch.zeros(shape, dtype=dtype), DEVICE)


# ------------------------------------------------------------------------------------------- no PyTorch with CUDA


def test_without_libtorch_cuda_a_call_says_what_is_missing(machine: Machine) -> None:
    """Must run before any test that loads it, hence its place."""
    with pytest.raises(RuntimeError, match=r"rlhf_fast\.token_stats: .* no PyTorch with CUDA \(libtorch_cuda\.so\)"):
        rf.token_logprobs(logits(2, 8), on_device(torch.zeros(2, dtype=torch.int64), DEVICE))
    assert machine.why_not(0) == "this process has no PyTorch with CUDA (libtorch_cuda.so)"


# ------------------------------------------------------------------------------------------- every op


def moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """rf.<op>(...) takes its tensors to the device."""

    def there(op: Any) -> Any:
        return lambda *args, **kwargs: op(*tree_map(move, args), **tree_map(move, kwargs))

    def move(x: Any) -> Any:
        return on_device(x, DEVICE) if isinstance(x, Tensor) and x.device.type == "cpu" else x

    for name in _dispatch.KERNEL_OF:
        monkeypatch.setattr(rf, name, there(getattr(rf, name)))


def call(gpu: Machine, name: str, rows: tuple[int, int] = (3, 4)) -> Any:
    """What the sample gives there, once its functions move their tensors."""
    sample = build(name, torch.float32, rows=rows)
    inputs = {k: on_device(x, DEVICE) for k, x in sample.inputs.items()}  # no gradient: autograd would start CUDA
    with rf.use_backend("native"), OnTheHost(gpu):
        return sample.call(**inputs)


@pytest.mark.parametrize("name", DIRECT)
def test_every_launch_goes_to_the_tensors_device_and_pytorchs_stream(
    gpu: Machine, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """In a private library, found although no symbol of it is global; and the device is given back afterwards."""
    moved(monkeypatch)
    result = call(gpu, name)
    lines = gpu.lines()
    assert launches(lines), lines
    assert {(x.device, x.stream) for x in launches(lines)} == {(DEVICE, STREAM + DEVICE)}
    assert not [line for line in lines if line in ("synchronize", f"set device {DEVICE}")]
    guards = [line for line in lines if line.startswith("guard")]
    assert guards == [f"guard {DEVICE}", "guard back to 0"] * (len(guards) // 2)
    assert all(x.device == torch.device("cuda", DEVICE) for x in torch.utils._pytree.tree_leaves(result))


def backward(op: str, *args: Any) -> Any:
    return getattr(torch.ops.rlhf_fast, op)(*args)


def test_backwards_launch_there_too(gpu: Machine) -> None:
    n, v = 4, 64
    x, ones = logits(n, v), on_device(torch.ones(n), DEVICE)
    targets = on_device(torch.zeros(n, dtype=torch.int64), DEVICE)
    pair, plain = on_device(torch.zeros(n, 2), DEVICE), (1.0, 1.0, 0.0, -1)
    backward("token_stats_backward", ones, ones, None, x, targets, None, None, ones, pair, *plain)
    backward("token_stats_backward_", ones, None, None, x, targets, None, None, None, pair, *plain)
    six = on_device(torch.zeros(n, 6), DEVICE)
    backward("token_kl_backward", ones, x, x, None, None, None, six, 1.0, *plain, 0, 0.5, True, True)
    backward("approx_kl_backward", ones, ones, ones, None, None, 0, 0, 1.0)
    found = launched(gpu)
    assert [x.kernel.split("<")[0] for x in found] == [
        "token_stats_backward_kernel", "token_stats_backward_kernel",
        "token_kl_kernel", "token_kl_kernel", "approx_kl_backward_kernel",
    ]  # fmt: skip
    assert {(x.device, x.stream) for x in found} == {(DEVICE, STREAM + DEVICE)}


@pytest.mark.parametrize("rows", [(0, 4), (2, 0)], ids=str)
def test_nothing_is_launched_of_nothing(gpu: Machine, monkeypatch: pytest.MonkeyPatch, rows: tuple[int, int]) -> None:
    """A launch of no blocks would be an error. The sums of whitening are 0 then, which a kernel writes."""
    moved(monkeypatch)
    for name in DIRECT:
        if "packed" not in name:  # their bounds need tokens
            call(gpu, name, rows)
            sums = name in ("masked_whiten", "ppo_advantages")
            assert [x.kernel for x in launched(gpu)] == ["sum_moments_kernel"] * sums, name
    empty, six = logits(*rows, 8), on_device(torch.zeros(*rows, 6), DEVICE)
    none, plain = on_device(torch.zeros(rows), DEVICE), (1.0, 1.0, 0.0, -1)
    backward("token_stats_backward", None, none, None, empty, None, None, None, none, six[..., :2], *plain)
    backward("token_kl_backward", none, empty, empty, None, None, None, six, 1.0, *plain, 0, 0.5, True, True)
    backward("approx_kl_backward", none, none, none, None, None, 0, 0, 1.0)
    assert launched(gpu) == []


@pytest.mark.parametrize("name", DIRECT)
def test_a_first_call_may_be_captured(gpu: Machine, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Its kernels are loaded then, which drivers before CUDA 12.3 refuse unless the thread's mode is relaxed."""
    moved(monkeypatch)
    gpu.capture(True)
    call(gpu, name)
    modes = [line for line in gpu.lines() if line.startswith("capture mode")]
    assert modes == ["capture mode 2", "capture mode 0"] * (len(modes) // 2), "the mode is not given back"


# ------------------------------------------------------------------------------------------- sizes


def workspaces(gpu: Machine) -> list[tuple[int, int]]:
    """Address and bytes of the scratch memory that was allocated and is not empty."""
    return [(a.address, a.bytes) for a in gpu.allocations if a.dtype == torch.uint8 and a.bytes > 0]


@pytest.mark.parametrize("rows", [3, 64, 100, 133, 200, 264, 265, 300, 527, 1000, 8192])
def test_rows_are_split_so_that_few_multiprocessors_idle(gpu: Machine, rows: int) -> None:
    """Blocks come in waves of two for each multiprocessor; and what the parts hand on has room."""
    x = on_device(torch.zeros(1, 151_936, dtype=torch.bfloat16).expand(rows, 151_936), DEVICE)
    rf.token_stats(x, None, outputs=("entropy",))
    found, wave = launched(gpu), 2 * PROCESSORS
    parts, rest = divmod(found[0].blocks, rows)
    assert rest == 0 and found[0].threads == 512
    used = found[0].blocks / (-(-found[0].blocks // wave) * wave)
    assert used > 0.75 or parts == 9, f"{parts} parts use {used:.0%}"  # nine have four loads a thread each
    assert sum(size for _, size in workspaces(gpu)) == (20 * found[0].blocks if parts > 1 else 0)
    assert found[0].cluster == (parts if parts in (2, 4, 8) else 1), "a cluster that has the whole row merges it"
    merged = parts == 1 or found[0].cluster > 1
    assert [x.kernel.split("<")[0] for x in found[1:]] == ([] if merged else ["token_stats_merge_kernel"])


def test_without_room_for_clusters_parts_are_merged_by_a_second_launch(gpu: Machine) -> None:
    x = on_device(torch.zeros(1, 151_936, dtype=torch.bfloat16).expand(64, 151_936), DEVICE)
    rf.token_stats(x, None, outputs=("entropy",))
    assert [x.cluster for x in launched(gpu)] == [4]
    gpu.pretend(clusters=0)
    rf.token_stats(x, None, outputs=("entropy",))
    assert [(x.cluster, x.threads) for x in launched(gpu)] == [(1, 512), (1, 32)]
    gpu.pretend(code=80)
    rf.token_stats(x, None, outputs=("entropy",))
    assert [x.cluster for x in launched(gpu)] == [1, 1]


@pytest.mark.parametrize("size", driver.CLUSTERS)
def test_what_compute_sanitizer_watches_has_clusters_of_every_size(gpu: Machine, size: int) -> None:
    rows, width = driver.CLUSTERS[size]
    x = on_device(torch.zeros(1, width, dtype=torch.bfloat16).expand(rows, width), DEVICE)
    rf.token_stats(x, None, outputs=("entropy", "argmax"))
    assert [(x.blocks, x.cluster) for x in launched(gpu)] == [(rows * size, size)]


def test_short_rows_are_not_split(gpu: Machine) -> None:
    rf.token_stats(logits(3, 1000), None, outputs=("entropy",))
    assert [x.blocks for x in launched(gpu)] == [3]


@pytest.mark.parametrize(("rows", "length"), [(1, 2048), (1, 2049), (3, 5000), (300, 777)])
def test_gae_clears_exactly_the_memory_that_its_blocks_talk_through(gpu: Machine, rows: int, length: int) -> None:
    zeros = on_device(torch.zeros(rows, length), DEVICE)
    rf.gae(zeros, zeros)
    lines = gpu.lines()
    cleared = [tuple(int(part.split("=")[1]) for part in x.split()[1:]) for x in lines if x.startswith("memset")]
    assert [(to, size) for to, _, size, _ in cleared] == workspaces(gpu)
    assert all(stream == STREAM + DEVICE for *_, stream in cleared)
    assert [x.kernel.split("<")[0] for x in launches(lines)] == ["gae_kernel"]


@pytest.mark.parametrize(("rows", "length", "walks"), [
    (PROCESSORS, 8192, True), (256, 16_384, True), (PROCESSORS - 1, 8192, False), (PROCESSORS, 8200, False),
    (PROCESSORS, 2048, False),  # no tile waits for another
])  # fmt: skip
def test_many_long_rows_of_gae_are_a_block_each_and_clear_nothing(
    gpu: Machine, rows: int, length: int, walks: bool
) -> None:
    zeros = on_device(torch.zeros(1, length).expand(rows, length).contiguous(), DEVICE)
    rf.gae(zeros, zeros)
    lines = gpu.lines()
    (found,) = launches(lines)
    assert found.kernel.startswith("gae_rows_kernel" if walks else "gae_kernel")
    if walks:
        assert found.blocks == rows and not workspaces(gpu) and not [x for x in lines if x.startswith("memset")]


def kl_and_grad(rows: int, width: int, kind: str = "jsd") -> None:
    x = on_device(torch.zeros(1, width, dtype=torch.bfloat16).expand(rows, width), DEVICE)
    with torch.no_grad():
        rf.token_kl_and_grad(x, x, on_device(torch.ones(rows), DEVICE), kind=kind)


@pytest.mark.parametrize(("rows", "width"), [(1, 70_000), (40, 70_001), (88, 70_001), (53, 151_936), (150, 70_001)])
def test_clusters_are_powers_of_two_that_the_device_has_room_for(gpu: Machine, rows: int, width: int) -> None:
    kl_and_grad(rows, width)
    lines = gpu.lines()
    found = launches(lines)
    assert all(x.cluster in (1, 2, 4, 8) for x in found)
    for x in found:
        assert x.cluster == 1 or (x.blocks == rows * x.cluster and f"clusters of {x.cluster}?" in lines)


def test_without_room_for_clusters_each_step_is_a_launch(gpu: Machine) -> None:
    kl_and_grad(88, 70_001)
    assert [x.cluster > 1 for x in launched(gpu)] == [True]
    gpu.pretend(clusters=0)
    kl_and_grad(88, 70_001)
    assert [x.cluster for x in launched(gpu)] == [1, 1, 1]
    gpu.pretend()
    gpu.fail("cudaOccupancyMaxActiveClusters")
    kl_and_grad(88, 70_001)
    assert [x.cluster for x in launched(gpu)] == [1, 1, 1]
    assert gpu.last_error() == 0


def test_code_without_the_clusters_barrier_is_launched_without_clusters(gpu: Machine) -> None:
    """sm_80 code on a newer GPU: what decides is the code that runs, and the launch's device is asked for its cache."""
    gpu.pretend(code=80)
    kl_and_grad(88, 70_001)
    assert {x.cluster for x in launched(gpu)} == {1}
    gpu.pretend()
    kl_and_grad(88, 70_001)
    asked = [line for line in gpu.lines() if line.startswith("attribute")]
    assert asked and all(line.endswith(f" of {DEVICE}") for line in asked)


@pytest.mark.usefixtures("lazy_memory")
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 2**31), r"token_stats: logits must have at most 2147483647 columns, got 2147483648"),
        ((2**31, 1), r"token_stats: logits must have at most 2147483647 rows, got 2147483648"),
    ],
)
def test_what_a_launch_cannot_count_is_refused(gpu: Machine, shape: tuple[int, int], message: str) -> None:
    """Address space alone: nobody touches the memory."""
    x = on_device(torch.empty(shape[0] if shape[1] == 1 else 1, shape[1], dtype=torch.bfloat16), DEVICE)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.rlhf_fast.token_stats(x, None, None, None, 1.0, 1.0, 0.0, -1, 4, False)
    assert launched(gpu) == []


# ------------------------------------------------------------------------------------------- failures


def test_a_failed_launch_names_op_and_kernel_and_leaves_the_next_alone(gpu: Machine) -> None:
    x = logits(2, 8)
    gpu.fail("launch")
    with pytest.raises(RuntimeError, match="token_stats: the CUDA kernel token_stats_kernel failed: an error of the"):
        rf.token_stats(x, None, outputs=("entropy",))
    assert gpu.lines()[-1] == "guard back to 0"
    rf.token_stats(x, None, outputs=("entropy",))
    assert len(launched(gpu)) == 1
    assert gpu.last_error() == 0


def test_failing_surroundings_are_named(gpu: Machine) -> None:
    zeros = on_device(torch.zeros(1, 5000), DEVICE)
    gpu.fail("cudaMemsetAsync")
    with pytest.raises(RuntimeError, match="rlhf_fast.gae: the CUDA kernel gae_kernel failed"):
        rf.gae(zeros, zeros)
    assert gpu.last_error() == 0, "PyTorch's next check would find an error that was raised already"
    gpu.fail_streams(1)
    try:
        with pytest.raises(RuntimeError, match="rlhf_fast.gae: PyTorch gave no CUDA stream"):
            rf.gae(zeros, zeros)
    finally:
        gpu.fail_streams(0)


# ------------------------------------------------------------------------------------------- whether native serves


@pytest.fixture
def two_gpus(gpu: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """PyTorch believes in them; the probe is the extension's, on the fake runtime."""
    monkeypatch.setattr(_ext, "_gpu_refused", {})
    monkeypatch.setattr(_ext, "_native_refused", {})
    monkeypatch.setattr(_ext._C, "why_not_cuda", gpu.why_not)
    monkeypatch.setattr(_triton, "installed", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (9, 0))
    return gpu


def served() -> tuple[str, str]:
    row = next(row for row in rf.backends() if (row.op, row.device) == ("token_kl", "cuda"))
    return row.backend, row.why_not_faster


def test_a_device_is_probed_once_without_a_trace(two_gpus: Machine) -> None:
    x = logits(2, 8)
    for _ in range(2):
        assert _dispatch.select("token_kl", x).name == "rlhf_fast", served()
    lines = two_gpus.lines()
    assert [x.kernel for x in launches(lines)] == ["rlhf_fast::probe_kernel"]
    assert [line for line in lines if not line.startswith("launch")] == [
        f"set device {DEVICE}", "capture mode 2", "synchronize", "capture mode 0", "set device 0",
    ]  # fmt: skip
    assert launches(lines)[0].device == DEVICE and launches(lines)[0].stream != STREAM + DEVICE
    assert served() == ("native", "")  # device 0, asked for itself
    assert launches(two_gpus.lines())[0].device == 0


def test_an_old_driver_hands_over_to_triton(two_gpus: Machine) -> None:
    two_gpus.pretend(driver=12080)
    backend, reason = served()
    assert backend == "triton"
    assert "the NVIDIA driver supports CUDA 12.8, and the kernels were built with CUDA 13" in reason
    assert "update the driver, or build with a CUDA 12 toolkit" in reason
    assert _dispatch.select("gae", logits(2, 8)).name == "rlhf_fast_triton"
    with (
        rf.use_backend("native"),
        pytest.raises(RuntimeError, match="native backend was requested, but the NVIDIA"),
    ):
        rf.token_stats(logits(2, 8), None, outputs=("entropy",))
    assert launches(two_gpus.lines()) == []


def test_a_machine_without_a_driver_says_so(two_gpus: Machine) -> None:
    two_gpus.pretend(driver=0)
    assert served()[1] == "native: no NVIDIA driver is installed"


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("cudaDriverGetVersion", "the question for the driver's version failed: an error of the test"),
        ("cudaFuncGetAttributes", "loading the kernels failed: an error of the test; build with CUDAARCHS"),
        ("cudaStreamCreateWithFlags", "making a stream failed"),
        ("launch", "a first launch failed"),
        ("cudaStreamSynchronize", "a first launch failed"),
        ("cudaSetDevice", "choosing the device failed"),
    ],
)
def test_whatever_fails_in_the_probe_is_the_reason(two_gpus: Machine, function: str, reason: str) -> None:
    two_gpus.fail(function)
    backend, why = served()
    assert backend == "triton" and why.startswith(f"native: {reason}")
    assert "capture mode 2" not in two_gpus.lines()[-2:], "the thread's capture mode is not given back"


def test_the_test_would_notice_a_weak_symbol(started: Machine) -> None:
    """The mock is as private as Python loads PyTorch's library: a global look-up does not find it."""
    import ctypes

    with pytest.raises(AttributeError):
        _ = ctypes.CDLL(None).aoti_torch_get_current_cuda_stream
