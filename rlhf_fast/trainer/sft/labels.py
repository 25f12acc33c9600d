# SPDX-License-Identifier: Apache-2.0
"""Demonstrations as token ids and labels, which mark the tokens to learn.

In a chat they are the last answer, or every answer of the assistant (`turns` "all"). Answers are found by the
template's own marks ({% generation %}) where it has them, else by what the template writes before and after each.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_fast.data.dropped import Dropped
from rlhf_fast.data.encoding import (
    close,
    common_length,
    encode_example,
    end_of_turn,
    render,
    template_arguments,
    tokens_of,
)
from rlhf_fast.data.examples import Demonstration
from rlhf_fast.data.limits import Limits
from rlhf_fast.data.messages import Chat, as_chat
from rlhf_fast.errors import UserError
from rlhf_fast.run.progress import notice

from .config import Turns
from .packing import IGNORED, Example

OTHERWISE = (
    "answers are written by the chat template otherwise than behind its generation prompt (which may open a think "
    "block that the answer lacks): they are learned as the template writes a conversation"
)


def encode(
    tokenizer: Any, demonstrations: Sequence[Demonstration], limits: Limits, turns: Turns = "last", source: str = ""
) -> list[Example]:
    """Token ids and labels of each demonstration; a completion that is too long is truncated, without its end.

    Reports what is dropped or truncated. Raises UserError if no demonstration is usable.
    """
    examples: list[Example] = []
    dropped, truncated, not_following = Dropped(Path(source or "the demonstrations"), limits.strict), 0, 0
    for demonstration in demonstrations:
        where = demonstration.where
        try:
            ids, spans, follows = _spans(tokenizer, demonstration, turns)
            start = spans[0][0]
            prompt = limits.prompt_of(ids, start, tokenizer, where)
        except UserError as error:
            limits.leave_out(dropped, error)
            continue
        if limits.overlong == "error" and len(prompt) + len(ids) - start > limits.max_length:
            raise UserError(f"{where}: it has {len(ids)} tokens, more than max_length {limits.max_length}")
        labels = [IGNORED] * len(ids)
        for begin, end in spans:
            labels[begin:end] = ids[begin:end]
        ids, labels = prompt + ids[start:], [IGNORED] * len(prompt) + labels[start:]
        truncated += len(ids) > limits.max_length
        not_following += not follows
        examples.append({"input_ids": ids[: limits.max_length], "labels": labels[: limits.max_length]})
    dropped.report(len(examples))
    if truncated:
        notice(
            f"{truncated} of {len(examples)} demonstrations were longer than max_length {limits.max_length} "
            "and were cut"
        )
    if not_following:
        notice(f"{not_following} of {len(examples)} {OTHERWISE}")
    return examples


def _spans(tokenizer: Any, demonstration: Demonstration, turns: Turns) -> tuple[list[int], list[tuple[int, int]], bool]:
    """Token ids, (begin, end) of each answer that is learned, and whether the last follows the generation prompt."""
    encoded = encode_example(tokenizer, demonstration.prompt, demonstration.completion, where=demonstration.where)
    last = (encoded.prompt_length, len(encoded.ids))
    if turns == "last" or isinstance(demonstration.prompt, str):
        return encoded.ids, [last], encoded.follows
    chat = as_chat(demonstration.prompt).then(demonstration.completion)
    if re.search(r"\{%-?\s*generation\b", str(tokenizer.chat_template)):
        return (*_marked(tokenizer, chat, demonstration.where), encoded.follows)
    spans = [_answer(tokenizer, chat, i, encoded.ids, demonstration.where) for i in range(len(chat) - 1)]
    return encoded.ids, [*(span for span in spans if span is not None), last], encoded.follows


def _answer(tokenizer: Any, chat: Chat, place: int, ids: list[int], where: str) -> tuple[int, int] | None:
    """(begin, end) in `ids` of the message at `place`, if it is an answer, from rendering the messages before it."""
    if chat[place]["role"] != "assistant":
        return None
    until = Chat(chat[:place], chat.tools, chat.variables)
    begin = common_length(tokens_of(tokenizer, render(tokenizer, until, where, generate=True)), ids)
    end = end_of_turn(tokenizer)
    if end in ids[begin:]:
        return begin, ids.index(end, begin) + 1
    rendered = render(tokenizer, Chat(chat[: place + 1], chat.tools, chat.variables), where)
    return begin, max(begin, common_length(tokens_of(tokenizer, rendered), ids))


def _marked(tokenizer: Any, chat: Chat, where: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids and the spans that the template itself marks as the assistant's, each with the token that ends it."""
    encoded = tokenizer.apply_chat_template(
        list(chat), return_dict=True, return_assistant_tokens_mask=True, **template_arguments(chat)
    )
    ids, mask = list(encoded["input_ids"]), [*encoded["assistant_masks"], 0]
    end = end_of_turn(tokenizer)
    begins = [i for i, marked in enumerate(mask) if marked and (i == 0 or not mask[i - 1])]
    spans = [(begin, mask.index(0, begin)) for begin in begins]
    spans = [(begin, stop + (ids[stop : stop + 1] == [end])) for begin, stop in spans]
    if not spans:
        raise UserError(f"{where}: the chat template marks no token of it as the assistant's")
    begin, stop = spans[-1]
    answer = close(ids[begin:stop], end, tokenizer.eos_token_id, ended=True)
    return ids[:begin] + answer, [*spans[:-1], (begin, begin + len(answer))]
