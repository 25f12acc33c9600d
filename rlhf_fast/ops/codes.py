# SPDX-License-Identifier: Apache-2.0
"""Names of options and the integers that operators take for them.

Schemas take no strings (the stable ABI leaks them before torch 2.14), so every choice is passed to a kernel as a
number. `csrc/math.h` holds the same numbers; tests/test_dispatch.py compares the two. And one constant that kernels
share.
"""

from __future__ import annotations

# Outputs of token_stats, one bit each, in the order of TokenStats' fields.
LOGPROBS, ENTROPY, LOGSUMEXP, SUM_SQ_PROBS, ARGMAX = 1, 2, 4, 8, 16
OUTPUTS = {
    "logprobs": LOGPROBS,
    "entropy": ENTROPY,
    "logsumexp": LOGSUMEXP,
    "sum_sq_probs": SUM_SQ_PROBS,
    "argmax": ARGMAX,
}

# kind of token_kl
REVERSE, FORWARD, JSD, TV = 0, 1, 2, 3
KL_KINDS = {"reverse": REVERSE, "forward": FORWARD, "jsd": JSD, "tv": TV}

# estimator of approx_kl and ppo_advantages
K1, K2, K3, ABS = 0, 1, 2, 3
ESTIMATORS = {"k1": K1, "k2": K2, "k3": K3, "abs": ABS}

# gradient of approx_kl
VALUE, STRAIGHT_THROUGH = 0, 1
GRADIENTS = {"value": VALUE, "straight_through": STRAIGHT_THROUGH}

# Of vtrace's log-ratios that are not -inf. A finite one must not give a factor of exactly 0, which would make
# 0 * inf = NaN of an infinite gain. exp underflows below -87; exp(-69) = 1e-30 leaves room for gamma lam: down to 1e-7
# their product is a normal float32. The C++ and CUDA kernels have it as kLeastLogRatio.
LEAST_LOG_RATIO = -69.0
