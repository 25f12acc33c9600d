# SPDX-License-Identifier: Apache-2.0
"""What nvcc made of the CUDA kernels: registers, shared memory, spills and 16-byte accesses, read from the built `_C`.

`python tests/helpers/codegen.py` writes docs/codegen.md; tests/test_cuda_build.py asserts what must hold.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "codegen.md"
ARCHS = ("sm_80", "sm_90", "sm_100")
WIDE = ("LDG.E.128", "STG.E.128")


class Usage(NamedTuple):
    """What one kernel takes on one architecture; bytes but for registers, which are per thread."""

    registers: int
    shared: int
    stack: int
    local: int


def cuobjdump() -> str | None:
    """The CUDA disassembler: of the toolkit, or the one inside Triton's wheel."""
    if (found := shutil.which("cuobjdump")) is not None:
        return found
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    inside = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(inside) if inside.exists() else None


def library() -> Path:
    return next((ROOT / "rlhf_fast").glob("_C.*so"))


def _dump(*options: str) -> str:
    program = cuobjdump()
    assert program is not None, "cuobjdump comes with Triton or the CUDA toolkit; neither is here"
    return subprocess.run([program, *options, str(library())], capture_output=True, text=True, check=True).stdout


def _readable(mangled: set[str]) -> dict[str, str]:
    """kernel<dtype, flags>, without namespaces and arguments."""
    names = sorted(mangled)
    shown = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = (line.removeprefix("void ").replace("rlhf_fast::cuda::", "").split("(")[0] for line in shown.splitlines())
    return dict(zip(names, short, strict=True))


def resources() -> dict[tuple[str, str], Usage]:
    """(architecture, mangled name) -> what the kernel takes."""
    found: dict[tuple[str, str], Usage] = {}
    arch = name = ""
    for line in _dump("-res-usage").splitlines():
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ").strip()
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
            found[arch, name] = Usage(numbers["REG"], numbers["SHARED"], numbers["STACK"], numbers["LOCAL"])
    return found


def wide_accesses(arch: str) -> dict[str, Counter[str]]:
    """Mangled name -> how many 16-byte loads and stores its code has, and accesses to local memory."""
    counts: dict[str, Counter[str]] = {}
    name = ""
    for line in _dump("-sass", "-arch", arch).splitlines():
        if match := re.search(r"Function : (\S+)", line):
            name = match[1]
            counts[name] = Counter()
        elif match := re.search(r"\b(LDG\.E\.128|STG\.E\.128|LDL|STL)\b", line):
            counts[name][match[1]] += 1
    return counts


def hot_loops(arch: str) -> dict[str, tuple[int, int]]:
    """Mangled name -> 16-byte loads and instructions of the loop that streams: the shortest with the most loads."""
    bodies: dict[str, list[tuple[int, str, str]]] = {}
    for line in _dump("-sass", "-arch", arch).splitlines():
        if match := re.search(r"Function : (\S+)", line):
            code = bodies.setdefault(match[1], [])
        elif match := re.match(r"\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)(.*)", line):
            code.append((int(match[1], 16), match[2], match[3]))
    found = {}
    for name, code in bodies.items():
        loops = []
        for address, operation, rest in code:
            target = re.search(r"0x([0-9a-f]+)", rest) if operation.startswith("BRA") else None
            if target is None or int(target[1], 16) >= address:
                continue
            body = [operation for at, operation, _ in code if int(target[1], 16) <= at <= address]
            loops.append((-sum(operation.startswith("LDG.E.128") for operation in body), len(body)))
        if loops and min(loops)[0] < 0:
            found[name] = (-min(loops)[0], min(loops)[1])
    return found


def page() -> str:
    """docs/codegen.md as it should be for the extension that is built."""
    usage, wide, loops = resources(), wide_accesses("sm_90"), hot_loops("sm_90")
    readable = _readable(set(wide))
    rows = []
    for name in sorted(wide, key=lambda n: readable[n]):
        registers = " | ".join(str(usage[arch, name].registers) for arch in ARCHS)
        loads, stores = (wide[name][kind] for kind in WIDE)
        loop = " of ".join(map(str, reversed(loops[name]))) if name in loops else "-"
        rows.append(
            f"| `{readable[name]}` | {registers} | {usage['sm_90', name].shared} | {loads} | {stores} | {loop} |"
        )
    spills = sum(u.stack + u.local for u in usage.values())
    return "\n".join(
        [
            "# What nvcc makes of the CUDA kernels",
            "",
            "Written by `python tests/helpers/codegen.py` from the built extension (nvcc 13.0).",
            "`tests/test_cuda_build.py` fails when a kernel spills, or when a hot loop has lost its 16-byte loads.",
            f"Local memory and stack of all kernels together, on all three architectures: {spills} bytes.",
            "",
            "`<T, flags>`: the dtype, then the kernel's compile-time options (softcap, all outputs, kind of KL).",
            "Kernels over rows of logits have 512 threads a block: two blocks of 64 registers a thread fit on a",
            "multiprocessor. Kernels over tokens have 256.",
            "",
            "Hot loop, on sm_90: '221 of 4' is 221 instructions for four 16-byte loads, each of eight bfloat16",
            "entries. `tests/test_cuda_build.py` fails if a count rises. These are counts, not times. Before the",
            "argmax was looked up after the fold, and bfloat16 unpacked by words, without a multiplication by 1,",
            "`token_stats_kernel<BFloat16, false, true>` had 445 of 4, 13.9 instructions an entry.",
            "",
            "| kernel | registers sm_80 | sm_90 | sm_100 | shared bytes | 16-byte loads | 16-byte stores | hot loop |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE.relative_to(ROOT)}")
