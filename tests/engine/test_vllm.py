# SPDX-License-Identifier: Apache-2.0
"""A real vLLM server on the CPU: `make test-engine`. RLHF_FAST_ENGINE_PYTHON is a Python that has vLLM."""

from __future__ import annotations

import copy
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from helpers.engine_policy import PROMPTS, Tokenizer, learn, policy, save

from rlhf_fast.models import heads
from rlhf_fast.rollout.distribution import draw
from rlhf_fast.rollout.engine import EngineError, EngineSampler
from rlhf_fast.rollout.rollout import Rollout, SamplingParams
from rlhf_fast.rollout.vllm_process import Server, find_vllm, running
from rlhf_fast.rollout.vllm_server import VLLMServers

PYTHON = os.environ.get("RLHF_FAST_ENGINE_PYTHON", "")
DRAWS: dict[str, dict[str, Any]] = {"plain": {}, "top_k": {"top_k": 7}, "top_p": {"top_p": 0.8}}  # of in_process.py
pytestmark = pytest.mark.skipif(not PYTHON, reason="needs vLLM, in an environment of its own: make test-engine")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServers]:
    """Started as `rlhf-fast engine` does it."""
    folder = tmp_path_factory.mktemp("engine")
    wanted = Server(str(save(folder / "model")), "float32", 128, more=["--block-size", "32"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        with running(find_vllm(PYTHON), wanted, folder / "log") as engine:
            yield VLLMServers([engine.url], timeout=120)


def gaps(model: Any, rollout: Rollout, temperature: float) -> float:
    assert rollout.logprobs is not None
    with torch.no_grad():
        own = heads.token_logprobs(model, rollout.batch, temperature)
    return float((own - rollout.logprobs).abs().max())


def test_another_model_is_refused_by_name_and_the_server_lives_on(server: VLLMServers) -> None:
    other = policy()
    other.config.num_hidden_layers = 3
    params = SamplingParams(max_new_tokens=2)
    with pytest.raises(EngineError, match=r"another model than the policy: num_hidden_layers 2 .the policy: 3."):
        EngineSampler(server)(other, Tokenizer(), PROMPTS, params, seed=0)
    with pytest.raises(EngineError, match="could not run a method of our worker extension"):
        server.load({"model.nothing.weight": torch.zeros(2)}, 7)
    with pytest.raises(EngineError, match="token id 96 is not in its vocabulary of 96"):
        EngineSampler(server)(policy(), Tokenizer(), [[3, 96]], params, seed=0)
    assert len(EngineSampler(server)(policy(), Tokenizer(), PROMPTS, params, seed=0).texts) == 4


def test_more_prompt_tokens_than_it_reads_at_once_leave_the_server_alive(server: VLLMServers) -> None:
    """vLLM would divide a prompt, and cannot set back the random numbers of a CPU."""
    model, params = policy(), SamplingParams(max_new_tokens=4)
    prompts = [[3 + (i * (p + 1) + p) % 90 for i in range(100)] for p in range(45)]
    rollout = EngineSampler(server)(model, Tokenizer(), prompts, params, seed=0, samples_per_prompt=2)
    assert len(rollout.texts) == 90 and gaps(model, rollout, 1.0) < 1e-5


def test_five_syncs_and_the_gap_stays_flat(server: VLLMServers) -> None:
    model, sampler = policy(), EngineSampler(server)
    params = SamplingParams(max_new_tokens=8, temperature=0.8)
    texts = []
    for step in range(6):
        rollout = sampler(model, Tokenizer(), PROMPTS, params, seed=step, samples_per_prompt=4)
        assert gaps(model, rollout, 0.8) < 1e-5, step
        texts.append(rollout.texts)
        learn(model, step)
    assert len({tuple(each) for each in texts}) == 6


def test_what_was_started_before_an_update_is_of_the_weights_before_it(server: VLLMServers) -> None:
    model, sampler = policy(), EngineSampler(server)
    params = SamplingParams(max_new_tokens=40, temperature=0.8)
    wanted = sampler(model, Tokenizer(), PROMPTS, params, seed=1, samples_per_prompt=4)
    before = copy.deepcopy(model)
    pending = sampler.start(model, Tokenizer(), PROMPTS, params, seed=1, samples_per_prompt=4)
    learn(model, 1)
    rollout, timed = pending.result()
    assert rollout.texts == wanted.texts and gaps(before, rollout, 0.8) < 1e-5 < gaps(model, rollout, 0.8)
    assert timed.ended > timed.began
    after = sampler(model, Tokenizer(), PROMPTS, params, seed=1, samples_per_prompt=4)
    assert gaps(model, after, 0.8) < 1e-5 and after.texts != wanted.texts


def test_weights_by_broadcast_give_the_samples_of_weights_by_files(server: VLLMServers) -> None:
    broadcast, file, model = (
        EngineSampler(VLLMServers(server.urls, 120, transfer="broadcast")),
        EngineSampler(server),
        policy(),
    )
    params = SamplingParams(max_new_tokens=8, temperature=0.8)
    for step in range(3):
        learn(model, step)
        found, wanted = (
            sampler(model, Tokenizer(), PROMPTS, params, seed=step, samples_per_prompt=4)
            for sampler in (broadcast, file)
        )
        assert gaps(model, found, 0.8) < 1e-5 and found.texts == wanted.texts
        with pytest.raises(EngineError, match="does another run use it"):  # `file` has sent its own
            broadcast(model, Tokenizer(), PROMPTS, params, seed=step)


@pytest.mark.parametrize("processes", [1, 2])
def test_vllm_in_the_process_gives_the_samples_of_the_server(
    server: VLLMServers, tmp_path: Path, processes: int
) -> None:
    """And nothing of the trainer's process is changed by it. With two, each samples its share of the prompts."""
    root = Path(__file__).parents[2]
    environment = {
        **os.environ, "TRAINER_SITE": str(Path(accelerate.__file__).parents[1]), "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{root}:{root / 'tests'}", "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1",
    }  # fmt: skip
    script = str(Path(__file__).parent / "in_process.py")
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [PYTHON, *(several if processes > 1 else []), script, str(save(tmp_path / "model"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.split("RESULT ")[1].splitlines()[0])
    assert result["undisturbed"] and result["changed"] == []
    unknown, long = result["refused"]
    assert "token id 96 is not in its vocabulary" in unknown and "max_model_len 128" in long
    sampler, model = EngineSampler(server), policy()
    for step, options in enumerate([*DRAWS.values(), {}]):
        params = SamplingParams(max_new_tokens=8, temperature=0.8, **options)
        rollout = sampler(model, Tokenizer(), PROMPTS, params, seed=step, samples_per_prompt=4)
        found = result["rounds"][step]
        assert found["texts"] == rollout.texts and found["gap"] < 1e-5
        assert found["kept"] == (None if rollout.support is None else rollout.support.ids.tolist())
        learn(model, step)


def test_the_same_seed_repeats_and_a_rank_has_its_share(server: VLLMServers) -> None:
    model, sampler = policy(), EngineSampler(server)
    params = SamplingParams(max_new_tokens=8, temperature=1.5)
    whole = sampler(model, Tokenizer(), PROMPTS, params, seed=3, samples_per_prompt=3)
    share = sampler(model, Tokenizer(), PROMPTS[2:], params, seed=3, samples_per_prompt=3, first_prompt=2)
    assert share.texts == whole.texts[6:] and len(set(whole.texts)) > 6


@pytest.mark.parametrize("options", [{"top_k": 7}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.9}, {"min_p": 0.1}])
def test_kept_sets_are_ours(server: VLLMServers, options: dict[str, Any]) -> None:
    model, sampler = policy(), EngineSampler(server)
    params = SamplingParams(max_new_tokens=6, temperature=0.8, **options)
    rollout = sampler(model, Tokenizer(), PROMPTS, params, seed=5, samples_per_prompt=2)
    assert rollout.support is not None and gaps(model, rollout, 0.8) < 1e-5
    with torch.no_grad():
        logits = model(rollout.input_ids, attention_mask=rollout.attention_mask.long()).logits
    for number, (row, column) in enumerate(rollout.response_mask.nonzero().tolist()):
        _, wanted = draw(logits[row, column - 1][None], torch.zeros(1).double(), params)
        assert wanted is not None
        assert sorted(wanted.ids.tolist()) == rollout.support.take(torch.tensor([number])).ids.tolist()


@pytest.mark.parametrize("mutant", ["no sync", "no head", "cache kept", "raw temperature"])
def test_what_goes_wrong_shows(server: VLLMServers, monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    model, sampler = policy(), EngineSampler(server)
    params = SamplingParams(max_new_tokens=8, temperature=0.8)
    sampler(model, Tokenizer(), PROMPTS, params, seed=1, samples_per_prompt=4)
    learn(model, 1)
    wrong = params
    if mutant == "no sync":
        monkeypatch.setattr(sampler, "sync", lambda model: None)
    elif mutant == "no head":
        from rlhf_fast.rollout import engine

        own = engine.policy_weights
        monkeypatch.setattr(
            engine, "policy_weights", lambda model: {k: v for k, v in own(model).items() if "lm_head" not in k}
        )
    elif mutant == "cache kept":
        post = server._post
        monkeypatch.setattr(
            server, "_post",
            lambda url, route, body=None: (
                {"success": True}
                if "reset" in route
                else post(url, route.replace("mode=wait", "mode=wait&clear_cache=false"), body)  # clears it, too
            ),
        )  # fmt: skip
    else:
        wrong = SamplingParams(max_new_tokens=8, temperature=1.0)
    rollout = sampler(model, Tokenizer(), PROMPTS, wrong, seed=2, samples_per_prompt=4)
    assert gaps(model, rollout, 0.8) > 1e-3
