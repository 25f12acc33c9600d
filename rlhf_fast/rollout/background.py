# SPDX-License-Identifier: Apache-2.0
"""Work in a thread that the end of the process does not wait for, as it would for those of `concurrent.futures`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


def started(work: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """The future result of `work(*arguments)`, which has begun in a thread of its own."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work(*arguments))
        except BaseException as error:  # raised again by `result`
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
