# SPDX-License-Identifier: Apache-2.0
"""report.html: nothing that a model wrote becomes markup, nothing is fetched, and half a run has a report too."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.report import plots
from rlhf_fast.report.page import write_report
from rlhf_fast.rollout.evaluate import variety

EVIL = "<script>alert('x')</script> & \"quotes\""
VOID = {"meta", "br", "img", "path", "use"}


def write(path: Path, *rows: dict[str, Any]) -> None:
    """A JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A pipeline's folder with a few rows of everything."""
    steps = range(1, 4)
    write(
        tmp_path / "sft/metrics.jsonl",
        {"step": 0, "eval/nll": 4.0},
        *({"step": n, "loss": 4.0 - n, "lr": 0.1} for n in steps),
    )
    write(
        tmp_path / "collect/feedback.jsonl",
        {"prompt": EVIL, "completions": [EVIL, "b"], "ratings": [1, 0], "annotator": EVIL},
    )
    write(tmp_path / "reward/metrics.jsonl", *({"step": n, "loss": 0.6, "pair_accuracy": 0.5} for n in steps))
    samples = [{"prompt": "p", "completion": EVIL, "goodness": g, "score": g / 2} for g in (0, 1)]
    write(tmp_path / "reward/samples.jsonl", *samples)
    ppo = {"objective/scores": 0.1, "objective/kl": 2.0, "val/explained_variance": None, f"rewards/{EVIL}": 0.5}
    write(tmp_path / "ppo/metrics.jsonl", *({"step": n, **ppo} for n in steps))
    row = {"prompt": EVIL, "completion": EVIL, "reward": 1.0, "gold": 0.5, "ended": False}
    write(tmp_path / "ppo/samples.jsonl", {"when": "before", **row}, {"when": "after", **row})
    bins = [{"predicted": 0.6, "observed": 0.7, "pairs": 9}, {"predicted": 0.9, "observed": 0.8, "pairs": 4}]
    (tmp_path / "reward/summary.json").write_text(json.dumps({"calibration": bins}))
    (tmp_path / "ppo/summary.json").write_text(
        json.dumps({"reward_before": 0.0, "reward_after": 1.25, "seconds": 9.0, "seconds_by_part": {"generate": 5.0}})
    )
    (tmp_path / "config.yaml").write_text(f"model: {EVIL}\n")
    (tmp_path / "summary.json").write_text(
        json.dumps({"model": EVIL, "seconds": {"total": 99}, "backend": {"gae": "native"}})
    )
    return tmp_path


class Balance(HTMLParser):
    """Counts what is open; raises if a tag closes what another opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        """Remember it."""
        self.seen.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        """It closes itself."""

    def handle_endtag(self, tag: str) -> None:
        """Must close the innermost."""
        if tag not in VOID:
            assert self.open.pop() == tag


def test_the_page_is_whole_self_contained_and_escaped(run: Path) -> None:
    page = write_report(run).read_text()
    assert EVIL not in page and "&lt;script&gt;alert" in page
    balance = Balance()
    balance.feed(page)
    assert not balance.open and "script" not in balance.seen and "link" not in balance.seen
    assert not re.search(r"(src|href)=[\"'](?!#)", page) and "url(http" not in page
    assert page.count("<svg") >= 8 and "0.00</s> 1.25" in page
    for heading in (
        "Supervised fine-tuning",
        "Feedback",
        "Reward model",
        "PPO",
        "before and after",
        "Best, median and worst",
        "Reward: ",
        "Calibration",
        "config.yaml",
    ):
        assert heading in page


def test_figures_after_training_stand_at_the_step_whose_model_is_kept(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for when, reward in (("before", 0.0), ("after", 1.25)):
        (run / f"ppo/eval_{when}.json").write_text(json.dumps({"reward": reward}))
    drawn: list[plots.Line] = []
    draw = plots.lines

    def lines(curves: Sequence[plots.Line], *args: Any, **options: Any) -> str:
        drawn.extend(curves)
        return draw(curves, *args, **options)

    monkeypatch.setattr(plots, "lines", lines)
    for summary, last in (({}, 3), ({"best_step": 2}, 2)):
        (run / "ppo/summary.json").write_text(json.dumps(summary))
        drawn.clear()
        write_report(run)
        assert [(line.x, line.y) for line in drawn if line.label == "held out" and 1.25 in line.y] == [
            ([0, last], [0.0, 1.25])
        ]


def test_a_report_shows_no_secret(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_" + "S3cretS3cretS3cretS3cret"
    monkeypatch.setenv("SOME_API_KEY", "correct-horse-battery")
    (run / "config.yaml").write_text(
        f"reward_functions: [https://me:{secret}@host/?token=abc]\nx: correct-horse-battery\n"
    )
    row = {"prompt": f"my token is {secret}", "completion": "correct-horse-battery", "reward": 1.0, "ended": True}
    write(run / "ppo/samples.jsonl", {"when": "before", **row}, {"when": "after", **row})
    page = write_report(run).read_text()
    assert "my token is ***" in page and secret not in page and "correct-horse" not in page and "token=abc" not in page


def test_half_a_run_has_a_report_too(run: Path) -> None:
    (run / "summary.json").unlink()
    with (run / "sft/metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    for phase in ("collect", "reward", "ppo"):
        for file_of_phase in (run / phase).iterdir():
            file_of_phase.unlink()
    (run / "collect").rmdir()
    page = write_report(run).read_text()
    assert "Supervised fine-tuning" in page and "Feedback" not in page


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run: wanted one of the folders sft, collect, reward, ppo"):
        write_report(tmp_path)


def test_variety_counts_texts_and_word_pairs() -> None:
    assert variety(["a b a", "a b a", "c"]) == {"distinct": 2 / 3, "distinct_2": 0.5}
    assert variety(["a"]) == {"distinct": 1.0, "distinct_2": 1.0}
