# SPDX-License-Identifier: Apache-2.0
"""Sampling by an engine: a stub server with vLLM's routes, the weights it gets, what is recorded, and what fails."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers.engine_runs import by_engine
from helpers.ppo_runs import metrics
from helpers.vllm_stub import Stub
from torch import Tensor

from rlhf_fast.data.encoding import decode_completion
from rlhf_fast.errors import UserError
from rlhf_fast.models import heads, loading
from rlhf_fast.models.lora import add_lora, merged_copy
from rlhf_fast.rollout import mismatch
from rlhf_fast.rollout.builtin import end_ids
from rlhf_fast.rollout.engine import EngineError, EngineSampler
from rlhf_fast.rollout.engine_weights import policy_weights
from rlhf_fast.rollout.mismatch import Correction
from rlhf_fast.rollout.rollout import Rollout, SamplingParams
from rlhf_fast.rollout.vllm_server import VLLMServers
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.trainer import PPOConfig
from rlhf_fast.trainer.rl import ppo

PROMPTS = [[5, 9, 11], [8], [6, 33, 21, 50, 4], [7, 19]]
PARAMS = SamplingParams(max_new_tokens=6, temperature=0.8)


@pytest.fixture
def lm(tiny: Path) -> Any:
    return loading.load_causal_lm(str(tiny / "model"), "float32")


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    return loading.load_tokenizer(str(tiny / "model"))


def perturb(model: Any) -> None:
    """An optimizer's step."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def gap(lm: Any, rollout: Rollout) -> float:
    """Largest difference of the engine's log-probabilities and the trainer's."""
    assert rollout.logprobs is not None
    with torch.no_grad():
        own = heads.token_logprobs(lm, rollout.batch, temperature=0.8)
    return float((own - rollout.logprobs).abs().max())


def test_every_sync_brings_the_weights_and_what_is_recorded_is_exact(
    lm: Any, tokenizer: Any, stub: Stub, tmp_path: Path
) -> None:
    sampler, versions = EngineSampler(VLLMServers([stub.url], folder=str(tmp_path))), list[int]()
    ends, ended = set(end_ids(lm, tokenizer)), list[bool]()
    for step in range(3):
        rollout = sampler(lm, tokenizer, PROMPTS, PARAMS, seed=step, samples_per_prompt=3)
        assert gap(lm, rollout) < 1e-5
        assert rollout.texts == [
            decode_completion(tokenizer, PROMPTS[row // 3], rollout.input_ids[row][rollout.response_mask[row]].tolist())
            for row in range(12)
        ]
        last = rollout.attention_mask.sum(1) - 1
        ended += rollout.ended.tolist()
        assert rollout.ended.tolist() == [token in ends for token in rollout.input_ids[range(12), last].tolist()]
        versions.append(stub.version)
        again = sampler(lm, tokenizer, PROMPTS, PARAMS, seed=step, samples_per_prompt=3)
        assert stub.version == versions[0] + step  # the same policy is not sent again
        assert torch.equal(again.input_ids, rollout.input_ids)
        perturb(lm)
    route = [name for name in stub.log if name in ("/pause", "/collective_rpc", "/reset_prefix_cache", "/resume")]
    start = route.index("/pause")
    assert route[start : start + 4] == ["/pause", "/collective_rpc", "/reset_prefix_cache", "/resume"]
    assert list(tmp_path.iterdir()) == [] and set(ended) == {True, False}


def test_prompts_have_seeds_of_their_own_and_the_share_of_a_rank_changes_no_sample(
    lm: Any, tokenizer: Any, stub: Stub
) -> None:
    sampler = EngineSampler(VLLMServers([stub.url]))
    whole = sampler(lm, tokenizer, PROMPTS, PARAMS, seed=3, samples_per_prompt=4)
    assert len(set(stub.seeds)) == 16
    later = sampler(lm, tokenizer, PROMPTS[2:], PARAMS, seed=3, samples_per_prompt=4, first_prompt=2, total_prompts=4)
    assert later.texts == whole.texts[8:]
    sampler(lm, tokenizer, PROMPTS, PARAMS, seed=4, samples_per_prompt=4)  # the next step
    assert len(set(stub.seeds[:16]) | set(stub.seeds[-16:])) == 32


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_k": 8, "min_p": 0.0}])
def test_what_could_be_sampled_is_recorded(lm: Any, tokenizer: Any, stub: Stub, options: dict[str, Any]) -> None:
    params = SamplingParams(max_new_tokens=6, temperature=0.8, **options)
    rollout = EngineSampler(VLLMServers([stub.url]))(lm, tokenizer, PROMPTS, params, seed=0, samples_per_prompt=2)
    assert rollout.support is not None
    assert rollout.support.offsets.diff().tolist() == [options["top_k"]] * int(rollout.response_mask.sum())
    assert gap(lm, rollout) < 1e-5


def test_rollouts_carry_their_log_probabilities(lm: Any, tokenizer: Any, stub: Stub) -> None:
    sampler = EngineSampler(VLLMServers([stub.url]))
    parts = [sampler(lm, tokenizer, PROMPTS[i : i + 2], PARAMS, seed=i, samples_per_prompt=2) for i in (0, 2)]
    both = Rollout.concatenate(parts).to("cpu").rows(torch.tensor([6, 1]))
    assert gap(lm, both) < 1e-5 and both.logprobs is not None
    assert torch.equal(both.logprobs != 0, both.response_mask)


def test_the_weights_are_those_of_the_merged_model_with_its_head(tiny: Path, lm: Any) -> None:
    plain = policy_weights(lm)
    assert "lm_head.weight" in plain and set(plain) >= set(dict(lm.named_parameters()))
    for config in ("llama", "gpt2"):
        model = lm
        if config == "gpt2":
            from transformers import GPT2Config, GPT2LMHeadModel

            model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=54, n_positions=64)).eval()
        handle = add_lora(model, 4)
        perturb(model)
        wanted = merged_copy(handle).state_dict()
        got = policy_weights(model)
        assert set(wanted) <= set(got)
        for name, weight in wanted.items():
            torch.testing.assert_close(got[name], weight, atol=1e-6, rtol=1e-5)


# --------------------------------------------------------------------------------------------------- mutants, faults


@pytest.mark.parametrize("fault", [{"skips": "lm_head"}, {"raw": True}])
def test_a_wrong_engine_is_noticed(tiny: Path, tokenizer: Any, fault: dict[str, Any]) -> None:
    """A head left out (untied in the stub's model, as in an engine's packed copy); raw log-probabilities."""
    policy = loading.load_causal_lm(str(tiny / "model"), "float32")
    served = copy.deepcopy(policy)
    served.lm_head.weight = torch.nn.Parameter(served.lm_head.weight.detach().clone())
    for model in (policy, served):
        for parameter in model.parameters():
            parameter.data.mul_(2)
    with Stub(served, **fault) as server:
        sampler = EngineSampler(VLLMServers([server.url]))
        perturb(policy)
        rollout = sampler(policy, tokenizer, PROMPTS, PARAMS, seed=0, samples_per_prompt=4)
        assert rollout.logprobs is not None
        with torch.no_grad():
            own = heads.token_logprobs(policy, rollout.batch, temperature=0.8)
        with pytest.raises(Exception, match="the engine's log-probabilities are .* nats a token from the policy's"):
            mismatch.check_engine(own, rollout.logprobs, rollout.response_mask, torch.float32)


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"forgets": True}, "has not taken the new weights"),
    ({"busy": True}, "did not empty its prefix cache"),
    ({"no_extension": True}, "lacks our worker extension"),
    ({"name": "gpt"}, "serves gpt, wanted --served-model-name policy"),
    ({"logprobs_mode": "raw_logprobs"}, "gives raw_logprobs, wanted --logprobs-mode processed_logprobs"),
    ({"sizes": {"num_hidden_layers": 30}}, r"another model than the policy: num_hidden_layers 30 \(the policy: 2\)"),
    ({"status": {"/health": 404}}, "does not answer as vLLM does .404 at /health.: is something else on that port"),
    ({"dtype": "torch.bfloat16"}, "works in torch.bfloat16, the policy in torch.float32"),
    ({"status": {"/collective_rpc": 404}}, "has no /collective_rpc: .*VLLM_SERVER_DEV_MODE=1"),
    ({"status": {"/collective_rpc": 500}}, "could not run a method of our worker extension.*as the test wants it"),
    ({"status": {"/v1/completions": 500}}, "/v1/completions failed .*restart it, then --resume"),
    ({"status": {"/v1/completions": 400}}, r"refused the request \(400\): .*as the test wants it"),
    ({"garbage": "/v1/models"}, "does not answer as vLLM does: is something else on that port"),
    ({"broken": "/v1/completions"}, r"/v1/completions does not answer as vLLM does .IncompleteRead.*then --resume"),
    ({"babble": "/health"}, "/health does not answer as vLLM does .BadStatusLine.*something else is on that port"),
    ({"hang": "/v1/completions"}, "did not answer in 1 s: the engine hangs"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS, ids=[message[:24] for _, message in FAULTS])
def test_each_fault_is_one_message_that_names_the_server(
    lm: Any, tokenizer: Any, fault: dict[str, Any], message: str
) -> None:
    timeout = 1.0 if "hang" in fault else 120.0  # a busy machine's stub may take more than a second for any answer
    with Stub(copy.deepcopy(lm), **fault) as server, pytest.raises(EngineError, match=message) as caught:
        EngineSampler(VLLMServers([server.url], timeout=timeout))(lm, tokenizer, PROMPTS, PARAMS, seed=0)
    assert server.url in str(caught.value)


def test_a_server_that_dies_or_is_not_there_is_named(lm: Any, tokenizer: Any, stub: Stub) -> None:
    sampler = EngineSampler(VLLMServers([stub.url]))
    sampler(lm, tokenizer, PROMPTS, PARAMS, seed=0)
    stub.stop()
    with pytest.raises(EngineError, match=f"{stub.url} cannot be reached .*then --resume"):
        sampler(lm, tokenizer, PROMPTS, PARAMS, seed=1)
    with pytest.raises(EngineError, match="cannot be reached"):
        VLLMServers([stub.url])


def test_a_connection_that_is_reset_is_tried_again(lm: Any, tokenizer: Any, stub: Stub) -> None:
    sampler = EngineSampler(VLLMServers([stub.url]))
    wanted = sampler(lm, tokenizer, PROMPTS, PARAMS, seed=0)
    stub.faults["reset"] = "/v1/completions"
    assert sampler(lm, tokenizer, PROMPTS, PARAMS, seed=0).texts == wanted.texts


def test_a_file_that_cannot_be_written_is_said_with_the_server_and_the_folder(
    lm: Any, tokenizer: Any, stub: Stub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """safetensors has an error of its own for a full disk."""

    def full(*args: Any, **more: Any) -> None:
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    sampler = EngineSampler(VLLMServers([stub.url], folder=str(tmp_path)))
    with pytest.raises(EngineError, match=f"weights for {stub.url} to {tmp_path}: .*No space left.*then --resume"):
        sampler(lm, tokenizer, PROMPTS, PARAMS, seed=0)


def test_another_run_on_the_same_server_is_noticed(lm: Any, tokenizer: Any, stub: Stub) -> None:
    first, second = (EngineSampler(VLLMServers([stub.url])) for _ in range(2))
    first(lm, tokenizer, PROMPTS, PARAMS, seed=0)
    other = copy.deepcopy(lm)
    perturb(other)
    second(other, tokenizer, PROMPTS, PARAMS, seed=0)
    with pytest.raises(EngineError, match="does another run use it"):
        first(lm, tokenizer, PROMPTS, PARAMS, seed=1)


def test_prompts_that_an_engine_would_cut_or_not_know_are_refused(lm: Any, tokenizer: Any, stub: Stub) -> None:
    sampler = EngineSampler(VLLMServers([stub.url]))
    with pytest.raises(
        EngineError, match="a prompt of 60 tokens and max_new_tokens 6 are more than its max_model_len 64"
    ):
        sampler(lm, tokenizer, [[5] * 60], PARAMS, seed=0)
    with pytest.raises(EngineError, match="token id 54 is not in its vocabulary of 54"):
        sampler(lm, tokenizer, [[5, 54]], PARAMS, seed=0)


# ------------------------------------------------------------------------------------------------------- corrections


def ratios(*values: float) -> tuple[Tensor, Tensor, Tensor]:
    gaps = torch.tensor([values, (0.0,) * len(values)]).log()
    gaps[1] = 0
    mask = torch.ones_like(gaps, dtype=torch.bool)
    mask[:, -1] = False
    engine = torch.full_like(gaps, -1.5)
    return engine + gaps, engine, mask


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("none", [1.0, 1.0, 1.0, 1.0]),
        ("truncate", [0.3, 1.5, 2.0, 1.0]),
        ("mask", [0.0, 1.5, 4.0, 1.0]),
        ("sequence-mask", [1.8, 1.8, 1.8, 1.0]),  # 0.3 x 1.5 x 4
    ],
)
def test_corrections_are_those_of_their_papers(kind: Any, wanted: list[float]) -> None:
    own, engine, mask = ratios(0.3, 1.5, 4.0, 7.0)
    found = mismatch.weights(own, engine, mask, Correction(kind))
    torch.testing.assert_close(found, torch.tensor([wanted, [1.0] * 4]))


def test_a_sequence_above_the_cap_counts_for_nothing_and_nothing_overflows() -> None:
    own, engine, mask = ratios(2.0, 1.5, 4.0, 7.0)
    assert mismatch.weights(own, engine, mask, Correction("sequence-mask"))[0].tolist() == [0.0, 0.0, 0.0, 1.0]
    far = torch.full_like(own, 300.0)
    for kind in ("truncate", "mask", "sequence-mask"):
        assert mismatch.weights(far, engine, mask, Correction(kind)).isfinite().all()
    engine[:, -1] = -torch.inf  # where nothing was sampled
    for kind in ("truncate", "mask", "sequence-mask"):
        assert mismatch.weights(own, engine, mask, Correction(kind)).isfinite().all()


def test_metrics_of_the_mismatch() -> None:
    own, engine, mask = ratios(0.5, 1.5, 4.0, 7.0)
    found = mismatch.mismatch_metrics(own, engine, mask, Correction("truncate"))
    d = torch.tensor([0.5, 1.5, 4.0, 1.0, 1.0, 1.0], dtype=torch.float64).log()
    w = d.exp().clamp(max=2)
    assert found["engine/logprob_diff_mean"] == pytest.approx(float(d.abs().mean()), rel=1e-5)
    assert found["engine/logprob_diff_max"] == pytest.approx(float(d.abs().max()), rel=1e-5)
    assert found["engine/k3"] == pytest.approx(float((d.exp() - 1 - d).mean()), rel=1e-5)
    assert found["engine/corrected"] == pytest.approx(1 / 6)
    assert found["engine/effective_samples"] == pytest.approx(float(w.sum() ** 2 / (6 * w.square().sum())), rel=1e-5)


# ------------------------------------------------------------------------------------------------------- in the trainer


@pytest.fixture
def run_config(config: PPOConfig, stub: Stub) -> PPOConfig:
    return by_engine(config, stub, max_steps=2)


def learned_from(config: PPOConfig, folder: Path, patch: pytest.MonkeyPatch) -> list[Any]:
    """What each step of a run learned from."""
    seen: list[Any] = []
    learn = ppo.update
    with patch.context() as context:
        context.setattr(
            ppo, "update", lambda agent, made, *rest, **more: seen.append(made) or learn(agent, made, *rest, **more)
        )
        ppo.train_ppo(config, RunFolder.create(folder))
    return seen


def test_a_run_by_an_engine_syncs_each_step_and_says_how_far_it_is(
    run_config: PPOConfig, tmp_path: Path, stub: Stub, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(run_config, eval_prompts_file=str(tiny / "heldout.jsonl"), eval_samples=1, max_steps=3)
    loads = []
    load = stub.load
    monkeypatch.setattr(stub, "load", lambda path, version: loads.append(version) or load(path, version))
    ppo.train_ppo(config, RunFolder.create(tmp_path / "run"))
    rows = metrics(tmp_path / "run")
    assert loads == list(range(loads[0], loads[0] + 4))  # the evaluation before and the first step share one
    assert len(rows) == 3
    for row in rows:
        assert row["engine/logprob_diff_max"] < 1e-5 and row["engine/effective_samples"] == pytest.approx(1, abs=1e-4)
        assert row["engine/corrected"] == 0 and abs(row["engine/k3"]) < 1e-6


def test_the_correction_weights_the_advantages(
    run_config: PPOConfig, tmp_path: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.faults["shift"] = -8e-4  # an engine whose rounding is that of a lower precision
    found = {}
    for kind, cap in (("none", None), ("truncate", 1.0005)):
        config = dataclasses.replace(run_config, sampler_correction=kind, sampler_cap=cap, max_steps=1)
        found[kind] = learned_from(config, tmp_path / kind, monkeypatch)[0]
    assert float(found["none"].advantages.abs().max()) > 0.1
    torch.testing.assert_close(found["truncate"].advantages, found["none"].advantages * 1.0005)
    torch.testing.assert_close(found["truncate"].returns, found["none"].returns)


@pytest.mark.parametrize("minibatches", [1, 2])
def test_an_engine_of_other_weights_stops_the_run(
    run_config: PPOConfig, tmp_path: Path, stub: Stub, minibatches: int
) -> None:
    """Where a step is learned from once, too, whose log-probabilities are else the update's own."""
    stub.faults["shift"] = 0.01
    config = dataclasses.replace(run_config, num_minibatches=minibatches, kl_in="loss")
    with pytest.raises(UserError, match="the engine's log-probabilities are 0.01 nats a token from the policy's"):
        ppo.train_ppo(config, RunFolder.create(tmp_path / "run"))


def test_options_of_engines_that_contradict_one_another_are_refused(config: PPOConfig) -> None:
    with pytest.raises(UserError, match="engine_url is for sampler vllm-server"):
        dataclasses.replace(config, engine_url=("http://127.0.0.1:1",)).validate()
    with pytest.raises(UserError, match="engine_weights broadcast is for servers of other hosts: name them"):
        dataclasses.replace(config, sampler="vllm-server", engine_weights="broadcast").validate()
