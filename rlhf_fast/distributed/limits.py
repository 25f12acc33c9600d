# SPDX-License-Identifier: Apache-2.0
"""How long one call of a user's function may take, and so how long the other processes wait for it."""

from __future__ import annotations

import math
import os
from datetime import timedelta

from rlhf_fast.errors import UserError

NAME = "RLHF_FAST_CALL_SECONDS"
LEAST, MORE = 1800.0, 600.0  # seconds


def longest_call() -> float:
    """Seconds that one call may take, from the environment variable RLHF_FAST_CALL_SECONDS; 0: any number.

    Raises:
        UserError: it is not a number, or below 0.
    """
    text = os.environ.get(NAME, "1800")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UserError(f"the environment variable {NAME} must be a number of seconds, or 0 for no limit, got {text!r}")
    return seconds


def longest_wait() -> timedelta:
    """How long processes wait for one another: 10 minutes more than the longest call, at least 30; a day without limit.

    The process whose call takes too long is then the one that says so.
    """
    seconds = longest_call()
    return timedelta(seconds=max(LEAST, seconds + MORE)) if seconds else timedelta(days=1)
