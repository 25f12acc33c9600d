# SPDX-License-Identifier: Apache-2.0
"""Breaks the Triton kernels on purpose, one line at a time, and sees whether the tests in Triton's interpreter notice.

`python tests/triton_mutants.py [families]`; some seconds a mutant, and a run that was stopped goes on where it was.
Prints the list, the count and the survivors. Memory that a kernel reads in vain, or races, the interpreter does not
see: such mutants are not in the list.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from helpers import interpreter, mutation  # noqa: E402, which sets TRITON_INTERPRET

import rlhf_fast  # noqa: E402, F401, once for all processes


class Mutant(NamedTuple):
    file: str  # in kernels/
    old: str  # occurs there
    new: str
    which: int = 0  # of several occurrences
    equivalent: str = ""  # why nothing can notice: it is not run


class QuickFirst:
    """A plugin of pytest: tests that take long in the interpreter, or do in bfloat16 what others do, come last."""

    LATE = ("bf16", "4099", "wide_rows", "half_logits", "more_rows", "thousands", "every_half", "bitwise", "long_rows")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: any(word in item.name for word in self.LATE))


# A family's tests, those that are likely to notice first.
TESTS = {
    "logprob": ("test_logprob.py", "test_logprob_edges.py", "test_row_edges.py"),
    "kl": ("test_kl.py", "test_row_edges.py"),
    "approx_kl": ("test_approx_kl.py",),
    "gae": ("test_gae.py", "test_gae_long.py"),
    "vtrace": ("test_vtrace.py",),
    "ppo": ("test_ppo_advantages.py", "test_gae_long.py"),
}
MUTANTS: dict[str, list[Mutant]] = {
    "logprob": [
        Mutant("logprob_fold.py", "tl.sum((weighted + down * total) * scale, 1),", "tl.sum(weighted * scale, 1),"),
        Mutant("logprob_fold.py", "squares * scale * scale, 1)", "squares * scale, 1)"),
        Mutant("logprob_fold.py", "(weighted + down * total) * scale + tl.sum", "weighted * scale + tl.sum"),
        Mutant("logprob_fold.py", "squares = squares * scale * scale", "squares = squares * scale"),
        Mutant("logprob_fold.py", "total = total * scale + tl.sum(e, 2)", "total = total + tl.sum(e, 2)"),
        Mutant("logprob_fold.py", "tl.where(higher > top, start,", "tl.where(higher >= top, start,"),
        Mutant("logprob_fold.py", "vector = tl.min(vectors, 1)", "vector = tl.max(vectors, 1)"),
        Mutant("logprob_fold.py", "e * tl.maximum(exponent, -200.0), 2)", "e * exponent, 2)"),
        Mutant("logprob_fold.py", "tl.where(total < 1, 1.0, total)", "total + 0.0"),
        Mutant("logprob_fold.py", "(target >= 0) & (target < columns)\n            u", "(target >= 0)\n            u"),
        Mutant("logprob_fold.py", "tl.where(total == total, top, total)", "top"),
        Mutant("logprob_fold.py", "tl.where(gap > 0, 0.0, gap) * factors", "gap"),
        Mutant("logprob_fold.py", "begin = split * blocks * BLOCK", "begin = split * 0"),
        Mutant("logprob_fold.py", "ours = split < splits", "ours = split < splits - 1"),
        Mutant("logprob_gradient.py", "keep = real & (top != float(\"-inf\"))", "keep = real"),
        Mutant("logprob_gradient.py", "constant -= tl.where(", "constant += tl.where("),
        Mutant("logprob_gradient.py", ", grad, float(\"nan\"))", ", grad, 0.0)"),
        Mutant("logprob_gradient.py", "dz += tl.where(at_target", "dz = tl.where(at_target"),
        Mutant("logprob_gradient.py", "(column >= 0) & (column < BLOCK)", "(column >= 0) & (column < BLOCK - 1)"),
        Mutant("logprob_gradient.py", "tl.maximum(exponent, -200.0) +", "exponent +"),
        Mutant("logprob_gradient.py", "dz *= 1.0 - bent * bent", "dz *= 1.0 - bent"),
        Mutant("logprob_gradient.py", "slope = -factors", "slope = factors"),
        Mutant("logprob_gradient.py", "dx = tl.where(column < columns - start, dx, 0.0)", "dx = dx + 0.0"),
        Mutant("logprob_gradient.py", "(column < width - start)", "(column < columns - start)"),
        Mutant("rows.py", "u = tl.where(counts, u, float(\"-inf\"))", "u = u + 0.0"),
        Mutant("rows.py", "real = exists & (tl.load(mask_ptr", "real = exists | (tl.load(mask_ptr"),
        Mutant("rows.py", "(rows % inner).to(tl.int64) * stride", "rows.to(tl.int64) * stride"),
        Mutant("rows.py", "return factor / tl.load(temperature_ptr", "return factor * tl.load(temperature_ptr"),
        Mutant("rows.py", "tl.where(top == float(\"-inf\"), 0.0, top)", "top + 0.0"),
        Mutant("rows.py", "square * (-3.33332819422e-1 +", "square * (-3.3e-1 +"),
        Mutant("rows.py", "triton.cdiv(blocks, per_split), per_split", "blocks // per_split, per_split"),
    ],
    "kl": [
        Mutant("kl_ratio.py", "cross + down_a * sum_a - _drift(top_b, higher_b", "cross - _drift(top_b, higher_b"),
        Mutant("kl_ratio.py", "(sum_a - lost)) * scale_a", "sum_a) * scale_a"),
        Mutant("kl_ratio.py", "lost = lost * scale_a +", "lost = lost +"),
        Mutant("kl_ratio.py", "tl.exp2(fall(top_b, higher_b, factor_b2)) +", "1.0 +"),
        Mutant("kl_ratio.py", "tl.maximum(u, -200.0) - tl.where(forbidden, 0.0, v)", "u - tl.where(forbidden, 0.0, v)"),
        Mutant("kl_ratio.py", "return tl.where(old == float(\"-inf\"), 0.0,", "return tl.where(old != old, 0.0,",
               equivalent="what it multiplies is exactly 0: the interpreter adds both sums up in the same steps"),
        Mutant("kl_ratio.py", "cross = cross + down_a * sum_a - _drift", "cross = cross - _drift"),
        Mutant("kl_ratio.py", "tl.sum(lost * scale_a, 1)", "tl.sum(lost, 1)"),
        Mutant("kl_ratio.py", "(lost > 0) & (mean == mean)", "(lost > 0)"),
        Mutant("kl_ratio.py", "top_b += 0.0 * bits_b", "top_b += 0.0",
               equivalent="the log-sum is NaN too, which makes all of the row's gradients NaN"),
        Mutant("kl_ratio.py", "second = parts + 2 - 2 * SWAPPED", "second = parts + 2"),
        Mutant("kl_ratio.py", "ours = split < splits", "ours = split < splits - 1"),
        Mutant("kl_gradient.py", "tl.where(bits_q == float(\"-inf\"), LOG_FLOOR, bits_q)", "bits_q + 0.0"),
        Mutant("kl_gradient.py", "slope_q = tl.where(tiny, 0.0, beta *", "slope_q = tl.where(tiny, 0.0, (1 - beta) *"),
        Mutant("kl_gradient.py", "tiny = m < 1.1754944e-38", "tiny = m < 0.0"),
        Mutant("kl_gradient.py", "tl.where(p < q, -0.5, 0.0 * (p - q))", "tl.where(p < q, -0.5, 0.0)"),
        Mutant("kl_gradient.py", "keep_a = real & (top_a != float(\"-inf\"))", "keep_a = real"),
        Mutant("kl_gradient.py", "start > begin, readable - start + BLOCK, 0", "start > begin, readable - start, 0"),
        Mutant("kl_gradient.py", "(end - begin - 1) // BLOCK * BLOCK", "(end - begin) // BLOCK * BLOCK"),
        Mutant("kl_gradient.py", "q - p if KIND == RATIO", "p - q if KIND == RATIO"),
        Mutant("kl_gradient.py", "grad *= 1.0 - bent * bent", "grad *= 1.0 - bent"),
        Mutant("kl_gradient.py", "grad = tl.where(counts, grad, 0.0)", "grad = grad + 0.0"),
        Mutant("kl_gradient.py", "distance = mean_p + mean_q", "distance = mean_p"),
        Mutant("kl_gradient.py", "slope = -1.0", "slope = 1.0"),
    ],
    "approx_kl": [
        Mutant("kl_estimators.py", "near_0 = n == 0", "near_0 = n > 1000"),
        Mutant("kl_estimators.py", "tl.exp2(n - 1) * (2 * (1 + r", "tl.exp2(n) * (1 * (1 + r"),
        Mutant("kl_estimators.py", "tl.where(d < 0, -1.0, 0.0 * d)", "tl.where(d < 0, -1.0, 0.0)"),
        Mutant("kl_estimators.py", "tl.where(value < -clamp, -clamp, value)", "value"),
        Mutant("kl_estimators.py", "slope = d\n", "slope = slope\n"),
        Mutant("kl_estimators.py", "grad_kl * (slope * ratio)", "grad_kl * slope"),
        Mutant("kl_estimators.py", "tl.where(real, grad_kl * value, 0.0)", "grad_kl * value"),
        Mutant("kl_estimators.py", "place < size", "place < size - 1"),
    ],
    "gae": [
        Mutant("scan.py", "tl.where(decay > 0, offset + decay * state, offset)", "offset + decay * state"),
        Mutant("scan.py", "return tl.maximum(later_decay * decay, TINY), apply", "return later_decay * decay, apply"),
        Mutant("scan.py", "return tl.maximum(later_decay * decay, least), apply", "return later_decay * decay, apply"),
        Mutant("scan.py", "tl.where(counts, tl.maximum(decay, TINY), 1.0)", "tl.maximum(decay, TINY) + 0.0 * counts"),
        Mutant("scan.py", "+ 0.0 * value\n", "\n"),
        Mutant("scan.py", "decays = tl.where(cut, 0.0, decays)", "decays = decays + 0.0"),
        Mutant("scan.py", "d, o = then(d, o, d1, o1, CUTS)", "d, o = then(d, o, d0, o0, CUTS)"),
        Mutant("scan.py", "(later > part) & (later < parts)\n", "(later >= part) & (later < parts)\n"),
        Mutant("scan.py", "inside & (row < rows)", "inside"),
        Mutant("scan.py", "packed is None else packed) < FEW_ROWS", "packed is None else packed) < 0 * FEW_ROWS"),
        Mutant("gae.py", "stopped = real & stopped & ~cut", "stopped = real & stopped"),
        Mutant("gae.py", "cut = cut | stopped", "cut = cut"),
        Mutant("gae.py", "counts = real if CARRY else inside", "counts = real"),
        Mutant("gae.py", "cut = cut | (inside & (tl.minimum(sequence_end, length) == token + 1))", "cut = cut"),
        Mutant("gae.py", "tl.where(cut, 0.0, after)", "after"),
        Mutant("gae.py", "tl.where(cut, 0.0, after)", "after", which=1),
        Mutant("gae.py", "_decay(lams[1], sequence", "_decay(lams[0], sequence"),
        Mutant("gae.py", "(bound <= token)", "(bound < token)"),
        Mutant("gae.py", "row, parts, part, 2, value_part_decay,", "row, parts, part, 2, part_decay,"),
    ],
    "vtrace": [
        Mutant("vtrace.py", "real, real if CARRY else inside", "real, real"),
        Mutant("vtrace.py", "start, end, lane + 2, CARRY", "start, end, lane + 1, CARRY"),
        Mutant("vtrace.py", "tl.where(cut1, CUT, factor1)", "factor1"),
        Mutant("vtrace.py", "tl.where(cut1, CUT, factor1)", "tl.where(cut1, CUT, tl.maximum(factor1, TINY))"),
        Mutant("vtrace.py", "tl.maximum(limited, LEAST_LOG_RATIO)", "limited"),
        Mutant("vtrace.py", "tl.where(decay == CUT, offset, offset + decay * state)", "offset + decay * state"),
        Mutant("vtrace.py", "tl.where(least == CUT, least,", "tl.where(least == 0, least,"),
        Mutant("vtrace.py", "tl.where(counts1, factor1, 1.0)", "factor1"),
        Mutant("vtrace.py", "tl.where(counts1, value1, next_value1)", "value1"),
        Mutant("vtrace.py", "tl.where(log_ratio > log_rho_limit, log_rho_limit, log_ratio)", "log_ratio"),
        Mutant("vtrace.py", "tl.where(ratio > c_clip, c_clip, ratio)", "ratio"),
        Mutant("vtrace.py", "ALIGNED) != 0) & ~cut", "ALIGNED) != 0)"),
        Mutant("vtrace.py", "tl.where(cut, 0.0, next_value)", "next_value"),
        Mutant("vtrace.py", "tl.where(cut, 0.0, gain)", "gain"),
        Mutant("vtrace.py", "(lane < left) & (row < rows)", "lane < left"),
        Mutant("vtrace.py", "tl.maximum(later_decay * decay, least)", "later_decay * decay"),
    ],
    "ppo": [
        Mutant("ppo.py", "kl = 0.5 * kl * kl", "kl = kl * kl"),
        Mutant("ppo.py", "tl.where(real, -kl_coef * kl, 0.0)", "tl.where(real, kl_coef * kl, 0.0)"),
        Mutant("ppo.py", "tl.where(score < -score_clip, -score_clip, score)", "score"),
        Mutant("ppo.py", "(later_real == 0)[:, None, None]", "(later_real >= 0)[:, None, None]"),
        Mutant("ppo.py", "later_real = any_after(", "later_real = 0 * any_after("),
        Mutant("ppo.py", "reward += tl.where(is_last, score", "reward += tl.where(real, score"),
        Mutant("ppo.py", "state = tl.zeros([ROWS], tl.float32)", "state = score"),
        Mutant("ppo.py", "advantage.to(tl.float64) * advantage.to(tl.float64)", "advantage.to(tl.float64)"),
        Mutant("ppo.py", "tl.where(n == 0, series,", "tl.where(n > 1000, series,"),
        Mutant("whiten.py", "real.to(tl.int32), x, x * x)", "real.to(tl.int32), x, x)"),
        Mutant("whiten.py", "x = tl.where(real, x, 0.0).to(tl.float64)", "x = x.to(tl.float64)"),
        Mutant("whiten.py", "tl.maximum(count - 1.0, 1.0)", "tl.maximum(count, 1.0)"),
        Mutant("whiten.py", "variance = tl.where(variance < 0, 0.0, variance)", "variance = variance + 0.0"),
        Mutant("whiten.py", "whitened += mean", "whitened += 0.0"),
        Mutant("whiten.py", "tl.where(real, whitened, 0.0)", "whitened"),
    ],
}  # fmt: skip


def _run_tests(kernels: Path, family: str, log: Path) -> None:
    """In a process of its own: the family's tests in the interpreter, with the kernels of this folder."""
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    mutation.limit_work()
    package = importlib.import_module("rlhf_fast.kernels")
    package.__path__ = [str(kernels)]
    tests = [str(ROOT / "tests" / name) for name in TESTS[family]]
    options = ["-q", "-x", "-p", "no:cacheprovider", "--tb=no", "-k", "triton"]
    os._exit(int(pytest.main([*options, *tests], plugins=[QuickFirst()])))


def caught_by(mutant: Mutant | None, family: str) -> str:
    """The test that noticed it, or ''. None: the kernels as they are."""
    with tempfile.TemporaryDirectory() as name:
        kernels, log = Path(name) / "kernels", Path(name) / "log"
        shutil.copytree(ROOT / "kernels", kernels, ignore=shutil.ignore_patterns("__pycache__"))
        if mutant is not None:
            mutation.break_file(kernels / mutant.file, mutant.old, mutant.new, mutant.which)
        process = multiprocessing.get_context("fork").Process(target=_run_tests, args=(kernels, family, log))
        process.start()
        process.join()
        said = log.read_text()
    code = process.exitcode or 0
    if code < 0:  # a kernel that reads far outside of its tensors ends the process
        endless = code == -signal.SIGKILL
        return "a test that does not end" if endless else f"a test that ends by {signal.Signals(-code).name}"
    if code == 0:
        assert " passed" in said, said
        return ""
    failed = re.findall(r"^(?:FAILED|ERROR) \S*?::(.+?)(?: - .*)?$", said, re.MULTILINE)
    assert failed, f"{family} was not tested: {said[-3000:]}"
    return str(failed[0])


def sources(family: str) -> list[bytes]:
    """What the outcome rests on: the kernels of the list, the family's launches, their imports, and the tests."""
    found: set[Path] = set()
    ahead = {ROOT / "kernels" / name for name in (f"{family}.py", *(mutant.file for mutant in MUTANTS[family]))}
    while ahead:
        if (path := ahead.pop()) in found or not path.exists():
            continue
        found.add(path)
        imported = re.findall(r"from rlhf_fast\.kernels(?:\.| import )(\w+)", path.read_text())
        ahead |= {ROOT / "kernels" / f"{name}.py" for name in imported}
    found |= {ROOT / "tests" / name for name in TESTS[family]}
    return [path.read_bytes() for path in sorted(found)]


def try_all(families: list[str]) -> Iterator[mutation.Tried]:
    for family in families:
        found = mutation.Found(f"triton-{family}", sources(family))
        said = found.by(("the kernels as they are",), functools.partial(caught_by, None, family))
        assert not said, f"{family}: without a mutant {said} fails too"
        for mutant in MUTANTS[family]:
            key, why = mutant[:-1], mutant.equivalent
            way = "" if why else found.by(key, functools.partial(caught_by, mutant, family))
            yield mutation.Tried(mutant.file, mutant.old, mutant.new, way, why)


if __name__ == "__main__":
    assert interpreter.usable, interpreter.why_not
    sys.exit(mutation.report(try_all(sys.argv[1:] or list(MUTANTS))))
