# SPDX-License-Identifier: Apache-2.0
"""The figures in README and docs/benchmarks.md are those of the committed results, printed by benchmarks/report.py."""

from __future__ import annotations

from typing import Any

import pytest
import report


@pytest.mark.parametrize("path", [report.README, report.DOCUMENT], ids=lambda p: p.name)
def test_documents_print_the_committed_results(path: Any) -> None:
    assert path.read_text() == report.documents()[path], "run: python benchmarks/report.py"


def test_pictures_that_the_document_shows_exist() -> None:
    name, results = report.load()
    for key in ("scaling", "memory"):
        assert not results.get(key) or (report.RESULTS / f"{name}-{key}.png").exists()


def test_losses_are_listed() -> None:
    row = {"case": "a case", "seconds": {"native": 2e-3, "eager": 1e-3, "torch": 1e-4, "compile": 3e-3}}
    printed = report.losses({"rows": [row]})
    assert "| a case | 2.00 ms | eager | 1.00 ms | 2.00 |" in printed
    assert printed.count("a case") == 1, "the reference is ours, and torch.compile was slower"


def test_results_name_their_machine() -> None:
    """A figure means nothing without the machine and its limits."""
    _, results = report.load()
    assert {"cpu", "threads", "torch", "served_by"} <= results["machine"].keys()
    assert {"read", "copy"} <= results["limits"].keys() and results["date"]
