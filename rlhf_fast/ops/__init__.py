# SPDX-License-Identifier: Apache-2.0
"""The fused ops, one family a file: logprob, kl, gae, and linear, which composes them with BLAS."""
