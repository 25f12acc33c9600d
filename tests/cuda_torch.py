# SPDX-License-Identifier: Apache-2.0
"""The extension beside a PyTorch with CUDA, on a machine without a GPU: `make check-cuda-torch`.

`make test` runs on a PyTorch without CUDA. What only the other shows: that the extension loads there, that its CUDA
kernels are registered over the same schemas, that it finds PyTorch's current stream in a library which Python loaded
privately, and that every op can be traced for a CUDA device. Nothing is launched.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from helpers.samples import SAMPLES, build  # noqa: E402
from helpers.tools import Recorder, with_gradients  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

import rlhf_fast as rf  # noqa: E402
from rlhf_fast import _dispatch, _ext, _triton  # noqa: E402

DEVICE = torch.device("cuda", 0)


def check_build() -> None:
    assert torch.version.cuda, f"PyTorch {torch.__version__} has no CUDA: this check is for one that has"
    assert not _ext.why_not, _ext.why_not
    assert _ext.build_info()["cuda"], "this build holds no CUDA kernels (nvcc was not found)"


def check_kernels_are_registered() -> None:
    operators = [name for names in _triton.FAMILIES.values() for name in names]
    missing = [name for name in operators if not _ext.has_kernel(name, "cuda")]
    assert not missing, f"no CUDA kernel of {missing}"


def check_stream_is_found() -> None:
    """The probe asks for PyTorch's stream before it asks for a driver, which a machine without a GPU lacks."""
    assert _ext._C is not None
    reason = _ext._C.why_not_cuda(0)
    assert "libtorch_cuda" not in reason, reason
    if not torch.cuda.is_available():
        assert "driver" in reason, reason


def to_device(x: Any) -> Any:
    return x.to(DEVICE) if isinstance(x, Tensor) else x


def check_fake_tensors(name: str) -> None:
    """Every operator that a forward and backward on the CPU reach, once more for fake tensors of the device."""
    sample = build(name, torch.float32)
    with Recorder() as recorder:
        with_gradients(sample.call, sample.inputs) if sample.differentiable else sample.call(**sample.inputs)
    assert recorder.calls, "no operator of ours was called"
    for operator, args, kwargs in recorder.calls:
        with FakeTensorMode(allow_non_fake_inputs=True):
            there = torch.utils._pytree.tree_map(to_device, args)
            outputs = torch.utils._pytree.tree_leaves(operator(*there, **kwargs))
        assert all(x.device == DEVICE for x in outputs if isinstance(x, Tensor)), operator


def check_selection(name: str) -> None:
    """The public function with fake tensors of the device: without a GPU to ask, it takes the compiled kernels."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), Recorder() as recorder, on_device():
        build(name, torch.float32).call(**{k: x.to(DEVICE) for k, x in build(name, torch.float32).inputs.items()})
    assert recorder.calls
    assert {operator.namespace for operator, _, _ in recorder.calls} == {"rlhf_fast"}


@contextmanager
def on_device() -> Iterator[None]:
    """rf.<op>(...) takes its tensors to the device."""
    originals = {name: getattr(rf, name) for name in _dispatch.KERNEL_OF}

    def there(op: Callable[..., Any]) -> Callable[..., Any]:
        move = torch.utils._pytree.tree_map
        return lambda *args, **kwargs: op(*move(to_device, args), **move(to_device, kwargs))

    for name, op in originals.items():
        setattr(rf, name, there(op))
    try:
        yield
    finally:
        for name, op in originals.items():
            setattr(rf, name, op)


def check_tracing() -> None:
    """torch.compile's front end on tensors of the device: one graph, with our operator in it."""

    class Loss(torch.nn.Module):
        def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
            stats = rf.token_stats(logits, targets, outputs=("logprobs", "entropy"))
            return stats.logprobs.sum() + stats.entropy.sum()

    with FakeTensorMode(allow_non_fake_inputs=True):
        logits = torch.empty(4, 100, device=DEVICE, dtype=torch.bfloat16)
        program = torch.export.export(Loss(), (logits, torch.zeros(4, dtype=torch.int64, device=DEVICE)))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any(name.startswith("rlhf_fast.token_stats") for name in called), called


def main() -> int:
    checks: dict[str, Callable[[], None]] = {
        "build": check_build,
        "kernels are registered": check_kernels_are_registered,
        "PyTorch's stream is found": check_stream_is_found,
        "tracing": check_tracing,
    }
    for name in SAMPLES:
        checks[f"fake tensors, {name}"] = functools.partial(check_fake_tensors, name)
        checks[f"selection, {name}"] = functools.partial(check_selection, name)
    failed = 0
    print(f"PyTorch {torch.__version__}, a GPU {'is' if torch.cuda.is_available() else 'is not'} here")
    for what, check in checks.items():
        try:
            check()
            print(f"ok      {what}")
        except Exception as error:
            failed += 1
            print(f"FAILED  {what}: {type(error).__name__}: {error}"[:600])
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
