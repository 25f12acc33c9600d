# SPDX-License-Identifier: Apache-2.0
"""Dropout of every kind is off in every phase but where somebody wants it, and what is saved says what it did."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import phases

from rlhf_fast import cli
from rlhf_fast.models import loading
from rlhf_fast.models.dropout import switch_off_dropout, switch_on_dropout

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
# Their configurations name dropout in many ways, and put it into modules, functions and whole layers.
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "gptj": {**GPT2, "rotary_dim": 8, "attn_pdrop": 0.3},
    "gpt_neo": {**SMALL, "num_layers": 2, "num_heads": 2, "attention_types": [[["global"], 2]], "embed_dropout": 0.2},
    "opt": {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32, "layerdrop": 0.5, "attention_dropout": 0.3},
    "bloom": {**SMALL, "n_layer": 2, "n_head": 2, "hidden_dropout": 0.3, "attention_dropout": 0.3},
    "falcon": {**SMALL, "hidden_dropout": 0.3, "attention_dropout": 0.3},
    "phi": {**SMALL, "resid_pdrop": 0.3, "embd_pdrop": 0.3, "attention_dropout": 0.3, "intermediate_size": 64},
    "llama": {**SMALL, "attention_dropout": 0.3, "intermediate_size": 64},
    "mixtral": {**SMALL, "router_jitter_noise": 0.3, "intermediate_size": 64, "num_key_value_heads": 2},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 2, "ffn_dim": 64, "layerdrop": 0.5},
}  # fmt: skip


def build(name: str, vocabulary: int = 64, **options: Any) -> Any:
    torch.manual_seed(0)
    settings = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(name, **{**settings, **CONFIGS[name], **options})
    return transformers.AutoModelForCausalLM.from_config(config)


@torch.no_grad()
def differs(model: Any) -> bool:
    """Whether two passes in training mode differ."""
    ids = torch.arange(1, 41).view(4, 10)
    model.train()
    return not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_kind_is_switched_off_and_on(name: str) -> None:
    model = build(name)
    assert differs(model), "the model has dropout, or this test sees nothing"
    switch_off_dropout(model)
    assert not differs(model)
    switch_on_dropout(model)
    assert differs(model)


@pytest.fixture(scope="module")
def others(job_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stock GPT-2 and OPT, with the tiny task's tokenizer: a tenth of everything is dropped."""
    folder = tmp_path_factory.mktemp("dropout")
    tokenizer = transformers.AutoTokenizer.from_pretrained(job_data / "model")
    for name in ("gpt2", "opt"):
        vocabulary = {"vocabulary": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
        limits = {} if name == "gpt2" else {"max_position_embeddings": 64, "layerdrop": 0.0}
        build(name, **{**vocabulary, **limits}, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def command(phase: str, model: Path, run: Path, *more: str) -> list[str]:
    common = f"{phase} --model {model} --output-dir {run} --dtype float32 --max-length 32 --micro-batch-size 8"
    return [*common.split(), *map(str, more)]


def test_sft_of_a_stock_gpt2_with_held_out_data(others: Path, job_data: Path, tmp_path: Path) -> None:
    """It used to stop: attention over packed rows, found to work in eval mode, met attention dropout in training."""
    demonstrations = str(job_data / "demos.jsonl")
    options = ["--train-file", demonstrations, "--eval-file", demonstrations, "--max-steps", "2", "--batch-size", "8"]
    for packing in ("--packing", "--no-packing"):
        assert cli.main(command("sft", others / "gpt2", tmp_path / packing, *options, packing)) == 0
    losses = [phases.metrics(tmp_path / packing)[1]["loss"] for packing in ("--packing", "--no-packing")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)  # with dropout it would be neither's
    saved = json.loads((tmp_path / "--packing" / "model" / "config.json").read_text())
    assert saved["attn_pdrop"] == saved["resid_pdrop"] == saved["embd_pdrop"] == 0.1
    more = ["--dropout", "--eval-steps", "1", "--lr", "1e-12"]
    assert cli.main(command("sft", others / "gpt2", tmp_path / "wanted", *options, *more)) == 0
    rows = phases.metrics(tmp_path / "wanted")
    assert [row["loss"] for row in rows if "loss" in row][1] != pytest.approx(losses[1], abs=1e-4)
    before, *rest = [row["eval/nll"] for row in rows if "eval/nll" in row]
    assert rest == pytest.approx([before] * 2, abs=1e-5)  # evaluated without dropout


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_rl_with_gradient_checkpointing(name: str, others: Path, job_data: Path, tmp_path: Path) -> None:
    """OPT used to stop at the ratio check: its dropout is a function, not a module."""
    options = [
        "--prompts-file", str(job_data / "feedback_prompts.jsonl"), "--objective", "grpo", "--max-new-tokens", "6",
        "--reward-functions", f"{phases.__file__}:often_short", "--max-steps", "2", "--prompts-per-step", "2",
        "--gradient-checkpointing", "--lr", "1e-4",
    ]  # fmt: skip
    assert cli.main(command("ppo", others / name, tmp_path / "run", *options)) == 0
    assert phases.metrics(tmp_path / "run")[0]["policy/ratio"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_reward_model_of_a_stock_gpt2(processes: int, others: Path, job_data: Path, tmp_path: Path) -> None:
    """With --fsdp it used to crash, for the same reason as SFT."""
    words = command(
        "reward", others / "gpt2", tmp_path / "run", "--feedback-file", str(job_data / "feedback.jsonl"), "--epochs",
        "0.3", *(["--fsdp"] if processes == 2 else ["--dropout"]),
    )  # fmt: skip
    if processes == 1:
        assert cli.main(words) == 0
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert summary["read_position_gap"] < 1e-3  # scored without dropout
        return
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rlhf_fast"]
    done = subprocess.run([*launch, *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_a_loaded_model_has_none(others: Path) -> None:
    for name in ("gpt2", "opt"):
        tokenizer = loading.load_tokenizer(str(others / name))
        for model in (
            loading.load_causal_lm(str(others / name), "float32"),
            loading.load_reward_model(str(others / name), "float32", tokenizer, new_head=True),
        ):
            ids = torch.arange(1, 41).view(4, 10)
            model.train()
            assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
