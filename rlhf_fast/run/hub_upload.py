# SPDX-License-Identifier: Apache-2.0
"""Uploading a trained model to the Hugging Face hub (or whatever HF_ENDPOINT names), by huggingface_hub.

The token is the one of `hf auth login`, or of HF_TOKEN; no option takes it, so no file of a run can hold it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_fast.errors import UserError, first_line

from .progress import notice

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-[0-9]*-of-[0-9]*.safetensors")


def open_repository(repository: str) -> None:
    """Make the repository, private, if it does not exist; UserError if this user cannot write to it.

    Called before training, so that hours of it do not end with a wrong name or token. That a repository exists does
    not say that this token may write to it, so the hub is asked.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repository, private=True, exist_ok=True)
        HfApi().auth_check(repository, write=True)
    except Exception as error:  # of the hub's client, or of the network library below it
        raise UserError(
            f"push_to_hub: cannot make the repository {repository!r} or write to it ({first_line(error)}); log in "
            "with `hf auth login` or set HF_TOKEN to a token that may write"
        ) from None


def upload(repository: str, folder: Path, inside: str = "", stale: Sequence[str] = ()) -> str | None:
    """Upload a folder, as `inside` of the repository; returns the address of the commit.

    Weights of an earlier upload that this one does not replace are removed: transformers would prefer an old index of
    shards. `stale` are more names of the repository to remove. A failure is printed with the command that tries again:
    the model is on the disk, and later phases need it.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repository, private=True, exist_ok=True)  # a run may be told at its end to upload
        commit: Any = HfApi().upload_folder(
            repo_id=repository,
            folder_path=folder,
            path_in_repo=inside or None,
            commit_message="Upload a model trained by rlhf_fast",
            delete_patterns=[*WEIGHTS, *stale],
        )
    except Exception as error:
        target = f" {inside}" if inside else ""
        notice(
            f"{folder} is saved but was not uploaded ({first_line(error)}); to try again: the same command with "
            f"--resume, or hf upload {repository} {folder}{target}"
        )
        return None
    return str(commit.commit_url)
