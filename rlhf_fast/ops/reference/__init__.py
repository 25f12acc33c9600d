# SPDX-License-Identifier: Apache-2.0
"""Every op in plain PyTorch; work on logits goes a block of rows at a time, so that it needs little memory.

Each function here is the kernel of the operator of the same name in the torch backend, and the fallback of the
native one. The arguments are those of the op's schema (see the family's file), with shapes and ranges already
checked; mathematics and sources are in the docstrings of the public functions.

Arithmetic is float32, or float64 for float64 inputs. Masked rows are replaced by 0, not multiplied by it, so a NaN in
a masked slot cannot reach a result.
"""

from rlhf_fast.ops.reference.common import accumulate_dtype, wide_dtype
from rlhf_fast.ops.reference.gae import gae, ppo_advantages, whiten, whiten_moments
from rlhf_fast.ops.reference.kl import (
    approx_kl,
    approx_kl_and_slope,
    approx_kl_backward,
    approx_kl_gradients,
    token_kl,
    token_kl_and_grad,
    token_kl_backward,
)
from rlhf_fast.ops.reference.logprob import token_stats, token_stats_backward, token_stats_backward_into
from rlhf_fast.ops.reference.vtrace import vtrace

__all__ = [
    "accumulate_dtype",
    "approx_kl",
    "approx_kl_and_slope",
    "approx_kl_backward",
    "approx_kl_gradients",
    "gae",
    "ppo_advantages",
    "token_kl",
    "token_kl_and_grad",
    "token_kl_backward",
    "token_stats",
    "token_stats_backward",
    "token_stats_backward_into",
    "vtrace",
    "whiten",
    "whiten_moments",
    "wide_dtype",
]
