# SPDX-License-Identifier: Apache-2.0
"""Breaks the CUDA kernels on purpose, one line at a time, and sees whether the emulator notices.

`python tests/emulator/mutants.py [families]`; some minutes, and a run that was stopped goes on where it was. A mutant
is caught by wrong numbers, an abort, a data race or a sanitizer. Prints the list, the count and the survivors.
"""

from __future__ import annotations

import functools
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from emulator import proof  # noqa: E402
from helpers import mutation  # noqa: E402


class Mutant(NamedTuple):
    file: str  # in csrc/cuda
    old: str  # occurs there
    new: str
    ways: tuple[str, ...] = ("plain",)  # what is expected to notice: one of them is enough
    schedule: str = ""
    which: int = 0  # of several occurrences
    equivalent: str = ""  # why nothing can notice: it is not run


RACES, MEMORY = ("races",), ("memory", "plain")
# What of driver.cpp is run on a family's mutants.
PARTS = {"reduce": 1, "vec": 3, "logprob": 1, "kl": 2, "gae": 4, "vtrace": 8, "tokens": 20}
PARTS.update(dict.fromkeys(("ppo", "whiten", "approx_kl"), 16))
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
        Mutant("vec.cuh", "if (head > end) head = end;", "", MEMORY),
        Mutant("vec.cuh", "+ 127) / 128 * 128", "+ 127) / 128 * 64"),
        Mutant("vec.cuh", "*begin + step < count ? *begin + step : count", "*begin + step", MEMORY),
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
        Mutant("logprob.cuh", "  cluster_barrier();\n", "", RACES),
        Mutant("logprob.cuh", "part == 0 && thread < kWarp", "part == 1 && thread < kWarp"),
        Mutant("logprob.cuh", "k == thread ? first", "true ? first"),
        Mutant("logprob.cuh", "? kNan : transform", "? 0.0f : transform"),
        Mutant("logprob.cuh", "a.grad_logprobs[n * a.k + k] : kNan;", "a.grad_logprobs[n * a.k + k] : 0.0f;"),
        Mutant("logprob.cuh", "if (part == 0) write_masked_row", "if (part == 1) write_masked_row"),
        Mutant("logprob.cuh", "(a.mask && !a.mask[n]) || row_max == -kInf", "(a.mask && !a.mask[n])"),
        Mutant("softmax.cuh", "if (i + j * kStride >= span.tail) break;", "", MEMORY),
        Mutant("softmax.cuh", "- 1; ++j) {\n    if (i + j * kStride >=", "- 2; ++j) {\n    if (i + j * kStride >="),
        Mutant("softmax.cuh", "last = x[tail];", "last = x[span.tail];"),
        Mutant(
            "softmax.cuh",
            "own.max == top && top != -kInf",
            "top != -kInf",
            equivalent="spares a search: a column of the row with this maximum is right, whichever thread finds it",
        ),
        Mutant("softmax.cuh", "return a < b ? a : b; }", "return a > b ? a : b; }"),
        Mutant("softmax.cuh", "float sum) { return sum == sum ?", "float sum) { return true ?"),
        Mutant("softmax.cuh", "fmaxf(-150.0f, s), weighted)", "s, weighted)"),
        Mutant("softmax.cuh", "return fold.max == -kInf ? 0.0f : fold.max;", "return fold.max;"),
        Mutant("softmax.cuh", "slope * (1.0f - capped * capped)", "slope * (1.0f - capped)"),
        Mutant("logprob.cuh", "if (part == parts - 1) zero_range(grad, a.columns, a.width);", ""),
    ],
    "kl": [
        Mutant("kl_pair.cuh", "fold->cross += rise * fold->covered;", ""),
        Mutant("kl_pair.cuh", "fold->covered *= decay;", ""),
        Mutant("kl_pair.cuh", "a.other_sum += b.other_sum;", ""),
        Mutant("kl.cuh", "    cluster_barrier();\n", "", RACES),
        Mutant("kl.cuh", "part < parts; part += kWarp", "part < parts - 1; part += kWarp"),
        Mutant("kl.cuh", "kLn2 * beta * (logq", "kLn2 * (1 - beta) * (logq"),
        Mutant("kl.cuh", "if (row.last) zero_range", "if (!row.last) zero_range", MEMORY),
        Mutant("kl.cuh", "KlMeans{f.p + g.p, f.q + g.q,", "KlMeans{f.p + g.p, f.q,"),
        Mutant("kl_pair.cuh", "unpack(load_any_pack(y + i), others);", "unpack(load_any_pack(y + i + 1), others);"),
        Mutant("kl.cuh", "(logq < kLowest ? kFloor : logq)", "logq"),
        Mutant("kl.cuh", "fold.forbidden / sum_p * (log_sum_q + kLogFloor)", "0.0f"),
        Mutant("kl.cuh", "fold.forbidden > 0 && stats.mean_p == stats.mean_p ? kInf", "fold.forbidden > 0 ? kInf"),
        Mutant("kl.cuh", "a.kind == kForward ? 1 : 0", "0"),
        Mutant("kl.cuh", "kOfQ ? dq * (grad_kl * q.slope_at(v))", "kOfQ ? dq * (grad_kl * p.slope_at(u))"),
        Mutant("kl.cuh", "t.q * (t.slope_q - stats.mean_q)", "t.q * t.slope_q"),
        Mutant("kl.cuh", "if (without) return zero_range(to, row.begin, row.end);", ""),
        Mutant("kl_pair.cuh", "fold->forbidden += e;", "fold->covered += e;"),
        Mutant("kl_pair.cuh", "(forbidden ? 0.0f : b)", "b"),
        Mutant("kl_pair.cuh", "fold->forbidden *= decay;", ""),
        Mutant("kl_pair.cuh", "fmaxf(a, -150.0f) - (", "a - ("),
        Mutant("vec.cuh", "if (span.tail > span.head) span.tail -= kPack<T>;", "", MEMORY),
        Mutant("vec.cuh", "past & 8 ? words[k + 2]", "past & 8 ? words[k + 1]"),
    ],
    "gae": [
        Mutant("scan.cuh", "return gridDim.x - 1 - ticket[0];", "return gridDim.x - 1 - blockIdx.x;", schedule=LATE),
        Mutant("scan.cuh", "  __syncthreads();\n  return gridDim.x", "  return gridDim.x", RACES),
        Mutant("scan.cuh", "= from_lane;\n  __syncthreads();", "= from_lane;", RACES),
        Mutant("scan.cuh", "  __syncthreads();\n  return join(", "  return join(", RACES),
        Mutant("scan.cuh", "if (left.scale[c] == kCut) continue;", ""),
        Mutant("scan.cuh", "lane + distance < kWarp) s = join", "lane + distance < kWarp - 1) s = join"),
        Mutant("scan.cuh", "between = join(between,", "between = join(Stretch<kChains>::nothing(),"),
        Mutant("gae_tokens.cuh", "if (cuts & 1u << j) s->constant[c] = 0.0f;", ""),
        Mutant("gae_tokens.cuh", "tokens.cuts |= cut_off;", ""),
        Mutant("gae_tokens.cuh", "of[1] = a.gamma *", "of[1] ="),
        Mutant("scan.cuh", "((token | length) >> 32) == 0", "true"),
        Mutant("gae_rows.cuh", "warps + turn % 2 * kWarps", "warps", RACES),
        Mutant("gae_rows.cuh", "behind = join(broadcast_warp(from_warp), now);", ""),
        Mutant("gae_rows.cuh", "join(broadcast_warp(from_warp), now)", "join(from_warp, now)"),
        Mutant("gae_rows.cuh", "first >= begin ?", "true ?", MEMORY),
        Mutant("gae_rows.cuh", "a.returns + place.first, place.count != 0", "a.returns + place.first, 1", MEMORY),
        Mutant("gae_rows.cuh", "sequences.length % kPair == 0 &&", ""),
        Mutant("gae_rows.cuh", "decays(a, blockIdx.x)", "decays(a, 0)"),
        Mutant("gae_tokens.cuh", "kWrite ? tokens->real & of_sequence", "kWrite ? tokens->steps & of_sequence"),
        Mutant("gae_tokens.cuh", "tokens.steps = a.carry ? tokens.real : all;", "tokens.steps = tokens.real;"),
        Mutant("gae_tokens.cuh", "real ? to_float(loads.values.values[j])", "true ? to_float(loads.values.values[j])"),
        Mutant("gae_tokens.cuh", "& tokens.real & ~tokens.cuts", "& tokens.real"),
        Mutant("gae_tokens.cuh", "bits_of(loads.dones) & tokens.real", "bits_of(loads.dones)"),
        Mutant("gae.cuh", "ends || tokens.cuts != 0, &own", "tokens.cuts != 0, &own"),
        Mutant("gae.cuh", "for (float& x : s->constant) x = 0.0f;", ""),
        Mutant("gae.cuh", "    decays = decays_of<kChains>(a, sequences, sequence);\n", ""),
        Mutant("gae.cuh", "sequence < sequences.count ? sequence : sequences.count - 1", "sequence", MEMORY),
        Mutant("scan.cuh", "if (bounds[middle] <= token) {", "if (bounds[middle] < token) {"),
        Mutant("scan.cuh", "if (begin == 0 || sequence == 0) return;", "if (begin == 0) return;", MEMORY),
        Mutant("scan.cuh", "stop = bound < sequences.total ? bound : sequences.total;", "stop = bound;", MEMORY),
        Mutant(
            "scan.cuh",
            " || sequences.begin_of(sequence) == next) return end;",
            ") return end;",
            equivalent="spares waiting: the tile's last thread enters the sequence before, and forgets the state",
        ),
        Mutant("scan.cuh", "sequence == sequences.count || sequences.begin_of", "sequences.begin_of", MEMORY),
    ],
    "vtrace": [
        Mutant("vtrace.cuh", "if (tokens.steps & 1u << j) s = {{", "if (tokens.real & 1u << j) s = {{"),
        Mutant("vtrace.cuh", "warps + kWarps, keep", "warps, keep", RACES),
        Mutant("vtrace.cuh", "    next = tokens->values[j];\n", ""),
        Mutant("vtrace.cuh", "log_ratio > a.log_rho_limit ? a.log_rho_limit : log_ratio", "log_ratio"),
        Mutant("vtrace.cuh", "fmaxf(limited, kLeastLogRatio)", "limited"),
        Mutant("vtrace.cuh", "product(s->scale[0], decay)", "product(s->scale[0], fmaxf(decay, __FLT_DENORM_MIN__))"),
        Mutant("vtrace.cuh", "product(s->scale[0], decay)", "s->scale[0] * decay"),
        Mutant("vtrace.cuh", "(ratio > a.c_clip ? a.c_clip : ratio)", "ratio"),
        Mutant("vtrace.cuh", "if (cuts & 1u << j) *s = Stretch<1>::end();", ""),
        Mutant("vtrace.cuh", "ratio * fmaf(a.gamma, s->constant[0], error)", "ratio * error"),
        Mutant("vtrace.cuh", "tokens->dones & 1u << j ? 0.0f : next", "next"),
        Mutant("vtrace.cuh", "tokens.real & ~tokens.dones", "tokens.real"),
        Mutant("vtrace.cuh", "packs && span.begin % kTokens == 0", "packs", ("memory",)),
        Mutant("vtrace.cuh", "behind = join(broadcast_warp(from_warp), now);", "behind = join(from_warp, now);"),
        Mutant("vtrace.cuh", "real ? tokens->values[j] + s->constant[0] : 0.0f", "tokens->values[j] + s->constant[0]"),
        Mutant("vtrace.cuh", "(x < sequences.total ? x : sequences.total)", "x", MEMORY),
        Mutant("vtrace.cuh", "x < 0 ? int64_t{0} :", "", MEMORY),
        Mutant("vtrace.cuh", "whole && span.begin + (tile + 1) * kTile <= span.end", "whole", MEMORY),
        Mutant("vtrace.cuh", "tokens.steps = a.carry ? tokens.real : all;", "tokens.steps = tokens.real;"),
        Mutant("vtrace.cuh", "limited > -kInf ? fmaxf(limited, kLeastLogRatio) : limited", "fmaxf(limited, -69.0f)"),
        Mutant("vtrace.cuh", "(a.bootstrap_values)[place.first + j]", "(a.bootstrap_values)[place.first]"),
        Mutant("vtrace.cuh", "if (s->scale[0] != kCut) s->scale[0]", "s->scale[0]"),
        Mutant("vtrace.cuh", "float decay = a.decay * (ratio > a.c_clip", "float decay = a.gamma * (ratio > a.c_clip"),
    ],
    "ppo": [
        Mutant("gae.cuh", "s->constant[1] = 0.0f;\n", "\n"),
        Mutant("gae.cuh", "tokens.rewards[j] = -a.kl_coef * kl[j];", "tokens.rewards[j] = a.kl_coef * kl[j];"),
        Mutant("gae.cuh", "if (tokens.real & 1u << j) sums.add(advantages[j]);", "sums.add(advantages[j]);"),
        Mutant("gae.cuh", "(a.scores)[sequence]), a.score_clip)", "(a.scores)[sequence]), 1e30f)"),
        Mutant("gae.cuh", "s->constant[0] = s->constant[1] = score;", "s->constant[1] = score;"),
        Mutant("gae.cuh", "ends || tokens.real != 0 ? kCut : 1.0f", "ends ? kCut : 1.0f"),
        Mutant("gae.cuh", "finished_scale(own.scale[0], a.gamma * a.lam, ends)", "own.scale[0]"),
        Mutant("gae.cuh", "tokens->rewards[j] += s->constant[1];", ""),
        Mutant("gae.cuh", "tokens->values[j] += advantage;", ""),
        Mutant("gae.cuh", "kl[j] = real ? kl_estimate", "kl[j] = true ? kl_estimate"),
        Mutant("gae.cuh", "if (threadIdx.x == 0) partial[tile] = sums;", "partial[tile] = sums;", RACES),
        Mutant("whiten.cuh", "sums.squares += partial[i].squares;", ""),
    ],
    "whiten": [
        Mutant("whiten.cuh", "  __syncthreads();\n  const Whitening w", "  const Whitening w", RACES),
        Mutant("whiten.cuh", "if (threadIdx.x == 0) partial[blockIdx.x] = sums;", "partial[blockIdx.x] = sums;", RACES),
        Mutant("whiten.cuh", "real & 1u << j ? static_cast", "!(real & 1u << j) ? static_cast"),
        Mutant("whiten.cuh", "if (real & 1u << j) sums.add(to_float", "sums.add(to_float"),
        Mutant("whiten.cuh", "moments[2] = sums.squares;", "moments[2] = sums.sum;"),
        Mutant("../math.h", "count * mean * mean) / (count - 1)", "count * mean * mean) / count"),
        Mutant("../math.h", "shift_mean ? 0.0 : mean", "0.0"),
    ],
    "tokens": [
        Mutant("tokens.cuh", "const float given = odd ? x[k]", "const float given = !odd ? x[k]"),
        Mutant("tokens.cuh", "(tile + 1) * kTile <= total", "tile * kTile <= total", MEMORY),
        Mutant("tokens.cuh", "<< 4;\n}", "<< 3;\n}"),
    ],
    "approx_kl": [
        Mutant("approx_kl.cuh", "(slope * weight)", "slope"),
        Mutant("approx_kl.cuh", "tokens.is_real(j) ? value * weight", "tokens.is_real(j) ? value"),
        Mutant("approx_kl.cuh", "a.mask ? load_flags(a.mask, place) : ~uint64_t{0}", "~uint64_t{0}"),
        Mutant("approx_kl.cuh", "a.estimator), a.clamp);\n    const", "a.estimator), 1e30f);\n    const"),
        Mutant("approx_kl.cuh", "clamp_to(kl_estimate(d, a.estimator), a.clamp)", "kl_estimate(d, a.estimator)"),
        Mutant("approx_kl.cuh", "grad[j] = tokens.is_real(j) ?", "grad[j] = true ?"),
        Mutant("approx_kl.cuh", "grad_ratio[j] = tokens.is_real(j) ?", "grad_ratio[j] = true ?"),
        Mutant("../math.h", "return expm1f(-d) + d;", "return expm1f(-d) - d;"),
        Mutant("../math.h", "return -expm1f(-d);", "return expm1f(-d);"),
        Mutant("../math.h", "return 0.5f * d * d;", "return d * d;"),
        Mutant("../math.h", "static_cast<float>(d > 0) - static_cast<float>(d < 0)", "static_cast<float>(d > 0)"),
        Mutant("../math.h", "if (gradient == kStraightThrough) return d;", ""),
        Mutant("../math.h", "(x < -limit ? -limit : x)", "x"),
    ],
}  # fmt: skip


def broken_copy(mutant: Mutant, folder: Path) -> Path:
    shutil.copytree(proof.KERNELS, folder / "cuda")
    for header in proof.KERNELS.parent.glob("*.h"):
        shutil.copy(header, folder)
    mutation.break_file(folder / "cuda" / mutant.file, mutant.old, mutant.new, mutant.which)
    return folder / "cuda"


def notices(way: str, mutant: Mutant | None, family: str, schedule: str = "") -> str:
    """The way, and how, if the program of these kernels fails in it; else ''. None: the kernels as they are."""
    with tempfile.TemporaryDirectory() as name:
        kernels = proof.KERNELS if mutant is None else broken_copy(mutant, Path(name))
        done = proof.run(way, proof.build(way, Path(name), kernels, PARTS[family]), schedule)
    if done.returncode == 0:
        return ""
    return f"{way}: does not end" if done.returncode == -signal.SIGKILL else way


def caught_by(mutant: Mutant, family: str) -> str:
    """The first way that notices it, or ''."""
    tries = (notices(way, mutant, family, mutant.schedule) for way in mutant.ways)
    return next(filter(None, tries), "")


def try_all(families: list[str]) -> Iterator[mutation.Tried]:
    for family in families:
        found = mutation.Found(f"cuda-{family}", [proof.source(PARTS[family])])
        for way in sorted({way for mutant in MUTANTS[family] for way in mutant.ways}):
            said = found.by(("the kernels as they are", way), functools.partial(notices, way, None, family))
            assert not said, f"{family}: without a mutant {said} fails too"
        for mutant in MUTANTS[family]:
            key, why = mutant[:-1], mutant.equivalent
            way = "" if why else found.by(key, functools.partial(caught_by, mutant, family))
            yield mutation.Tried(mutant.file, mutant.old, mutant.new, way, why)


if __name__ == "__main__":
    sys.exit(mutation.report(try_all(sys.argv[1:] or list(MUTANTS))))
