# SPDX-License-Identifier: Apache-2.0
"""The compiled operators keep their distance: stable ABI alone, torch-free kernels, no symbol that two ISAs share.

One binary then serves every later torch and every Python from 3.11, and no AVX-512 copy of an inline function can be
linked into the path of a machine without it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from helpers.tools import native_is_built

from rlhf_fast import _ext

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"

needs_binary = pytest.mark.skipif(
    not native_is_built() or shutil.which("nm") is None, reason="extension not built, or no binutils"
)

# What a stable-ABI extension may ask of its surroundings: torch's C shims, CPython's limited API, libc and libstdc++.
ALLOWED = re.compile(
    r"@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$"  # versioned symbols of libc, libstdc++ and libgcc
    r"|^(aoti_|torch_)"  # the C shims of the stable ABI
    r"|^_?Py"  # CPython; that it is the limited API is what abi3audit checks, and the name .abi3.so promises
    r"|^_ZN?K?S[a-z]|^_ZT[VIST]N?S[a-z]"  # std::, unversioned where the linker found it in a library of torch
    r"|^_ITM_\w+$|^__gmon_start__$|^__cxa_finalize"  # weak, from the compiler's own start files
)


def symbols(binary: Path, *options: str) -> list[str]:
    lines = subprocess.run(
        ["nm", *options, str(binary)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [line.split()[-1] for line in lines if line.strip() and not line.endswith(":")]


def binary() -> Path:
    assert _ext._C is not None and _ext._C.__file__ is not None
    return Path(_ext._C.__file__)


@needs_binary
def test_undefined_symbols_are_stable_ones() -> None:
    undefined = [name for name in symbols(binary(), "-D", "-u")]
    assert any(name.startswith(("aoti_", "torch_")) for name in undefined), "nm shows no torch symbol: wrong file?"
    strange = [name for name in undefined if not ALLOWED.search(name)]
    assert not strange, f"symbols outside the stable ABI: {strange}"


@needs_binary
def test_no_cxx_symbol_of_torch() -> None:
    """at::, c10:: and torch:: C++ symbols change between releases; one of them would tie the binary to one torch."""
    undefined = symbols(binary(), "-D", "-u", "-C") + symbols(binary(), "-D", "-u")
    assert not [
        name for name in undefined if re.search(r"\b(at|c10|torch|caffe2)::|_ZN?K?(2at|3c10|5torch|6caffe2)", name)
    ]


@needs_binary
def test_file_name_promises_the_limited_api() -> None:
    assert binary().name == "_C.abi3.so"


def kernel_headers() -> list[Path]:
    return [
        *sorted((CSRC / "cpu").glob("*_kernel.h")),
        CSRC / "cpu" / "simd.h",
        CSRC / "cpu" / "kernels.h",
        CSRC / "cpu" / "kernels.cpp",
        CSRC / "math.h",
        *sorted((CSRC / "cuda").glob("*.cuh")),
    ]


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), flags=re.MULTILINE)


def test_kernels_never_include_torch() -> None:
    """Directly or through another of our headers."""
    assert len(kernel_headers()) >= 7
    for start in kernel_headers():
        todo, seen = [start], set()
        while todo:
            path = todo.pop()
            for name in includes(path):
                assert not re.match(r"(torch|ATen|c10|pybind11|Python)\b", name), f"{start.name} reaches <{name}>"
                inside = (path.parent / name).resolve()
                if inside.is_file() and inside not in seen:
                    seen.add(inside)
                    todo.append(inside)


def isa_objects() -> dict[str, list[Path]]:
    """Object files of the per-instruction-set libraries, by instruction set, from the newest build tree there is."""
    trees: dict[Path, dict[str, list[Path]]] = {}
    for path in ROOT.glob("build/**/kernels.cpp.o"):
        found = re.search(r"(default|avx512|avx2)", path.parent.as_posix().removeprefix(str(ROOT)))
        if found:
            tree = next(p for p in path.parents if p.name == "CMakeFiles").parent
            trees.setdefault(tree, {}).setdefault(found.group(1), []).append(path)
    complete = [tree for tree, objects in trees.items() if len(objects) >= 2]
    return trees[max(complete, key=lambda tree: tree.stat().st_mtime)] if complete else {}


@pytest.mark.skipif(shutil.which("nm") is None, reason="no binutils")
def test_instruction_sets_share_no_symbol() -> None:
    """The linker keeps one copy of a weak symbol: were it the AVX-512 one, older machines would die of SIGILL."""
    objects = isa_objects()
    if not objects:
        pytest.skip("no build tree in build/; the wheel's own build removes it")
    owners: Counter[str] = Counter()
    for paths in objects.values():
        defined = {name for path in paths for name in symbols(path, "--defined-only", "--extern-only")}
        owners.update({name for name in defined if not name.startswith("DW.ref.")})
    shared = [name for name, count in owners.items() if count > 1]
    assert not shared, f"defined for several instruction sets: {shared}"
    assert all(re.search(r"isa_(default|avx2|avx512)", name) for name in owners), sorted(owners)
