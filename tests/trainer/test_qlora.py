# SPDX-License-Identifier: Apache-2.0
"""QLoRA on a CPU: what is quantised, gradients through it, and the plain model that comes of it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import phases
from helpers.ppo_runs import load_agent
from safetensors.torch import load_file
from torch import Tensor

from rlhf_fast.errors import Interrupted, UserError
from rlhf_fast.models import loading, lora
from rlhf_fast.models.batches import Batch
from rlhf_fast.models.heads import token_logprobs
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.trainer import PPOConfig, RewardConfig, SFTConfig
from rlhf_fast.trainer.reward.train import train_reward
from rlhf_fast.trainer.rl import ppo
from rlhf_fast.trainer.sft import train as sft

IDS = torch.tensor([[5, 9, 11, 23, 30, 8, 12]])
MASK = torch.arange(7)[None] > 0


def test_it_needs_adapters_and_its_package(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="dtype nf4 needs lora_rank"):
        SFTConfig(train_file="a.jsonl", dtype="nf4").validate()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for load in (loading.load_causal_lm, loading.load_reward_model):
        with pytest.raises(UserError, match=r"needs the package bitsandbytes: pip install 'rlhf-fast\[qlora\]'"):
            load(str(tiny / "model"), "float32", load_in_4bit=True)


@pytest.fixture
def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes")


def test_the_trunk_is_quantised_and_the_head_is_not(bitsandbytes: Any, tiny: Path) -> None:
    whole = loading.load_causal_lm(str(tiny / "model"), "bfloat16")
    lm = loading.load_causal_lm(str(tiny / "model"), "bfloat16", load_in_4bit=True)
    reward = loading.load_reward_model(str(tiny / "model"), "bfloat16", load_in_4bit=True, new_head=True)
    for model in (lm, reward):
        linear = [m for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)]
        assert len(linear) == 14 and all(isinstance(m, bitsandbytes.nn.Linear4bit) for m in linear)
        assert {m.weight.quant_type for m in linear} == {"nf4"} and {m.compute_dtype for m in linear} == {
            torch.bfloat16
        }
    assert type(lm.lm_head) is torch.nn.Linear and torch.equal(lm.lm_head.weight, whole.lm_head.weight)
    assert type(reward.score) is torch.nn.Linear and reward.score.weight.dtype == torch.float32
    assert loading.parameter_count(lm) == loading.parameter_count(whole)
    stored = sum(p.numel() * p.element_size() for p in lm.base_model.layers.parameters())
    assert stored < 0.3 * sum(p.numel() * p.element_size() for p in whole.base_model.layers.parameters())


def logprobs_and_gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """In evaluation mode, as PPO learns, and after a pass without gradients, as PPO samples."""
    with torch.no_grad():
        before = token_logprobs(model, Batch(IDS, MASK | True, MASK))
    after = token_logprobs(model, Batch(IDS, MASK | True, MASK))
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    after.sum().backward()
    return after.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_learning_is_that_on_the_same_weights_as_numbers(bitsandbytes: Any, tiny: Path) -> None:
    model = loading.load_causal_lm(str(tiny / "model"), "float32", load_in_4bit=True)
    handle = lora.add_lora(model, 4)
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain = lora.merged_copy(handle)  # nothing learned yet: the NF4 weights alone
    lora.add_lora(plain, 4)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
                adapters[name].copy_(parameter)
    ours, gradients = logprobs_and_gradients(model)
    theirs, wanted = logprobs_and_gradients(plain)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert gradients.keys() == wanted.keys() == adapters.keys() and len(gradients) == 28
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-4, rtol=1e-3)


def test_what_is_saved_is_what_was_learned(bitsandbytes: Any, tiny: Path, tmp_path: Path) -> None:
    model = loading.load_causal_lm(str(tiny / "model"), "float32", load_in_4bit=True)
    handle = lora.add_lora(model, 4)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
        learned, base = model(IDS).logits, loading.load_causal_lm(str(tiny / "model"), "float32")(IDS).logits
    RunFolder.create(tmp_path / "run").save_model(lora.merged_copy(handle), loading.load_tokenizer(str(tiny / "model")))
    back = loading.load_causal_lm(str(tmp_path / "run" / "model"), "float32")
    assert not hasattr(back.config, "quantization_config") and back.generation_config.eos_token_id is not None
    torch.testing.assert_close(back(IDS).logits, learned, atol=1e-4, rtol=1e-4)
    assert (learned - base).abs().max() > 0.1
    assert torch.equal(model(IDS).logits, learned)  # what learns is left alone


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_phase_learns_and_saves_a_plain_model(
    bitsandbytes: Any, job_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    jobs = phases.jobs(job_data)
    options: dict[str, Any] = {"lora_rank": 4, "dtype": "nf4", "save_steps": 0}
    phases.say_that_bfloat16_is(monkeypatch, dtype == "bfloat16")
    options["gradient_checkpointing"] = dtype == "bfloat16"
    for name in ("sft", "reward", "ppo", "grpo"):
        config = dataclasses.replace(jobs[name], **options)
        run = RunFolder.create(tmp_path / name)
        if isinstance(config, PPOConfig):
            ppo.train_ppo(config, run)
        elif isinstance(config, RewardConfig):
            train_reward(config, run)
        else:
            summary = sft.train_sft(config, run)
            assert summary["loss_after"] < summary["loss_before"] - 0.05
        start = load_file(job_data / ("reward" if name == "reward" else "model") / "model.safetensors")
        saved = load_file(run.path / "model" / "model.safetensors")
        assert {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in start.items()}
        load = loading.load_reward_model if name == "reward" else loading.load_causal_lm
        assert load(str(run.path / "model"), dtype).base_model(IDS).last_hidden_state.isfinite().all()


def test_the_reference_is_the_quantised_model(bitsandbytes: Any, job_data: Path) -> None:
    config = phases.jobs(job_data)["reinforce-4bit"]
    agent = load_agent(config)
    untouched = loading.load_causal_lm(config.model, "nf4", load_in_4bit=True)
    with torch.no_grad():
        for parameter in agent.policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        with agent.reference() as reference:
            assert torch.equal(reference(IDS).logits, untouched(IDS).logits)
        assert not torch.allclose(agent.policy(IDS).logits, untouched(IDS).logits)


def test_it_resumes_bit_for_bit(
    bitsandbytes: Any,
    job_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_at: Callable[[int], Any],
) -> None:
    jobs = phases.jobs(job_data)
    for name, module, phase in (("reinforce-4bit", ppo, ppo.train_ppo), ("sft-4bit", sft, sft.train_sft)):
        config = jobs[name]
        straight, stopped = tmp_path / name / "straight", tmp_path / name / "stopped"
        phase(config, RunFolder.create(straight))
        with monkeypatch.context() as patch:
            patch.setattr(module, "StopFlag", stop_at(1))
            with pytest.raises(Interrupted):
                phase(config, RunFolder.create(stopped))
        phase(config, RunFolder.create(stopped, resume=True))
        one, other = (load_file(folder / "model" / "model.safetensors") for folder in (straight, stopped))
        assert all(torch.equal(one[key], other[key]) for key in one), name
