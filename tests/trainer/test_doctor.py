# SPDX-License-Identifier: Apache-2.0
"""`rlhf-fast doctor` on runs that are broken in one known way each, and `rlhf-fast eval` on two real models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast import cli
from rlhf_fast.errors import UserError
from rlhf_fast.report.compare import win_rate
from rlhf_fast.report.doctor import diagnose

SFT = {"demonstrations": 9, "loss_before": 4.0, "loss_after": 2.5}
REWARD = {
    "heldout_pair_accuracy": 0.8,
    "train_pair_accuracy": 0.85,
    "heldout_pairs": 60,
    "score_std": 1.2,
    "read_position_gap": 1e-6,
    "calibration_error": 0.05,
}
PPO = {
    "objective": "ppo",
    "kl_final": 5.0,
    "reward_before": 0.0,
    "reward_after": 1.2,
    "gold_before": 0.1,
    "gold_after": 0.6,
    "entropy_before": 2.0,
    "entropy_after": 1.4,
    "ended_before": 0.9,
    "ended_after": 1.0,
}
METRICS = {
    "policy/ratio": 1.001,
    "policy/approxkl_avg": 0.01,
    "val/explained_variance": 0.4,
    "objective/scores_std": 0.9,
}
ENGINE = {"engine/logprob_diff_mean": 0.04, "engine/effective_samples": 0.99}


def run_with(folder: Path, **changes: dict[str, Any]) -> Path:
    """A healthy run but for `changes`: phase -> entries of its summary (or, for `metrics`, of PPO's metrics)."""
    for name, summary in (("sft", SFT), ("reward", REWARD), ("ppo", PPO)):
        (folder / name).mkdir()
        (folder / name / "summary.json").write_text(json.dumps({**summary, **changes.get(name, {})}))
    row = {"step": 1, **METRICS, **changes.get("metrics", {})}
    (folder / "ppo" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def write_samples(folder: Path, scores: list[float]) -> None:
    """Held-out completions of growing length with these scores; people do not care for length."""
    rows = [
        {"prompt": "p", "completion": "word " * (n + 1), "goodness": n % 2, "score": score}
        for n, score in enumerate(scores)
    ]
    (folder / "reward" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_healthy_run_has_nothing_that_stands_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_samples(run_with(tmp_path), [0.1, 1.0] * 5)
    assert {finding.level for finding in diagnose(tmp_path)} == {"good"}
    assert cli.main(["doctor", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "held-out perplexity 54.6 -> 12.18" in text and text.endswith("nothing stands out\n")


@pytest.mark.parametrize(
    ("changes", "phase", "level", "message"),
    [
        ({"sft": {"loss_after": 4.2}}, "sft", "bad", "it has learned nothing"),
        ({"sft": {"loss_after": None}}, "sft", "look", "no held-out demonstrations"),
        ({"reward": {"heldout_pair_accuracy": 0.52, "train_pair_accuracy": 0.6}}, "reward", "bad", "0.5 is chance"),
        ({"reward": {"train_pair_accuracy": 1.0, "heldout_pair_accuracy": 0.7}}, "reward", "look", "it memorises"),
        ({"reward": {"score_std": 0.001}}, "reward", "bad", "nearly one score for all"),
        ({"reward": {"read_position_gap": 0.9}}, "reward", "bad", "read at a wrong token"),
        ({"metrics": {"policy/ratio": 1.8}}, "ppo", "bad", "mean ratio of the first step 1.800"),
        ({"ppo": {"kl_final": 90.0}}, "ppo", "look", "far from it: raise kl_coef"),
        ({"ppo": {"kl_final": -3.0}}, "ppo", "bad", "log-probs are not of the distribution"),
        ({"ppo": {"gold_after": -0.2}}, "ppo", "bad", "it exploits the reward model"),
        ({"ppo": {"entropy_after": 0.05}}, "ppo", "bad", "collapsing"),
        ({"ppo": {"length_before": 46.0, "length_after": 1.0}}, "ppo", "bad", "46.0 -> 1.0 tokens: nearly empty"),
        ({"ppo": {"length_before": 10.0, "length_after": 25.0}}, "ppo", "look", "it rewards length"),
        ({"ppo": {"distinct_before": 1.0, "distinct_after": 0.1}}, "ppo", "bad", "10% of the samples differ"),
        ({"ppo": {"ended_after": 0.1}}, "ppo", "bad", "raise missing_eos_penalty"),
        ({"metrics": {"val/explained_variance": -1.0}}, "ppo", "look", "less than a constant would"),
        ({"metrics": {"objective/scores_std": 0.0}}, "ppo", "bad", "nothing to learn from"),
        ({"metrics": {"objective/scores_clipped": 0.3}}, "ppo", "look", "score_clip clips 30% of the scores"),
        ({"metrics": {"objective/scores_clipped": 0.9}}, "ppo", "bad", "raise it"),
        ({"metrics": {"engine/logprob_diff_mean": 0.1}}, "ppo", "look", "0.1 nats per token from the policy's: more"),
        ({"metrics": {"engine/logprob_diff_mean": 0.2}}, "ppo", "bad", "the engine should have the policy's dtype"),
        ({"metrics": ENGINE | {"engine/effective_samples": 0.7}}, "ppo", "look", "70% of the sampled tokens count"),
        ({"metrics": ENGINE | {"engine/effective_samples": 0.3}}, "ppo", "bad", "too unlikely for the policy"),
    ],
)
def test_each_ill_is_found_in_its_phase(
    tmp_path: Path, changes: dict[str, Any], phase: str, level: str, message: str
) -> None:
    (finding,) = [finding for finding in diagnose(run_with(tmp_path, **changes)) if finding.level != "good"]
    assert (finding.phase, finding.level) == (phase, level) and message in finding.text


def test_a_gap_to_the_engine_that_grows_is_seen(tmp_path: Path) -> None:
    run = run_with(tmp_path, metrics=ENGINE)
    assert all(finding.level == "good" for finding in diagnose(run))
    rows = [{"step": n, **METRICS, "engine/logprob_diff_mean": 0.001 * 2**n} for n in range(6)]
    (run / "ppo" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (finding,) = [finding for finding in diagnose(run) if finding.level != "good"]
    assert finding.level == "bad" and "grew from 0.001 to 0.032: new weights do not all arrive" in finding.text


def test_a_reward_for_length_is_seen(tmp_path: Path) -> None:
    write_samples(run_with(tmp_path), [float(n) for n in range(10)])
    (finding,) = [finding for finding in diagnose(tmp_path) if finding.level != "good"]
    assert "score and length correlate +1.00" in finding.text and "it rewards length" in finding.text


def test_the_first_bad_phase_is_named_and_unfinished_ones_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with(tmp_path, reward={"heldout_pair_accuracy": 0.5}, ppo={"gold_after": -1.0}, sft={"loss_after": None})
    assert cli.main(["doctor", str(run)]) == 1
    assert "look first at Reward model: held-out pair accuracy 0.50" in capsys.readouterr().out
    (run / "ppo" / "summary.json").unlink()
    assert "has not finished" in diagnose(run)[-1].text
    assert [finding.phase for finding in diagnose(run / "sft")] == ["sft"]  # one phase by itself
    with pytest.raises(UserError, match="holds no run"):
        diagnose(tmp_path / "ppo")


def test_the_win_rate_and_its_interval() -> None:
    assert win_rate([0.0] * 8, [1.0] * 8, 2) == {"rate": 1.0, "low": 1.0, "high": 1.0, "prompts": 4}
    assert win_rate([1.0, 1.0], [1.0, 1.0], 1)["rate"] == 0.5
    one_each = win_rate([0.0, 1.0] * 50, [1.0, 0.0] * 50, 2)  # every prompt is won and lost once: no variance
    assert (one_each["rate"], one_each["low"], one_each["high"]) == (0.5, 0.5, 0.5)
    by_prompt = win_rate([0.0, 0.0, 1.0, 1.0] * 25, [1.0, 1.0, 0.0, 0.0] * 25, 2)
    assert 0.3 < by_prompt["low"] < 0.45 and 0.55 < by_prompt["high"] < 0.7  # 50 coins: 0.5 +- 0.14


def test_eval_of_a_model_against_itself_and_another(
    tiny: Path, tiny_rater: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other = AutoModelForCausalLM.from_pretrained(tiny / "model")
    with torch.no_grad():
        other.lm_head.weight[AutoTokenizer.from_pretrained(tiny / "model").eos_token_id] += 1.0
    for part in (other, AutoTokenizer.from_pretrained(tiny / "model")):
        part.save_pretrained(tmp_path / "other")
    rows = [json.loads(line) for line in (tiny / "heldout.jsonl").read_text().splitlines()[:7]]
    for row in rows[2:]:  # a rater gets the columns of each prompt's row as in `collect`: None where a row lacks one
        row["answer"] = row["prompt"].split()[-1]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rules.py").write_text(
        f"from rlhf_fast.feedback.raters import load_rater\nshare = load_rater({tiny_rater!r})\n"
        "def rate(prompt, completions, answer):\n"
        "    return [number + 10 * (prompt.split()[-1] == answer) for number in share(prompt, completions)]\n"
    )
    options = ["--prompts", f"{tmp_path}/prompts.jsonl", "--rater", f"{tmp_path}/rules.py:rate", "--dtype", "float32"]
    options += ["--max-new-tokens", "6", "--samples", "2", "--limit", "6"]
    output = tmp_path / "eval.json"
    model = str(tiny / "model")
    assert cli.main(["eval", model, str(tmp_path / "other"), *options, "--output", str(output)]) == 0
    text = capsys.readouterr().out
    result = json.loads(output.read_text())
    assert "B wins by gold" in text and result["win_rate_of_b"]["gold"]["prompts"] == 6
    assert result["figures"]["a"]["kl"] == pytest.approx(0, abs=1e-4) and "reward" not in result["figures"]["a"]
    assert result["figures"]["b"]["kl"] != pytest.approx(0, abs=1e-3) and len(result["samples"]["b"]) == 12
    assert [row["gold"] >= 10 for row in result["samples"]["a"]] == [False] * 4 + [True] * 8
    assert cli.main(["eval", model, model, *options, "--output", str(output)]) == 2
    assert "exists already" in capsys.readouterr().err
