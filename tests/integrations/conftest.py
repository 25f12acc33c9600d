# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the integrations' tests. They need the trainers that `make test-integrations` installs, and skip else."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def nan_filled_allocations() -> None:
    """Not here: libraries allocate memory that they never read."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on several threads, and one thread repeats bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The trainers' own deprecation warnings are not ours to read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
