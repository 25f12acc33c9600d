# SPDX-License-Identifier: Apache-2.0
"""Check once whether Hugging Face's hub can be reached: loading would retry for most of a minute for every file."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from rlhf_fast.errors import UserError


def on_hub(name: str) -> str:
    """`name` if the hub answers, else the folder of its copy in the hub's cache; UserError if there is none.

    If the hub answers, it says itself, and quickly, whether it has the model.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    if Path(name).exists():
        raise UserError(f"{name} is a file; wanted the folder of a model, a .gguf file, or an id such as org/name")
    if name[0] in "./~" or name.count("/") > 1 or name.endswith("/") or "\\" in name:
        raise UserError(f"there is no folder {name!r}; wanted the folder of a model, or an id such as org/name")
    if constants.HF_HUB_OFFLINE or _answers(constants.ENDPOINT, constants.HF_HUB_ETAG_TIMEOUT):
        return name
    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return str(Path(cached).parent)
    raise UserError(
        f"there is no folder {name!r} here, the hub {constants.ENDPOINT} cannot be reached, and its cache has no such "
        "model; name the folder of a model with --model"
    )


@lru_cache
def _answers(endpoint: str, seconds: float) -> bool:
    """True if there is any response, using the hub client's own proxies and certificates."""
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=seconds)
    except Exception:  # the type depends on the hub's version: requests, httpx or httpx2
        return False
    return True
