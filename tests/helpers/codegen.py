# SPDX-License-Identifier: Apache-2.0
"""What nvcc made of the CUDA kernels: registers, shared memory, spills and 16-byte accesses, read from the built `_C`.

`python tests/helpers/codegen.py` writes docs/codegen.md; tests/test_cuda_build.py asserts what must hold.
"""

from __future__ import annotations

import functools
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


@functools.cache
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
        elif match := re.search(r"\b(LDG\.E|STG\.E|LDL|STL)\b(?:\.EF)?(\.128)?\b", line):  # EF: leaves the cache first
            counts[name][match[1] + (match[2] or "")] += 1
    return counts


def _lengths(arch: str) -> dict[str, int]:
    """Mangled name -> how many instructions the kernel has."""
    counts: Counter[str] = Counter()
    name = ""
    for line in _dump("-sass", "-arch", arch).splitlines():
        if match := re.search(r"Function : (\S+)", line):
            name = match[1]
        elif re.match(r"\s+/\*[0-9a-f]{4,5}\*/", line):
            counts[name] += 1
    return counts


class Loop(NamedTuple):
    """One that streams: its 16-byte loads and all its instructions."""

    loads: int
    instructions: int


def hot_loops(arch: str) -> dict[str, list[Loop]]:
    """Mangled name -> the innermost loops with the most 16-byte loads, as they lie in the code; none that shifts."""
    bodies: dict[str, list[tuple[int, str, str]]] = {}
    for line in _dump("-sass", "-arch", arch).splitlines():
        if match := re.search(r"Function : (\S+)", line):
            code = bodies.setdefault(match[1], [])
        elif match := re.match(r"\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)(.*)", line):
            code.append((int(match[1], 16), match[2], match[3]))
    return {name: loops for name, code in bodies.items() if (loops := _streaming_loops(code))}


def _streaming_loops(code: list[tuple[int, str, str]]) -> list[Loop]:
    found = []
    for address, operation, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if operation.startswith("BRA") else None
        if target is None or int(target[1], 16) >= address:
            continue
        begin = int(target[1], 16)
        body = [operation for at, operation, _ in code if begin <= at <= address]
        if any(operation.startswith("SHF.R.W") for operation in body):  # shifts what it loads: rows of another phase
            continue
        loads = sum(re.match(r"LDG\.E\.(EF\.)?128", operation) is not None for operation in body)
        if loads:
            found.append((begin, address, Loop(loads, len(body))))
    inner = [x for x in found if not any(x[0] <= y[0] and y[1] <= x[1] and x != y for y in found)]
    most = max((loop.loads for _, _, loop in inner), default=0)
    return [loop for _, _, loop in sorted(inner) if loop.loads == most]


class Case(NamedTuple):
    """A shape of docs/benchmarks.md, and the loops that it goes through."""

    name: str
    kernel: str
    loops: tuple[int, ...]  # which of the kernel's
    entries: int  # or pairs of them, or tokens
    entries_of_a_turn: int  # of a thread
    bytes_of_an_entry: int
    before: int  # instructions of a turn, in the build before these counts were lowered


ROWS, LONG_ROWS = 8192 * 151_936, 4096 * 131_072
CASES = (
    Case(
        "token_stats, all outputs, 8192 x 151936", "token_stats_kernel<BFloat16, false, true>", (0,), ROWS, 32, 2, 445
    ),
    Case("its backward in place", "token_stats_backward_kernel<BFloat16, false, true>", (0,), ROWS, 32, 4, 0),
    Case("token_kl reverse, 4096 x 131072", "token_kl_kernel<BFloat16, false, 0>", (0,), LONG_ROWS, 16, 4, 424),
    Case("the same with its gradient", "token_kl_kernel<BFloat16, false, 0>", (0, 1), LONG_ROWS, 16, 6, 0),
    Case("gae fp32, 256 x 131072", "gae_rows_kernel<float, 1>", (0,), 256 * 131_072, 8, 16, 0),
    Case("vtrace fp32, 256 x 131072", "vtrace_kernel<float>", (0,), 256 * 131_072, 8, 20, 0),
)
LANES_A_SECOND = 132 * 4 * 32 * 1.755e9  # of an H100: multiprocessors, warps' instructions a cycle, lanes, clock
BYTES_A_SECOND = 3.0e12


def predictions(loops: dict[str, list[Loop]]) -> list[str]:
    """Lines of a table: what the counts say of the time. `loops` by readable name."""
    lines = [
        "| shape | instructions of a turn, before | now | issue slots, ms | memory, ms | predicted, ms |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in CASES:
        now = sum(loops[case.kernel][i].instructions for i in case.loops)
        issue = 1e3 * case.entries * now / case.entries_of_a_turn / LANES_A_SECOND
        memory = 1e3 * case.entries * case.bytes_of_an_entry / BYTES_A_SECOND
        lines.append(
            f"| {case.name} | {case.before or '-'} | {now} | {issue:.2f} | {memory:.2f} | {max(issue, memory):.2f} |"
        )
    return lines


TEXT = """\
# What nvcc makes of the CUDA kernels

Written by `python tests/helpers/codegen.py` from the built extension (nvcc 13.0).
`tests/test_cuda_build.py` fails when a kernel spills, or when a hot loop has lost its 16-byte loads.
Local memory and stack of all kernels together, on all three architectures: {spills} bytes.

`<T, flags>`: the dtype, then the kernel's compile-time options (softcap, all outputs, kind of KL).
Kernels over rows of logits have 512 threads a block: two blocks of 64 registers a thread fit on a
multiprocessor. Kernels over tokens have 256.

Hot loops: the instructions of those with the most 16-byte loads, and these loads, on sm_90; a load is
eight bfloat16 entries. Of token_kl's the first folds the pair of rows, the last write the gradients of
either side. `tests/test_cuda_build.py` keeps the counts from rising.

## What the counts predict

No time was measured. Predicted is the larger of two: the time that an H100 (132 multiprocessors,
1.755 GHz, four instructions of a warp a cycle) takes to issue the loop's instructions, and the time to
move the bytes at 3.0 TB/s. Neither counts the ends of rows. A turn is four loads of 16 bytes; of gae and
vtrace a thread's eight tokens, with all branches, taken or not. Second reads of `token_kl` with its gradient are
taken to hit the L2 cache. Before: in an earlier build, where the argmax was looked up in the loop and
bfloat16 converted entry by entry.

{predictions}

What these counts do not show, estimated:

- The last round of a row, which is not full, loads all that it reads before the first is used; it was
  up to three loads one after the other. The target is read ahead, its logit while the block's sums are
  merged. Of the 27 us that a row of 303 872 bytes takes a block, that is some 2 us less of waiting.
- Few rows are shared by clusters of 2, 4 or 8 blocks, of which the first merges: one launch less, some
  2 us.
- `gae` of as many long rows as there are multiprocessors: a block goes along a whole row, and reads a
  tile while it works on the one behind. No block waits for another, and nothing is cleared before. That
  kernel has {gae_rows} instructions; the other, for few rows and packed sequences, {gae}.
- `vtrace` gives a block to every sequence, scans twice a tile (the next value, then the gain) and reads a tile
  only when it comes to it; a single long row is one block's.
- `token_kl` with its gradient reads the rows for the last time, and writes, as what leaves the L2 cache
  first, so that the rows that are read again find more room there.

Left out: shifted loads for rows that begin at different 16-byte phases, of `token_kl` with a softcap and kind jsd:
they go entry by entry. With such loads the kernel of bfloat16 has 8 bytes on the stack on sm_100 (none on sm_80 and
sm_90), and 10856 instructions in place of 7752 on sm_90.

Left out: bulk copies (TMA) into a ring in shared memory, on sm_90 and later. In every line of the table the
memory takes longer than the issue slots, and of a turn's 324 instructions (`token_stats`) a bulk copy would
take the place of four loads and some twenty that compute addresses and bounds. What it could buy
is the wait at a row's end, an estimated 1 to 2 of 27 us, by reading the next row's begin meanwhile. The
emulator does not show the order of asynchronous copies, so it could not be proven without a GPU.

## What was tried on the kernels over tokens

A thread decides whether it can read and write 16 bytes at a time. It decided for each array by itself; now once for all
arrays that it reads together, and once for all that it writes. All instructions of a kernel, sm_90:

| kernel | a decision for each array | now |
| --- | ---: | ---: |
{tried}

A single decision for all arrays, the flags included, gave more: 1776 for `gae_kernel<float, 1>`.

## Every kernel

| kernel | registers sm_80 | sm_90 | sm_100 | shared bytes | 16-byte loads | 16-byte stores | hot loops |
| --- | --- | --- | --- | --- | --- | --- | --- |
{kernels}
"""


# Instructions when a thread still decided for each array by itself how to read and write it.
BEFORE = {
    "gae_kernel<float, 1>": 1712,
    "gae_kernel<float, 2>": 2288,
    "ppo_advantages_kernel<float>": 2576,
    "vtrace_kernel<float>": 1800,
}


def page() -> str:
    """docs/codegen.md as it should be for the extension that is built."""
    usage, wide, loops = resources(), wide_accesses("sm_90"), hot_loops("sm_90")
    readable = _readable(set(wide))
    lengths = {readable[name]: length for name, length in _lengths("sm_90").items()}
    rows = []
    for name in sorted(wide, key=lambda n: readable[n]):
        registers = " | ".join(str(usage[arch, name].registers) for arch in ARCHS)
        loads, stores = (wide[name][kind] for kind in WIDE)
        loop = ", ".join(f"{x.instructions} of {x.loads}" for x in loops.get(name, [])) or "-"
        rows.append(
            f"| `{readable[name]}` | {registers} | {usage['sm_90', name].shared} | {loads} | {stores} | {loop} |"
        )
    spills = sum(u.stack + u.local for u in usage.values())
    table = "\n".join(predictions({readable[name]: found for name, found in loops.items()}))
    gae, gae_rows = (lengths[f"{name}<float, 1>"] for name in ("gae_kernel", "gae_rows_kernel"))
    tried = "\n".join(f"| `{name}` | {before} | {lengths[name]} |" for name, before in BEFORE.items())
    return TEXT.format(
        spills=spills, predictions=table, gae=gae, gae_rows=gae_rows, tried=tried, kernels="\n".join(rows)
    )


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE.relative_to(ROOT)}")
