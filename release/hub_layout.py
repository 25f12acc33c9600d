# SPDX-License-Identifier: Apache-2.0
"""Lay a binary wheel out as a repository of the Hugging Face hub's `kernels` package.

    python release/hub_layout.py dist/rlhf_fast-*-abi3-*.whl --out build/hub
    >>> kernels.get_local_kernel(Path("build/hub/build")).token_logprobs          # or get_kernel(...) once uploaded

One folder for each backend, build/torch-stable-abi210-<backend>-<processor>-<system>/, which the loader chooses by the
machine and the PyTorch at hand: any from 2.10, for the binary uses PyTorch's stable ABI. A wheel with CUDA kernels also
serves PyTorch's CUDA builds: add --backend cu128 for each CUDA version to offer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import zipfile
from pathlib import Path

TAG = re.compile(
    r"rlhf_fast-(?P<version>[^-]+)-cp311-abi3-"
    r"(?P<system>manylinux|linux|macosx)[\w.]*?_(?P<processor>x86_64|aarch64|arm64)\.whl"
)
OLDEST_TORCH = "210"  # 2.10: RLHF_FAST_TORCH_TARGET_NAME in CMakeLists.txt
LOADER = '''# SPDX-License-Identifier: Apache-2.0
"""rlhf_fast as a kernel of the hub: the package beside this file, or the one of this version that is loaded."""

import sys
from pathlib import Path

_VERSION = "{version}"
if "rlhf_fast" not in sys.modules:
    sys.path.insert(0, str(Path(__file__).parent))  # the operators' names are fixed: one rlhf_fast a process
    try:
        import rlhf_fast
    finally:
        sys.path.remove(str(Path(__file__).parent))
import rlhf_fast

if rlhf_fast.__version__ != _VERSION:
    raise ImportError(f"rlhf_fast {{rlhf_fast.__version__}} is loaded already, and this kernel is {{_VERSION}}")
from rlhf_fast import *  # noqa: E402, F403
from rlhf_fast import __all__  # noqa: E402, F401
'''


def variant_name(wheel: Path, backend: str) -> str:
    """The folder that the loader looks for.

    Raises:
        ValueError: the wheel is no binary wheel of this package.
    """
    tag = TAG.fullmatch(wheel.name)
    if tag is None:
        raise ValueError(f"{wheel.name}: wanted a binary wheel, rlhf_fast-<version>-cp311-abi3-<platform>.whl")
    system = "darwin" if tag["system"] == "macosx" else "linux"
    processor = "aarch64" if tag["processor"] == "arm64" else tag["processor"]
    return f"torch-stable-abi{OLDEST_TORCH}-{backend}-{processor}-{system}"


def lay_out(wheel: Path, out: Path, backends: list[str], kernel_version: int) -> list[Path]:
    """Write the folders; what was in them is replaced."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()[:12]
    folders = []
    for backend in backends:
        folder = out / "build" / variant_name(wheel, backend)
        shutil.rmtree(folder, ignore_errors=True)
        with zipfile.ZipFile(wheel) as archive:
            ours = [name for name in archive.namelist() if name.startswith("rlhf_fast/")]
            archive.extractall(folder, ours)
        (folder / "__init__.py").write_text(LOADER.format(version=wheel.name.split("-")[1]))
        metadata = {
            "id": f"_rlhf_fast_{backend}_{digest}",
            "name": "rlhf-fast",
            "version": kernel_version,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": "cpu" if backend == "cpu" else "cuda"},
        }
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        folders.append(folder)
    return folders


def main() -> None:
    """Write the folders that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--out", type=Path, default=Path("build/hub"))
    parser.add_argument("--backend", action="append", help="cpu (the default), or cu<version> of a PyTorch with CUDA")
    parser.add_argument("--kernel-version", type=int, default=1, help="the hub's number; raise it where an op changes")
    args = parser.parse_args()
    for folder in lay_out(args.wheel, args.out, args.backend or ["cpu"], args.kernel_version):
        print(folder)


if __name__ == "__main__":
    main()
