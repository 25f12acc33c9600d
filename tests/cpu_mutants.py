# SPDX-License-Identifier: Apache-2.0
"""Breaks the CPU kernels on purpose, one line at a time, and sees whether the program of tests/kernels or, if that does
not notice, the family's tests do.

`python tests/cpu_mutants.py [families]`; some seconds a mutant, and a run that was stopped goes on where it was. Prints
the list, the count and the survivors. One instruction set serves: AVX2 on x86, and the baseline elsewhere.
"""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from helpers import mutation  # noqa: E402


class Mutant(NamedTuple):
    file: str  # in csrc/cpu
    old: str  # occurs there
    new: str
    which: int = 0  # of several occurrences
    equivalent: str = ""  # why nothing can notice: it is not run


# A family's tests, those that are likely to notice first.
TESTS = {
    "logprob": ("test_logprob.py", "test_logprob_edges.py", "test_row_edges.py"),
    "kl": ("test_kl.py", "test_row_edges.py", "test_kl_long.py"),
    "approx_kl": ("test_approx_kl.py",),
    "gae": ("test_gae.py", "test_gae_long.py"),
    "vtrace": ("test_vtrace.py",),
    "ppo": ("test_ppo_advantages.py",),
    "decode_attention": ("test_decode_attention.py",),
    "simd": ("test_logprob.py", "test_logprob_edges.py", "test_gae.py"),
}
ONE_BACKEND = {"decode_attention": "not rlhf_fast_torch"}  # its tests name backends otherwise
LOGPROB, KL, GAE, VTRACE, ATTENTION = (
    f"{name}_kernel.h" for name in ("logprob", "kl", "gae", "vtrace", "decode_attention")
)
MUTANTS: dict[str, list[Mutant]] = {
    "logprob": [
        Mutant(LOGPROB, "weighted = (weighted - rise * sum) * decay;", "weighted *= decay;"),
        Mutant(LOGPROB, "squares *= decay * decay;", "squares *= decay;"),
        Mutant(LOGPROB, "    sum *= decay;\n", ""),
        Mutant(LOGPROB, "max_block = start;", "max_block = 0;"),
        Mutant(LOGPROB, "if (!(top > max)) return 0;", "if (!(top >= max)) return 0;"),
        Mutant(LOGPROB, "max(load(u + i + j * kLanes), best[j])", "max(best[j], load(u + i + j * kLanes))",
               equivalent="a row with a NaN is NaN, but for its argmax, which may be any column"),
        Mutant(LOGPROB, "for (i = whole; i < padded; ++i) u[i] = -kInf;", ""),
        Mutant(LOGPROB, "return {as_floats(x), steps, steps};", "return {as_floats(x), steps, whole};"),
        Mutant(LOGPROB, "return transform.in_scale == 1.0f;", "return true;"),
        Mutant(LOGPROB, "sum == sum ? max : static_cast<float>(sum)", "max"),
        Mutant(LOGPROB, "return max == -kInf ? 0.0f : max;", "return max;"),
        Mutant(LOGPROB, "return max == -kInf && sum == 0;", "return max == -kInf;"),
        Mutant(LOGPROB, "fma(e, max(splat(-104.0f), s), weighted[j])", "fma(e, s, weighted[j])"),
        Mutant(LOGPROB, "offset += (n % index.sizes[d])", "offset += n"),
        Mutant(LOGPROB, "t.scale / cap : (t.scale < 0 ? -1.0f : 1.0f)", "t.scale / cap : 1.0f"),
        Mutant(LOGPROB, "target < 0 || target >= a.columns", "target < 0"),
        Mutant(LOGPROB, "fold.max_block + kBlock", "fold.max_block + kStep"),
        Mutant(LOGPROB, "(fold.sum * fold.sum)", "fold.sum"),
        Mutant(LOGPROB, "*slope *= 1.0f - capped * capped;", "*slope *= 1.0f - capped;"),
        Mutant(LOGPROB, "return p == 0.0f ? Vec{} : result;", "return result;"),
        Mutant(LOGPROB, "|| a.parts[2 * n] == -kInf", ""),
        Mutant(LOGPROB, "valid ? grad_logprobs[k] : __builtin_nanf(\"\")", "valid ? grad_logprobs[k] : 0"),
        Mutant(LOGPROB, "targets[other] == targets[k] ? grad", "other == k ? grad"),
        Mutant(LOGPROB, "zero_row(grad + a.columns, a.width - a.columns);", ""),
        Mutant(LOGPROB, "store_some(dz * slope, columns - i, grad + i);", "store_some(dz, columns - i, grad + i);"),
    ],
    "kl": [
        Mutant(KL, "t == -kInf ? s - (log_sum_s + kLogFloor) :", "false ? Vec{} :"),
        Mutant(KL, "terms.infinite = (terms.p != 0.0f) & (logq == -kInf);", ""),
        Mutant(KL, "terms.infinite = (terms.q != 0.0f) & (logp == -kInf);", ""),
        Mutant(KL, "zero_unless(terms.q, beta * (logq - logm))", "zero_unless(terms.q, logq - logm)"),
        Mutant(KL, "return weight == 0.0f ? Vec{} : x;", "return x;"),
        Mutant(KL, "for (int64_t j = count; j < kLanes; ++j) s[j] = -kInf;", ""),
        Mutant(KL, "splat(-0.5f) : 0.0f * d)", "splat(-0.5f) : splat(0.5f))"),
        Mutant(KL, "p->weighted += p->sum * q->raise(", "p->weighted += 0 * q->raise("),
        Mutant(KL, "zero_unless(e, s - t), gap[j])", "s - t, gap[j])"),
        Mutant(KL, "return std::isfinite(gap);", "return p.max != -kInf && q.max != -kInf;"),
        Mutant(KL, "kKind == kTv ? distance : total_p + total_q", "total_p + total_q"),
        Mutant(KL, "unbounded ? kInf", "false ? kInf"),
        Mutant(KL, "unbounded |= infinite[j] != 0", "unbounded |= infinite[0] != 0"),
        Mutant(KL, "      std::fill_n(parts, 6, 0.0f);\n", "",
               equivalent="the gradient reads no sums of a masked row"),
        Mutant(KL, "std::isnan(parts[0]) || std::isnan(parts[2])", "std::isnan(parts[0])"),
        Mutant(KL, "if (kKind == kForward) terms.p = exp(s - policy.log_sum);", ""),
        Mutant(KL, "if (kKind == kReverse) terms.q = exp(t - ref.log_sum);", ""),
        Mutant(KL, "terms.p * (terms.slope_p - mean_p)", "terms.p * terms.slope_p"),
        Mutant(KL, "terms.q * (terms.slope_q - mean_q)", "terms.q * terms.slope_q"),
        Mutant(KL, "store_some(grad_kl * dy * slope_y,", "store_some(grad_kl * dy * slope_x,"),
        Mutant(KL, "real && parts[0] != -kInf ? grad_x", "real ? grad_x"),
        Mutant(KL, "real && parts[2] != -kInf ? grad_y", "real ? grad_y"),
        Mutant(KL, "grad_x, live_x ? a.width - a.columns : a.width", "grad_x, 0"),
    ],
    "approx_kl": [
        Mutant(KL, "d * d < 0.09f ? ExpParts::after_two_terms(-d) * (d * d) :", "false ? Vec{} :"),
        Mutant(KL, "return d < 0.0f ? -d : d;", "return d;"),
        Mutant(KL, "gradient == kStraightThrough || kEstimator == kK2", "kEstimator == kK2"),
        Mutant(KL, "(d < 0.0f ? splat(-1.0f) : 0.0f * d);", "splat(-1.0f);"),
        Mutant(KL, "(x < -limit ? splat(-limit) : x)", "x"),
        Mutant(KL, "if (ratio) kl *= load_some(ratio + i, count);", ""),
        Mutant(KL, "if (ratio) slope *= load_some(ratio + i, count);", ""),
        Mutant(KL, "if (a.mask) kl = load_mask(a.mask + i, count) ? kl : Vec{};", ""),
        Mutant(KL, "clamp_to(estimate<estimator.value>(d), a.clamp);", "estimate<estimator.value>(d);"),
    ],
    "gae": [
        Mutant(GAE, "cut ? s.gamma * to_float(s.bootstrap_values[t]) : 0.0f", "0.0f"),
        Mutant(GAE, "const bool cut = !done && s.truncated", "const bool cut = s.truncated"),
        Mutant(GAE, "if (!real && s.carry) continue;", "if (!real) continue;"),
        Mutant(GAE, "if (kFlags && real)", "if (kFlags)"),
        Mutant(GAE, "shift_down<kShift>(*c, splat(1.0f)) : *c", "shift_down<kShift>(*c, *c) : *c"),
        Mutant(GAE, "c = real ? c : splat(1.0f);", ""),
        Mutant(GAE, "fma(kMixed ? c : powers,", "fma(powers,"),
        Mutant(GAE, "i >= 0; --i, power *= d) powers[i]", "i >= 0; --i) powers[i]"),
        Mutant(GAE, "shift_down<1>(hands_on, splat(*handed))", "shift_down<1>(hands_on, Vec{})"),
        Mutant(GAE, "if (s.carry && s.mask &&", "if (s.mask &&"),
        Mutant(GAE, "if (!flags && s.decay >= kSmallestDecay", "if (s.decay >= kSmallestDecay"),
        Mutant(GAE, "s.decay >= kSmallestDecay && s.value_decay >= kSmallestDecay", "true"),
        Mutant(GAE, "decoupled ? gae_vectors<true>(s) :", "false ? gae_vectors<true>(s) :"),
        Mutant(GAE, "decoupled ? gae_tokens<true, true>", "false ? gae_tokens<true, true>"),
        Mutant(GAE, "a.row_value_lam ? a.row_value_lam[n] : a.value_lam", "lam"),
        Mutant(GAE, "a.cu_seqlens[n + 1] - start", "a.length"),
    ],
    "vtrace": [
        Mutant(VTRACE, "x = load_mask(a.mask + t, count) ? x : Vec{};", "load_mask(a.mask + t, count);"),
        Mutant(VTRACE, "x > -kInf ? max(splat(kLeastLogRatio), limited) : x", "x"),
        Mutant(VTRACE, "if (!real && a.carry) {", "if (!real) {"),
        Mutant(VTRACE, "if (done || cut) next_gain = 0;", ""),
        Mutant(VTRACE, "if (done) next_value = 0;", ""),
        Mutant(VTRACE, "a.dones[t], cut = !done &&", "a.dones[t], cut ="),
        Mutant(VTRACE, "(ratio > a.c_clip ? a.c_clip : ratio)", "ratio"),
        Mutant(VTRACE, "ratio * (error + a.gamma * next_gain)", "error + a.gamma * next_gain"),
        Mutant(VTRACE, "next_gain, ratio * error)", "next_gain, error)"),
        Mutant(VTRACE, "a.returns[t] = real ? value + next_gain : 0.0f", "a.returns[t] = value + next_gain"),
        Mutant(VTRACE, "a.cu_seqlens ? a.cu_seqlens[n + 1] : first + a.length", "first + a.length"),
    ],
    "ppo": [
        Mutant(GAE, "counts -= real;", "counts += real;"),
        Mutant(GAE, "real ? load_some(values + t, length - t) : Vec{}", "load_some(values + t, length - t)"),
        Mutant(GAE, "squares[j] += halves[j] * halves[j];", "squares[j] += halves[j];"),
        Mutant(GAE, "(high_half(x) - w.mean) * w.scale + w.shift)", "(high_half(x) - w.mean) * w.scale)"),
        Mutant(GAE, "load_mask(a.mask + i, last - i) ? white : Vec{}", "white"),
        Mutant(GAE, "store_some(real ? value : Vec{}, count, kl + t);", "store_some(value, count, kl + t);"),
        Mutant(GAE, "real ? -a.kl_coef * value : Vec{}", "real ? a.kl_coef * value : Vec{}"),
        Mutant(GAE, "while (last >= 0 && !mask[last]) --last;", ""),
        Mutant(GAE, "a.scores)[n]), a.score_clip)", "a.scores)[n]), kInf)"),
        Mutant(GAE, "int64_t i = begin * a.length;", "int64_t i = 0;",
               equivalent="writes the rows of other threads once more, with the same numbers"),
        Mutant("../math.h", "spread < 0 ? 0.0 : spread", "spread"),
        Mutant("../math.h", "count * mean * mean) / (count - 1)", "count * mean * mean) / count"),
        Mutant("../math.h", "shift_mean ? 0.0 : mean", "0.0"),
        Mutant("../math.h", "count > 0 ? moments[1] / count : 0.0", "moments[1] / count",
               equivalent="without a real token nothing is whitened"),
        Mutant("../math.h", "x < -limit ? -limit", "x < -limit ? limit"),
    ],
    "decode_attention": [
        Mutant(ATTENTION, "scores[h * length + j] = -kInf;", "scores[h * length + j] = 0;"),
        Mutant(ATTENTION, "keys + j * stride + d,", "keys + j * size + d,"),
        Mutant(ATTENTION, "largest = max(largest, load_some(scores + j, length - j, -kInf))", "largest = Vec{}"),
        Mutant(ATTENTION, "return score != score;", "return false;"),
        Mutant(ATTENTION, "if (top == -kInf && ", "if (false && "),
        Mutant(ATTENTION, "length - j, -kInf) - top)", "length - j) - top)"),
        Mutant(ATTENTION, "    if (mask && !mask[j]) continue;\n", ""),
        Mutant(ATTENTION, "args.size + d]) * args.scale", "args.size + d])"),
        Mutant(ATTENTION, "row = n / args.key_heads", "row = n % args.key_heads"),
        Mutant(ATTENTION, "args.mask + row * args.mask_stride", "args.mask"),
        Mutant(ATTENTION, "d + kSlice * kLanes <= args.value_size", "d <= args.value_size"),
        Mutant(ATTENTION, "left == 3", "left == 5"),
        Mutant(ATTENTION, "(args.length + args.size + kLanes)", "args.length"),
    ],
    "simd": [
        Mutant("simd.h", "x != x ? 0x7fc0u :", "false ? 0x7fc0u :"),
        Mutant("simd.h", "half_up = 0x7fffu + ((bits >> 16) & 1u)", "half_up = 0x8000u + 0u * bits"),
        Mutant("simd.h", "(v != v) ? (Uint{} + 0x7fc0u) : rounded", "rounded"),
        Mutant("simd.h", "j < count ? to_float(x[j]) : fill", "to_float(x[j < count ? j : 0])"),
        Mutant("simd.h", "j < count; ++j) from_float(", "j < kLanes; ++j) from_float("),
        Mutant("simd.h", "j < count; ++j) lanes[j] = mask[j];", "j + 1 < count; ++j) lanes[j] = mask[j];"),
        Mutant("simd.h", "if constexpr (kHalf > 1) return max_of", "if constexpr (kHalf > 2) return max_of"),
        Mutant("simd.h", "half > 0; half /= 2)", "half > 1; half /= 2)"),
        Mutant("simd.h", "return x < kSmallest ? Vec{} :", "return"),
        Mutant("simd.h", "p = fma(p, r, 8.3687454462e-3f);", "p = fma(p, r, 8.3e-3f);"),
        Mutant("simd.h", "(x < -80.0f ? splat(-80.0f) : x)", "x"),
        Mutant("simd.h", "(half + 64) << 23", "(half + 63) << 23"),
        Mutant("simd.h", "limited * limited < 0.09f ?", "false ?"),
        Mutant("simd.h", "(bits - 0x3f3504f3) >> 23", "(bits - 0x3f800000) >> 23"),
        Mutant("simd.h", "small + f) + 0.0f * x;", "small + f);"),
        Mutant("simd.h", "magnitude < 0.625f ? small", "magnitude < 0.0f ? small"),
        Mutant("simd.h", "bit_cast<Int>(large) | (bit_cast<Int>(x)", "bit_cast<Int>(large) | (0 & bit_cast<Int>(x)"),
    ],
}  # fmt: skip

ISA = ["-mavx2", "-mfma", "-mf16c"] if platform.machine() in ("x86_64", "AMD64") else []
COMPILE = ["g++", "-std=c++17", f"@{ROOT}/csrc/cpu/flags.txt", "-O0", "-w", "-fPIC", "-fvisibility=hidden"]
WATCHED = "-fsanitize=address"  # the program: also what is read or written outside of arrays
# What the module has beside the kernels; one table of kernels serves, whatever the host has.
REST = ("module", "cpu/capability", "cpu/logprob", "cpu/kl", "cpu/gae", "cpu/decode_attention")
TARGET = "-DTORCH_TARGET_VERSION=(((0ULL + 2) << 56) | ((0ULL + 10) << 48))"


def call(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)


def rest_of_module(folder: Path) -> list[Path]:
    """The objects of the module that no mutant changes, in `folder`."""
    torch_include = Path(torch.__file__).parent / "include"
    includes = [f"-isystem{torch_include}", f"-isystem{sysconfig.get_path('include')}"]
    for name in REST:
        source, built = ROOT / "csrc" / f"{name}.cpp", folder / f"{Path(name).name}.o"
        call(*COMPILE, TARGET, "-DPy_LIMITED_API=0x030B0000", *includes, "-c", source, "-o", built)
    return sorted(folder.glob("*.o"))


def build_module(csrc: Path, rest: list[Path], module: Path) -> None:
    kernels = module.with_name("kernels.o")
    call(*COMPILE, *ISA, "-DRF_ISA=isa_default", "-c", csrc / "cpu" / "kernels.cpp", "-o", kernels)
    libraries = Path(torch.__file__).parent / "lib"
    call("g++", "-shared", kernels, *rest, f"-L{libraries}", "-ltorch_cpu", "-lc10", "-o", module)


def program_notices(folder: Path) -> bool:
    """Whether tests/kernels/driver.cpp, in `folder` beside the broken csrc, prints differences, or crashes."""
    program = folder / "driver"
    driver = folder / "tests" / "kernels" / "driver.cpp"
    call(*COMPILE, *ISA, WATCHED, "-DRF_ISA=isa_default", driver, "-o", program)
    return subprocess.run([program], capture_output=True, preexec_fn=mutation.limit_work).returncode != 0


def _run_tests(module: Path, family: str, log: Path) -> None:
    """In a process of its own: the family's tests with this extension."""
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    mutation.limit_work()
    spec = importlib.util.spec_from_file_location("rlhf_fast._C", module)
    assert spec is not None and spec.loader is not None
    sys.modules["rlhf_fast._C"] = extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    from rlhf_fast import _ext

    assert _ext._C is extension, _ext.why_not
    tests = [str(ROOT / "tests" / name) for name in TESTS[family]]
    which = ONE_BACKEND.get(family, "native and not native:avx2 and not native:default")
    os._exit(int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--tb=no", "-k", which, *tests])))


def noticing_test(module: Path, family: str, log: Path) -> str:
    process = multiprocessing.get_context("fork").Process(target=_run_tests, args=(module, family, log))
    process.start()
    process.join()
    said = log.read_text()
    if process.exitcode == 0:
        assert " passed" in said, said
        return ""
    if process.exitcode is not None and process.exitcode < 0:
        return "a test that does not end" if process.exitcode == -signal.SIGKILL else "a crash"
    failed = re.findall(r"^(?:FAILED|ERROR) \S*?::(.+?)(?: - .*)?$", said, re.MULTILINE)
    assert failed, f"{family} was not tested: {said[-3000:]}"
    return str(failed[0])


def caught_by(mutant: Mutant | None, family: str, rest: list[Path]) -> str:
    """What noticed it, or ''. None: the kernels as they are."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=shutil.ignore_patterns("cuda"))
        shutil.copytree(ROOT / "tests" / "kernels", folder / "tests" / "kernels")
        if mutant is not None:
            mutation.break_file(folder / "csrc" / "cpu" / mutant.file, mutant.old, mutant.new, mutant.which)
        if program_notices(folder):
            return "the program"
        build_module(folder / "csrc", rest, folder / "_C.so")
        return noticing_test(folder / "_C.so", family, folder / "log")


def sources(family: str) -> list[bytes]:
    tests = [ROOT / "tests" / name for name in TESTS[family]]
    paths = [*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cpu/*"), *ROOT.glob("tests/kernels/*"), *tests]
    return [path.read_bytes() for path in sorted(paths)]


def try_all(families: list[str]) -> Iterator[mutation.Tried]:
    with tempfile.TemporaryDirectory() as name:
        rest = rest_of_module(Path(name))
        for family in families:
            found = mutation.Found(f"cpu-{family}", sources(family))
            said = found.by(("the kernels as they are",), functools.partial(caught_by, None, family, rest))
            assert not said, f"{family}: without a mutant {said} fails too"
            for mutant in MUTANTS[family]:
                key, why = mutant[:-1], mutant.equivalent
                way = "" if why else found.by(key, functools.partial(caught_by, mutant, family, rest))
                yield mutation.Tried(mutant.file, mutant.old, mutant.new, way, why)


if __name__ == "__main__":
    sys.exit(mutation.report(try_all(sys.argv[1:] or list(MUTANTS))))
