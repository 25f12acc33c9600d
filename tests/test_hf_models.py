# SPDX-License-Identifier: Apache-2.0
"""`rf.hf` on every causal LM class of the installed transformers: served, or refused by name, and none wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")

from helpers import causal_lms  # noqa: E402

PAGE = Path(__file__).parent.parent / "docs" / "integrations.md"


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """What came of each class."""
    transformers.logging.set_verbosity_error()
    found = {}
    for model_type, name in causal_lms.classes():
        model = causal_lms.tiny(model_type, name)
        found[name] = causal_lms.NOT_BUILT if model is None else causal_lms.outcome(model)
    return found


def test_none_is_wrong(outcomes: dict[str, str]) -> None:
    wrong = {name: what for name, what in outcomes.items() if what.startswith("wrong")}
    assert not wrong
    assert sum(what == "served" for what in outcomes.values()) >= 120


def test_the_page_lists_them(outcomes: dict[str, str]) -> None:
    """`python tests/helpers/causal_lms.py` prints the table anew."""
    text = PAGE.read_text()
    version = re.search(r"causal language models of transformers ([\d.]+)", text)
    assert version is not None
    if version[1] != transformers.__version__:
        pytest.skip(f"the page describes transformers {version[1]}, not {transformers.__version__}")
    assert causal_lms.table(outcomes) in text
