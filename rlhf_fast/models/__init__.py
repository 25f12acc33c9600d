# SPDX-License-Identifier: Apache-2.0
"""Hugging Face models: loading them, reading log-probabilities, values and scores out of them, sampling from them."""
