# SPDX-License-Identifier: Apache-2.0
"""What a model can read, and what is done with examples that are longer or hold other tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf_fast.errors import UserError

from .dropped import Dropped
from .encoding import OverlongError, encode_prompt
from .examples import PromptLine

Overlong = Literal["drop", "truncate-left", "error"]
TOO_LONG = "the prompt leaves no room for a completion (overlong: drop)"


@dataclass(frozen=True)
class Limits:
    """What one model can read, and the options `overlong` and `strict`."""

    max_length: int  # most tokens of a prompt and its completion together
    overlong: Overlong = "drop"
    strict: bool = False
    vocabulary: int | None = None  # ids from here on are not in the model's embeddings

    def fit_prompt(self, ids: list[int], longest: int, where: str, bos: int | None = None) -> list[int]:
        """The prompt's ids, cut at the left to `longest` with `overlong` truncate-left; OverlongError otherwise.

        A first token that is `bos` stays.
        """
        if len(ids) <= longest:
            return ids
        if self.overlong != "truncate-left" or longest < 1:
            raise OverlongError(where, len(ids), longest + 1)
        kept = ids[len(ids) - longest :]
        return [ids[0], *kept[1:]] if ids[0] == bos and longest > 1 else kept

    def check(self, ids: Sequence[int], tokenizer: Any, where: str) -> None:
        """UserError for a token that the model's embeddings do not have."""
        if self.vocabulary is not None and max(ids, default=0) >= self.vocabulary:
            beyond = next(i for i in ids if i >= self.vocabulary)
            raise UserError(
                f"{where}: the token {tokenizer.convert_ids_to_tokens(beyond)!r} has the id {beyond}, but the model's "
                f"embeddings have {self.vocabulary} rows; resize them, or take the tokenizer that belongs to the model"
            )

    def leave_out(self, dropped: Dropped, error: UserError) -> None:
        """Count a row that does not fit or cannot be encoded; raise where the options say so."""
        if not isinstance(error, OverlongError):
            dropped.add(error)
        elif self.overlong == "error":
            raise error
        else:
            dropped.add(error, TOO_LONG)


def encode_prompts(
    tokenizer: Any, lines: Sequence[PromptLine], limits: Limits, max_new_tokens: int, source: str | Path = "prompts"
) -> tuple[list[PromptLine], list[list[int]]]:
    """The prompts that leave room for `max_new_tokens`, and their token ids; the others are left out and named."""
    kept, encoded = [], []
    dropped = Dropped(source, limits.strict)
    for line in lines:
        try:
            ids = encode_prompt(tokenizer, line.prompt, where=line.where)
            limits.check(ids, tokenizer, line.where)
            ids = limits.fit_prompt(ids, limits.max_length - max_new_tokens, line.where, tokenizer.bos_token_id)
        except UserError as error:
            limits.leave_out(dropped, error)
        else:
            kept.append(line)
            encoded.append(ids)
    dropped.report(len(kept))
    return kept, encoded
