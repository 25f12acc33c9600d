# SPDX-License-Identifier: Apache-2.0
"""`rlhf-fast report`: several runs on one page, and what the doctor says while a run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import phases

from rlhf_fast import cli
from rlhf_fast.report.plots import frontier
from rlhf_fast.report.runs import write_comparison
from rlhf_fast.run.progress import Progress
from rlhf_fast.run.records import read_jsonl
from rlhf_fast.run.verdicts import LiveVerdict, of_reward, of_rl_so_far, of_sft

from .test_report import EVIL, Balance, write

GOOD = {
    "policy/ratio": 1.0,
    "policy/approxkl_avg": 0.01,
    "objective/kl": 3.0,
    "objective/scores_std": 1.0,
    "objective/entropy": 2.0,
    "sample/ended": 1.0,
}


def make_run(folder: Path, scores: list[float], **options: Any) -> Path:
    """A pipeline's folder whose policy moves by one nat a step."""
    rows = [{"step": n, "objective/kl": float(n), "objective/scores": score} for n, score in enumerate(scores, 1)]
    write(folder / "ppo/metrics.jsonl", *rows)
    write(folder / "sft/metrics.jsonl", *({"step": n, "loss": 3.0 / n} for n in (1, 2, 3)))
    samples = [
        {"when": "after", "prompt": p, "completion": f"{EVIL} {folder.name}", "reward": 1.0} for p in ("p", EVIL)
    ]
    write(folder / "ppo/samples.jsonl", *samples)
    summary = {"objective": "ppo", "reward_before": 0.0, "reward_after": scores[-1], "kl_final": 3.25, "steps": 3}
    (folder / "ppo/summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 0, "output_dir": str(folder), "ppo": options}))
    return folder


def test_several_runs_on_one_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    first = make_run(tmp_path / "first", [0.1, 0.5, 0.25], lr=1e-5, epochs=4)
    second = make_run(tmp_path / "second", [0.2, 0.3, 0.75], lr=2e-5, epochs=4)
    alone = first.rename(tmp_path / "alone") / "ppo"  # one phase's folder by itself
    assert cli.main(["report", str(alone), str(second)]) == 0
    shown = capsys.readouterr().out
    assert "alone/ppo: objective ppo, steps 3, reward before 0, reward after 0.25, KL 3.25" in shown
    page = (tmp_path / "comparison.html").read_text()
    balance = Balance()
    balance.feed(page)
    assert not balance.open and "script" not in balance.seen and EVIL not in page
    for text in ("Reward against KL", "Figures at the end", "0.25", "0.75", "side by side"):
        assert text in page
    assert "Options that differ" in page and ">ppo.lr<" in page and "2e-05" in page
    assert page.count("&lt;script&gt;") >= 2 * 2  # samples of both, under each prompt


def test_options_that_are_the_same_are_left_out(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, [0.1, 0.2, 0.3], lr=lr, epochs=4) for name, lr in (("a", 1e-5), ("b", 2e-5))]
    page = write_comparison(runs, tmp_path / "page.html").read_text()
    assert ">ppo.lr<" in page and "ppo.epochs" not in page and "output_dir" not in page and ">seed<" not in page


def test_one_run_gets_its_report_anew_and_a_wrong_folder_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", [0.1, 0.2, 0.3])
    assert cli.main(["report", str(run)]) == 0 and (run / "report.html").exists()
    assert cli.main(["report", str(run), str(tmp_path)]) == 2
    assert f"{tmp_path} holds no run" in capsys.readouterr().err
    assert cli.main(["report", str(run), str(run), "--output", str(tmp_path / "no" / "page.html")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_the_frontier_is_the_best_reward_within_each_kl() -> None:
    assert frontier([3, 1, 2, 5, 4], [0.5, 0.2, 0.1, 0.4, 0.7]) == [(1, 0.2), (3, 0.5), (4, 0.7), (5, 0.7)]
    assert frontier([1, 1], [0.1, 0.2]) == [(1, 0.2), (1, 0.2)]


def test_line_separators_inside_of_texts_lose_no_row(tmp_path: Path) -> None:
    rows = [{"text": mark} for mark in ("\u2028", "\x85", "\x0b", "\x1c")]
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + '{"cut')
    assert read_jsonl(tmp_path / "f.jsonl") == rows


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, "good so far"),
        ({"objective/kl": 90.0}, "look: KL 90.0 nats per sequence from the reference: far from it"),
        ({"objective/kl": -3.0}, "bad: KL -3.0"),
        ({"policy/approxkl_avg": 3.0}, "bad: largest update 3 nats per token"),
        ({"objective/scores_std": 0.0}, "bad: scores spread by 0: nothing to learn from"),
        ({"objective/entropy": 0.1}, "bad: entropy 2.00 -> 0.10 nats per token: collapsing"),
        ({"sample/ended": 0.0, "objective/entropy": 0.1}, "(and 1 more)"),
        ({"val/explained_variance": -0.5}, "look: the critic explains -50% of the returns"),
    ],
)
def test_the_doctor_speaks_while_rl_runs(change: dict[str, float], verdict: str) -> None:
    live = LiveVerdict(of_rl_so_far, [GOOD])
    assert live.after(GOOD) == "good so far"
    assert verdict in live.after({**GOOD, **change})


def test_the_doctor_speaks_while_sft_the_reward_model_and_dpo_learn() -> None:
    ranked = "rewards/accuracies"  # of DPO on ranked completions, which has no KL, scores or entropy of samples
    for judge, name, good, bad in (
        (of_sft, "loss", [3.0 - 0.1 * n for n in range(8)], [3.0] * 8),
        (of_reward, "pair_accuracy", [0.5 + 0.05 * n for n in range(8)], [0.5] * 8),
        (of_rl_so_far, ranked, [0.0] + [0.7] * 7, [0.4] * 8),
    ):
        for values, level in ((good, "good so far"), (bad, "look: ")):
            live = LiveVerdict(judge)
            said = [live.after({name: value}) for value in values]
            assert said[:7] == [""] * 7 and said[7].startswith(level)


def test_the_verdict_stands_in_the_progress_of_a_run(
    job_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phases.run(phases.jobs(job_data)["grpo"], tmp_path / "run")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ppo 3/3")]
    assert len(lines) == 1 and any(word in lines[0] for word in ("; good so far", "; look: ", "; bad: "))


def test_the_verdict_is_drawn_below_the_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    monkeypatch.setenv("COLUMNS", "100")
    with Progress("ppo", 2) as bar:
        bar.update(1, "bad: KL [red]90\x1b[2J", loss=0.5)
    text = capsys.readouterr().out
    assert "loss 0.5" in text and r"doctor: bad: KL [red]90\x1b[2J" in text
