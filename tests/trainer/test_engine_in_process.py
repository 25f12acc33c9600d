# SPDX-License-Identifier: Apache-2.0
"""vLLM in the trainer's process, with a stand-in for vLLM: what it is given, what is restored, how it fails."""

from __future__ import annotations

import copy
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.vllm_stub import SIZES, Stub

from rlhf_fast.errors import UserError
from rlhf_fast.models import heads, loading
from rlhf_fast.rollout import vllm_in_process
from rlhf_fast.rollout.engine import EngineError, EngineSampler
from rlhf_fast.rollout.rollout import SamplingParams
from rlhf_fast.rollout.sampler import Served, open_sampler
from rlhf_fast.rollout.vllm_in_process import VLLMInProcess
from rlhf_fast.run.options import SamplerOptions

PROMPTS = [[5, 9, 11], [8], [6, 33, 21, 50, 4], [7, 19]]


class FakeLLM:
    """As much of vLLM's class as is used, and what its start does to a process."""

    made: list[FakeLLM] = []
    cache_is_busy = False

    def __init__(self, model: str, **options: Any) -> None:
        self.options, self.closed, self.log = options, False, list[str]()
        self.stub = Stub(loading.load_causal_lm(model, "float32"))
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self.shutdown))
        torch.set_num_threads = lambda count: None
        torch.manual_seed(0)
        random.seed(0)
        os.environ["LOCAL_WORLD_SIZE"] = "1"
        FakeLLM.made.append(self)

    def shutdown(self) -> None:
        torch.accelerator.synchronize()  # raises on a CPU, unless it is vLLM's own
        self.closed = True

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[dict[str, int]]:
        self.log.append(method)
        if method == "rlhf_fast_take":
            weights, self.stub.version = args
            self.stub.model.load_state_dict({name: weight.clone() for name, weight in weights.items()}, strict=False)
        sizes = {name: getattr(self.stub.model.config, name) for name in SIZES}
        return [{"weight_version": self.stub.version, **sizes}]

    def reset_prefix_cache(self) -> bool:
        self.log.append("reset_prefix_cache")
        return not self.cache_is_busy

    def generate(self, prompts: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
        outputs = []
        for prompt, one in zip(prompts, params, strict=True):
            if one.seed is None:
                raise IndexError("an id outside")
            body = {**vars(one), "prompt": prompt["prompt_token_ids"]}
            choices = [self.stub.complete(body, k) for k in range(one.n)]
            outputs.append(SimpleNamespace(outputs=[_output(choice) for choice in choices]))
        return outputs


def _output(choice: dict[str, Any]) -> Any:
    found = choice["logprobs"]
    logprobs = [
        {int(name.removeprefix("token_id:")): SimpleNamespace(logprob=value if value > -9e3 else -torch.inf)
         for name, value in top.items()} | {token: SimpleNamespace(logprob=own)}
        for top, token, own in zip(found["top_logprobs"], choice["token_ids"], found["token_logprobs"], strict=True)
    ]  # fmt: skip
    return SimpleNamespace(
        token_ids=choice["token_ids"], logprobs=logprobs, finish_reason=choice["finish_reason"], index=choice["index"]
    )


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=FakeLLM, SamplingParams=SimpleNamespace))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # restored by monkeypatch after the test
    FakeLLM.made.clear()
    return FakeLLM


@pytest.mark.parametrize("options", [{}, {"top_k": 5}])
def test_what_it_samples_is_recorded_with_the_policys_weights(
    vllm: type[FakeLLM], tiny: Path, options: dict[str, Any]
) -> None:
    lm, tokenizer = loading.load_causal_lm(str(tiny / "model"), "float32"), loading.load_tokenizer(str(tiny / "model"))
    set_threads = torch.set_num_threads
    random.seed(3)
    torch.manual_seed(3)
    served = Served(str(tiny / "model"), "float32", 32)
    with open_sampler(SamplerOptions(sampler="vllm"), served, tiny / "unused") as sampler:
        assert random.random() == random.Random(3).random() and torch.set_num_threads is set_threads
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(3)))
        assert "LOCAL_WORLD_SIZE" not in os.environ and os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        (llm,) = vllm.made
        wanted = {"logprobs_mode": "processed_logprobs", "max_logprobs": -1, "max_model_len": 32, "dtype": "float32"}
        assert wanted.items() <= llm.options.items() and llm.options["generation_config"] == "vllm"
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        params = SamplingParams(max_new_tokens=5, temperature=0.8, **options)
        rollout = sampler(lm, tokenizer, PROMPTS, params, seed=1, samples_per_prompt=3)
        with torch.no_grad():
            own = heads.token_logprobs(lm, rollout.batch, temperature=0.8)
        assert rollout.logprobs is not None and float((own - rollout.logprobs).abs().max()) < 1e-5
        assert (rollout.support is not None) == bool(options) and len(set(llm.stub.seeds)) == len(PROMPTS) * 3
        assert llm.log.index("rlhf_fast_take") + 1 == llm.log.index("reset_prefix_cache")
    assert llm.closed


def test_an_engine_that_failed_is_not_asked_again(vllm: type[FakeLLM], tiny: Path) -> None:
    """A call of the real one would not return."""
    lm, tokenizer = loading.load_causal_lm(str(tiny / "model"), "float32"), loading.load_tokenizer(str(tiny / "model"))
    params = SamplingParams(max_new_tokens=3)
    engine = VLLMInProcess(str(tiny / "model"), "float32", 32)
    sampler = EngineSampler(engine)
    with pytest.raises(EngineError, match="the vLLM in this process: token id 54 is not in its vocabulary"):
        sampler(lm, tokenizer, [[5, 54]], params, seed=0)
    assert len(sampler(lm, tokenizer, PROMPTS, params, seed=0).texts) == 4
    vllm.cache_is_busy = True
    try:
        other = copy.deepcopy(lm)
        other.lm_head.weight.data.mul_(2)
        with pytest.raises(EngineError, match="did not empty its prefix cache"):
            sampler(other, tokenizer, PROMPTS, params, seed=0)
    finally:
        vllm.cache_is_busy = False
    engine.llm.generate = lambda *args, **more: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(EngineError, match=r"failed \(ZeroDivisionError: .*--resume"):
        sampler(lm, tokenizer, PROMPTS, params, seed=0)
    del engine.llm.generate  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="has failed before: start again with --resume"):
        sampler(lm, tokenizer, PROMPTS, params, seed=0)


def test_each_of_several_ranks_has_one_on_its_own_device(
    vllm: type[FakeLLM], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    VLLMInProcess(str(tiny / "model"), "float32", 32)
    monkeypatch.setattr(vllm_in_process, "ranks", lambda: SimpleNamespace(count=2))
    VLLMInProcess(str(tiny / "model"), "float32", 32)
    assert [llm.options.get("distributed_executor_backend") for llm in vllm.made] == [None, "external_launcher"]


def test_without_vllm_it_says_what_to_install(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="needs vLLM in this environment .*or use vllm-server"):
        VLLMInProcess(str(tiny / "model"), "float32", 32)
