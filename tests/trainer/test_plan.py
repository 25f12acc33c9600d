# SPDX-License-Identifier: Apache-2.0
"""The counts of `rlhf-fast plan` against what PyTorch does, and what it recommends."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, LlamaConfig

from rlhf_fast import cli
from rlhf_fast.models.footprint import Footprint
from rlhf_fast.report import plan

LLAMA = LlamaConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=301, tie_word_embeddings=False,
)  # fmt: skip
GPT2 = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=301, bos_token_id=1, eos_token_id=2)
SEVEN_B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
    vocab_size=32000, tie_word_embeddings=False,
)  # fmt: skip


def folder_of(config: Any, path: Path) -> str:
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM").replace("GPT2For", "GPT2LMHead")]
    config.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_counts_are_those_of_the_real_model(config: Any, tmp_path: Path) -> None:
    found = Footprint.of(folder_of(config, tmp_path), torch.float32)
    real = AutoModelForCausalLM.from_config(config)
    assert found.weights == found.trained == sum(p.numel() for p in real.parameters())
    assert found.head == 64 * 301
    cache = DynamicCache(config=config)
    ids = torch.ones((2, 9), dtype=torch.int64)
    real(ids, past_key_values=cache, use_cache=True)
    kept = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    assert kept == found.cache_per_token * ids.numel()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_saves(checkpointing: bool, tmp_path: Path) -> None:
    found = Footprint.of(folder_of(LLAMA, tmp_path), torch.float32)
    real = AutoModelForCausalLM.from_config(LLAMA, attn_implementation="sdpa").train()
    if checkpointing:
        real.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    own = {p.untyped_storage().data_ptr() for p in (*real.parameters(), *real.buffers())}
    storages: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        real.base_model(input_ids=torch.ones((3, 40), dtype=torch.int64), use_cache=False)
    saved = sum(x.untyped_storage().nbytes() for x in storages.values())
    if checkpointing:  # while one layer is recomputed, its own tensors are there as well
        layer = found.saved(3, 40, False) / 3
        saved += layer
    assert found.saved(3, 40, checkpointing) == pytest.approx(saved, rel=0.1)


def test_adapters_are_counted_apart(tmp_path: Path) -> None:
    found = Footprint.of(folder_of(LLAMA, tmp_path), torch.bfloat16, lora_rank=4)
    layer = 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))  # q, o; k, v; gate, up, down
    assert found.trained == 3 * layer
    assert found.weights - found.trained == Footprint.of(str(tmp_path), torch.bfloat16).weights


def options_of(tmp_path: Path, **changes: Any) -> plan.PlanOptions:
    return plan.PlanOptions(model=folder_of(SEVEN_B, tmp_path), **changes)


def test_full_ppo_of_7b_needs_shards_and_one_gpu_needs_adapters(tmp_path: Path) -> None:
    """Two trained models of 6.7B weights take 16 bytes a weight and more: 216 GiB, which eight GPUs of 80 share."""
    options = options_of(tmp_path, gpus=8)
    models = plan.load(options)
    eight = plan.choose(options, models)
    assert eight is not None and eight.fsdp and not eight.lora_rank
    options.gpus = 1
    one = plan.choose(options, models)
    assert one is not None and one.lora_rank and not one.fsdp
    options.gpu_memory = 24.0
    small = plan.choose(options, models)
    assert small is None or small.nf4


def test_a_model_is_loaded_whole_before_it_is_sharded(tmp_path: Path) -> None:
    options = options_of(tmp_path, gpus=64, phase="sft")
    models = plan.load(options)
    moments = plan.memory(options, models, plan.Setup(fsdp=True))
    assert moments["load"]["policy weights"] == 4 * models.policy.weights  # in float32
    assert plan.peak(moments) >= 4 * models.policy.weights


def test_a_plan_never_exceeds_the_memory_and_the_next_micro_batch_would(tmp_path: Path) -> None:
    options = options_of(tmp_path, gpus=8, objective="grpo", reward_model="none", batch_size=1024)
    models = plan.load(options)
    setup = plan.choose(options, models)
    assert setup is not None and setup.micro_batch < 128
    assert plan.peak(plan.memory(options, models, setup)) <= 80 * plan.GIB
    assert plan.peak(plan.memory(options, models, setup._replace(micro_batch=2 * setup.micro_batch))) > 80 * plan.GIB


def test_objectives_without_a_critic_take_less(tmp_path: Path) -> None:
    options = options_of(tmp_path, gpus=8)
    models = plan.load(options)
    setup = plan.Setup(fsdp=True)
    ppo = plan.peak(plan.memory(options, models, setup))
    options.objective = "grpo"
    assert plan.peak(plan.memory(options, models, setup)) < 0.75 * ppo


@pytest.mark.parametrize(
    ("objective", "kl_coef", "wanted"),
    [("grpo", None, True), ("dapo", None, False), ("dapo", 0.1, True), ("grpo", 0.0, False), ("dpo", 0.0, True)],
)
def test_without_a_kl_no_reference_is_counted(
    objective: str, kl_coef: float | None, wanted: bool, tmp_path: Path
) -> None:
    options = options_of(tmp_path, objective=objective, kl_coef=kl_coef, epochs=2)
    models = plan.load(options)
    moments = plan.memory(options, models, plan.Setup())
    assert all(("reference weights" in parts) == wanted for parts in moments.values())
    times = plan.seconds(options, models, plan.Setup())["old and reference log-probabilities"]
    options.objective, options.kl_coef = "grpo", 1.0
    whole = plan.seconds(options, models, plan.Setup())["old and reference log-probabilities"]
    assert times == pytest.approx(whole if wanted else whole / 2)


@pytest.mark.parametrize("phase", ["sft", "reward", "ppo"])
def test_the_launch_line_is_one_that_the_phase_understands(
    phase: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = folder_of(LLAMA, tmp_path / "model")
    assert cli.main(["plan", "--model", config, "--phase", phase, "--gpus", "2", "--batch-size", "8"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    words = line.split(f"-m rlhf_fast {phase} ")[1].split()
    from rlhf_fast import trainer

    cls = {"sft": trainer.SFTConfig, "reward": trainer.RewardConfig, "ppo": trainer.PPOConfig}[phase]
    parsed = cli.parse(cls, words, "test")
    assert parsed.micro_batch_size == 4 and parsed.max_length == (1024 if phase == "ppo" else 512)


def test_what_never_fits_says_how_much_it_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = folder_of(SEVEN_B, tmp_path)
    assert cli.main(["plan", "--model", config, "--gpu-memory", "2"]) == 2
    message = capsys.readouterr().err
    assert "nothing fits into 1 x 2 GiB" in message and re.search(r"takes \d+\.\d GiB", message)
    assert cli.main(["plan", "--model", str(tmp_path / "none")]) == 2


def test_a_config_file_is_enough(tmp_path: Path) -> None:
    folder_of(LLAMA, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == 64
    assert Footprint.of(str(tmp_path / "config.json"), torch.float32).weights
