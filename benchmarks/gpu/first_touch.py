# SPDX-License-Identifier: Apache-2.0
"""The first minute on a GPU: does a native kernel run at all, and does the clock measure it? Part of `make gpu-check`.

Prints driver, toolkit and PyTorch versions, what the probe says of every device, which backend serves each op, one call
of every family compared with the reference, and one kernel's time beside its call's.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpu.timing import milliseconds  # noqa: E402

import rlhf_fast as rf  # noqa: E402
from rlhf_fast import _ext  # noqa: E402


def versions() -> None:
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    print("driver     ", driver.stdout.strip() or driver.stderr.strip())
    print("PyTorch    ", torch.__version__, "built with CUDA", torch.version.cuda)
    print("extension  ", _ext.build_info())
    for index in range(torch.cuda.device_count()):
        print(f"probe of {index} ", _ext.why_not_native_gpu("cuda", index) or "the compiled kernels run")


def families() -> None:
    """One call of each op on native, against the reference."""
    torch.manual_seed(0)
    x, y = (torch.randn(5, 3001, device="cuda") for _ in range(2))
    rewards, values = (torch.randn(3, 5000, device="cuda") for _ in range(2))
    targets, ones = torch.randint(3001, (5,), device="cuda"), torch.ones(5, device="cuda")
    calls = {
        "token_stats": lambda: rf.token_stats(x, targets).entropy,
        "token_logprobs": lambda: rf.token_logprobs(x, targets),
        "token_kl": lambda: rf.token_kl(x, y),
        "token_kl_and_grad": lambda: rf.token_kl_and_grad(x, y, ones)[1],
        "approx_kl": lambda: rf.approx_kl(rewards, values, estimator="k3"),
        "gae": lambda: rf.gae(rewards, values).advantages,
        "vtrace": lambda: rf.vtrace(rewards, values, rewards).advantages,
        "retrace": lambda: rf.retrace(rewards, values, values, rewards),
        "ppo_advantages": lambda: rf.ppo_advantages(ones[:3], rewards, values, values, values > 0, kl_coef=0.1).returns,
        "masked_whiten": lambda: rf.masked_whiten(rewards, values > 0),
    }
    for name, call in calls.items():
        with rf.use_backend("torch"):
            wanted = call()
        with rf.use_backend("native"):
            error = (call() - wanted).abs().max().item()
        print(f"{name:17} differs from the reference by {error:.1e}")
        assert error < 1e-3, name


def clock() -> None:
    x = torch.randn(4096, 32000, device="cuda", dtype=torch.bfloat16)
    with rf.use_backend("native"):
        time = milliseconds({"op": lambda i: rf.token_stats(x, None, outputs=("entropy",))}, rounds=10)["op"]
    rate = 2 * x.numel() / time.kernel * 1e3 / 1e12
    print(f"entropy of 4096 x 32000 bf16: kernel {time.kernel:.3f} ms ({rate:.2f} TB/s), a call {time.call:.3f} ms")


def main() -> None:
    versions()
    print(rf.backends())
    families()
    clock()


if __name__ == "__main__":
    main()
