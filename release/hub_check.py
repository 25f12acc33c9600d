# SPDX-License-Identifier: Apache-2.0
"""Load a layout of release/hub_layout.py with the `kernels` package, from its folder, and use an op.

python release/hub_check.py build/hub        (where `kernels` and PyTorch are installed, and rlhf_fast is not)
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

import kernels  # noqa: TID251, the published package of that name is what is wanted here

folder = Path(sys.argv[1]).resolve() / "build"
assert importlib.util.find_spec("rlhf_fast") is None, "rlhf_fast is installed here: that would be tried instead"
rf = kernels.get_local_kernel(folder, backend="cpu")

logits, tokens = torch.randn(5, 33, requires_grad=True), torch.randint(0, 33, (5,))
value = rf.token_logprobs(logits, tokens)
value.sum().backward()
exact = logits.detach().double().requires_grad_()
truth = exact.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
truth.sum().backward()
assert (value - truth).abs().max() < 1e-5
assert logits.grad is not None and exact.grad is not None and (logits.grad - exact.grad).abs().max() < 1e-6
(served,) = {row.backend for row in rf.backends() if row.device == "cpu"}  # with its instruction set: native (avx2)
assert served.startswith("native"), served
print(f"kernels {kernels.__version__}, torch {torch.__version__}: loaded from {rf.__file__}, served by {served}")
