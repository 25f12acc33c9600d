# SPDX-License-Identifier: Apache-2.0
"""Weights by broadcast: a stub server whose workers run our extension, in a real Gloo group with this process."""

from __future__ import annotations

import copy
from contextlib import ExitStack, nullcontext
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.vllm_stub import SIZES, Stub

from rlhf_fast.models import heads, loading
from rlhf_fast.rollout import weight_broadcast
from rlhf_fast.rollout.engine import EngineError, EngineSampler
from rlhf_fast.rollout.rollout import SamplingParams
from rlhf_fast.rollout.vllm_extension.rlhf_fast_vllm_worker import Sync
from rlhf_fast.rollout.vllm_server import VLLMServers

PROMPTS = [[5, 9, 11], [8], [6, 33, 21, 50, 4], [7, 19]]
PARAMS = SamplingParams(max_new_tokens=4, temperature=0.8)


class Worker(Sync):
    """As much of vLLM's worker as the extension uses."""

    rank, device = 0, torch.device("cpu")

    def __init__(self, stub: WithWorker) -> None:
        self.stub = stub
        config = SimpleNamespace(**{name: getattr(stub.model.config, name) for name in SIZES})
        self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(hf_text_config=config))

    def reload_weights(self, weights_iterator: Any) -> None:
        received = {}
        for name, weight in weights_iterator:
            if len(received) == self.stub.faults.get("fails_after", -1):
                raise RuntimeError("no room")
            received[name] = weight
            if self.stub.faults.get("stops"):  # a loader that needs no more of them
                break
        self.stub.received = received
        self.stub.model.load_state_dict(received, strict=False)


class WithWorker(Stub):
    """A stub whose routes for workers are the extension's."""

    def __init__(self, model: Any, **faults: Any) -> None:
        super().__init__(model, **faults)
        self.worker = Worker(self)

    def route(self, route: str, body: Any) -> Any:
        if route == "/collective_rpc":
            if body["method"] == "rlhf_fast_join" and self.faults.get("no_join"):
                raise RuntimeError("an older one")
            state = getattr(self.worker, body["method"])(*body["args"])
            self.version = self.worker.rlhf_fast_weight_version
            return {"results": [state]}
        return super().route(route, body)


def test_each_server_is_given_the_address_that_it_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    joined, reached = {}, []

    def connect(address: tuple[str, int], timeout: float) -> Any:
        reached.append(address)
        return nullcontext(SimpleNamespace(getsockname=lambda: (f"towards {address[0]}", 5)))

    def rpc(url: str, method: str, arguments: list[Any]) -> None:
        joined[url] = arguments[0]
        if len(joined) == 2:
            both.set()

    def group(*arguments: Any) -> None:
        assert both.wait(60)

    both = Event()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("socket.create_connection", connect)
    fakes = {"TCPStore": lambda *rest, **more: SimpleNamespace(port=9), "ProcessGroupGloo": group}
    monkeypatch.setattr(weight_broadcast, "DISTRIBUTED", SimpleNamespace(**fakes))
    weight_broadcast.Broadcast({"http://a:8000": 1, "https://b": 2}, rpc, 60.0)
    assert joined == {"http://a:8000": "towards a", "https://b": "towards b"}
    assert reached == [("a", 8000), ("b", 443)]


def test_every_worker_of_every_server_gets_the_weights(tiny: Path) -> None:
    """16-bit weights and the head included, at each sync; the samples are those that files give."""
    lm = loading.load_causal_lm(str(tiny / "model"), "float32")
    tokenizer = loading.load_tokenizer(str(tiny / "model"))
    with ExitStack() as stack:
        first, second, by_file = (
            stack.enter_context(kind(copy.deepcopy(lm))) for kind in (WithWorker, WithWorker, Stub)
        )
        sampler = EngineSampler(VLLMServers([first.url, second.url], timeout=60, transfer="broadcast"))
        other = EngineSampler(VLLMServers([by_file.url], timeout=60))
        for step in range(3):
            with torch.no_grad():
                for parameter in lm.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
            rollout = sampler(lm, tokenizer, PROMPTS, PARAMS, seed=step, samples_per_prompt=2)
            assert rollout.logprobs is not None
            with torch.no_grad():
                own = heads.token_logprobs(lm, rollout.batch, temperature=0.8)
            assert float((own - rollout.logprobs).abs().max()) < 1e-5
            assert rollout.texts == other(lm, tokenizer, PROMPTS, PARAMS, seed=step, samples_per_prompt=2).texts
            assert first.version == second.version == sampler.version
            assert set(first.received) == set(second.received) == set(by_file.received)
            assert all(torch.equal(first.received[name], weight) for name, weight in second.received.items())
        route = [name for name in first.log if name in ("/pause", "/reset_prefix_cache", "/resume")]
        assert route == ["/pause", "/reset_prefix_cache", "/resume"] * 3
        first.faults["stops"] = True  # the rest is received all the same, or the trainer would wait
        lm.lm_head.weight.data.mul_(2)
        sampler(lm, tokenizer, PROMPTS, PARAMS, seed=9)


def test_a_dtype_of_two_bytes_and_a_number_arrive(tiny: Path) -> None:
    model = loading.load_causal_lm(str(tiny / "model"), "float32")
    with WithWorker(model, dtype="torch.bfloat16") as stub:
        servers = VLLMServers([stub.url], timeout=60, transfer="broadcast")
        sent = {
            "a": torch.randn(3, 5).bfloat16().t(),
            "b": torch.tensor(2.5).bfloat16(),
            "c": torch.zeros(0, 4).bfloat16(),
        }
        servers.load(sent, 1)
        assert all(torch.equal(stub.received[name], weight) for name, weight in sent.items())


def test_a_worker_that_fails_within_the_broadcast_is_named_and_the_others_do_not_wait(tiny: Path) -> None:
    lm = loading.load_causal_lm(str(tiny / "model"), "float32")
    tokenizer = loading.load_tokenizer(str(tiny / "model"))
    with WithWorker(copy.deepcopy(lm), fails_after=2) as stub, WithWorker(copy.deepcopy(lm)) as other:
        servers = VLLMServers([other.url, stub.url], timeout=600, transfer="broadcast")
        message = f"{stub.url} could not run a method of our worker extension.*no room"
        with pytest.raises(EngineError, match=message):
            EngineSampler(servers)(lm, tokenizer, PROMPTS, PARAMS, seed=0)
        # Both servers can be used again: `other` has not waited for the rest for its 600 seconds.
        stub.faults.pop("fails_after")
        assert len(EngineSampler(servers)(lm, tokenizer, PROMPTS, PARAMS, seed=0).texts) == 4


def test_a_server_that_does_not_join_is_named_at_once(tiny: Path) -> None:
    model = loading.load_causal_lm(str(tiny / "model"), "float32")
    with WithWorker(model, no_join=True) as stub:
        servers = VLLMServers([stub.url], timeout=600, transfer="broadcast")
        with pytest.raises(
            EngineError, match=f"{stub.url} could not run a method of our worker extension.*an older one"
        ):
            servers.load(dict(model.state_dict()), 1)
