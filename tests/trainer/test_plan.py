# SPDX-License-Identifier: Apache-2.0
"""The counts of `rlhf-fast plan` against what PyTorch does, and what it recommends."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.plans import GPT2, LLAMA, SEVEN_B, folder_of, options_of
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, DynamicCache, MixtralConfig, OPTConfig

from rlhf_fast import cli
from rlhf_fast.models.footprint import Footprint
from rlhf_fast.models.lora import add_lora
from rlhf_fast.models.optim import AdamW
from rlhf_fast.report import estimate, plan
from rlhf_fast.trainer.rl.objectives import OBJECTIVES


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
    real = AutoModelForCausalLM.from_config(deepcopy(LLAMA), dtype=torch.float32, attn_implementation="sdpa").train()
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


@pytest.mark.parametrize(
    ("gpus", "words"),
    [
        (1, "rlhf-fast sft "),
        (8, "torchrun --nproc-per-node 8 -m rlhf_fast sft "),
        (16, "torchrun --nnodes 2 --node-rank 0 --nproc-per-node 8 --master-addr NODE0 --master-port 29500 -m rlhf"),
        (12, "torchrun --nnodes 2 --node-rank 0 --nproc-per-node 6 --master-addr NODE0 --master-port 29500 -m rlhf"),
    ],
)
def test_several_nodes_have_a_launch_line_each(
    gpus: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = folder_of(LLAMA, tmp_path)
    options = ["plan", "--model", config, "--phase", "sft", "--gpus", str(gpus), "--batch-size", "48"]
    assert cli.main(options) == 0
    *before, line = capsys.readouterr().out.splitlines()
    assert line.startswith(words)
    assert ("On each of 2 nodes" in " ".join(before)) == (gpus > 8)


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
    options.kl_coef = 1.0
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
    assert parsed.max_length == (512 if phase == "sft" else 1024)
    if phase == "ppo":  # two minibatches of 4 sequences, two on each process
        assert (parsed.micro_batch_size, parsed.prompts_per_step, parsed.samples_per_prompt) == (2, 2, 4)
    else:  # a pair counts as two sequences
        assert (parsed.micro_batch_size, parsed.batch_size) == (4, 4 if phase == "reward" else 8)


def exact(phase: str, objective: str = "ppo", dtype: str = "bfloat16", rank: int = 0, **options: Any) -> Any:
    """Bytes of each moment of a plan whose one optimizer step has several micro-batches."""
    made = plan.PlanOptions(
        phase=phase, objective=objective, dtype=dtype, lora_rank=rank, prompt_length=16, max_new_tokens=8, **options
    )
    return made, lambda models: estimate.memory(made, models, plan.Setup(lora_rank=rank, micro_batch=2), "cpu")


@pytest.mark.parametrize(
    ("phase", "rank", "dtype"),
    [("sft", 0, "bfloat16"), ("sft", 4, "bfloat16"), ("reward", 0, "float32"), ("grpo", 4, "float32")]
    + [("ppo", rank, "bfloat16") for rank in (0, 4)],
)
def test_bytes_of_weights_masters_moments_and_gradients_are_those_of_real_models(
    phase: str, rank: int, dtype: str, tmp_path: Path
) -> None:
    sampled = phase in OBJECTIVES
    options, memory = exact("ppo" if sampled else phase, phase if sampled else "ppo", dtype, rank)
    options.model = folder_of(LLAMA, tmp_path)
    moments = memory(plan.load(options))
    float32 = phase == "sft" and not rank  # SFT holds float32 weights, and a bfloat16 copy while it multiplies
    width = torch.float32 if float32 else getattr(torch, dtype)
    model = AutoModelForCausalLM.from_config(deepcopy(LLAMA), dtype=width)  # which writes it into the config
    plain = sum(p.nbytes for p in model.parameters())
    if rank:
        add_lora(model, rank)
    weights = sum(p.nbytes for p in model.parameters())
    optimizer = AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        model(input_ids=torch.ones((1, 4), dtype=torch.int64)).logits.float().sum().backward()
    if phase == "sft":
        gradients = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    else:
        gradients = sum(master.grad.nbytes for _, master in optimizer.pairs if master.grad is not None)
    optimizer.step()
    moments_ = sum(x.nbytes for state in optimizer.optimizer.state.values() for x in state.values() if x.dim())
    masters = sum(master.nbytes for weight, master in optimizer.pairs if master is not weight)
    copies = 2 * sum(p.numel() for p in model.parameters()) if float32 else 0
    update = next(parts for name, parts in moments.items() if name.startswith("update"))
    assert update["policy weights"] == weights and update["weights in autocast's dtype"] == copies
    assert update["policy optimizer"] == moments_ + masters
    assert update["gradients"] == gradients
    if sampled:
        assert update["reward model weights"] == plain
        assert update.get("reference weights", 0) == (0 if rank else plain)
        assert ("critic optimizer" in update) == (phase == "ppo")
        cache = DynamicCache(config=LLAMA)
        model(input_ids=torch.ones((options.batch_size, 24), dtype=torch.int64), past_key_values=cache, use_cache=True)
        assert moments["sample"]["KV cache"] == sum(x.nbytes for y in cache.layers for x in (y.keys, y.values))


def test_gradients_of_one_micro_batch_replace_its_activations(tmp_path: Path) -> None:
    """Reset in the backward, they are there in full when the optimizer steps."""
    options = options_of(tmp_path, phase="reward", batch_size=4)
    models = plan.load(options)
    several = plan.memory(options, models, plan.Setup(micro_batch=2))
    one = plan.memory(options, models, plan.Setup(micro_batch=4))
    assert list(several) == ["update"] and several["update"]["gradients"] == 4 * models.policy.weights
    assert "gradients" not in one["update"] and one["step"]["gradients"] == 2 * models.policy.weights
    options.phase = "sft"  # whose weights are float32
    assert plan.memory(options, models, plan.Setup(micro_batch=4))["step"]["gradients"] == 4 * models.policy.weights


@pytest.mark.parametrize(
    ("objective", "minibatches", "tokens"),
    [("grpo", 1, 100 + 4 * 50), ("ppo", 2, 2 * 100 + 4 * 50), ("dpo", 2, 2 * 100 + 4 * 50)],
)
def test_a_prompt_is_counted_once_for_the_completions_that_share_it(
    objective: str, minibatches: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(estimate.COMMON_DEFAULTS, "num_minibatches", minibatches)
    options = plan.PlanOptions(objective=objective, prompt_length=100, max_new_tokens=50)
    if OBJECTIVES[objective].defaults.get("num_minibatches", minibatches) == minibatches:
        assert estimate.pass_tokens(options, 4) == tokens
    options.prompt_length = 2  # not worth the copying
    assert estimate.pass_tokens(options, 4) == 4 * 52


def test_completions_are_sampled_in_waves_before_weights_are_given_up(tmp_path: Path) -> None:
    """A KV cache of 512 completions of a 7B model is 256 GiB."""
    options = options_of(tmp_path, objective="grpo", reward_model="none", gpus=8, batch_size=1024)
    models = plan.load(options)
    setup = plan.choose(options, models)
    assert setup is not None and setup.waves > 1 and not setup.lora_rank
    assert f"--generation-batch-size {128 // setup.waves}" in plan._sizes(options, setup)
    slower = plan.seconds(options, models, setup)["sample"]
    assert slower > plan.seconds(options, models, setup._replace(waves=1))["sample"]


def test_a_token_of_a_mixture_goes_to_some_of_the_experts(tmp_path: Path) -> None:
    config = MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=301, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    found = Footprint.of(folder_of(config, tmp_path), torch.bfloat16)
    experts = 2 * 8 * 3 * 64 * 96
    assert found.used == found.weights - 301 * 64 - experts * 6 / 8
    assert found.linear < found.weights - experts - 2 * 301 * 64 + 1  # experts are no linear layers: NF4 leaves them


def test_embeddings_narrower_than_the_states_are_counted(tmp_path: Path) -> None:
    config = OPTConfig(
        hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=301, word_embed_proj_dim=32
    )
    assert Footprint.of(folder_of(config, tmp_path), torch.float32).saved(1, 8, False) > 0


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, [], r"quantised \(gptq\).* made from"),
        ({"max_position_embeddings": 600}, [], "1024 tokens is longer than the context of .*, 600"),
        ({"model_type": "mamba", "num_attention_heads": None}, [], "no model with attention heads"),
        ({"model_type": "t5"}, [], "cannot read the configuration"),
        ({}, ["--gpus", "3"], "batch_size must be a multiple of 12.* got 64, try 72"),
        ({}, ["--efficiency", "40"], "efficiency must be above 0 and at most 1"),
        ({}, ["--gpu-memory", "0"], "gpu_memory must be greater than 0"),
        ({}, ["--objective", "sac"], "objective must be one of"),
        ({}, ["--gpus", "8", "--fsdp-size", "3"], "fsdp_size needs fsdp and is 2 or more of the 8 processes.* got 3"),
        ({}, ["--gpus", "8", "--fsdp-size", "1"], "fsdp_size needs fsdp and is 2 or more of the 8 processes.* got 1"),
        ({}, ["--gpus", "8", "--fsdp-size", "16"], "is 2 or more of the 8 processes, in equal groups; got 16"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(
    change: dict[str, Any], words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(folder_of(LLAMA, tmp_path)) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert cli.main(["plan", "--model", str(file), *words]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and "Traceback" not in error


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
