# SPDX-License-Identifier: Apache-2.0
"""docs/trainer-reference.md names every option, metric and file of a run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers import options_page, phases

REFERENCE = options_page.PAGE.read_text(encoding="utf-8")


def test_the_tables_of_options_are_those_of_the_dataclasses() -> None:
    assert options_page.page(REFERENCE) == REFERENCE, "python tests/helpers/options_page.py writes it anew"
    assert set(re.findall(r"<!-- options of ([a-z ]+) -->", REFERENCE)) == options_page.SECTIONS.keys()


@pytest.fixture(scope="module")
def runs(job_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name in ("sft", "reward", "ppo", "dynamic", "dpo"):
        phases.run(phases.jobs(job_data)[name], folder / name)
    return folder


def test_every_metric_is_documented(runs: Path) -> None:
    lines = [line for path in runs.glob("*/metrics.jsonl") for line in path.read_text().splitlines()]
    names = {name for line in lines for name in json.loads(line)} - {"step"}
    known = set(re.findall(r"`([\w/*]+)`", REFERENCE[REFERENCE.index("## Metrics") :]))
    groups = {name.rpartition("/")[0] for name in known if name.endswith(("/*", "/NAME"))}
    assert len(names) > 25 and {name for name in names - known if name.partition("/")[0] not in groups} == set()


def test_every_file_of_a_run_is_documented(runs: Path) -> None:
    table = REFERENCE[REFERENCE.index("## Files of a run") : REFERENCE.index("## Metrics")]
    cells = " ".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE))
    known = {name.rstrip("/") for name in re.findall(r"`([^`]+)`", cells)}
    for run in runs.iterdir():
        for path in run.iterdir():
            name = "checkpoints/step-N" if path.name == "checkpoints" else path.name
            assert name in known or name.startswith("rollouts-"), f"{name} is in no table"  # what phases.py adds
