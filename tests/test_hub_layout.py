# SPDX-License-Identifier: Apache-2.0
"""The layout for the hub's `kernels` package; that it loads there is what `make hub-layout` shows."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import rlhf_fast as rf

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def layout() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hub_layout", ROOT / "release" / "hub_layout.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("platform", "of", "folder"),
    [
        ("manylinux_2_24_x86_64", "cpu", "torch-stable-abi210-cpu-x86_64-linux"),
        ("manylinux2014_x86_64.manylinux_2_17_x86_64", "cu128", "torch-stable-abi210-cu128-x86_64-linux"),
        ("manylinux_2_28_aarch64", "cpu", "torch-stable-abi210-cpu-aarch64-linux"),
        ("macosx_14_0_arm64", "cpu", "torch-stable-abi210-cpu-aarch64-darwin"),
    ],
)
def test_folders_are_those_that_the_loader_looks_for(layout: ModuleType, platform: str, of: str, folder: str) -> None:
    assert layout.variant_name(Path(f"rlhf_fast-0.1.0-cp311-abi3-{platform}.whl"), of) == folder


def test_the_oldest_torch_is_the_one_that_was_built_for(layout: ModuleType) -> None:
    found = re.search(r"RLHF_FAST_TORCH_TARGET_NAME (\S+)", (ROOT / "CMakeLists.txt").read_text())
    assert found is not None and found.group(1).replace(".", "") == layout.OLDEST_TORCH


def test_a_pure_python_wheel_is_refused(layout: ModuleType) -> None:
    with pytest.raises(ValueError, match="wanted a binary wheel"):
        layout.variant_name(Path("rlhf_fast-0.1.0-py3-none-any.whl"), "cpu")


@pytest.mark.parametrize("version", [rf.__version__, "0.0.9"])
def test_the_folder_gives_the_ops_and_refuses_a_second_version(
    layout: ModuleType, tmp_path: Path, version: str
) -> None:
    wheel = tmp_path / f"rlhf_fast-{version}-cp311-abi3-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("rlhf_fast/nothing.py", "")
        archive.writestr(f"rlhf_fast-{version}.dist-info/METADATA", "")
    (folder,) = layout.lay_out(wheel, tmp_path / "hub", ["cpu"], 1)
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["backend"] == {"type": "cpu"} and metadata["id"].isidentifier()
    assert not list(folder.glob("*.dist-info"))
    # As the loader does it; rlhf_fast is this checkout's, loaded before.
    script = (
        "import importlib.util, rlhf_fast\n"
        f"spec = importlib.util.spec_from_file_location('kernel', {str(folder / '__init__.py')!r})\n"
        "kernel = importlib.util.module_from_spec(spec); spec.loader.exec_module(kernel)\n"
        "assert kernel.token_logprobs is rlhf_fast.token_logprobs"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    if version == rf.__version__:
        assert done.returncode == 0, done.stderr
    else:
        assert f"{rf.__version__} is loaded already, and this kernel is 0.0.9" in done.stderr
