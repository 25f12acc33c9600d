# SPDX-License-Identifier: Apache-2.0
"""Sampling completions from a model: the interface, the built-in sampler, engines, evaluation."""
