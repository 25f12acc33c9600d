# SPDX-License-Identifier: Apache-2.0
"""What release/try_wheel.py runs where PyTorch and the wheel are all there is. Prints one row of a table."""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rlhf_fast as rf


class Recorder(TorchDispatchMode):
    """Keeps every call of an operator of ours, so that PyTorch's opcheck can repeat it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace.startswith("rlhf_fast"):
            copies = tuple(x.detach().clone() if isinstance(x, Tensor) else x for x in args)
            self.calls.setdefault(str(func), (func, copies, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


def operators_hold() -> int:
    """Opcheck of each operator that the row ops call, forward and backward; how many there were."""
    generator = torch.Generator().manual_seed(0)
    logits, other = (torch.randn(6, 37, generator=generator).requires_grad_() for _ in range(2))
    tokens = torch.randint(0, 37, (6,), generator=generator)
    rewards, values = torch.randn(2, 3, 5, generator=generator)
    mask = torch.ones(3, 5, dtype=torch.bool)
    with Recorder() as recorder:
        (rf.token_logprobs(logits, tokens).sum() + rf.token_kl(logits, other).sum()).backward()
        rf.gae(rewards, values, mask=mask, gamma=0.9, lam=0.8)
        rf.masked_whiten(rewards, mask)
    assert len(recorder.calls) >= 5, recorder.calls
    for func, args, kwargs in recorder.calls.values():
        torch.library.opcheck(func, args, kwargs, test_utils=("test_schema", "test_faketensor"))
    return len(recorder.calls)


def error_of_the_gradient() -> float:
    """Of token_logprobs in float32, against float64."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(8, 1001, generator=generator).requires_grad_()
    tokens = torch.randint(0, 1001, (8,), generator=generator)
    rf.token_logprobs(logits, tokens).sum().backward()
    exact = logits.detach().double().requires_grad_()
    exact.log_softmax(-1).gather(-1, tokens[:, None]).sum().backward()
    assert logits.grad is not None and exact.grad is not None
    return float((logits.grad - exact.grad).abs().max())


def main() -> None:
    """Check, and print the row."""
    served = sorted({row.backend for row in rf.backends() if row.device == "cpu"})
    error, operators = error_of_the_gradient(), operators_hold()
    assert error < 1e-6, error
    compiled = torch.compile(lambda x: rf.masked_whiten(x, x > -9.0), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 5)
    torch.testing.assert_close(compiled(x), rf.masked_whiten(x, x > -9.0))
    python, glibc = platform.python_version(), platform.libc_ver()[1]
    print(
        f"| {python} | {torch.__version__} | {glibc} | {', '.join(served)} | {operators} operators, error {error:.0e} |"
    )


if __name__ == "__main__":
    main()
