# SPDX-License-Identifier: Apache-2.0
"""Breaks the CUDA kernels on purpose, one line at a time, and sees whether the emulator notices.

`python tests/emulator/mutants.py [families]`; some minutes. A mutant is caught by wrong numbers, an abort, a data race
or a sanitizer. Prints the list, the count and the survivors.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from emulator import proof  # noqa: E402


class Mutant(NamedTuple):
    file: str  # in csrc/cuda
    old: str  # occurs there
    new: str
    ways: tuple[str, ...] = ("plain",)  # what is expected to notice: one of them is enough
    schedule: str = ""
    which: int = 0  # of several occurrences


RACES = ("races",)
LATE = "seed=5 resident=3 start=random"
MUTANTS: dict[str, list[Mutant]] = {
    "reduce": [
        Mutant("reduce.cuh", "  __syncthreads();\n", "", RACES),
        Mutant("reduce.cuh", "if (lane == 0) scratch[warp] = value;", "if (lane == 1) scratch[warp] = value;"),
        Mutant("reduce.cuh", "scratch[lane % kWarps]", "scratch[0]"),
        Mutant("reduce.cuh", "distance = kWarp / 2;", "distance = kWarp / 4;"),
        Mutant("reduce.cuh", "return broadcast_warp(value);", "return value;"),
    ],
    "vec": [
        Mutant("vec.cuh", "head + (end - head) / kPack<T> * kPack<T>,", "end,", ("memory",)),
        Mutant("vec.cuh", "if (head > end) head = end;", "", ("memory", "plain")),
        Mutant("vec.cuh", "+ 127) / 128 * 128", "+ 127) / 128 * 64"),
        Mutant("vec.cuh", "*begin + step < count ? *begin + step : count", "*begin + step", ("memory", "plain")),
    ],
    "logprob": [
        Mutant("softmax.cuh", "sum *= decay;\n    squares", "squares"),
        Mutant("softmax.cuh", "squares *= decay * decay;", "squares *= decay;"),
        Mutant("softmax.cuh", "(weighted - rise * sum) * decay", "weighted * decay"),
        Mutant("softmax.cuh", "b.max > a.max ||", "b.max < a.max ||"),
        Mutant("softmax.cuh", "raise_to(top, factor2, &b);", ""),
        Mutant("logprob.cuh", "log_sum - kLn2 *", "log_sum + kLn2 *"),
        Mutant("logprob.cuh", "fold.squares / fold.sum / fold.sum", "fold.squares / fold.sum"),
        Mutant("logprob.cuh", "if (a.k > 0) __syncthreads();", "", RACES, which=0),
        Mutant("logprob.cuh", "if (a.k > 0) __syncthreads();", "", ("races", "plain"), which=1),
        Mutant("logprob.cuh", "if (is_mine(target)) a.at_targets", "a.at_targets", ("memory", "races", "plain")),
        Mutant("logprob.cuh", "part < parts; part += kWarp", "part < parts - 1; part += kWarp"),
    ],
    "kl": [
        Mutant("kl_pair.cuh", "fold->cross += rise * fold->covered;", ""),
        Mutant("kl_pair.cuh", "fold->covered *= decay;", ""),
        Mutant("kl_pair.cuh", "a.other_sum += b.other_sum;", ""),
        Mutant("kl.cuh", "    cluster_barrier();\n", "", RACES),
        Mutant("kl.cuh", "part < parts; part += kWarp", "part < parts - 1; part += kWarp"),
        Mutant("kl.cuh", "kLn2 * beta * (logq", "kLn2 * (1 - beta) * (logq"),
        Mutant("kl.cuh", "if (row.last) zero_range", "if (!row.last) zero_range", ("memory", "plain")),
        Mutant("kl.cuh", "KlMeans{f.p + g.p, f.q + g.q,", "KlMeans{f.p + g.p, f.q,"),
    ],
    "gae": [
        Mutant("scan.cuh", "return gridDim.x - 1 - ticket[0];", "return gridDim.x - 1 - blockIdx.x;", schedule=LATE),
        Mutant("scan.cuh", "  __syncthreads();\n  return gridDim.x", "  return gridDim.x", RACES),
        Mutant("scan.cuh", "= from_lane;\n  __syncthreads();", "= from_lane;", RACES),
        Mutant("scan.cuh", "  __syncthreads();\n  return join(", "  return join(", RACES),
        Mutant("scan.cuh", "if (left.scale[c] == kCut) continue;", ""),
        Mutant("scan.cuh", "lane + distance < kWarp) s = join", "lane + distance < kWarp - 1) s = join"),
        Mutant("scan.cuh", "between = join(between,", "between = join(Stretch<kChains>::nothing(),"),
        Mutant("gae.cuh", "if (cuts & 1u << j) s->constant[c] = 0.0f;", ""),
        Mutant("gae.cuh", "tokens.cuts |= cut_off;", ""),
        Mutant("gae.cuh", "of[1] = a.gamma *", "of[1] ="),
    ],
    "ppo": [
        Mutant("gae.cuh", "s->constant[1] = 0.0f;\n", "\n"),
        Mutant("gae.cuh", "tokens.rewards[j] = -a.kl_coef * kl[j];", "tokens.rewards[j] = a.kl_coef * kl[j];"),
        Mutant("gae.cuh", "if (tokens.real & 1u << j) sums.add(advantages[j]);", "sums.add(advantages[j]);"),
        Mutant("whiten.cuh", "sums.squares += partial[i].squares;", ""),
    ],
    "whiten": [
        Mutant("whiten.cuh", "  __syncthreads();\n  const Whitening w", "  const Whitening w", RACES),
        Mutant("whiten.cuh", "if (threadIdx.x == 0) partial[blockIdx.x] = sums;", "partial[blockIdx.x] = sums;", RACES),
        Mutant("whiten.cuh", "real & 1u << j ? static_cast", "!(real & 1u << j) ? static_cast"),
    ],
    "tokens": [
        Mutant("tokens.cuh", "const float given = odd ? x[k]", "const float given = !odd ? x[k]"),
        Mutant("tokens.cuh", "(tile + 1) * kTile <= total", "tile * kTile <= total", ("memory", "plain")),
        Mutant("tokens.cuh", "<< 4;\n}", "<< 3;\n}"),
        Mutant("approx_kl.cuh", "(slope * weight)", "slope"),
    ],
}  # fmt: skip


def broken_copy(mutant: Mutant, folder: Path) -> Path:
    shutil.copytree(proof.KERNELS, folder / "cuda")
    for header in proof.KERNELS.parent.glob("*.h"):
        shutil.copy(header, folder)
    path = folder / "cuda" / mutant.file
    parts = path.read_text().split(mutant.old)
    assert len(parts) > mutant.which + 1, f"{mutant.file} no longer has {mutant.old!r}"
    left, right = mutant.old.join(parts[: mutant.which + 1]), mutant.old.join(parts[mutant.which + 1 :])
    path.write_text(left + mutant.new + right)
    return folder / "cuda"


def caught_by(mutant: Mutant) -> str:
    """The way that noticed it, or ''."""
    for way in mutant.ways:
        with tempfile.TemporaryDirectory() as name:
            kernels = broken_copy(mutant, Path(name))
            try:
                done = proof.run(way, proof.build(way, Path(name), kernels), mutant.schedule)
            except subprocess.TimeoutExpired:
                return f"{way}: does not end"
            if done.returncode != 0:
                return way
    return ""


def main() -> int:
    families = sys.argv[1:] or list(MUTANTS)
    tried, survivors = 0, []
    for family in families:
        for mutant in MUTANTS[family]:
            tried += 1
            way = caught_by(mutant)
            verdict = f"caught by {way}" if way else "SURVIVES"
            print(f"{verdict:24} {mutant.file}: {mutant.old.strip()!r} -> {mutant.new.strip()!r}", flush=True)
            if not way:
                survivors.append(mutant)
    print(f"{tried} mutants, {len(survivors)} survive")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
