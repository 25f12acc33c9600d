# SPDX-License-Identifier: Apache-2.0
"""A model's limits on length and vocabulary, and what happens to examples beyond them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_fast.errors import UserError
from rlhf_fast.run.options import Overlong

from .dropped import Dropped
from .encoding import OverlongError, encode_prompt
from .examples import PromptLine

TOO_LONG = "the prompt is too long to leave room for a completion (overlong: drop)"


@dataclass(frozen=True)
class Limits:
    """Limits of one model, and the options `overlong` and `strict`."""

    max_length: int  # most tokens in a prompt and its completion together
    overlong: Overlong = "drop"
    strict: bool = False
    vocabulary: int | None = None  # number of rows of the model's embeddings; greater ids are errors

    def fit_prompt(self, ids: list[int], longest: int, where: str, bos: int | None = None) -> list[int]:
        """The prompt's ids, truncated at the left to `longest` if `overlong` is truncate-left; else OverlongError.

        A first token equal to `bos` is kept.
        """
        if len(ids) <= longest:
            return ids
        if self.overlong != "truncate-left" or longest < 1:
            raise OverlongError(where, len(ids), longest, self.max_length)
        tail = ids[len(ids) - longest :]
        return [ids[0], *tail[1:]] if ids[0] == bos and longest > 1 else tail

    def prompt_of(self, ids: list[int], start: int, tokenizer: Any, where: str) -> list[int]:
        """The prompt `ids[:start]` of an example `ids`, with room for the completion, or for its first token at least.

        With truncate-left there is room for as much of the completion as fits. Raises as `check` and `fit_prompt`.
        """
        self.check(ids, tokenizer, where)
        room = self.max_length - 1
        if self.overlong == "truncate-left":
            room = max(1, min(room, self.max_length - len(ids) + start))
        return self.fit_prompt(ids[:start], room, where, tokenizer.bos_token_id)

    def check(self, ids: Sequence[int], tokenizer: Any, where: str) -> None:
        """UserError for a token that the model's embeddings do not have."""
        if self.vocabulary is not None and max(ids, default=0) >= self.vocabulary:
            beyond = next(i for i in ids if i >= self.vocabulary)
            raise UserError(
                f"{where}: the token {tokenizer.convert_ids_to_tokens(beyond)!r} has the id {beyond}, but the model's "
                f"embeddings have {self.vocabulary} rows; resize them, or use the model's own tokenizer"
            )

    def leave_out(self, dropped: Dropped, error: UserError) -> None:
        """Drop a row that does not fit or cannot be encoded; raise if the options say so."""
        if not isinstance(error, OverlongError):
            dropped.add(error)
        elif self.overlong == "error":
            raise error
        else:
            dropped.add(error, TOO_LONG)


def encode_prompts(
    tokenizer: Any, lines: Sequence[PromptLine], limits: Limits, max_new_tokens: int, source: str | Path = "prompts"
) -> tuple[list[PromptLine], list[list[int]]]:
    """The prompts that leave room for `max_new_tokens`, and their token ids; the others are dropped and listed."""
    fitting, encoded = [], []
    dropped = Dropped(source, limits.strict)
    for line in lines:
        try:
            ids = encode_prompt(tokenizer, line.prompt, where=line.where)
            limits.check(ids, tokenizer, line.where)
            ids = limits.fit_prompt(ids, limits.max_length - max_new_tokens, line.where, tokenizer.bos_token_id)
        except UserError as error:
            limits.leave_out(dropped, error)
        else:
            fitting.append(line)
            encoded.append(ids)
    dropped.report(len(fitting))
    return fitting, encoded
