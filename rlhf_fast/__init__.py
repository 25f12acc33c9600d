# SPDX-License-Identifier: Apache-2.0
"""Fused ops for RLHF, exact and fast on CPU and GPU, and a thin trainer on top. `import rlhf_fast as rf`."""

from __future__ import annotations

from rlhf_fast._spin import bounded_spinning as _bounded_spinning

try:
    with _bounded_spinning():
        import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "rlhf_fast needs PyTorch 2.10 or newer, which is not installed.\n"
        "Install the build for your machine (https://pytorch.org/get-started), for example:\n"
        "    pip install torch"
    ) from error

from rlhf_fast import _triton
from rlhf_fast._dispatch import backends, find_native_kernels, use_backend
from rlhf_fast._version import __version__
from rlhf_fast.integrations import hf
from rlhf_fast.ops.gae import GAE, Advantages, gae, masked_whiten, ppo_advantages
from rlhf_fast.ops.kl import approx_kl, token_kl, token_kl_and_grad
from rlhf_fast.ops.linear import (
    PolicyLoss,
    linear_policy_loss,
    linear_sampled_logprobs,
    linear_token_kl,
    linear_token_logprobs,
    linear_token_stats,
)
from rlhf_fast.ops.logprob import TokenStats, token_logprobs, token_stats
from rlhf_fast.ops.token_losses import LOG_RATIO_LIMIT
from rlhf_fast.ops.vtrace import VTrace, retrace, vtrace

find_native_kernels()
_triton.register()

__all__ = [
    "GAE",
    "LOG_RATIO_LIMIT",
    "Advantages",
    "PolicyLoss",
    "TokenStats",
    "VTrace",
    "__version__",
    "approx_kl",
    "backends",
    "gae",
    "hf",
    "linear_policy_loss",
    "linear_sampled_logprobs",
    "linear_token_kl",
    "linear_token_logprobs",
    "linear_token_stats",
    "masked_whiten",
    "ppo_advantages",
    "retrace",
    "token_kl",
    "token_kl_and_grad",
    "token_logprobs",
    "token_stats",
    "use_backend",
    "vtrace",
]
