# SPDX-License-Identifier: Apache-2.0
"""Token ids of prompts and completions: the same for one example in every phase.

The policy samples a completion after the ids of its prompt and ends it with one token. SFT and the reward model must
see exactly the same ids, so all phases encode here:

    prompt of text        the tokenizer's ids, without a closing end-of-sequence token
    prompt of messages    the ids of the rendered chat template, with the generation prompt
    completion            what follows the prompt in the whole sequence, up to the token that ends the completion

For text, the token that ends a completion is the end-of-sequence token. For messages it is the token with which the
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

PROBE = "zyxanswerxyz"  # a string that no template contains
ANCHORS = ("\n", ".", "a")  # context to tokenize a completion after, if its own prompt merges with it


class Encoded(NamedTuple):
    """A prompt and a completion as one sequence."""

    ids: list[int]
    prompt_length: int
    follows: bool = True  # False: the rendered conversation does not begin with the rendered generation prompt

    @property
    def completion(self) -> list[int]:
        """The ids after the prompt."""
        return self.ids[self.prompt_length :]


def encode_prompt(tokenizer: Any, prompt: Prompt, *, where: str, max_length: int | None = None) -> list[int]:
    """Token ids of a prompt that a completion can follow; `where` ("file:line") is for error messages.

    Raises UserError if there is no chat template or it refuses the messages, or if `max_length` is given and leaves no
    room for a single completion token.
    """
    if isinstance(prompt, str):
        ids = _opened(tokenizer, prompt)
    else:
        ids = tokens_of(tokenizer, render(tokenizer, prompt, where, generate=True))
    if not ids:  # "text" demonstrations: the first token must be predicted from something
        ids = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    if max_length is not None and len(ids) >= max_length:
        raise OverlongError(where, len(ids), max_length - 1, max_length)
    return ids


class OverlongError(UserError):
    """A prompt that leaves no room for a completion."""

    def __init__(self, where: str, tokens: int, longest: int, max_length: int) -> None:
        """The prompt has `tokens` tokens and may have `longest`; with its completion it may have `max_length`."""
        super().__init__(
            f"{where}: the prompt has {tokens} tokens, and at most {longest} fit, as a prompt and its completion may "
            f"have {max_length} together and {max_length - longest} are kept for the completion; shorten the prompt, "
            "raise max_length (the model sets the upper limit) or set overlong to truncate-left"
        )


def encode_example(
    tokenizer: Any, prompt: Prompt, completion: Completion, *, ended: bool = True, where: str = "the example"
) -> Encoded:
    """Token ids of a prompt and its completion, with the token that ends the completion if it `ended` by itself.

    If the rendered conversation does not begin with the rendered generation prompt (which may open a think block that
    the answer lacks), the ids are those of the conversation, and the prompt is what both begin with.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        ids = encode_prompt(tokenizer, prompt, where=where)
        return Encoded(ids + encode_completion(tokenizer, completion, after=prompt, ended=ended), len(ids))
    chat = as_chat(prompt)
    before = render(tokenizer, chat, where, generate=True)
    ids = tokens_of(tokenizer, before)
    conversation = render(tokenizer, chat.then(completion), where)
    conversation = conversation.removesuffix(_ending(tokenizer, str(tokenizer.chat_template)).unclosed)
    answer, follows = behind(tokenizer, ids, before, conversation), True
    if answer is None:
        all_ids = tokens_of(tokenizer, conversation)
        shared = common_length(ids, all_ids)
        ids, answer, follows = all_ids[:shared], all_ids[shared:], False
    return Encoded(ids + close(answer, end_of_turn(tokenizer), tokenizer.eos_token_id, ended), len(ids), follows)


def encode_completion(tokenizer: Any, completion: str, *, after: str = "", ended: bool = True) -> list[int]:
    """Token ids of a text completion that follows the text `after`, and the end-of-sequence token if it `ended`."""
    ids = _in_place(tokenizer, completion, after)
    if ended and ids[-1:] != [tokenizer.eos_token_id]:  # text rendered by a template already ends with it
        ids.append(tokenizer.eos_token_id)
    return ids


def encode_answer(tokenizer: Any, prompt: Prompt, prompt_ids: Sequence[int], completion: Completion) -> list[int]:
    """Token ids of a completion after `prompt_ids`, including the token that ends it.

    For users' own code: the phases take `encode_example`, which has both. If the rendered conversation does not begin
    with the prompt, they are the ids of the completion's text and that token.
    """
    encoded = encode_example(tokenizer, prompt, completion)
    if encoded.follows or isinstance(prompt, str):
        return encoded.completion
    return [*_in_place(tokenizer, completion_text(completion), ""), end_of_turn(tokenizer)]


def decode_completion(tokenizer: Any, prompt_ids: Sequence[int], ids: Sequence[int], stop: Sequence[str] = ()) -> str:
    """The text of a completion's ids, without special tokens, up to the first of the texts `stop` that ended it.

    It is prompt and completion decoded, minus the prompt's text: decoded alone, a completion of a sentencepiece
    tokenizer would lose its first space.
    """
    before = tokenizer.decode(list(prompt_ids), skip_special_tokens=True)
    text = str(tokenizer.decode([*prompt_ids, *ids], skip_special_tokens=True))
    if before and text.startswith(before):
        text = text[len(before) :]
    else:
        text = str(tokenizer.decode(list(ids), skip_special_tokens=True))
    return text[: min((place for end in stop if (place := text.find(end)) >= 0), default=len(text))]


class Ending(NamedTuple):
    """What a chat template writes after an answer."""

    token: int  # ends the answer: the first added or end-of-sequence token after it; EOS if there is none
    unclosed: str  # the text after the content if no such token follows: not part of the answer


def end_of_turn(tokenizer: Any) -> int:
    """Id of the token with which the chat template ends an answer; the end-of-sequence token if it has none."""
    return _ending(tokenizer, str(getattr(tokenizer, "chat_template", None))).token


@lru_cache(maxsize=8)
def _ending(tokenizer: Any, template: str) -> Ending:
    """`template` is only a key of the cache, so that a changed template is noticed."""
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
    """A rendered answer's ids up to the last token that ends a turn; if there is none, `end` is appended."""
    stop = next((stop for stop in (end, eos) if stop in answer), None)
    if stop is None:
        return [*answer, end] if ended else list(answer)
    last = len(answer) - 1 - list(answer)[::-1].index(stop)
    return list(answer[: last + ended])


def behind(tokenizer: Any, before_ids: Sequence[int], before: str, text: str) -> list[int] | None:
    """Token ids of what follows `before` (ids: `before_ids`) in `text`; None if `text` does not begin with it."""
    if not text.startswith(before):
        return None
    ids = tokens_of(tokenizer, text)
    if ids[: len(before_ids)] == list(before_ids):
        return ids[len(before_ids) :]
    return _in_place(tokenizer, text[len(before) :], "")


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common prefix."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _opened(tokenizer: Any, text: str) -> list[int]:
    """Token ids of text with the tokenizer's leading special tokens, but without its trailing ones.

    Text rendered by a template already begins with the BOS token, which is not doubled.
    """
    ids = list(tokenizer(text)["input_ids"])
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids.pop(0)
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def _in_place(tokenizer: Any, text: str, after: str) -> list[int]:
    """Token ids of `text` following `after`, or following another anchor if the two would merge into one token.

    Alone, the tokenizer may put a space in front, as sentencepiece does at the beginning of a text.
    """
    if not text:
        return []
    for anchor in ([after] if after else []) + list(ANCHORS):
        head, ids = tokens_of(tokenizer, anchor), tokens_of(tokenizer, anchor + text)
        if len(ids) > len(head) and ids[: len(head)] == head:
            return ids[len(head) :]
    return tokens_of(tokenizer, text)


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """Token ids of text alone, without added special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def render(tokenizer: Any, messages: Prompt, where: str, *, generate: bool = False) -> str:
    """Messages rendered by the chat template; UserError if there is no template or it refuses them."""
    if tokenizer.chat_template is None:
        raise UserError(
            f"{where}: the prompt is a list of messages, but the model's tokenizer has no chat template; "
            "give the prompt as text, or use a model that was tuned for chat"
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
    """Keyword arguments of `apply_chat_template` for this chat."""
    return {"tools": chat.tools, **chat.variables}


def vocabulary_id(tokenizer: Any) -> str:
    """A digest of the vocabulary: equal for tokenizers whose ids mean the same tokens."""
    return _vocabulary_id(tokenizer, len(tokenizer))


@lru_cache(maxsize=8)
def _vocabulary_id(tokenizer: Any, size: int) -> str:
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def reads_ids_of(reader: Any, writer: Any) -> bool:
    """Whether every id of the tokenizer `writer`, pads aside, means the same token to the tokenizer `reader`."""
    theirs = reader.get_vocab()
    return all(theirs.get(token) == i for token, i in writer.get_vocab().items() if token != writer.pad_token)


def encode_texts(
    tokenizer: Any, prompts: Sequence[Prompt], texts: Sequence[str], ended: Sequence[bool], max_length: int
) -> list[list[int]]:
    """Token ids of whole conversations for a model with a tokenizer of its own, such as another family's reward model.

    Messages are rendered by that tokenizer's template, with the ending if the completion `ended`. Sequences longer than
    `max_length` are truncated at the left, because the score is read at the end.
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
