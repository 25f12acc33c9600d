# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on the emulated GPU, watched by sanitizers, and the scripts that a real GPU will run.

The backend "emulated" of every op test runs the kernels' own source on the CPU. It sees wrong indices, masks, tails,
reductions and barriers that not every thread reaches. It cannot see races between threads or blocks, memory order, the
GPU's approximate instructions, or speed: `make gpu-check` is for those.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cpu_mutants
import pytest
import triton_mutants
from emulator import build, mutants, proof, sanitized
from helpers import mutation

from rlhf_fast import _dispatch

ROOT = Path(__file__).parent.parent

# A slice of each family's tests that reaches every kernel: values, tails, masks, layouts, split rows, packed sequences.
WATCHED = {
    "logprob": ("tests/test_logprob.py", "values_and_gradients or mask or layouts or several_targets"),
    "kl": ("tests/test_kl.py", "values_and_gradients or mask or layouts"),
    "approx_kl": ("tests/test_approx_kl.py", ""),
    "gae": ("tests/test_gae.py", "mask or flags or packed or layouts or row"),
    "vtrace": ("tests/test_vtrace.py", "mask or packed or layouts or row or bounds"),
    "ppo_advantages": ("tests/test_ppo_advantages.py", ""),
}


def test_no_kernel_is_left_out() -> None:
    """Every family is watched, every launcher is in the program, and what runs on a GPU has every op with kernels."""
    kernels, calls = ROOT / "csrc" / "cuda", re.compile(r"\b(?:cuda::|rf\.)(\w+)\(")
    assert {path.stem for path in kernels.glob("*.cu")} - {"probe"} <= set(WATCHED)
    launcher = re.compile(r"^inline cudaError_t (\w+)\(Dtype ", re.MULTILINE)
    launchers = {name for path in kernels.glob("*.cuh") for name in launcher.findall(path.read_text())}
    program = "".join(path.read_text() for path in (ROOT / "tests/emulator").glob("driver*"))
    assert launchers and launchers <= set(calls.findall(program))
    ops = {op for op, kernel in _dispatch.KERNEL_OF.items() if kernel and not op.startswith("linear_")}
    for script in ("first_touch", "driver", "bench"):
        assert ops <= set(calls.findall((ROOT / f"benchmarks/gpu/{script}.py").read_text())), script


needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="the sanitizers are looked for beside g++")


@needs_gxx
def test_emulated_kernels_under_address_and_undefined_behaviour_sanitizers() -> None:
    """One process for all families: under the sanitizers it takes longer to start than to test."""
    chosen = [f"({Path(path).name} and ({names}))" if names else Path(path).name for path, names in WATCHED.values()]
    which = f"(emulated-fp32 or emulated-bf16) and ({' or '.join(chosen)})"
    done = sanitized.run(*(path for path, _ in WATCHED.values()), "-x", "-k", which)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout


@needs_gxx
@pytest.mark.parametrize("way", ["real", "races"])  # "memory" is the test above, with more shapes
def test_every_kernel_in_a_program_of_its_own(tmp_path: Path, way: str) -> None:
    """At a GPU's block sizes, and under ThreadSanitizer, in several schedules."""
    program = proof.build(way, tmp_path)
    for schedule in ("", "seed=3 resident=3 start=random", "seed=8 resident=1 start=random"):
        done = proof.run(way, program, schedule)
        assert done.returncode == 0, f"{schedule}: {done.stdout[-1000:]}{done.stderr[-3000:]}"
        assert "every kernel is right" in done.stdout


@needs_gxx
@pytest.mark.parametrize(("family", "number"), [("reduce", 0), ("gae", 0)])
def test_the_program_sees_a_removed_barrier_and_a_block_without_a_ticket(family: str, number: int) -> None:
    """The others of mutants.py take minutes."""
    assert mutants.caught_by(mutants.MUTANTS[family][number], family)


def test_every_mutant_still_finds_its_line() -> None:
    """The lists are run by hand; a kernel that changes must not leave them behind."""
    cuda, triton, cpu = mutants.MUTANTS, triton_mutants.MUTANTS, cpu_mutants.MUTANTS
    for folder, lists in (("csrc/cuda", cuda), ("kernels", triton), ("csrc/cpu", cpu)):
        for mutant in (mutant for family in lists.values() for mutant in family):
            found = (ROOT / folder / mutant.file).read_text().count(mutant.old)
            assert found > mutant.which, f"{mutant.file} no longer has {mutant.old!r}"


def test_a_kernel_that_ends_the_process_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does that reads far outside of its tensors, in Triton's interpreter."""

    def end(kernels: Path, family: str, log: Path) -> None:
        log.touch()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(triton_mutants, "_run_tests", end)
    assert triton_mutants.caught_by(None, "gae") == "a test that ends by SIGTERM"


def test_a_run_of_mutants_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the same sources gave is remembered; other sources begin anew."""
    monkeypatch.setattr(mutation, "FOUND", tmp_path / "found")
    source = tmp_path / "kernel.py"
    runs: list[str] = []

    def find() -> str:
        runs.append(source.read_text())
        return "test_a"

    for text in ("one", "one", "two"):
        source.write_text(text)
        mutation.Found("family", [source.read_bytes()]).by(("kernel.py", "a", "b", 0), find)
    assert runs == ["one", "two"]


def test_the_sanitizers_see_a_read_past_the_end(tmp_path: Path) -> None:
    """The watch itself is awake: a kernel that reads one entry too many is caught."""
    source = tmp_path / "past_the_end.cpp"
    source.write_text(
        '#include "cuda_emulator.h"\n'
        "void past(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x + 1]; }\n"
        "int main() {\n"
        "  std::vector<float> x(32, 1.0f), y(32);\n"
        "  float *from = x.data(), *to = y.data();\n"
        "  RF_LAUNCH(past, 1, 32, nullptr, from, to);\n"
        "}\n"
    )
    program = tmp_path / "past_the_end"
    command = ["g++", "-std=c++17", *sanitized.FLAGS.split(), f"-I{build.FOLDER}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr


def test_the_emulator_sees_a_barrier_that_some_threads_miss(tmp_path: Path) -> None:
    source = tmp_path / "missed.cpp"
    source.write_text(
        '#include "cuda_emulator.h"\n'
        "void missed() { if (threadIdx.x != 7) __syncthreads(); }\n"
        "int main() { RF_LAUNCH(missed, 1, 64, nullptr); }\n"
    )
    program = tmp_path / "missed"
    subprocess.run(["g++", "-std=c++17", f"-I{build.FOLDER}", str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode != 0 and "deadlock" in done.stderr


def test_emulated_run_of_what_compute_sanitizer_will_watch() -> None:
    """benchmarks/gpu/driver.py calls every op; on a GPU it runs under compute-sanitizer."""
    code = (
        "import sys; sys.path[:0] = ['tests', 'benchmarks']\n"
        "from emulator import build; build.load()\n"
        "from gpu import driver\n"
        "driver.DEVICE, driver.BACKEND = 'cpu', 'emulated'\n"
        "driver.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "every native op ran" in done.stdout
