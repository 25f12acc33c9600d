# SPDX-License-Identifier: Apache-2.0
"""Heads whose vocabulary is cut over two processes (gloo): every op gives what one process with all of it does."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from helpers.two import two_ranks

WORKER = Path(__file__).parent / "helpers" / "ranks_linear.py"
CASES = ("stats", "offset", "kl", "policy", "blocks", "sampled", "unequal", "compiled", "dtensor", "fsdp")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[subprocess.CompletedProcess[str]]:
    """Both have done all cases, each in a group of its own, one after the other up to the first that failed."""
    return two_ranks(WORKER, tmp_path_factory.mktemp("ranks"), *CASES)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks(ranks: list[subprocess.CompletedProcess[str]], case: str) -> None:
    assert all(f" {case} done " in rank.stdout for rank in ranks), "\n".join(rank.stderr for rank in ranks)


def test_both_end_well(ranks: list[subprocess.CompletedProcess[str]]) -> None:
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(rank.stderr for rank in ranks)
