# SPDX-License-Identifier: Apache-2.0
"""Try one wheel in an environment of its own, and print a row of the table in docs/install.md.

    python release/try_wheel.py --python python3.13 --torch 2.12.1 dist/rlhf_fast-*-abi3-*.whl

Nothing but the wheel and that PyTorch is installed there. Tried: see wheel_checks.py.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from pathlib import Path

CHECKS = Path(__file__).with_name("wheel_checks.py")


def run(*command: str | Path, **kwargs: object) -> None:
    """Run a command; a failure ends the script."""
    subprocess.run([str(word) for word in command], check=True, **kwargs)  # type: ignore[call-overload]


def main() -> None:
    """Make the environment, install the wheel and run the checks there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--python", default="python3", help="interpreter to try it with")
    parser.add_argument("--torch", default="", help="version of PyTorch; the newest if not given")
    parser.add_argument("--environment", type=Path, help="folder of the environment, which is kept")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        environment = args.environment or Path(scratch) / "environment"
        if not (environment / "bin").exists():
            run(args.python, "-m", "venv", environment)
        python = environment / "bin" / "python"
        pip = (python, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check")
        run(*pip, f"torch=={args.torch}" if args.torch else "torch", "numpy", "setuptools")
        run(*pip, "--no-deps", "--force-reinstall", args.wheel)
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("RLHF_FAST_", "PYTHONPATH"))}
        run(python, "-I", CHECKS.resolve(), cwd=scratch, env=ours)


if __name__ == "__main__":
    main()
