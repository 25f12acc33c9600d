# SPDX-License-Identifier: Apache-2.0
"""Rewards: a model, functions, or a weighted sum; and a function that fails stops the run without a loss."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from helpers.ppo_runs import load_agent, prompts_of, train_step
from safetensors.torch import load_file

from rlhf_fast import cli
from rlhf_fast.data.examples import PromptLine
from rlhf_fast.errors import UserError
from rlhf_fast.feedback.raters import RaterError
from rlhf_fast.models.heads import sequence_scores
from rlhf_fast.models.loading import load_reward_model, load_tokenizer, set_score_normalizer
from rlhf_fast.rollout.builtin import generate
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.run.progress import Timer
from rlhf_fast.trainer import PPOConfig
from rlhf_fast.trainer.rl.ppo import train_ppo
from rlhf_fast.trainer.rl.reward_functions import RewardFunction, check_columns, load_functions
from rlhf_fast.trainer.rl.rewards import LengthRules, Rewards
from rlhf_fast.trainer.rl.sample import sample
from rlhf_fast.trainer.rl.settings import Settings


@pytest.fixture
def rules(tmp_path: Path) -> str:
    """A file of reward functions; `flaky` fails from its ninth call on while the file `broken` exists."""
    path = tmp_path / "rules.py"
    path.write_text(
        "import pathlib\n"
        "calls = []\n"
        "def words(prompt, completions): return [len(c.split()) for c in completions]\n"
        "def cats(prompt, completions): return [c.split().count('cat') for c in completions]\n"
        "def flaky(prompt, completions):\n"
        "    calls.append(prompt)\n"
        "    broken = len(calls) > 8 and (pathlib.Path(__file__).parent / 'broken').exists()\n"
        "    return [float('nan') if broken else len(c) / 10 for c in completions]\n"
    )
    return str(path)


def config(tiny: Path, folder: Path, **values: Any) -> PPOConfig:
    common = {"model": str(tiny / "model"), "prompts_file": str(tiny / "feedback_prompts.jsonl"), "dtype": "float32"}
    sizes = {"max_length": 32, "max_new_tokens": 8, "prompts_per_step": 4, "samples_per_prompt": 4, "max_steps": 4}
    return PPOConfig(**{**common, **sizes, "output_dir": str(folder), "lr": 1e-3, "critic_lr": 1e-3, **values})


def test_the_reward_is_a_weighted_sum(tiny: Path, rules: str) -> None:
    tokenizer = load_tokenizer(str(tiny / "model"))
    model = load_reward_model(str(tiny / "model"), torch.float32, tokenizer, new_head=True)
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in ("ann cat", "ann dog", "ben cat", "ben red")])
    real = torch.ones_like(ids).bool()
    functions = load_functions((f"2*{rules}:cats", f"-0.5 * {rules}:words"))
    texts = ["cat", "dog", "cat cat", "red"]
    lines = [PromptLine("ann", "f:1"), PromptLine("ben", "f:2")]
    rollout = Rollout(ids, real, real, texts, real.all(1))
    total = Rewards(model, functions)(rollout, [torch.arange(4)], lines).total
    with torch.no_grad():
        scores = sequence_scores(model, rollout.batch)
    torch.testing.assert_close(total, scores + torch.tensor([1.5, -0.5, 3.0, -0.5]))
    assert Rewards(None, functions).of_functions(lines[:1], texts).total.tolist() == [1.5, -0.5, 3.0, -0.5]
    rows = [
        {"prompt": "ann", "completion": "cat", "reward": 2.0},
        {"prompt": "ann", "completion": "dog", "reward": 0.0},
    ]
    assert Rewards(model, functions).add_to(rows, lines[:1])["reward"] == pytest.approx((3.5 - 0.5) / 2)


@pytest.mark.parametrize("objective", ["grpo", "dpo"])
def test_only_the_models_own_score_is_rounded(tiny: Path, reward_model: str, tmp_path: Path, objective: str) -> None:
    """Functions are exact: 50 and 50.6 differ, whatever the dtype of the reward model whose small score is added."""
    (tmp_path / "steps.py").write_text("def steps(prompt, completions): return [1 + i / 250 for i in range(4)]\n")
    more = {"dtype": "bfloat16", "reward_model": reward_model, "reward_functions": (f"50*{tmp_path}/steps.py:steps",)}
    settings = config(tiny, tmp_path / "run", objective=objective, score_clip=1e-3, dynamic_sampling=1, **more)
    agent = load_agent(settings)
    row = train_step(agent, prompts_of(settings, agent), settings, 0)
    assert row["policy/grad_norm"] > 0.01 and row["sample/dropped"] == row["sample/unfilled"] == 0


def test_a_function_named_like_a_figure_of_dpo_keeps_a_curve_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text("def margins(prompt, completions): return [1.0] * len(completions)\n")
    assert [function.name for function in load_functions([f"{tmp_path}/f.py:margins"] * 2)] == [
        "margins#1",
        "margins#2",
    ]


def test_wrong_functions_are_named(rules: str) -> None:
    with pytest.raises(UserError, match="'two' before the [*] in 'two[*].*' is no number"):
        load_functions((f"two*{rules}:cats",))
    with pytest.raises(UserError, match="^reward function .*has no function 'dogs'"):
        load_functions((f"{rules}:dogs",))


def test_functions_alone_teach_the_policy(tiny: Path, tmp_path: Path, rules: str) -> None:
    settings = config(
        tiny,
        tmp_path / "run",
        reward_functions=(f"{rules}:words",),
        eval_prompts_file=str(tiny / "heldout.jsonl"),
        objective="rloo",
        max_steps=15,
        kl_coef=0.0,
        score_clip=0.0,
    )
    summary = train_ppo(settings, RunFolder.create(settings.output_dir))
    assert summary["reward_after"] > summary["reward_before"] + 0.5
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert all(row["reward"] == len(row["completion"].split()) for row in rows)


def test_a_function_that_fails_stops_the_run_and_resume_goes_on_as_if_it_had_not(
    tiny: Path, tmp_path: Path, rules: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = config(tiny, tmp_path / "whole", reward_functions=(f"{rules}:flaky",))
    train_ppo(whole, RunFolder.create(whole.output_dir))
    (tmp_path / "broken").touch()
    Path(rules).touch()  # so that it is executed again, as another launch would
    options = ["ppo", "--config", str(tmp_path / "c.yaml")]
    stopped = config(tiny, tmp_path / "run", reward_functions=(f"{rules}:flaky",))
    names = ("model", "prompts_file", "dtype", "max_length", "max_new_tokens", "prompts_per_step", "max_steps")
    lines = {name: getattr(stopped, name) for name in (*names, "samples_per_prompt", "lr", "critic_lr", "output_dir")}
    (tmp_path / "c.yaml").write_text(json.dumps({**lines, "reward_functions": ["rules.py:flaky"]}))
    assert cli.main(options) == 2
    error = capsys.readouterr().err
    assert "rules.py:flaky' on the prompt '" in error and "returned nan for '" in error
    assert "saved after 2 steps, --resume goes on from there" in error and "Traceback" not in error
    (tmp_path / "broken").unlink()
    assert cli.main([*options, "--resume"]) == 0
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def lines_of(*columns: dict[str, Any]) -> list[PromptLine]:
    return [PromptLine(f"{i}+{i}=", f"f:{i}", row) for i, row in enumerate(columns)]


def test_functions_get_the_other_columns_of_the_row(tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text(
        "def right(prompt, completions, answer): return [float(answer in c) for c in completions]\n"
        "def most(prompt, completions, **columns): return [len(columns)] * len(completions)\n"
        "def plain(prompt, completions): return [1.0] * len(completions)\n"
        "def trl(prompts, completions, answer, **columns):\n"
        "    assert len(prompts) == len(completions) == len(answer) and columns == {'hint': ['a', 'a', None, None]}\n"
        "    return [None if a == '2' else float(a in c) for a, c in zip(answer, completions)]\n"
        "def chat(prompts, completions): return [len(c[0]['content']) for c in completions]\n"
    )
    lines, texts = lines_of({"answer": "0", "hint": "a"}, {"answer": "2"}), ["0", "1", "2", "3"]

    def of(name: str) -> list[float]:
        (function,) = load_functions((f"{tmp_path}/f.py:{name}",))
        return function.of_prompts(lines, texts)

    assert of("right") == [1, 0, 1, 0] and of("most") == [2, 2, 1, 1] and of("plain") == [1, 1, 1, 1]
    assert of("trl")[:2] == [1, 0] and all(math.isnan(number) for number in of("trl")[2:])  # None
    (function,) = load_functions((f"{tmp_path}/f.py:chat",))
    assert function.of_prompts([PromptLine([{"role": "user", "content": "hi"}], "f:1")], ["yes"]) == [3]


def test_signatures_of_trl_that_leave_the_prompts_out(tmp_path: Path) -> None:
    """As in TRL's documentation and its own `trl.rewards`: everything goes in by keyword."""
    (tmp_path / "f.py").write_text(
        "def logs(completions, **kwargs): return [len(kwargs['answer'])] * len(completions)\n"
        "def right(completions, answer, **kwargs): return [float(a in c) for a, c in zip(answer, completions)]\n"
        "def behind(completions, prompts, answer): return [float(a in p) for a, p in zip(answer, prompts)]\n"
        "def keywords(**kwargs): return [len(p) for p in kwargs['prompts']]\n"
        "def optional(completions, answer, level=7): return [level] * len(completions)\n"
    )
    lines, texts = lines_of({"answer": "0"}, {"answer": "2"}), ["0", "1", "2", "3"]
    wanted = {"logs": [4] * 4, "right": [1, 0, 1, 0], "behind": [1, 1, 0, 0], "keywords": [4] * 4, "optional": [7] * 4}
    for name, numbers in wanted.items():
        (function,) = load_functions((f"{tmp_path}/f.py:{name}",))
        assert function.of_prompts(lines, texts) == numbers, name


def test_a_column_that_a_function_must_have(tiny: Path, tmp_path: Path, rules: str) -> None:
    """A row without it gives None; a file without it is refused before anything is sampled."""
    path = tmp_path / "f.py"
    path.write_text(
        "def one(prompt, completions, gold): return [float(gold is not None)] * len(completions)\n"
        "def all(prompts, completions, gold): return [float(g is not None) for g in gold]\n"
    )
    lines = lines_of({"gold": "0", "hint": 1}, {"hint": 2})
    for name in ("one", "all"):
        (function,) = load_functions((f"{path}:{name}",))
        check_columns([function], lines)
        assert function.of_prompts(lines, ["0", "1"]) == [1, 0]
        assert function.of_prompts(lines[1:], ["0", "1"]) == [0, 0]  # where no row of a batch has it
        with pytest.raises(UserError, match=f"{name}' takes gold, which no row of f has; its columns .*: hint"):
            check_columns([function], lines[1:])
    wrong = config(tiny, tmp_path / "run", objective="grpo", reward_functions=(f"{path}:one",))
    with pytest.raises(UserError, match=r"takes gold, which no row of .*feedback_prompts.jsonl has"):
        train_ppo(wrong, RunFolder.create(tmp_path / "run"))


def test_each_function_is_shown_by_its_name(rules: str) -> None:
    found = Rewards(None, load_functions((f"{rules}:words", f"0.5*{rules}:cats", f"{rules}:words")))
    scores = found.of_functions(lines_of({}), ["cat dog", "cat"])
    assert scores.total.tolist() == [4.5, 2.5]
    assert {name: part.tolist() for name, part in scores.parts.items()} == {
        "rewards/words": [2, 1],
        "rewards/cats": [1, 1],
        "rewards/words#2": [2, 1],
    }


@pytest.fixture
def server() -> Iterator[tuple[str, list[Any], list[tuple[int, Any]]]]:
    """A reward server: its URL, the requests it got, and the answers it gives, the last one again and again."""
    got: list[Any] = []
    answers: list[tuple[int, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            code, answer = answers.pop(0) if len(answers) > 1 else answers[0]
            body = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/score", got, answers
        running.shutdown()


def test_rewards_come_over_http(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url, got, answers = server
    monkeypatch.setattr("rlhf_fast.trainer.rl.remote_reward.WAITS", (0.01, 0.01))
    (function,) = load_functions((f"0.5*{url}",))
    lines, texts = lines_of({"answer": "0"}, {"answer": "2"}), ["0", "1", "2", "3"]
    answers += [(503, {}), (200, {"rewards": [1, 2, 3, 4]})]
    assert function.weight == 0.5 and function.of_prompts(lines, texts) == [1, 2, 3, 4]
    assert got[0] == got[1] and len(got) == 2
    assert got[0]["query"] == ["0+0=0", "0+0=1", "1+1=2", "1+1=3"] and got[0]["labels"] == ["0", "0", "2", "2"]
    assert got[0]["columns"] == {"answer": ["0", "0", "2", "2"]} and got[0]["completions"] == texts
    for code, answer, message in (
        (500, {}, "answered 500"),
        (404, {}, "answered 404"),
        (200, {"scores": [1]}, "wanted"),
        (200, {"rewards": [1]}, "returned 1 rewards for 4 completions"),
        (200, {"rewards": [1, None, 3, 4]}, "answered null for completion 1"),
        (200, {"rewards": [1, 2, float("nan"), 4]}, "must be finite"),
    ):
        answers[:] = [(code, answer)]
        with pytest.raises(RaterError, match=message):
            function.of_prompts(lines, texts)


def test_a_server_that_cannot_be_reached_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_fast.trainer.rl.remote_reward.WAITS", (0.01,))
    (function,) = load_functions(("http://127.0.0.1:9/score",))
    with pytest.raises(RaterError, match="cannot be reached .*; tried 2 times"):
        function.of_prompts(lines_of({}), ["a"])


def test_rewards_that_nobody_normalised_are_not_clipped(tiny: Path, tmp_path: Path, rules: str) -> None:
    """Ten to twenty words' worth of reward: clipped to 5 all samples would be alike, and nothing would be learned."""
    path = tmp_path / "far.py"
    path.write_text("def far(prompt, completions): return [10 + len(c.split()) for c in completions]\n")
    settings = config(tiny, tmp_path / "run", reward_functions=(f"{path}:far",), max_steps=1, score_clip=5.0)
    train_ppo(settings, RunFolder.create(settings.output_dir))
    (row,) = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert row["policy/grad_norm"] > 0.01 and row["objective/scores"] > 10
    assert row["objective/rlhf_reward"] == pytest.approx(row["objective/scores"], abs=0.1)
    assert "objective/scores_clipped" not in row
    assert 8 < row["val/mean"] < 20  # the critic begins on the rewards that advantages see


@pytest.mark.parametrize("normalised", [True, False])
def test_normalised_scores_alone_are_clipped(tiny: Path, reward_model: str, normalised: bool, tmp_path: Path) -> None:
    agent = load_agent(config(tiny, tmp_path / "run", reward_model=reward_model))
    if not normalised:
        set_score_normalizer(agent.rewards.model, 0.0, 1.0)
    ids = torch.randint(2, 50, (6, 5), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(ids).bool()
    rollout = Rollout(ids, real, real, ["a"] * 6, real.all(1))
    with torch.no_grad():
        raw = sequence_scores(agent.rewards.model, rollout.batch)
    limit = float(raw.abs().median())
    scores = replace(agent.rewards, score_clip=limit)(rollout, [torch.arange(6)], lines_of({}))
    torch.testing.assert_close(scores.total, raw.clamp(-limit, limit) if normalised else raw)
    share = {"objective/scores_clipped": (raw.abs() > limit).float(), "objective/scores": raw}
    assert scores.parts.keys() == (share.keys() if normalised else set())
    assert all(torch.equal(scores.parts[name], share[name]) for name in scores.parts)
    assert 0 < share["objective/scores_clipped"].mean() < 1
    two = RewardFunction("two", "two", 1.0, lambda prompt, completions: [2.0] * len(completions))
    both = replace(agent.rewards, score_clip=limit, functions=[two])(rollout, [torch.arange(6)], lines_of({}))
    torch.testing.assert_close(both.total, scores.total + 2)  # of which functions are never clipped
    torch.testing.assert_close(both.parts["rewards/reward_model"], raw)
    if normalised:
        torch.testing.assert_close(both.parts["objective/scores"], raw + 2)
        assert torch.equal(both.parts["objective/scores_clipped"], share["objective/scores_clipped"])
    assert both.rounding is not None and not both.rounding.any()
    agent.rewards.model.bfloat16()
    half = replace(agent.rewards, score_clip=limit, functions=[two])(rollout, [torch.arange(6)], lines_of({}))
    assert half.rounding is not None and torch.equal(half.rounding, 2**-6 * (half.total - 2).abs().clamp(min=1))


def test_a_sample_that_did_not_end(tiny: Path) -> None:
    ids = torch.zeros(3, 12, dtype=torch.int64)
    lengths = torch.tensor([10, 9, 4])
    real = torch.arange(12) < 2 + lengths[:, None]
    mask = real & (torch.arange(12) >= 2)  # behind prompts of two tokens
    rollout = Rollout(
        ids, real, mask, [""] * 3, torch.tensor([False, True, False]), scores=torch.tensor([2.0, 3.0, 4.0])
    )
    assert LengthRules(missing_eos_penalty=1.0).apply(rollout).tolist() == [1.0, 3.0, 3.0]
    assert LengthRules(missing_eos_score=-1.0).apply(rollout).tolist() == [-1.0, 3.0, -1.0]
    soft = LengthRules(overlong_penalty=2.0, overlong_buffer=0.2, max_new_tokens=10)
    assert soft.apply(rollout).tolist() == [0.0, 2.0, 4.0]  # all of it at the limit, half of it half-way
    assert soft.apply(rollout, punish=False).tolist() == [2.0, 3.0, 4.0]


def permuted(tiny: Path, folder: Path) -> str:
    """A reward model whose tokenizer has the same tokens under other ids."""
    content = json.loads((tiny / "model" / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    special = {token["id"] for token in content["added_tokens"]}
    ordinary = sorted(i for i in vocabulary.values() if i not in special)
    other = dict(zip(ordinary, reversed(ordinary), strict=True))
    content["model"]["vocab"] = {token: other.get(i, i) for token, i in vocabulary.items()}
    model = load_reward_model(str(tiny / "model"), torch.float32, load_tokenizer(str(tiny / "model")), new_head=True)
    model.score.weight.data.mul_(20)
    embeddings = model.get_input_embeddings().weight.data
    old = embeddings.clone()
    for i, j in other.items():
        embeddings[j] = old[i]
    model.save_pretrained(folder)
    load_tokenizer(str(tiny / "model")).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return str(folder)


def test_a_reward_model_of_another_vocabulary_reads_the_text(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its embeddings are permuted as its ids are, so its scores are those of the model that reads the policy's ids."""
    torch.manual_seed(0)
    folder = permuted(tiny, tmp_path / "reward")
    torch.manual_seed(0)
    plain = load_reward_model(str(tiny / "model"), torch.float32, load_tokenizer(str(tiny / "model")), new_head=True)
    plain.score.weight.data.mul_(20)
    settings = config(tiny, tmp_path / "run", reward_model=folder, max_steps=1, score_clip=0.0)
    agent = load_agent(settings)
    assert "has another vocabulary than" in capsys.readouterr().err and agent.rewards.reader is not None
    assert not agent.critic.score.weight.any()  # from the policy, with a new head
    prompts = prompts_of(settings, agent)
    options = Settings(settings)
    rollout = sample(agent, prompts, options.step.sample, options.sizes, 0, 0, Timer(), generate)
    with torch.no_grad():
        wanted = sequence_scores(plain, rollout.batch)
    assert rollout.scores is not None
    same = torch.zeros(len(wanted), dtype=torch.bool)  # of the samples that text keeps whole: no special token in them
    for row, (ids, mask, ended) in enumerate(
        zip(rollout.input_ids, rollout.attention_mask, rollout.ended.tolist(), strict=True)
    ):
        sampled = ids[mask].tolist()[: -1 if ended else None]
        same[row] = not set(sampled[1:]) & set(agent.tokenizer.all_special_ids)
    assert int(same.sum()) >= 4
    torch.testing.assert_close(rollout.scores[same], wanted[same], atol=1e-4, rtol=1e-4)
    summary = train_ppo(
        replace(settings, eval_prompts_file=str(tiny / "heldout.jsonl")), RunFolder.create(tmp_path / "run")
    )
    assert summary["reward_before"] is not None
    for reward in (folder, str(tiny / "model")):  # the second has no score head to speak of, but reads the same ids
        options = ["--prompts", str(tiny / "heldout.jsonl"), "--limit", "4", "--max-new-tokens", "4", "--reward-model"]
        assert cli.main(["eval", str(tiny / "model"), str(tiny / "model"), *options, reward]) in (0, 2)
        said = capsys.readouterr()
        assert ("has another vocabulary" in said.err) == (reward == folder)
        assert reward != folder or "B wins by reward 50.0%" in said.out
