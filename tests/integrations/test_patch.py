# SPDX-License-Identifier: Apache-2.0
"""The Patch class on a package made up for the purpose; needs no trainer."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.integrations._patch import Patch, Target, patch_package, plain_signature

SOURCE = "TABLE = {}\ndef double(x, times=2): return x * times\nTABLE['double'] = double\n"
CONSUMER = "from made_up.maths import double\ndef use(x): return double(x)\n"
KNOWN = "x, times=2"


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package `made_up` 1.4.2, not imported yet."""
    files = {
        "made_up/__init__.py": "",
        "made_up/maths.py": SOURCE,
        "made_up/consumer.py": CONSUMER,
        "made_up-1.4.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: made_up\nVersion: 1.4.2\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "made_up"]:
        del sys.modules[name]


def tenfold(original: Any) -> Any:
    return lambda x, times=2: 10 * original(x, times)


def target(signature: str = KNOWN, name: str = "double", **options: Any) -> Target:
    return Target("made_up.maths", name, {signature: tenfold}, **options)


def apply(*targets: Target, **options: Any) -> Patch:
    return patch_package("made_up", ("1.4",), targets or [target()], **options)


@pytest.mark.parametrize("consumer_first", [True, False])
def test_consumers_by_name_see_ours_and_then_the_original(made_up: Path, consumer_first: bool) -> None:
    if consumer_first:
        importlib.import_module("made_up.consumer")
    maths = importlib.import_module("made_up.maths")
    original = maths.double
    with apply(target(registry="TABLE")) as patch:
        consumer = importlib.import_module("made_up.consumer")
        assert consumer.use(1) == 20 and maths.TABLE["double"](1) == 20
        assert patch.replaced == ["made_up.maths.double"]
        assert maths.double.__name__ == "double" and plain_signature(maths.double) == KNOWN
    assert maths.double is consumer.double is maths.TABLE["double"] is original
    assert patch.replaced == []
    patch.undo()
    assert maths.double is original


def test_a_second_call_does_nothing_and_its_undo_neither(made_up: Path) -> None:
    first = apply()
    second = apply()
    assert second.rows["made_up.maths.double"].startswith("ours already")
    second.undo()
    double = importlib.import_module("made_up.maths").double
    assert double(1) == 20
    first.undo()
    assert importlib.import_module("made_up.maths").double(1) == 2


def test_an_unknown_version_is_left_alone_unless_forced(made_up: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        patch = patch_package("made_up", ("1.3",), [target()])
    assert patch.replaced == [] and "version 1.4.2 was not tested" in patch.report()
    assert "version 1.4.2 was not tested" in caplog.text
    assert "made_up.maths" not in sys.modules
    with patch_package("made_up", ("1.3",), [target()], force=True) as patch:
        assert patch.replaced == ["made_up.maths.double"]


def test_an_unknown_signature_is_left_alone_even_when_forced(made_up: Path) -> None:
    patch = apply(target("x, factor"), force=True)
    assert patch.rows["made_up.maths.double"] == "left alone: its signature is (x, times=2), tested: (x, factor)"


def test_what_is_missing_is_said(made_up: Path) -> None:
    assert "does not have it" in apply(target(name="triple")).report()
    assert "cannot be imported" in apply(Target("made_up.absent", "f", {"": tenfold})).report()
    assert "is not installed" in patch_package("never_heard_of_it", ("1.0",), [target()]).report()


def test_the_switch_turns_everything_off(made_up: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_FAST_DISABLE", "1")
    patch = apply()
    assert patch.rows == {"made_up.maths.double": "left alone: RLHF_FAST_DISABLE is set"}
    assert "made_up.maths" not in sys.modules


def test_an_addition_to_a_registry(made_up: Path) -> None:
    table = importlib.import_module("made_up.maths").TABLE
    with apply(target(registry="TABLE", added_as="tenfold")) as patch:
        assert table["tenfold"](1) == 20 and table["double"](1) == 2
        assert patch.rows == {"TABLE['tenfold']": "added"}
    assert "tenfold" not in table


def test_waiting_imports_nothing_and_patches_in_time(made_up: Path) -> None:
    patch = apply(wait=True)
    assert "made_up" not in sys.modules and "waits" in patch.report()
    assert importlib.import_module("made_up.consumer").use(1) == 20
    assert patch.replaced == ["made_up.maths.double"]
    finders = len(sys.meta_path)
    patch.undo()
    assert importlib.import_module("made_up.consumer").use(1) == 2
    assert len(sys.meta_path) == finders - 1


def test_somebody_elses_later_patch_survives_undo(made_up: Path) -> None:
    maths = importlib.import_module("made_up.maths")
    patch = apply()
    maths.double = theirs = lambda x: -x
    patch.undo()
    assert maths.double is theirs


def test_importing_the_integrations_imports_no_trainer() -> None:
    script = (
        "import sys\nfrom rlhf_fast.integrations import (apply_rlhf_fast_to_openrlhf, apply_rlhf_fast_to_trl,\n"
        "    apply_rlhf_fast_to_verl, patch_loss)\nimport rlhf_fast.integrations.verl_plugin\n"
        "print({name.split('.')[0] for name in sys.modules} & {'trl', 'verl', 'openrlhf', 'transformers', 'ray'})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
