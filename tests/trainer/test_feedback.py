# SPDX-License-Identifier: Apache-2.0
"""Feedback files, raters, and the collecting that loses nothing."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast import cli
from rlhf_fast.data.examples import PromptLine
from rlhf_fast.errors import UserError
from rlhf_fast.feedback.answer_file import AnswerFile
from rlhf_fast.feedback.encoded import encode
from rlhf_fast.feedback.raters import load_rater
from rlhf_fast.feedback.schema import read_feedback
from rlhf_fast.models.loading import load_tokenizer
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.run.resume import finished_summary
from rlhf_fast.trainer.collection import CollectConfig, collect
from rlhf_fast.trainer.rl.reward_functions import load_functions

ROW = {"prompt": "p", "completions": ["a", "b", "c"]}


def test_ranks_and_ratings_give_the_same_pairs(write_jsonl: Any) -> None:
    path = write_jsonl("f.jsonl", {**ROW, "ranks": [1, 3, 2]}, {**ROW, "ratings": [9.5, -1, 2]})
    ranked, rated = read_feedback(path)
    assert sorted(ranked.pairs()) == sorted(rated.pairs()) == [(0, 1), (0, 2), (2, 1)]
    assert ranked.ended == [True, True, True]


def test_ties_carry_no_pair_and_ranks_win_over_ratings(write_jsonl: Any) -> None:
    path = write_jsonl("f.jsonl", {**ROW, "ranks": [1, 2, 2], "ratings": [0, 0, 7], "ended": [True, False, True]})
    (ranking,) = read_feedback(path)
    assert ranking.pairs() == [(0, 1), (0, 2)]
    assert ranking.ended == [True, False, True]


def test_lines_that_nobody_rated_are_left_out(write_jsonl: Any) -> None:
    path = write_jsonl("f.jsonl", {**ROW, "ratings": None}, {**ROW, "ratings": [1, 2, 3]})
    assert [ranking.where for ranking in read_feedback(path)] == [f"{path}:2"]
    with pytest.raises(UserError, match="no line is rated yet"):
        read_feedback(write_jsonl("unrated.jsonl", ROW))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completions": ["a"]}, '"completions" must be a list of two or more texts'),
        ({"completions": "abc"}, '"completions" must be a list of two or more texts'),
        ({"completions": ["a", 2, "c"]}, '"completions" must be a list of two or more texts'),
        ({"ratings": [1, 2]}, r'"ratings" must be 3 finite numbers, one for each completion, got \[1, 2\]'),
        ({"ratings": [1, 2, "3"]}, '"ratings" must be 3 finite numbers'),
        ({"ratings": [1, 2, float("nan")]}, '"ratings" must be 3 finite numbers'),
        ({"ranks": [0, 1, 2]}, r'"ranks" must be whole numbers from 1 \(best\)'),
        ({"ranks": [1, 2.5, 2]}, '"ranks" must be whole numbers from 1'),
        ({"ratings": [1, 2, 3], "ended": [True]}, '"ended" must be 3 booleans'),
        ({"prompt": None, "ratings": [1, 2, 3]}, '"prompt" must be text'),
    ],
)
def test_a_wrong_line_is_named(write_jsonl: Any, change: dict[str, Any], message: str) -> None:
    path = write_jsonl("f.jsonl", {**ROW, "ranks": [1, 2, 3]}, {**ROW, **change})
    with pytest.raises(UserError, match=message) as caught:
        read_feedback(path, strict=True)
    assert str(caught.value).startswith(f"{path}:2: ")


@pytest.fixture
def raters(tmp_path: Path) -> str:
    """A file of raters, good and bad."""
    path = tmp_path / "raters.py"
    path.write_text(
        "def length(prompt, completions): return [len(c) for c in completions]\n"
        "def raises(prompt, completions): raise RuntimeError('service is down')\n"
        "def nan(prompt, completions): return [float('nan')] * len(completions)\n"
        "def short(prompt, completions): return [1.0]\n"
        "calls = []\n"
        "def fails_third(prompt, completions):\n"
        "    calls.append(prompt)\n"
        "    return [float('nan') if len(calls) == 3 else 1.0] * len(completions)\n"
    )
    return str(path)


def test_a_rater_is_a_function_of_a_file_or_a_module(raters: str) -> None:
    assert load_rater(f"{raters}:length")("p", ["a", "bb"]) == [1.0, 2.0]
    assert callable(load_rater("json:dumps"))


def test_the_functions_of_a_file_share_one_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Executed once, by whatever name and for whatever use it is asked for; again when it has been edited."""
    (tmp_path / "beside.py").write_text("WORD = 'cat'\n")
    path = tmp_path / "rules.py"
    path.write_text(
        "from __future__ import annotations\n"
        "import dataclasses, pickle\nfrom beside import WORD\n"
        "@dataclasses.dataclass\nclass Score:\n    value: float = 0.0\n"
        "shared = []\n"
        "def rate(prompt, completions):\n    shared.append(prompt)\n"
        "    return [pickle.loads(pickle.dumps(Score(c.count(WORD)))).value for c in completions]\n"
        "def calls(prompt, completions): return [len(shared)] * len(completions)\n"
    )
    (tmp_path / "folder").mkdir()
    rater = load_rater(f"{path}:rate")
    (first,) = load_functions((f"0.5*{tmp_path}/folder/../rules.py:calls",))
    assert rater("p", ["cat cat", ""]) == [2, 0]
    assert first.of_prompts([PromptLine("p", "f:1")], ["x"]) == [1]
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for edited in range(100, 103):  # as long as the one before, and within the same second
        path.write_text(re.sub(r"\[(\d+ \+ )?len", f"[{edited} + len", path.read_text()))
        assert load_rater(f"{path}:calls")("p", ["x"]) == [edited]


def test_a_file_that_raises_is_executed_again(tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text("def rate(prompt, completions): return [0.0]\nraise ValueError('no')\n")
    for _ in range(2):
        with pytest.raises(UserError, match="raised ValueError: no"):
            load_rater(f"{tmp_path}/f.py:rate")


def test_a_rater_gets_the_columns_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text(
        "def right(prompt, completions, answer, level=2): return [level * (answer in c) for c in completions]\n"
        "def none(prompt, completions, answer): return [answer is None for c in completions]\n"
        "def any(prompt, completions, **columns): return [len(columns)] * len(completions)\n"
    )
    rate = {name: load_rater(f"{tmp_path}/f.py:{name}") for name in ("right", "none", "any")}
    assert rate["right"]("p", ["a", "b"], answer="a", other=1) == [2, 0]
    assert rate["right"]("p", ["a", "b"], answer="a", level=3) == [3, 0]
    assert rate["none"]("p", ["a"], other=1) == [1]  # the row lacks it
    assert rate["any"]("p", ["a"], answer="a", completions=["x"], prompt="y", self=1) == [2]  # answer and self


@pytest.mark.parametrize("phase", ["collect", "ppo", "eval"])
def test_a_column_that_a_rater_must_have_is_missed_before_a_model_is_loaded(
    tmp_path: Path, write_jsonl: Any, phase: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "f.py").write_text("def right(prompt, completions, answer): return [1] * len(completions)\n")
    file, rater = write_jsonl("p.jsonl", {"prompt": "p", "hint": 1}), f"{tmp_path}/f.py:right"
    run = f"--model nowhere --output-dir {tmp_path}/run --prompts-file {file}"
    command = {
        "collect": f"collect {run}",
        "ppo": f"ppo {run} --reward-model nowhere --eval-prompts-file {file}",
        "eval": f"eval nowhere nowhere --prompts {file}",
    }[phase]
    assert cli.main([*command.split(), "--rater", rater]) == 2
    message = f"rater '{rater}' takes answer, which no row of {file} has; its columns beside the prompt: hint"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "on the prompt 'why' raised RuntimeError: service is down"),
        ("nan", "on the prompt 'why' returned nan for 'a'; ratings must be finite"),
        ("short", "on the prompt 'why' returned 1 ratings for 2 completions"),
    ],
)
def test_a_bad_rater_is_named_with_the_prompt(raters: str, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_rater(f"{raters}:{name}")("why", ["a", "b"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("length", "must be module:function or file.py:function"),
        ("nowhere.py:f", "there is no file nowhere.py"),
        ("no_such_module:f", "importing no_such_module raised ModuleNotFoundError"),
        ("json:no_such_function", "json has no function 'no_such_function'"),
    ],
)
def test_a_rater_that_cannot_be_found(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_rater(spec)


def config(tiny: Path, folder: Path, **values: Any) -> CollectConfig:
    """Eight prompts at a time would be one batch: two of them are."""
    common = {
        "model": str(tiny / "model"),
        "output_dir": str(folder),
        "dtype": "float32",
        "micro_batch_size": 8,
    }
    return CollectConfig(**{**common, "samples_per_prompt": 4, "max_new_tokens": 6, **values})


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """What feedback.jsonl holds."""
    return [json.loads(line) for line in (folder / "feedback.jsonl").read_text().splitlines()]


@pytest.fixture
def prompts(write_jsonl: Any) -> str:
    """Five prompts."""
    return write_jsonl(
        "prompts.jsonl", *({"prompt": f"{name} wants food"} for name in ("ann", "ben", "cleo", "dan", "eve"))
    )


def test_collect_writes_what_read_feedback_reads(tiny: Path, tmp_path: Path, prompts: str, raters: str) -> None:
    settings = config(tiny, tmp_path / "run", prompts_file=prompts, rater=f"{raters}:length")
    summary = collect(settings, RunFolder.create(settings.output_dir))
    rows = rows_of(tmp_path / "run")
    assert summary["prompts"] == len(rows) == 5 and summary["completions"] == 20
    assert all(len(set(row["completions"])) > 1 and len(row["ended"]) == 4 for row in rows)
    assert rows[0]["sampling"] == {
        "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_new_tokens": 6, "min_new_tokens": 0,
        "stop": [], "seed": 0,
    }  # fmt: skip
    assert rows[0]["annotator"] == f"simulated rater {raters}:length"
    ranking = read_feedback(tmp_path / "run" / "feedback.jsonl")[0]
    assert ranking.goodness == [len(text) for text in rows[0]["completions"]]


def test_a_completion_that_a_stop_text_ended_keeps_its_tokens(tiny: Path, tmp_path: Path, prompts: str) -> None:
    """The reward model and DPO learn from the tokens that the policy sampled, also of lines that a person rated."""
    settings = config(tiny, tmp_path / "run", prompts_file=prompts, stop=("e", "o"))
    collect(settings, RunFolder.create(settings.output_dir))
    file = AnswerFile(tmp_path / "run" / "feedback.jsonl", tmp_path / "labels.jsonl", rate=True)
    for place in range(5):
        file.answer("ann", place, [1, 2, 3, 4])
    tokenizer = load_tokenizer(str(tiny / "model"))
    stopped = 0
    for ranking in read_feedback(tmp_path / "labels.jsonl"):
        assert ranking.completion_ids is not None
        encoded = encode(tokenizer, ranking, 99)
        assert [ids[encoded.prompt_length :] for ids in encoded.sequences] == ranking.completion_ids
        stopped += sum(ids[-1] != tokenizer.eos_token_id for ids in ranking.completion_ids)
        written = replace(ranking, completions=[f"{text} egg" for text in ranking.texts])  # edited by a person
        assert encode(tokenizer, written, 99).sequences[0][-1] == tokenizer.eos_token_id
    assert stopped > 5


def test_without_a_rater_a_person_fills_the_ratings_in(
    tiny: Path, tmp_path: Path, prompts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tiny, tmp_path / "run", prompts_file=prompts, resume=True)  # of nothing, which is said
    assert collect(settings, RunFolder.create(settings.output_dir, resume=True))["mean_rating"] is None
    assert f"nothing to resume in {tmp_path}/run: starting from the beginning" in capsys.readouterr().err
    with pytest.raises(UserError, match="no line is rated yet"):
        read_feedback(tmp_path / "run" / "feedback.jsonl")


def test_nothing_is_lost_and_resume_goes_on(
    tiny: Path, tmp_path: Path, prompts: str, raters: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = config(tiny, tmp_path / "whole", prompts_file=prompts, rater=f"{raters}:length")
    collect(whole, RunFolder.create(whole.output_dir))

    broken = config(tiny, tmp_path / "run", prompts_file=prompts, rater=f"{raters}:fails_third")
    with pytest.raises(UserError, match="on the prompt 'cleo wants food' returned nan"):
        collect(broken, RunFolder.create(broken.output_dir))
    assert len(rows_of(tmp_path / "run")) == 2
    with (tmp_path / "run" / "feedback.jsonl").open("a") as file:
        file.write('{"prompt": "cleo wants fo')  # as a kill would leave it

    mended = config(tiny, tmp_path / "run", prompts_file=prompts, rater=f"{raters}:length", resume=True)
    collect(mended, RunFolder.create(mended.output_dir, resume=True))
    ours, theirs = rows_of(tmp_path / "run"), rows_of(tmp_path / "whole")
    assert [row["completions"] for row in ours] == [row["completions"] for row in theirs]
    assert [row["ratings"] for row in ours[2:]] == [row["ratings"] for row in theirs[2:]]

    # A finished run goes on if the file has grown, under the same name or another, and only then.
    for name, added in ((prompts, ["fay wants food"]), (f"{tmp_path}/a.jsonl", ["kim wants food"]), (prompts, [])):
        done = [row["prompt"] for row in rows_of(tmp_path / "run")] + added
        Path(name).write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in done))
        more = replace(mended, prompts_file=name)
        assert collect(more, RunFolder.create(mended.output_dir, resume=True))["prompts"] == len(done)
        assert [row["prompt"] for row in rows_of(tmp_path / "run")] == done
    assert "with another content" in (shown := capsys.readouterr().err) and "nothing is left" in shown
    same = Path(prompts).read_text()
    records = [(tmp_path / "run" / name).read_text() for name in ("summary.json", "inputs.json", "config.yaml")]
    for changed in ('{"prompt": "leo wants food"}\n', same.replace("ben", "leo") + '{"prompt": "guy wants food"}\n'):
        Path(prompts).write_text(changed)
        with pytest.raises(UserError, match="holds another prompt"):
            collect(more, RunFolder.create(mended.output_dir, resume=True))
        # nothing was written before
        kept = [(tmp_path / "run" / name).read_text() for name in ("summary.json", "inputs.json", "config.yaml")]
        assert kept == records
    # Where later phases began from its result, as in a pipeline, a file that has grown is left for another run.
    Path(prompts).write_text(same + '{"prompt": "guy wants food"}\n')
    resumed, more = (
        RunFolder.create(mended.output_dir, resume=True),
        replace(mended, prompts_file=f"{tmp_path}/a.jsonl"),
    )
    Path(more.prompts_file).write_text(Path(prompts).read_text())
    assert (finished_summary(resumed, more, may_extend=False) or {})["prompts"] == len(done)
    assert "is finished, so prompts_file" in capsys.readouterr().err


def test_resume_with_another_prompts_file_is_refused(
    tiny: Path, tmp_path: Path, prompts: str, write_jsonl: Any
) -> None:
    settings = config(tiny, tmp_path / "run", prompts_file=prompts)
    collect(settings, RunFolder.create(settings.output_dir))
    (tmp_path / "run" / "summary.json").unlink()
    settings.prompts_file = write_jsonl("other.jsonl", {"prompt": "kim needs animals"})
    with pytest.raises(UserError, match=r"feedback.jsonl:1: holds another prompt than .*other.jsonl:1"):
        collect(settings, RunFolder.create(settings.output_dir, resume=True))


def test_a_prompt_without_room_for_the_completion_is_named(tiny: Path, tmp_path: Path, prompts: str) -> None:
    settings = config(tiny, tmp_path / "run", prompts_file=prompts, max_length=8)
    with pytest.raises(UserError, match=r"prompts.jsonl:1: the prompt has 3 tokens"):
        collect(settings, RunFolder.create(settings.output_dir))
