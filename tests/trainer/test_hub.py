# SPDX-License-Identifier: Apache-2.0
"""A model's name that is no folder: an error at once where the hub is out of reach, the hub's own word where not."""

from __future__ import annotations

import shutil
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import transformers

from rlhf_fast.errors import UserError, first_line
from rlhf_fast.models import hub
from rlhf_fast.models import loading as models


@pytest.fixture
def asked_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A hub at a port where nobody listens, with an empty cache; grows by each question to it, by the real client."""
    asked: list[str] = []
    session = huggingface_hub.get_session

    def counted() -> object:
        asked.append(huggingface_hub.constants.ENDPOINT)
        return session()

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setattr(huggingface_hub, "get_session", counted)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)  # where no folder is called like the names below
    return asked


def test_an_error_without_a_message_is_named_by_its_type() -> None:
    assert first_line(TimeoutError()) == "TimeoutError"
    assert first_line(OSError("no such file\nhint")) == "no such file"


def test_a_name_that_is_no_folder_fails_at_once(asked_hub: list[str], tmp_path: Path) -> None:
    """Without the hub; transformers would ask it for forty seconds, file by file."""
    for name in ("./runs/sft", "/nothing/here", "~/model", "runs/sft/model", "runs/", r"runs\sft"):
        with pytest.raises(UserError, match="there is no folder .* or an id such as org/name"):
            models.load_tokenizer(name)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; wanted the folder of a model"):
        models.load_causal_lm(str(tmp_path / "file"), "float32")
    assert not asked_hub
    for load in (models.load_causal_lm, models.load_reward_model):
        with pytest.raises(UserError, match="'org/name' here, the hub http://.* cannot be reached, and its cache has"):
            load("org/name", "float32")
    assert len(asked_hub) == 1


def test_what_the_hub_gave_before_is_used_without_it(
    asked_hub: list[str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "hub" / "models--org--name"
    shutil.copytree(tiny / "model", kept / "snapshots" / "abc")
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("abc")
    assert models.load_causal_lm("org/name", "float32").config.vocab_size and len(asked_hub) == 1
    download = transformers.utils.hub.hf_hub_download

    def downloaded(*args: Any, local_files_only: bool = False, **options: Any) -> Any:
        return (
            download(*args, local_files_only=True, **options) if local_files_only else pytest.fail("the hub was asked")
        )

    monkeypatch.setattr(transformers.utils.hub, "hf_hub_download", downloaded)
    # The head of a reward model is read again from the files that were loaded: nothing that the hub could refuse.
    assert models._file_with("score.weight", "org/name") == str(kept / "snapshots" / "abc" / "model.safetensors")
    assert models._file_with("score.weight", "org/none") is None


def test_a_hub_that_answers_is_asked(asked_hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuses(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(403)  # whatever it says: it is there

    with HTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert hub.on_hub("org/name") == "org/name" and hub.on_hub("gpt2") == "gpt2" and len(asked_hub) == 1
        server.shutdown()


def test_offline_the_hub_is_not_asked(asked_hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub.on_hub("org/name") == "org/name" and not asked_hub
