# SPDX-License-Identifier: Apache-2.0
"""A machine with two CUDA devices that are not there: see runtime.cpp. For a process of its own.

`load()` links the CUDA objects of the build with the fake runtime and loads them over the extension's own CUDA kernels;
other operators on such tensors run on the host (`_on_the_host`), where the memory is.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
TORCH = Path(torch.__file__).parent
FAMILIES = ("logprob", "kl", "gae", "probe")


def cuda_objects() -> list[Path]:
    """The CUDA objects of the newest build tree that has them all; none where there is no such tree."""
    for tree in sorted(ROOT.glob("build/cmake-*"), key=lambda path: path.stat().st_mtime, reverse=True):
        objects = [tree / "CMakeFiles/_C.dir/csrc/cuda" / f"{family}.cu.o" for family in FAMILIES]
        if all(path.exists() for path in objects):
            return objects
    return []


def cuda_headers() -> Path | None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null"], capture_output=True, text=True).stderr
    found = re.search(r'INCLUDES="?-I([^"\s]+)', said)
    return Path(found[1]) if found else None


def build(folder: Path) -> tuple[Path, Path]:
    """libtorch_cuda.so and the extension's CUDA kernels on the fake runtime."""
    stream, kernels = folder / "libtorch_cuda.so", folder / "kernels.so"
    shared = ["g++", "-std=c++20", "-shared", "-fPIC", "-O1"]
    named = "-Wl,-soname,libtorch_cuda.so"
    subprocess.run([*shared, named, str(FOLDER / "torch_cuda.cpp"), "-o", str(stream)], check=True)
    header = next(cuda_objects()[0].parents[4].glob("generated/torch_target.h"))
    shared += [f"-I{TORCH / 'include'}"]
    tensors = folder / "tensors.so"
    subprocess.run(
        [*shared, str(FOLDER / "tensors.cpp"), "-o", str(tensors), f"-L{TORCH / 'lib'}", "-lc10"], check=True
    )
    command = [*shared, "-include", str(header), f"-I{cuda_headers()}", "-Wl,-rpath," + str(folder)]
    command += [str(FOLDER / "runtime.cpp"), *map(str, cuda_objects()), str(tensors), "-o", str(kernels)]
    subprocess.run([*command, f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", "-ldl"], check=True)
    return stream, kernels


class Launch(NamedTuple):
    kernel: str
    blocks: int
    threads: int
    stream: int
    device: int
    cluster: int


class Allocation(NamedTuple):
    address: int
    bytes: int
    dtype: torch.dtype


class Machine:
    """What the tests steer and read."""

    def __init__(self, folder: Path) -> None:
        torch._C._ensureCUDADeviceGuardSet()  # a guard of no effect, as for fake tensors
        torch.cuda._lazy_init = lambda: None  # "Torch not compiled with CUDA enabled"
        self.folder = folder
        stream, kernels = build(folder)
        self.stream_path = stream
        torch.ops.load_library(str(kernels))
        self._runtime = ctypes.CDLL(str(kernels))
        self._runtime.fake_cuda_log.restype = self._runtime.fake_cuda_why_not.restype = ctypes.c_char_p
        self._library = torch.library.Library("_", "IMPL")
        self._library.fallback(functools.partial(_on_the_host, self), "CUDA")
        self.allocations: list[Allocation] = []

    def load_torch_cuda(self) -> None:
        """As `import torch` does on a CUDA build: privately."""
        self._torch_cuda = ctypes.CDLL(str(self.stream_path), mode=os.RTLD_LOCAL | os.RTLD_NOW)

    def fail_streams(self, code: int) -> None:
        self._torch_cuda.fail_to_give_streams(code)

    def fail(self, function: str, error: int = 700) -> None:
        self._runtime.fake_cuda_fail(function.encode(), error)

    def pretend(self, driver: int = 13000, code: int = 90, clusters: int = 1) -> None:
        self._runtime.fake_cuda_set(driver, code, clusters)

    def capture(self, capturing: bool) -> None:
        """PyTorch captures a stream, and no kernel was used before."""
        self._runtime.fake_cuda_capture(int(capturing))

    def lines(self) -> list[str]:
        """What the runtime was asked since the last call."""
        return list(self._runtime.fake_cuda_log().decode().splitlines())

    def last_error(self) -> int:
        """What the runtime keeps for the next to ask, and forgets then."""
        return int(self._runtime.cudaGetLastError())

    def why_not(self, device: int) -> str:
        """The extension's probe of a device."""
        return str(self._runtime.fake_cuda_why_not(device).decode())

    def forget(self) -> None:
        self.lines()
        self.allocations.clear()


def launches(lines: list[str]) -> list[Launch]:
    found = []
    for line in lines:
        if line.startswith("launch "):
            name = line.removeprefix("launch ").split(" blocks=")[0].replace("rlhf_fast::cuda::", "")
            numbers = [int(n) for n in re.findall(r"(?:blocks|threads|stream|device|cluster)=(\d+)", line)]
            found.append(Launch(name, *numbers))
    return found


def on_device(x: Any, index: int = 1) -> Any:
    return torch.ops.rlhf_fast_fake_cuda.on_device(x, index) if isinstance(x, Tensor) else x


def _on_the_host(machine: Machine, op: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operator of PyTorch on such tensors: computed on the host, its result given to the device."""
    index = next((x.device.index for x in torch.utils._pytree.tree_leaves(args) if _is_there(x)), 1)
    index = kwargs["device"].index if kwargs.get("device") is not None else index

    def here(x: Any) -> Any:
        if isinstance(x, torch.device):
            return torch.device("cpu")
        return torch.ops.rlhf_fast_fake_cuda.on_host(x) if _is_there(x) else x

    result = op(*tree_map(here, args), **tree_map(here, kwargs))
    if isinstance(result, Tensor):
        there = on_device(result, index or 0)
        if "empty" in op.name():
            machine.allocations.append(Allocation(there.data_ptr(), there.nbytes, there.dtype))
        return there
    return tree_map(lambda x: on_device(x, index or 0), result)


class OnTheHost(TorchDispatchMode):
    """What Python calls of PyTorch's own operators, with such tensors: some of their kernels start CUDA themselves."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace.startswith("rlhf_fast"):
            return op(*args, **(kwargs or {}))
        return _on_the_host(self.machine, op, *args, **(kwargs or {}))


def _is_there(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type == "cuda"
