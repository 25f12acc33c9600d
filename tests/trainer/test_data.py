# SPDX-License-Identifier: Apache-2.0
"""Reading data files, and what is said when one of their lines is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.data.examples import encode_completion, encode_prompt, pad_right, prompt_text, read_prompts, read_sft
from rlhf_fast.errors import UserError
from rlhf_fast.models.loading import load_tokenizer

TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}cat{% endif %}"
MESSAGES = [{"role": "user", "content": "ann wants food"}]


@pytest.fixture
def tokenizer(tiny: Path) -> Any:
    """The tiny task's."""
    return load_tokenizer(str(tiny / "model"))


def test_prompts_are_text_or_messages_and_blank_lines_do_not_count(write_jsonl: Any) -> None:
    first = "\ufeff" + json.dumps({"prompt": "one"})  # as some editors begin a file
    path = write_jsonl("prompts.jsonl", first, "", {"prompt": MESSAGES, "id": 7})
    lines = read_prompts(path)
    assert [line.prompt for line in lines] == ["one", MESSAGES]
    assert [line.where for line in lines] == [f"{path}:1", f"{path}:3"]


def test_demonstrations_come_in_three_forms(write_jsonl: Any) -> None:
    answer = {"role": "assistant", "content": "bread"}
    path = write_jsonl(
        "sft.jsonl",
        {"prompt": "a", "completion": " b"},
        {"messages": [*MESSAGES, answer]},
        {"text": "some text"},
    )
    found = [(demonstration.prompt, demonstration.completion) for demonstration in read_sft(path)]
    assert found == [("a", " b"), (MESSAGES, "bread"), ("", "some text")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "a", ', "not valid JSON"),
        ("[1, 2]", "wanted a JSON object"),
        ({"prompt": "a"}, 'wanted the keys "prompt" and "completion"'),
        ({"prompt": "", "completion": "b"}, '"prompt" must be text'),
        ({"prompt": "a", "completion": ""}, '"completion" must be text that is not empty'),
        ({"prompt": "a", "completion": 3}, '"completion" must be text that is not empty, or messages .* got 3'),
        ({"prompt": [{"role": "user"}], "completion": "b"}, '"prompt" must be text or a list'),
        ({"messages": MESSAGES}, "an assistant message after it, which is learned"),
        ({"messages": []}, '"messages" must be text or a list'),
    ],
)
def test_a_wrong_line_is_named(write_jsonl: Any, row: Any, message: str) -> None:
    path = write_jsonl("sft.jsonl", {"prompt": "a", "completion": "b"}, row)
    with pytest.raises(UserError, match=message) as caught:
        read_sft(path, strict=True)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_a_missing_prompt_is_named(write_jsonl: Any) -> None:
    path = write_jsonl("prompts.jsonl", {"text": "a"})
    with pytest.raises(UserError, match=r'prompts.jsonl:1: "prompt" must be .* got nothing'):
        read_prompts(path)


def test_missing_empty_and_binary_files(write_jsonl: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the data file .*nowhere.jsonl: No such file"):
        read_prompts(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match=r"empty.jsonl holds no data: wanted one JSON object on each line"):
        read_prompts(write_jsonl("empty.jsonl", "", "  "))
    with pytest.raises(UserError, match=r"empty.csv holds no data: wanted a line of column names and lines of cells"):
        read_prompts(write_jsonl("empty.csv", "prompt,answer"))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read_prompts(tmp_path / "binary.jsonl")


def test_a_prompt_longer_than_the_context_is_named(tokenizer: Any) -> None:
    ids = encode_prompt(tokenizer, "ann wants food", max_length=4, where="f:1")
    assert tokenizer.decode(ids) == "ann wants food"
    with pytest.raises(
        UserError, match=r"f:1: the prompt has 3 tokens, and at most 2 fit, .* have 3 together and 1 are kept"
    ):
        encode_prompt(tokenizer, "ann wants food", max_length=3, where="f:1")


def test_messages_go_through_the_chat_template_or_are_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"f:9: the prompt is a list of messages, but .* no chat template"):
        encode_prompt(tokenizer, MESSAGES, max_length=9, where="f:9")
    tokenizer.chat_template = TEMPLATE
    ids = encode_prompt(tokenizer, MESSAGES, max_length=9, where="f:9")
    assert tokenizer.decode(ids) == "ann wants food cat"


def test_text_without_a_prompt_starts_from_a_special_token(tokenizer: Any) -> None:
    assert encode_prompt(tokenizer, "", max_length=9, where="f:1") == [tokenizer.eos_token_id]


def test_a_completion_ends_with_eos_if_it_ended(tokenizer: Any) -> None:
    whole, cut = (
        encode_completion(tokenizer, " cat dog"),
        encode_completion(tokenizer, " cat dog", ended=False),
    )
    assert whole == [*cut, tokenizer.eos_token_id] and len(cut) == 2


def test_a_tokenizer_that_closes_every_text_is_opened_again(tokenizer: Any) -> None:
    class Closing:
        eos_token_id = 1
        bos_token_id = None

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [5, 6, 1]}

    assert encode_prompt(Closing(), "x", max_length=9, where="f:1") == [5, 6]


def test_pad_right() -> None:
    input_ids, attention_mask = pad_right([[1, 2, 3], [4]], pad_id=9)
    assert input_ids.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert attention_mask.tolist() == [[True, True, True], [True, False, False]]


def test_prompt_text() -> None:
    assert prompt_text("as it is") == "as it is"
    assert prompt_text(MESSAGES) == "user: ann wants food"
