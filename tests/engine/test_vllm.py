# SPDX-License-Identifier: Apache-2.0
"""A real vLLM server on the CPU: `make test-engine`. RLHF_FAST_ENGINE_PYTHON is a Python that has vLLM."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from rlhf_fast.models import heads
from rlhf_fast.rollout.distribution import draw
from rlhf_fast.rollout.engine import EngineSampler
from rlhf_fast.rollout.rollout import Rollout, SamplingParams
from rlhf_fast.rollout.vllm_server import VLLMServers

PYTHON = os.environ.get("RLHF_FAST_ENGINE_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="needs vLLM, in an environment of its own: make test-engine")
EXTENSION = Path(__file__).parents[2] / "rlhf_fast" / "rollout" / "vllm_extension"
SIZE = 96
# One whole block of the prefix cache (32 tokens) and more, so that a stale one would show.
PROMPTS = [[3 + (7 * i + p) % 90 for i in range(40 + p)] for p in range(4)]


class Tokenizer:
    """As much of one as sampling asks for."""

    pad_token_id, eos_token_id = 0, 2

    def decode(self, ids: Any, skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def policy(tied: bool = True) -> Any:
    """Heads of 32: vLLM's CPU attention takes few sizes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = LlamaConfig(
        vocab_size=SIZE, num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=tied, **sizes, **ids
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(2)
    return model


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServers]:
    """Started as docs/engine.md shows."""
    from tokenizers import Tokenizer as Words
    from tokenizers.models import WordLevel

    folder = tmp_path_factory.mktemp("engine")
    policy().save_pretrained(folder / "model")
    words = Words(WordLevel({f"w{i}": i for i in range(SIZE)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w0").save_pretrained(folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "PYTHONPATH": str(EXTENSION), "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_COMPILE_DISABLE": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [
        PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "model"),
        "--served-model-name", "policy", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
        "--enforce-eager", "--max-model-len", "128", "--block-size", "32", "--logprobs-mode", "processed_logprobs",
        "--max-logprobs", "-1", "--generation-config", "vllm", "--seed", "0",
        "--worker-extension-cls", "rlhf_fast_vllm_worker.Sync",
    ]  # fmt: skip
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-3000:]
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(1)
        yield VLLMServers([url], timeout=120)
    finally:
        process.terminate()
        process.wait(60)


def gaps(model: Any, rollout: Rollout, temperature: float) -> float:
    assert rollout.logprobs is not None
    with torch.no_grad():
        own = heads.token_logprobs(model, rollout.batch, temperature)
    return float((own - rollout.logprobs).abs().max())


def learn(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))


def test_five_syncs_and_the_gap_stays_flat(server: VLLMServers) -> None:
    model, sampler = policy(), EngineSampler(server)
    params = SamplingParams(max_new_tokens=8, temperature=0.8)
    texts = []
    for step in range(6):
        rollout = sampler(model, Tokenizer(), PROMPTS, params, seed=step, samples_per_prompt=4)
        assert gaps(model, rollout, 0.8) < 1e-5, step
        texts.append(rollout.texts)
        learn(model)
    assert len({tuple(each) for each in texts}) == 6


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
    learn(model)
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
