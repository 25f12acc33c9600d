# SPDX-License-Identifier: Apache-2.0
"""Whether Hugging Face's hub can be asked for a model, found out at once: loading would try again for most of a minute,
for each of the files that a phase wants."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from rlhf_fast.errors import UserError


def on_hub(name: str) -> str:
    """`name` if the hub answers, the folder of its copy in the hub's cache if it does not; UserError without one.

    Whether the hub has such a model it says itself, quickly.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    if Path(name).exists():
        raise UserError(f"{name} is a file; wanted the folder of a model, a .gguf file, or an id such as org/name")
    if name[0] in "./~" or name.count("/") > 1 or name.endswith("/") or "\\" in name:
        raise UserError(f"there is no folder {name!r}; wanted the folder of a model, or an id such as org/name")
    if constants.HF_HUB_OFFLINE or _answers(constants.ENDPOINT, constants.HF_HUB_ETAG_TIMEOUT):
        return name
    kept = try_to_load_from_cache(name, "config.json")
    if isinstance(kept, str):
        return str(Path(kept).parent)
    raise UserError(
        f"there is no folder {name!r} here, the hub {constants.ENDPOINT} cannot be reached, and its cache has no such "
        "model; name the folder of a model with --model"
    )


@lru_cache
def _answers(endpoint: str, seconds: float) -> bool:
    """True if anything comes back, through the proxies and certificates that the hub's own client is set up with."""
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=seconds)
    except Exception:  # of requests, httpx or httpx2, as the hub's version has it
        return False
    return True
