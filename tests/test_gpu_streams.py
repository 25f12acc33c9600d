# SPDX-License-Identifier: Apache-2.0
"""What only a GPU shows of the native and Triton kernels: streams, graphs and devices. Skipped without one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rlhf_fast as rf

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]


def calls(device: str = "cuda") -> dict[str, Callable[[], Tensor]]:
    """A call of each kernel that synchronises blocks in its own way."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    x, y, rewards, values = random(3, 100_003), random(3, 100_003), random(4, 9001), random(4, 9001)
    many, scores = random(600, 4096), random(4)  # so many rows that a block goes along each
    targets = torch.zeros(3, dtype=torch.int64, device=device)
    ones, mask = torch.ones(3, device=device), random(4, 9001) > 0
    return {
        "token_stats": lambda: rf.token_stats(x, targets).logprobs,
        "token_kl_and_grad": lambda: rf.token_kl_and_grad(x, y, ones, kind="jsd")[1],
        "gae": lambda: rf.gae(rewards, values, mask=mask).advantages,
        "gae of many rows": lambda: rf.gae(many, many).returns,
        "ppo_advantages": lambda: rf.ppo_advantages(scores, rewards, values, values, mask, kl_coef=0.1).returns,
        "vtrace": lambda: rf.vtrace(rewards, values, values, mask=mask).advantages,
        "retrace": lambda: rf.retrace(rewards, values, values, values, mask=mask),
        "masked_whiten": lambda: rf.masked_whiten(values, mask),
    }


@pytest.fixture(params=["native", "triton"])
def on_gpu(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_graph_replay_gives_what_the_call_gives(on_gpu: str) -> None:
    """Replayed on new inputs, and the workspace that blocks talk through is clear at every replay."""
    with rf.use_backend(on_gpu):
        for name, call in calls().items():
            wanted = call()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = call()
            for _ in range(3):
                result.zero_()
                graph.replay()
                torch.cuda.synchronize()
                torch.testing.assert_close(result, wanted, rtol=0, atol=0, msg=name)


def test_side_streams_at_the_same_time(on_gpu: str) -> None:
    streams = [torch.cuda.Stream() for _ in range(3)]
    with rf.use_backend(on_gpu):
        for name, call in calls().items():
            wanted = call()
            torch.cuda.synchronize()
            results = []
            for _ in range(5):
                for stream in streams:
                    with torch.cuda.stream(stream):
                        results.append(call())
            torch.cuda.synchronize()
            for result in results:
                torch.testing.assert_close(result, wanted, rtol=0, atol=0, msg=name)


def test_work_waits_for_its_own_stream(on_gpu: str) -> None:
    """The input is written late on the side stream: a kernel on another stream would read what was there before."""
    stream = torch.cuda.Stream()
    x = torch.zeros(64, 5000, device="cuda")
    with rf.use_backend(on_gpu), torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x[:, 7] = 50.0
        argmax = rf.token_stats(x, None, outputs=("argmax",)).argmax
    stream.synchronize()
    assert torch.equal(argmax, torch.full_like(argmax, 7))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_device_that_is_not_the_current_one(on_gpu: str) -> None:
    with rf.use_backend(on_gpu):
        here, there = calls("cuda:0"), calls("cuda:1")
        for name, call in there.items():
            result = call()
            assert result.device.index == 1 and torch.cuda.current_device() == 0
            torch.testing.assert_close(result.isfinite().cpu(), here[name]().isfinite().cpu())


def test_the_first_call_of_a_process_may_be_inside_a_capture() -> None:
    """The probe, and the loading of kernels, happen there then. Triton's first call compiles: it needs a warm-up."""
    code = (
        "import torch, rlhf_fast as rf\n"
        "x = torch.randn(4, 5000, device='cuda')\n"
        "torch.cuda.synchronize()\n"
        "graph = torch.cuda.CUDAGraph()\n"
        "with rf.use_backend('native'), torch.cuda.graph(graph):\n"
        "    entropy = rf.token_stats(x, None, outputs=('entropy',)).entropy\n"
        "graph.replay(); torch.cuda.synchronize()\n"
        "true = torch.distributions.Categorical(logits=x.double()).entropy()\n"
        "torch.testing.assert_close(entropy.double(), true, rtol=1e-5, atol=1e-5)\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
