# SPDX-License-Identifier: Apache-2.0
"""Model cards, adapters beside the merged model, and uploads to a stand-in of the hub on this machine."""

from __future__ import annotations

import base64
import html
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from helpers import phases
from safetensors.torch import load_file

from rlhf_fast.distributed.ranks import Ranks
from rlhf_fast.errors import UserError
from rlhf_fast.models.loading import load_causal_lm, load_reward_model, load_tokenizer
from rlhf_fast.run import folder as folder_module
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.run.model_card import Trained, base_model, write_card
from rlhf_fast.trainer import CollectConfig
from rlhf_fast.trainer.pipeline import PipelineConfig, _config

EVIL = "<script>alert(1)</script> [x](javascript:alert(1)) ![i](http://evil/i.png) | # h\n\n</pre>```\n`` ` *b* \x1b[2J"
SECRET = "hf_" + "S3cretS3cretS3cretS3cret"


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """Metadata and text of a card, by the hub's own reader."""
    from huggingface_hub import ModelCard

    card = ModelCard.load(folder / "README.md")
    return card.data.to_dict(), card.text


class Tags(HTMLParser):
    """The tags of a page and their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        """Attributes are where a link or a script would be."""
        self.seen |= {tag, *(name for name, _ in attrs if name != "style")}


def test_nothing_of_a_model_or_a_file_becomes_markup(tmp_path: Path) -> None:
    from markdown_it import MarkdownIt

    options = {"model": EVIL, "rater": EVIL, "train_file": EVIL, "objective": "ppo", "reward_functions": (EVIL, "b|c")}
    samples = [{"prompt": EVIL, "completion": EVIL}, {"prompt": [{"role": "user", "content": EVIL}], "completion": ""}]
    summary = {f"{EVIL}_after": 1.0, "rewards/f`_before": 0.0, "rewards/f`_after": 2.0, "kl_final": 3.0}
    write_card(tmp_path, Trained("PPOConfig", options, summary, samples))
    data, text = card_of(tmp_path)
    assert data["tags"] == ["rlhf", "rlhf_fast", "ppo"] and "base_model" not in data and "\x1b" not in text
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    assert Tags(page).seen <= {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "code", "pre"}
    assert page.count("<table>") == 4 and "alert(1)" in page  # shown, as text
    assert not re.search(r"<td></td>\s*</tr>\s*<tr>\s*<td>h", page)  # no row was broken by a line break or a bar


@pytest.mark.parametrize("value", [r"a\|b", "a|b", "\\\\|| \\", "|`|``", "&#124;|<b>"])
def test_a_bar_ends_no_cell_whatever_stands_before_it(value: str, tmp_path: Path) -> None:
    from markdown_it import MarkdownIt

    write_card(tmp_path, Trained("PPOConfig", {"model": "m", "rater": value}, {}, []))
    text = card_of(tmp_path)[1]
    (row,) = [line for line in text.splitlines() if line.startswith("| rater")]
    assert row.count("|") == 3  # no bar that a reader could take for the end of a cell
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    (shown,) = re.findall(r"<td>rater</td>\s*<td><code>(.*)</code></td>", page)
    assert html.unescape(shown) == value.strip()


@pytest.fixture(scope="module")
def adapted(job_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every phase that trains, with adapters, one after the other as people run them."""
    folder = tmp_path_factory.mktemp("adapted")
    jobs = phases.jobs(job_data)
    small: dict[str, Any] = {"lora_rank": 2, "save_steps": 0, "save_last": False}
    phases.run(replace(jobs["sft"], **small, max_steps=2, lr=0.03), folder / "sft")
    phases.run(replace(jobs["reward"], **small, epochs=0.2, model=str(folder / "sft" / "model")), folder / "reward")
    ppo = replace(jobs["grpo"], **small, max_steps=1, lr=0.03, model=str(folder / "sft" / "model"))
    phases.run(replace(ppo, reward_model=str(folder / "reward" / "model")), folder / "ppo")
    return folder


def test_every_phase_writes_a_card_with_its_figures(adapted: Path, job_data: Path) -> None:
    for name, task, figure in (
        ("sft", "text-generation", "held-out loss, nats per token"),
        ("reward", "text-classification", "held-out pair accuracy"),
        ("ppo", "text-generation", "KL from the reference at the end"),
    ):
        for inside in ("model", "adapters"):
            data, text = card_of(adapted / name / inside)
            assert data["pipeline_tag"] == task and data["library_name"] == "transformers"
            assert figure in text and "`rlhf-fast`" not in text.partition("| torch")[0]
            summary = json.loads((adapted / name / "summary.json").read_text())
            known = summary.get("loss_after") or summary.get("heldout_pair_accuracy") or summary["reward_after"]
            assert f"{known:.4g}" in text and torch.__version__ in text
    _, text = card_of(adapted / "ppo" / "model")
    assert str(adapted / "reward" / "model") in text and "Samples of held-out prompts" in text and "grpo" in text
    assert re.search(r"\| held-out reward \| [-\d.e]+ \| [-\d.e]+ \|", text)


def test_adapters_beside_the_merged_model_give_its_outputs(adapted: Path, job_data: Path) -> None:
    from peft import PeftModel

    ids = torch.arange(3, 15)[None]
    for name, base in (("sft", job_data / "model"), ("ppo", adapted / "sft" / "model")):
        merged = load_causal_lm(str(adapted / name / "model"), "float32")
        plain = load_causal_lm(str(base), "float32")
        before = plain(ids).logits
        with_adapters = PeftModel.from_pretrained(plain, str(adapted / name / "adapters"))
        torch.testing.assert_close(with_adapters(ids).logits, merged(ids).logits, atol=1e-5, rtol=1e-5)
        assert (before - merged(ids).logits).abs().max() > 1e-3, name  # it has learned
    tokenizer = load_tokenizer(str(job_data / "model"))
    torch.manual_seed(1)
    base_scores = load_reward_model(str(adapted / "sft" / "model"), "float32", tokenizer, new_head=True)
    scores = PeftModel.from_pretrained(base_scores, str(adapted / "reward" / "adapters")).eval()
    merged = load_reward_model(str(adapted / "reward" / "model"), "float32", tokenizer, new_head=False)
    torch.testing.assert_close(scores(ids).logits, merged(ids).logits, atol=1e-5, rtol=1e-5)  # the head with them
    stored = load_file(adapted / "reward" / "adapters" / "adapter_model.safetensors")
    assert all("lora_" in key or "score" in key for key in stored)


def test_the_base_model_is_known_through_our_own_folders(tmp_path: Path) -> None:
    assert base_model("smollm2") == "HuggingFaceTB/SmolLM2-135M-Instruct" and base_model("org/name") == "org/name"
    assert base_model(str(tmp_path)) is None and base_model("no such model") is None
    write_card(tmp_path, Trained("SFTConfig", {"model": "org/name"}, {}, []))
    assert base_model(str(tmp_path)) == "org/name" and card_of(tmp_path)[0]["base_model"] == "org/name"
    write_card(tmp_path, Trained("PPOConfig", {"model": str(tmp_path), "objective": "dpo"}, {}, []))
    assert card_of(tmp_path)[0]["base_model"] == "org/name"


def test_a_card_holds_the_command_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "correct-horse-battery")
    address = f"https://me:{SECRET}@host/score?token=abc"
    monkeypatch.setattr(
        sys, "argv", ["/x/bin/rlhf-fast", "ppo", "--reward-functions", address, "correct-horse-battery"]
    )
    write_card(tmp_path, Trained("PPOConfig", {"model": "m", "reward_functions": (address,)}, {}, []))
    text = (tmp_path / "README.md").read_text()
    assert "rlhf-fast ppo --reward-functions" in text and "https://***@host/score?token=***" in text
    assert SECRET not in text and "correct-horse" not in text
    monkeypatch.setattr(sys, "argv", ["pytest", "--secret-of-another-program"])
    write_card(tmp_path, Trained("PPOConfig", {"model": "m"}, {}, []))
    assert "another-program" not in (tmp_path / "README.md").read_text()


class Hub(ThreadingHTTPServer):
    """As much of the hub's HTTP API as uploading a folder takes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Hub)
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.cards: list[str] = []
        self.tokens: set[str | None] = set()
        self.checked: list[str] = []
        self.commits = 0
        self.fails = ""  # a part of the paths that are refused


class _Hub(BaseHTTPRequestHandler):
    server: Hub

    def _reply(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        hub = self.server
        if hub.fails and hub.fails in self.path:
            return self._reply({"error": "broken"}, 403)
        if "/tree/" in self.path:
            repository = self.path.split("/api/models/")[1].partition("/tree/")[0] + "/"
            names = [name.removeprefix(repository) for name in hub.files if name.startswith(repository)]
            return self._reply([{"type": "file", "path": name, "size": 1, "oid": "abc"} for name in names])
        if "/auth-check" in self.path:
            hub.checked.append(self.path)
        self._reply({"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        hub = self.server
        hub.tokens.add(self.headers["Authorization"])
        if hub.fails and hub.fails in self.path:
            return self._reply({"error": "broken"}, 400)
        if self.path == "/api/repos/create":
            hub.created.append(json.loads(body))
            return self._reply({"url": f"http://{self.headers['Host']}/me/{hub.created[-1]['name']}"})
        if self.path == "/api/validate-yaml":
            hub.cards.append(json.loads(body)["content"])
            return self._reply({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return self._reply(
                {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
            )
        if "/commit/" in self.path:
            repository = self.path.split("/api/models/")[1].partition("/commit/")[0]
            hub.commits += 1
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    hub.files[f"{repository}/{line['value']['path']}"] = content
                elif line["key"] == "deletedFile":
                    del hub.files[f"{repository}/{line['value']['path']}"]
            return self._reply(
                {"commitUrl": f"http://{self.headers['Host']}/{repository}/commit/abc", "commitOid": "abc"}
            )
        self._reply({"error": f"what is {self.path}"}, 404)

    def log_message(self, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    server = Hub()
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def uploading(job_data: Path) -> Any:
    return replace(phases.jobs(job_data)["sft"], max_steps=1, push_to_hub="me/tiny", save_steps=0)


def test_the_model_its_card_and_its_adapters_are_uploaded(
    hub: Hub, job_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "notes.md", "onnx/model.safetensors")
    hub.files |= {f"me/tiny/{name}": b"of an earlier upload" for name in old}
    job = replace(uploading(job_data), lora_rank=2)
    phases.run(job, tmp_path / "run")
    made = hub.created[0]
    assert made["name"] == "tiny" and (made.get("visibility") == "private" or made.get("private"))
    assert hub.tokens == {f"Bearer {SECRET}"} and hub.checked == ["/api/models/me/tiny/auth-check/write"]
    for local, remote in (("model", "me/tiny"), ("adapters", "me/tiny/adapters")):
        for path in (tmp_path / "run" / local).iterdir():
            assert hub.files.pop(f"{remote}/{path.name}") == path.read_bytes()
    # transformers would read the old shards, had they stayed; the rest of the repository is its owner's
    assert set(hub.files) == {"me/tiny/notes.md", "me/tiny/onnx/model.safetensors"}
    assert re.search(r"is at http://127.0.0.1:\d+/me/tiny/commit/abc", capsys.readouterr().err)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes()


@pytest.mark.parametrize("fails", ["create", "auth-check/write"])
def test_a_repository_that_cannot_be_written_is_known_before_training(
    fails: str, hub: Hub, job_data: Path, tmp_path: Path
) -> None:
    hub.fails = fails
    with pytest.raises(UserError, match=r"push_to_hub: cannot make the repository 'me/tiny' or write .*hf auth login"):
        phases.run(uploading(job_data), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_failed_upload_keeps_the_model_and_resume_tries_again(
    hub: Hub, job_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fails = "commit"
    job, folder = uploading(job_data), tmp_path / "run"
    phases.run(job, folder)
    assert (folder / "summary.json").exists() and not hub.files
    shown = capsys.readouterr().err
    assert "was not uploaded (" in shown and f"hf upload me/tiny {folder / 'model'}" in shown and "--resume" in shown
    assert SECRET not in shown
    hub.fails = ""
    hub.files["me/tiny/adapters/adapter_model.safetensors"] = b"of an earlier upload"
    phases.run(job, folder, resume=True)
    assert hub.commits == 1 and set(hub.files) == {f"me/tiny/{path.name}" for path in (folder / "model").iterdir()}
    phases.run(job, folder, resume=True)
    assert hub.commits == 1  # it is there
    capsys.readouterr()
    phases.run(replace(job, push_to_hub="me/other"), folder, resume=True)
    assert hub.commits == 2 and "me/other/model.safetensors" in hub.files
    assert "nothing is left to train" in capsys.readouterr().err


def test_other_processes_do_not_wait_for_an_upload(
    hub: Hub, job_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process may wait for another's message for some minutes only, less than a large upload takes."""
    events: list[str] = []
    for name in ("wait", "every"):
        real = getattr(Ranks, name)

        def noted(self: Ranks, *args: Any, real: Any = real) -> Any:
            events.append("message")
            return real(self, *args)

        monkeypatch.setattr(Ranks, name, noted)
    real_upload = folder_module.upload
    monkeypatch.setattr(folder_module, "upload", lambda *args: events.append("upload") or real_upload(*args))
    phases.run(uploading(job_data), tmp_path / "run")
    assert events.count("upload") == 1 and events[-1] == "upload" and events.count("message") > 3
    part = RunFolder(tmp_path / "run")
    part.part = True
    assert hub.commits == 1
    part._config = replace(uploading(job_data), push_to_hub="me/part")
    part.finish({})  # of a pipeline, whose next phase has messages: it uploads at its end
    assert hub.commits == 1
    part.upload("me/part")
    assert hub.commits == 2


def test_a_pipeline_names_the_repository_of_each_phase() -> None:
    config = PipelineConfig(push_to_hub="me/demo")
    config.sft.train_file = config.ppo.prompts_file = config.collect.prompts_file = "x"
    from rlhf_fast.trainer import PPOConfig, RewardConfig, SFTConfig

    parts = {SFTConfig: config.sft, RewardConfig: config.reward, PPOConfig: config.ppo, CollectConfig: config.collect}
    names = [_config(cls, config, part).push_to_hub for cls, part in parts.items()]
    assert names == ["me/demo-sft", "me/demo-reward", "me/demo-ppo", ""]
    with pytest.raises(UserError, match="collect makes none"):
        CollectConfig(prompts_file="x", push_to_hub="me/demo").validate()
