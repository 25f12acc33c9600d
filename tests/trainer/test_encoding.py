# SPDX-License-Identifier: Apache-2.0
"""One example has the same token ids in SFT, for the reward model and from the policy, whatever the tokenizer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_fast.data.encoding import (
    decode_completion,
    encode_answer,
    encode_completion,
    encode_prompt,
    encode_texts,
    end_of_turn,
    reads_ids_of,
    vocabulary_id,
)
from rlhf_fast.data.examples import demonstration
from rlhf_fast.data.limits import Limits
from rlhf_fast.errors import UserError
from rlhf_fast.feedback.encoded import encode
from rlhf_fast.feedback.schema import parse
from rlhf_fast.models.padding import NEW_PAD, give_own_padding
from rlhf_fast.trainer.sft import labels

SPECIAL = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "[PAD]"]
CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content | trim }} </s>{% endif %}{% endfor %}"
)
LLAMA3 = (
    "<s>{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level(template: str | None, eos: str, pad: str | None, bos: str | None = None) -> Any:
    """As GPT-2, Llama 3 and Qwen have it: every byte is a token, and a few merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("y", "o"), ("Ċ", "Ċ"), ("Ġ", "p"), ("Ġp", "a")]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return fast(tokenizer, template, eos, pad, bos)


def sentencepiece(template: str | None, eos: str = "</s>", pad: str | None = None) -> Any:
    """As Llama 2 and Mistral have it: a space goes in front of every text, and decoding takes it away again."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    letters = list("▁abcdefghijklmnopqrstuvwxyz[]/.:\nINST")
    merges = [("▁", "p"), ("▁p", "a"), ("y", "o"), ("▁", "yo")]
    tokens = dict.fromkeys([*SPECIAL, *letters, *map("".join, merges)])
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    if template is None:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return fast(tokenizer, template, eos, pad, "<s>")


def fast(tokenizer: Any, template: str | None, eos: str, pad: str | None, bos: str | None) -> Any:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=pad or eos, bos_token=bos)
    made.chat_template = template
    return made


FAMILIES: dict[str, tuple[Any, str]] = {  # with the token that ends an answer
    "chatml, eos = endoftext": (lambda: byte_level(CHATML, "<|endoftext|>", "[PAD]"), "<|im_end|>"),
    "chatml, eos = im_end": (lambda: byte_level(CHATML, "<|im_end|>", "<|endoftext|>"), "<|im_end|>"),
    "pad = eos": (lambda: byte_level(CHATML, "<|im_end|>", None), "<|im_end|>"),
    "several eos": (lambda: byte_level(LLAMA3, "<|endoftext|>", "[PAD]", "<s>"), "<|eot_id|>"),
    "prefix space, chat": (lambda: sentencepiece(LLAMA2), "</s>"),
    "a template without an end": (lambda: byte_level(PLAIN, "<|endoftext|>", "[PAD]"), "<|endoftext|>"),
    "byte level, no template": (lambda: byte_level(None, "<|endoftext|>", "[PAD]"), "<|endoftext|>"),
    "prefix space, no template": (lambda: sentencepiece(None), "</s>"),
}
TURN = [{"role": "user", "content": "say it"}]


def parts(tokenizer: Any) -> tuple[Any, str]:
    """A prompt and an answer in the form that suits the tokenizer."""
    return (TURN, "yo pa") if tokenizer.chat_template else ("say it", " pay yo")


@pytest.mark.parametrize("family", FAMILIES)
def test_sft_reward_model_and_policy_have_the_same_ids(family: str) -> None:
    build, end = FAMILIES[family]
    tokenizer = build()
    prompt, answer = parts(tokenizer)
    begin = encode_prompt(tokenizer, prompt, where="f:1")
    row = {"prompt": prompt, "completion": answer}
    shown_to_it = demonstration(row, "f:1")
    (example,) = labels.encode(tokenizer, [shown_to_it], Limits(99))
    ids = example["input_ids"]
    assert ids[: len(begin)] == begin and ids.count(tokenizer.convert_tokens_to_ids(end)) >= 1
    assert example["labels"] == [-100] * len(begin) + ids[len(begin) :]
    assert encode_answer(tokenizer, shown_to_it.prompt, begin, shown_to_it.completion) == ids[len(begin) :]
    assert ids[-1] == tokenizer.convert_tokens_to_ids(end) == end_of_turn(tokenizer)

    # A policy that has learned this example writes exactly the labels behind the prompt's ids; what people read of it
    # goes into the feedback with the ids and, written by hand, without.
    sampled = ids[len(begin) :]
    text = decode_completion(tokenizer, begin, sampled)
    rated = {"prompt": prompt, "completions": [text, text + "o"], "ended": [True, False], "ranks": [1, 2]}
    kept = {"completion_ids": [sampled, sampled[:-1]], "vocabulary": vocabulary_id(tokenizer)}
    for extra in ({}, kept):
        ranking = encode(tokenizer, parse({**rated, **extra}, "f:1"), Limits(99))
        assert ranking.sequences[0] == ids and ranking.prompt_length == len(begin)
    shown = tokenizer.decode(ids, skip_special_tokens=True)
    assert shown == tokenizer.decode(begin, skip_special_tokens=True) + text


@pytest.mark.parametrize(
    ("eos", "pad", "ends", "spare", "wanted"),
    [
        ("<|endoftext|>", "[PAD]", ["<|im_end|>"], 0, "[PAD]"),
        ("<|im_end|>", None, [], 0, "[PAD]"),  # a token with the name of a pad
        ("<|im_end|>", "<|endoftext|>", ["<|endoftext|>"], 0, "[PAD]"),  # a pad that the generation config ends at
        ("<|im_end|>", None, ["[PAD]"], 0, "<unk>"),
        ("<|im_end|>", None, ["[PAD]", "<unk>"], 1, NEW_PAD),  # a row of the embeddings that no token has yet
        ("<|im_end|>", None, ["[PAD]", "<unk>"], 0, None),
    ],
)
def test_a_saved_reward_model_pads_with_what_ends_no_completion(
    eos: str, pad: str | None, ends: list[str], spare: int, wanted: str | None
) -> None:
    tokenizer = byte_level(CHATML, eos, pad)
    tokenizer.unk_token = "<unk>"
    before = tokenizer.pad_token, len(tokenizer)
    config = SimpleNamespace(get_text_config=lambda: config, pad_token_id=99)
    embeddings = torch.nn.Embedding(len(tokenizer) + spare, 1)
    model = SimpleNamespace(config=config, get_input_embeddings=lambda: embeddings)
    saved = give_own_padding(model, tokenizer, tokenizer.convert_tokens_to_ids([eos, "<|im_end|>", *ends]))
    assert config.pad_token_id == (None if wanted is None else saved.convert_tokens_to_ids(wanted))
    assert saved.pad_token == (eos if wanted is None else wanted) and saved.padding_side == "right"
    assert (tokenizer.pad_token, len(tokenizer)) == before and reads_ids_of(saved, tokenizer)


def test_a_new_pad_past_the_embeddings_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a vocabulary with gaps, whose length says less than its last id."""
    tokenizer = byte_level(CHATML, "<|im_end|>", None)
    rows = len(tokenizer)
    config = SimpleNamespace(get_text_config=lambda: config, pad_token_id=99)
    model = SimpleNamespace(config=config, get_input_embeddings=lambda: torch.nn.Embedding(rows, 1))
    monkeypatch.setattr(type(tokenizer), "__len__", lambda self: rows - 3)
    saved = give_own_padding(model, tokenizer, range(rows))
    assert (
        config.pad_token_id is None and saved.pad_token != NEW_PAD and "no token to pad with" in capsys.readouterr().err
    )


def test_a_completion_is_tokenized_where_it_stands() -> None:
    tokenizer = sentencepiece(None)
    for prompt, completion in (("say it", " pay"), ("say", "yo"), ("say it", "\npay")):
        begin = encode_prompt(tokenizer, prompt, where="f:1")
        ids = encode_completion(tokenizer, completion, after=prompt, ended=False)
        assert begin + ids == tokenizer(prompt + completion)["input_ids"]
        assert decode_completion(tokenizer, begin, ids) == completion
        assert encode_completion(tokenizer, completion, ended=False) == ids
    merging = byte_level(None, "<|endoftext|>", None)  # "y" + "o" would be one token: the prompt keeps its own
    assert merging.convert_ids_to_tokens(encode_completion(merging, "o", after="y", ended=False)) == ["o"]


def test_ids_that_no_longer_spell_the_text_give_way_to_it() -> None:
    tokenizer = byte_level(CHATML, "<|endoftext|>", "[PAD]")
    apart = [*tokenizer.convert_tokens_to_ids(["y", "o"]), end_of_turn(tokenizer)]  # as it may be sampled
    row = {"prompt": TURN, "completions": ["yo", "no"], "ranks": [1, 2], "vocabulary": vocabulary_id(tokenizer)}
    sequences = [
        encode(tokenizer, parse({**row, "completion_ids": [ids, ids]}, "f:1"), Limits(99)).sequences[0]
        for ids in (apart, tokenizer("no")["input_ids"])
    ]
    assert sequences[0][-3:] == apart
    assert tokenizer.convert_ids_to_tokens(sequences[1])[-2:] == ["yo", "<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_every_answer_of_a_chat_is_learned_or_the_last(template: str) -> None:
    tokenizer = byte_level(template, "<|endoftext|>", "[PAD]")
    says = [("system", "be kind"), ("user", "hi"), ("assistant", "yo"), ("user", "and"), ("assistant", "pa")]
    says += [("user", "more")]  # nobody answers it
    row = {"messages": [{"role": role, "content": text} for role, text in says]}
    for turns, wanted in (("last", "pa<|im_end|>"), ("all", "yo<|im_end|>pa<|im_end|>")):
        (example,) = labels.encode(tokenizer, [demonstration(row, "f:1")], Limits(200), turns)
        assert tokenizer.decode([i for i in example["labels"] if i >= 0]) == wanted
        assert tokenizer.decode(example["input_ids"]).endswith("<|im_start|>assistant\npa<|im_end|>")


def test_tools_calls_and_reasoning_reach_the_template() -> None:
    tokenizer = byte_level(CHATML, "<|endoftext|>", "[PAD]")
    call = {"function": {"name": "add", "arguments": '{"a": 1}'}}  # as OpenAI's API has it
    answers = [
        ({"content": None, "tool_calls": [call]}, '<call>{"a": 1}</call><|im_end|>'),
        ({"content": "42", "reasoning_content": "twice 21"}, "<think>twice 21</think>42<|im_end|>"),
    ]
    for answer, wanted in answers:
        tools = '[{"type": "function"}]'  # JSON text, since Parquet cannot hold schemas that differ from row to row
        row = {"messages": [*TURN, {"role": "assistant", **answer}], "tools": tools}
        (example,) = labels.encode(tokenizer, [demonstration(row, "f:1")], Limits(300))
        assert tokenizer.decode([i for i in example["labels"] if i >= 0]) == wanted
        assert '{"type": "function"}' in tokenizer.decode(example["input_ids"])


def test_text_that_a_template_has_written_gets_no_second_bos_and_eos() -> None:
    tokenizer = sentencepiece(None)
    begin = encode_prompt(tokenizer, "<s>[INST] say it [/INST]", where="f:1")
    assert begin.count(tokenizer.bos_token_id) == 1
    row = demonstration({"prompt": "<s>[INST] say it [/INST]", "completion": " yo</s>"}, "f:1")
    (example,) = labels.encode(tokenizer, [row], Limits(99))
    assert example["input_ids"][: len(begin)] == begin and example["input_ids"].count(tokenizer.eos_token_id) == 1


def test_a_template_that_opens_a_think_block_is_followed_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    opens = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    tokenizer = byte_level(opens, "<|endoftext|>", "[PAD]")
    row = demonstration({"prompt": TURN, "completion": "yo"}, "f:1")
    (example,) = labels.encode(tokenizer, [row], Limits(99))
    assert tokenizer.decode(example["input_ids"]).endswith("<|im_start|>assistant\nyo<|im_end|>")
    assert "1 of 1 answers are written by the chat template otherwise" in capsys.readouterr().err


def test_a_template_that_refuses_a_row_costs_that_row_alone(capsys: pytest.CaptureFixture[str]) -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    tokenizer = byte_level(refuses, "<|endoftext|>", "[PAD]")
    good = {"prompt": TURN, "completion": "yo"}
    bad = {"prompt": [{"role": "system", "content": "x"}, *TURN], "completion": "yo"}
    rows = [demonstration(good, "f:1"), demonstration(bad, "f:2")]
    assert len(labels.encode(tokenizer, rows, Limits(99))) == 1
    assert "f:2: the model's chat template refuses the messages: no system role" in capsys.readouterr().err
    with pytest.raises(UserError, match="f:2: the model's chat template refuses"):
        labels.encode(tokenizer, rows, Limits(99, strict=True))


def test_what_is_too_long_is_dropped_cut_at_the_left_or_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = byte_level(None, "<|endoftext|>", "[PAD]")
    rows = [demonstration({"prompt": p, "completion": " yo"}, f"f:{i}") for i, p in enumerate(("ab", "a" * 20 + "bc"))]
    assert len(labels.encode(tokenizer, rows, Limits(10))) == 1
    assert "1 of 2 rows" in (told := capsys.readouterr().err) and "f:1: the prompt has 22 tokens" in told
    _, long = labels.encode(tokenizer, rows, Limits(10, "truncate-left"))
    assert tokenizer.decode(long["input_ids"]) == "aaaaabc yo<|endoftext|>" and len(long["input_ids"]) == 10
    with pytest.raises(UserError, match="f:1: the prompt has 22 tokens"):
        labels.encode(tokenizer, rows, Limits(10, "error"))


def test_a_token_beyond_the_embeddings_is_named() -> None:
    tokenizer = byte_level(None, "<|endoftext|>", "[PAD]")
    row = demonstration({"prompt": "a<|eot_id|>", "completion": " yo"}, "f:1")
    with pytest.raises(UserError, match=r"f:1: the token '<\|eot_id\|>' has the id 6, but .* have 5 rows"):
        Limits(99, vocabulary=5).check([6, 1], tokenizer, "f:1")
    assert labels.encode(tokenizer, [row], Limits(99, vocabulary=len(tokenizer)))


def test_vocabularies_are_compared_not_their_sizes() -> None:
    first, padded = byte_level(CHATML, "<|endoftext|>", None), byte_level(LLAMA3, "<|im_end|>", "[PAD]")
    assert reads_ids_of(first, padded) and vocabulary_id(first) == vocabulary_id(padded)
    padded.add_tokens(["<extra>"])
    assert reads_ids_of(padded, first) and not reads_ids_of(first, padded)
    assert not reads_ids_of(sentencepiece(None), first)
    # Another family's reward model reads the conversation as its own template writes it.
    (ids,) = encode_texts(first, [TURN], ["yo"], [True], 99)
    assert first.decode(ids) == "<|im_start|>user\nsay it<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
    (cut,) = encode_texts(first, [TURN], ["yo"], [False], 5)
    assert first.decode(cut).endswith("nt\nyo") and len(cut) == 5
