# SPDX-License-Identifier: Apache-2.0
"""What samples completions from a model and measures them: the interface, the built-in sampler, evaluation."""
