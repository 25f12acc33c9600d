# SPDX-License-Identifier: Apache-2.0
"""The figures that benchmarks/human_data.py prints, by hand."""

from __future__ import annotations

import math

import human_data
import pytest


def test_accuracy_has_wilsons_interval() -> None:
    found = human_data.figures([1.0] * 132 + [-1.0] * 68)
    assert found["accuracy"] == 0.66
    assert (found["low"], found["high"]) == (pytest.approx(0.592, abs=1e-3), pytest.approx(0.722, abs=1e-3))
    assert human_data.figures([1.0] * 10)["high"] == pytest.approx(1.0)


def test_the_loss_is_finite_and_right_for_large_margins() -> None:
    assert human_data.figures([800.0, -800.0])["loss"] == pytest.approx(400.0)
    assert human_data.figures([0.3])["loss"] == pytest.approx(math.log1p(math.exp(-0.3)))


def test_a_model_that_is_right_as_often_as_it_says_is_calibrated() -> None:
    margin = math.log(3.0)  # three in four
    assert human_data.figures([margin, margin, margin, -margin])["calibration error"] == pytest.approx(0.0, abs=1e-6)
    assert human_data.figures([-margin] * 4)["calibration error"] == pytest.approx(0.75)
    assert human_data.calibration_rows([margin, margin, margin, -margin]) == ["| 0.7 to 0.8 | 4 | 0.75 | 0.75 |"]
