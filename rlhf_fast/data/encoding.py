# SPDX-License-Identifier: Apache-2.0
"""Token ids of prompts and completions: the same for one example in every phase.

The policy writes a completion behind the ids of its prompt and ends it with one token. What SFT teaches and what a
reward model reads must be those very ids, so all phases encode here:

    prompt of text        what the tokenizer makes of it, without a closing end-of-sequence token
    prompt of messages    what the chat template makes of them, with the generation prompt
    completion            what stands behind the prompt in the whole, tokenized in place, up to the token that ends it

The token that ends a completion is the end-of-sequence token after text. After messages it is the token with which the
template closes an answer (<|im_end|>, <|eot_id|>, </s>, ...), whether or not the tokenizer calls it end-of-sequence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from rlhf_fast.errors import UserError

from .messages import Chat, Completion, Prompt, as_chat, completion_text

PROBE = "zyxanswerxyz"  # an answer that no template writes by itself
ANCHORS = ("\n", ".", "a")  # texts that may stand before a completion whose own prompt merges with it


class Encoded(NamedTuple):
    """A prompt and a completion as one sequence."""

    ids: list[int]
    prompt_length: int
    follows: bool = True  # False: the template writes the conversation otherwise than behind its generation prompt

    @property
    def completion(self) -> list[int]:
        """The ids behind the prompt."""
        return self.ids[self.prompt_length :]


def encode_prompt(tokenizer: Any, prompt: Prompt, *, where: str, max_length: int | None = None) -> list[int]:
    """Token ids of a prompt, ready for a completion to follow; `where` ("file:line") is for messages.

    Raises UserError if there is no chat template or it refuses the messages, or if `max_length` is given and leaves no
    room for a single completion token.
    """
    if isinstance(prompt, str):
        ids = _opened(tokenizer, prompt)
    else:
        ids = tokens_of(tokenizer, render(tokenizer, prompt, where, generate=True))
    if not ids:  # "text" demonstrations: the first token needs something to be predicted from
        ids = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    if max_length is not None and len(ids) >= max_length:
        raise OverlongError(where, len(ids), max_length)
    return ids


class OverlongError(UserError):
    """A prompt that leaves no room for a completion."""

    def __init__(self, where: str, tokens: int, max_length: int) -> None:
        """`tokens` of the prompt in a context of `max_length`."""
        super().__init__(
            f"{where}: the prompt has {tokens} tokens and leaves no room for a completion in a context of "
            f"{max_length}; shorten it, raise max_length (the model sets the upper limit) or set overlong to "
            "truncate-left"
        )


def encode_example(
    tokenizer: Any, prompt: Prompt, completion: Completion, *, ended: bool = True, where: str = "the example"
) -> Encoded:
    """Token ids of a prompt with its completion, which closes with the token that ends it if it `ended` by itself.

    Where the template writes the conversation otherwise than behind its generation prompt (which may open a think
    block that the answer lacks), the ids are the template's own and the prompt is what both have in common.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        ids = encode_prompt(tokenizer, prompt, where=where)
        return Encoded(ids + encode_completion(tokenizer, completion, after=prompt, ended=ended), len(ids))
    chat = as_chat(prompt)
    before = render(tokenizer, chat, where, generate=True)
    ids = tokens_of(tokenizer, before)
    whole = render(tokenizer, chat.then(completion), where)
    whole = whole.removesuffix(_ending(tokenizer, str(tokenizer.chat_template)).unclosed)
    answer, follows = behind(tokenizer, ids, before, whole), True
    if answer is None:
        every = tokens_of(tokenizer, whole)
        shared = common_length(ids, every)
        ids, answer, follows = every[:shared], every[shared:], False
    return Encoded(ids + close(answer, end_of_turn(tokenizer), tokenizer.eos_token_id, ended), len(ids), follows)


def encode_completion(tokenizer: Any, completion: str, *, after: str = "", ended: bool = True) -> list[int]:
    """Token ids of a completion of text behind the text `after`, and the end-of-sequence token if it `ended`."""
    ids = _in_place(tokenizer, completion, after)
    if ended and ids[-1:] != [tokenizer.eos_token_id]:  # texts that a template has written end with it already
        ids.append(tokenizer.eos_token_id)
    return ids


def encode_answer(tokenizer: Any, prompt: Prompt, prompt_ids: Sequence[int], completion: Completion) -> list[int]:
    """Token ids of a completion behind `prompt_ids`, the token that ends it included.

    Where the template writes the conversation otherwise, they are the completion's text and that token.
    """
    encoded = encode_example(tokenizer, prompt, completion)
    if encoded.follows or isinstance(prompt, str):
        return encoded.completion
    return [*_in_place(tokenizer, completion_text(completion), ""), end_of_turn(tokenizer)]


def decode_completion(tokenizer: Any, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
    """The text of completion ids behind a prompt, without special tokens: the text of both less that of the prompt.

    By itself a completion of a sentencepiece tokenizer would lose its first space.
    """
    before = tokenizer.decode(list(prompt_ids), skip_special_tokens=True)
    whole = tokenizer.decode([*prompt_ids, *ids], skip_special_tokens=True)
    if before and whole.startswith(before):
        return str(whole[len(before) :])
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


class Ending(NamedTuple):
    """What a chat template writes behind an answer."""

    token: int  # closes the answer: the first added or end-of-sequence token, the latter if there is none
    unclosed: str  # the text behind the content where no such token follows: not the answer's, so it is left out


def end_of_turn(tokenizer: Any) -> int:
    """Id of the token with which the chat template closes an answer; the end-of-sequence token where there is none."""
    return _ending(tokenizer, str(getattr(tokenizer, "chat_template", None))).token


@lru_cache(maxsize=8)
def _ending(tokenizer: Any, template: str) -> Ending:
    """`template` is only there to tell the cache that it has changed."""
    eos = int(tokenizer.eos_token_id)
    try:
        text = render(tokenizer, Chat([{"role": "user", "content": "Hi"}]).then(PROBE), "the chat template")
    except (UserError, AttributeError):
        return Ending(eos, "")
    tail = text.rpartition(PROBE)[2] if PROBE in text else ""
    closing = {*tokenizer.added_tokens_decoder, eos}
    token = next((token for token in tokens_of(tokenizer, tail) if token in closing), None)
    return Ending(eos, tail) if token is None else Ending(int(token), "")


def close(answer: Sequence[int], end: int, eos: int, ended: bool) -> list[int]:
    """What a template wrote behind the prompt, up to the last token that ends a turn; it is added if there is none."""
    stop = next((stop for stop in (end, eos) if stop in answer), None)
    if stop is None:
        return [*answer, end] if ended else list(answer)
    last = len(answer) - 1 - list(answer)[::-1].index(stop)
    return list(answer[: last + ended])


def behind(tokenizer: Any, before_ids: Sequence[int], before: str, whole: str) -> list[int] | None:
    """Token ids of what `whole` has behind `before`, whose ids are `before_ids`; None if it does not begin so."""
    if not whole.startswith(before):
        return None
    ids = tokens_of(tokenizer, whole)
    if ids[: len(before_ids)] == list(before_ids):
        return ids[len(before_ids) :]
    return _in_place(tokenizer, whole[len(before) :], "")


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids both begin with."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _opened(tokenizer: Any, text: str) -> list[int]:
    """Token ids of text with the special tokens in front, and without those that some tokenizers close it with.

    A text that a template has written begins with the first of them already: it is not doubled.
    """
    ids = list(tokenizer(text)["input_ids"])
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids.pop(0)
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def _in_place(tokenizer: Any, text: str, after: str) -> list[int]:
    """Token ids of `text` where it follows `after`, or something else if the two would merge into one token.

    By itself the tokenizer may put a space in front, as sentencepiece does at the beginning of a text.
    """
    if not text:
        return []
    for anchor in ([after] if after else []) + list(ANCHORS):
        head, whole = tokens_of(tokenizer, anchor), tokens_of(tokenizer, anchor + text)
        if len(whole) > len(head) and whole[: len(head)] == head:
            return whole[len(head) :]
    return tokens_of(tokenizer, text)


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """Token ids of text as it stands, without special tokens around it."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def render(tokenizer: Any, messages: Prompt, where: str, *, generate: bool = False) -> str:
    """What the chat template makes of messages, as text; UserError where there is none, or where it refuses them."""
    if tokenizer.chat_template is None:
        raise UserError(
            f"{where}: the prompt is a list of messages, but the model's tokenizer has no chat template; "
            "give the prompt as text, or take a model that was tuned for chat"
        )
    from jinja2 import TemplateError

    chat = as_chat(messages)
    arguments = template_arguments(chat)
    try:
        return str(
            tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=generate, **arguments)
        )
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise UserError(f"{where}: the model's chat template refuses the messages: {error}") from None


def template_arguments(chat: Chat) -> dict[str, Any]:
    """What `apply_chat_template` takes beside the messages."""
    return {"tools": chat.tools, **chat.variables}


def vocabulary_id(tokenizer: Any) -> str:
    """Equal for tokenizers that mean the same token by each id: a digest of the vocabulary."""
    return _vocabulary_id(tokenizer, len(tokenizer))


@lru_cache(maxsize=8)
def _vocabulary_id(tokenizer: Any, size: int) -> str:
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def reads_ids_of(reader: Any, writer: Any) -> bool:
    """Whether every id that the tokenizer `writer` may write means the same token to `reader`; pads do not count."""
    theirs = reader.get_vocab()
    return all(theirs.get(token) == i for token, i in writer.get_vocab().items() if token != writer.pad_token)


def encode_texts(
    tokenizer: Any, prompts: Sequence[Prompt], texts: Sequence[str], ended: Sequence[bool], max_length: int
) -> list[list[int]]:
    """Token ids of whole conversations for a model with a tokenizer of its own, such as another family's reward model.

    Messages are written by that tokenizer's template, in full where the completion `ended`. What is longer than
    `max_length` loses its beginning, because the score is read at the end.
    """
    rows = []
    for prompt, text, done in zip(prompts, texts, ended, strict=True):
        if done and not isinstance(prompt, str) and tokenizer.chat_template is not None:
            ids = tokens_of(tokenizer, render(tokenizer, as_chat(prompt).then(text), "the sample"))
        else:
            shown = prompt if isinstance(prompt, str) or tokenizer.chat_template is not None else _as_text(prompt)
            ids = encode_example(tokenizer, shown, text, ended=done, where="the sample").ids
        rows.append(ids[-max_length:])
    return rows


def _as_text(prompt: Prompt) -> str:
    return "".join(f"{message['role']}: {message['content']}\n" for message in as_chat(prompt)) + "assistant:"
