# SPDX-License-Identifier: Apache-2.0
"""Rewards over HTTP: a server gets prompts and completions and returns numbers, in OpenRLHF's request format.

    POST URL  {"query": [...], "prompts": [...], "completions": [...], "labels": [...], "columns": {name: [...]}}
    answer    {"rewards": [...]}, one number a completion

`query` is prompt and completion in one text, `labels` the column "label" or "answer" (null without one), as OpenRLHF's
remote reward models expect; `columns` has all columns of the data.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from rlhf_fast.data.examples import prompt_text

TIMEOUT = 120.0  # seconds that a server may take for the completions of a step
WAITS = (1.0, 4.0, 16.0)  # seconds before each new try


class RemoteReward:
    """A reward function with TRL's signature that calls a server.

    A server that cannot be reached, takes too long, or answers 429 or 5xx is tried again after a while; then, and for
    any other answer that is not a list of numbers, it raises: a failure stops the run and never becomes a reward.
    """

    def __init__(self, url: str) -> None:
        """`url` begins with http:// or https://."""
        self.url = url

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[Any]:
        """One number for each of `completions`."""
        texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
        begins = [prompt_text(prompt) for prompt in prompts]
        labels = columns.get("label", columns.get("answer", [None] * len(texts)))
        query = [begin + text for begin, text in zip(begins, texts, strict=True)]
        body = {"query": query, "prompts": begins, "completions": texts, "labels": labels, "columns": columns}
        answer = self._post(json.dumps(body).encode())
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, list):
            raise ValueError(f'{self.url} answered {str(answer)[:200]!r}, wanted {{"rewards": [...]}}')
        if None in rewards:  # of a function it means no opinion; servers write a NaN so
            raise ValueError(f"{self.url} answered null for completion {rewards.index(None)}, wanted a number")
        return rewards

    def _post(self, body: bytes) -> Any:
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        for wait in (*WAITS, None):
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:  # noqa: S310 - http(s) by load_functions
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                if wait is None or not (error.code == 429 or error.code >= 500):
                    raise ValueError(f"{self.url} answered {error.code} {error.reason}") from error
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                if wait is None:
                    reason = getattr(error, "reason", error)
                    raise ValueError(
                        f"{self.url} cannot be reached ({reason}); tried {len(WAITS) + 1} times"
                    ) from error
            time.sleep(wait)
        raise AssertionError("the last try returns or raises")
