# SPDX-License-Identifier: Apache-2.0
"""A run around its learning: options, folder, checkpoints, metrics, progress, signals, errors."""
