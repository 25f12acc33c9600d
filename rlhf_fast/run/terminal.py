# SPDX-License-Identifier: Apache-2.0
"""Text for a terminal or a log, without control characters and without secrets."""

from __future__ import annotations

import os
import re
from typing import Any

# C0 and C1 controls (escape sequences begin with one) but tab and newline; DEL; surrogates; marks that reorder text.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_CREDENTIALS = re.compile(r"(?<=://)[^\s/@]+(?=@)")
_NAMES = r"(?:(?:access_|auth_|api_|hf_)?token|api_?key|password|secret)"
_SECRET = re.compile(
    rf"""(?i)(\b{_NAMES}=|["']{_NAMES}["']: ?["']|\bauthorization["']?[:=] ?["']?(?:\w+ )?)[^\s&"',}}]+"""
)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")
_SECRET_VARIABLES = ("_TOKEN", "_API_KEY", "_SECRET", "_PASSWORD")  # ends of the names of environment variables
_SHORTEST_SECRET = 8  # characters of such a variable's value; shorter ones occur in ordinary text


def printable(text: Any) -> str:
    """`text` with each control character written as its escape, and secrets as `***`."""
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], redacted(str(text)))


def redacted(value: Any) -> Any:
    """`value`, and all texts in its lists and mappings, with passwords and tokens replaced by `***`.

    They are those in addresses and headers, tokens of the hub, and the values of environment variables such as
    HF_TOKEN and WANDB_API_KEY.
    """
    if isinstance(value, str):
        for name, secret in os.environ.items():
            if name.endswith(_SECRET_VARIABLES) and len(secret) >= _SHORTEST_SECRET:
                value = value.replace(secret, "***")
        return _HUB_TOKEN.sub("***", _SECRET.sub(r"\1***", _CREDENTIALS.sub("***", value)))
    if isinstance(value, dict):
        return {name: redacted(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redacted(item) for item in value)
    return value
