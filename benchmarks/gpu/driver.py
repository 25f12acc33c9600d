# SPDX-License-Identifier: Apache-2.0
"""Calls every native GPU op at small, odd shapes: what compute-sanitizer watches. `python benchmarks/gpu/driver.py`

Small because a sanitizer slows a kernel down a hundredfold; odd because the tails are where accesses go astray.
"""

from __future__ import annotations

import torch

import rlhf_fast as rf

ROWS = (3, 5)
DEVICE, BACKEND = "cuda", "native"  # tests/test_emulator.py runs this on the emulator
# Rows and width whose rows of token_stats clusters of 2, 4 and 8 blocks share, on 132 multiprocessors.
CLUSTERS = {2: (132, 70_001), 4: (64, 70_001), 8: (33, 140_001)}


def logits(width: int, dtype: torch.dtype, rows: tuple[int, ...] = ROWS) -> torch.Tensor:
    """Rows one element past an aligned address."""
    flat = torch.randn(1 + torch.Size(rows).numel() * width, device=DEVICE).to(dtype)
    return flat[1:].view(*rows, width).requires_grad_()


def row_ops(width: int, dtype: torch.dtype) -> None:
    mask = torch.rand(ROWS, device=DEVICE) < 0.7
    targets = torch.randint(width, (*ROWS, 3), device=DEVICE)
    outputs = ("logprobs", "entropy", "logsumexp", "sum_sq_probs", "argmax")
    for softcap in (None, 5.0):
        x = logits(width, dtype)
        stats = rf.token_stats(x * 1, targets, outputs=outputs, mask=mask, softcap=softcap, inplace_backward=True)
        (stats.logprobs.sum() + stats.entropy.sum() + stats.logsumexp.sum()).backward()
    for kind in ("reverse", "forward", "jsd", "tv"):
        x, y = logits(width, dtype), logits(width, dtype)
        rf.token_kl(x, y, kind=kind, mask=mask).sum().backward()
        rf.token_kl_and_grad(x, y, torch.ones(ROWS, device=DEVICE), kind=kind)


def few_long_rows() -> None:
    """Rows that are split over blocks."""
    x, y = logits(100_003, torch.bfloat16, (2,)), logits(100_003, torch.bfloat16, (2,))
    rf.token_logprobs(x, torch.tensor([0, 100_002], device=DEVICE)).sum().backward()
    rf.token_kl(x, y).sum().backward()
    rf.token_kl_and_grad(x, y, torch.ones(2, device=DEVICE))
    rf.gae(torch.randn(1, 50_001, device=DEVICE), torch.randn(1, 50_001, device=DEVICE))


def clusters() -> None:
    """Rows that clusters of blocks share: of token_stats, and of every kind of KL with its gradient, which rereads."""
    for rows, width in CLUSTERS.values():
        rf.token_stats(logits(width, torch.bfloat16, (rows,)), None, outputs=("entropy", "argmax"))
    for rows in (1, 40, 150):  # many blocks a row with a launch for each step; clusters of four; of two or one
        x, y = logits(70_001, torch.bfloat16, (rows,)), logits(70_001, torch.bfloat16, (rows,))
        for kind in ("reverse", "forward", "jsd", "tv"):
            rf.token_kl_and_grad(x, y, torch.ones(rows, device=DEVICE), kind=kind)


def token_ops(rows: int, length: int) -> None:
    def random() -> torch.Tensor:
        return torch.randn(rows, length, device=DEVICE)

    def flags(share: float) -> torch.Tensor:
        return torch.rand(rows, length, device=DEVICE) < share

    mask = flags(0.8)
    for mode in ("carry", "zero"):
        options = {"dones": flags(0.1), "truncated": flags(0.1), "bootstrap_values": random(), "value_lam": 1.0}
        rf.gae(random(), random(), mask=mask, mask_mode=mode, **options)
        del options["value_lam"]
        rf.vtrace(random(), random(), random(), mask=mask, mask_mode=mode, **options)
    total = rows * length
    cu_seqlens = torch.tensor([0, total // 3, total // 3, total // 2, total], device=DEVICE)
    rf.gae(random().view(-1), random().view(-1), cu_seqlens=cu_seqlens)
    rf.vtrace(*(random().view(-1) for _ in range(3)), cu_seqlens=cu_seqlens)
    rf.retrace(*(random().view(-1) for _ in range(4)), cu_seqlens=cu_seqlens)
    rf.ppo_advantages(torch.randn(rows, device=DEVICE), random(), random(), random(), mask, kl_coef=0.1)
    rf.masked_whiten(random(), mask)
    for estimator in ("k1", "k2", "k3", "abs"):
        x = random().requires_grad_()
        rf.approx_kl(x, random(), estimator=estimator, importance_ratio=random().exp(), mask=mask).sum().backward()


def main() -> None:
    torch.manual_seed(0)
    with rf.use_backend(BACKEND):
        for width in (1, 7, 1031, 5003):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                row_ops(width, dtype)
        few_long_rows()
        if DEVICE == "cuda":  # the emulator has clusters at smaller sizes
            clusters()
        for rows, length in ((1, 1), (3, 37), (2, 9001)):
            token_ops(rows, length)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print("every native op ran")


if __name__ == "__main__":
    main()
