# SPDX-License-Identifier: Apache-2.0
"""The linear family: the row ops straight from hidden states and a head's weight, without ever holding all the logits.

Masked rows are dropped before the matmul. For the rest, BLAS computes the logits in tiles of some rows and some
columns; the row kernels reduce a tile to statistics, and in the backward overwrite it with its gradient, which BLAS
multiplies again.

    row_selection.py    which rows take part    head.py    weight, bias, LoRA: a tile, and the sums of gradients
    tiles.py    sizes and order of tiles, and which are kept for the backward (the memory budget)
    slices.py   statistics of one slice of the vocabulary, and merging those of tiles and of ranks (shards.py)
    bundles.py  inputs and options as NamedTuples      head_rows.py    base class of all loops
    stats.py divergence.py policy_loss.py sampled.py    the ops
"""

from rlhf_fast.ops.linear.divergence import linear_token_kl
from rlhf_fast.ops.linear.policy_loss import PolicyLoss, linear_policy_loss
from rlhf_fast.ops.linear.sampled import linear_sampled_logprobs
from rlhf_fast.ops.linear.stats import linear_token_logprobs, linear_token_stats

__all__ = [
    "PolicyLoss",
    "linear_policy_loss",
    "linear_sampled_logprobs",
    "linear_token_kl",
    "linear_token_logprobs",
    "linear_token_stats",
]
