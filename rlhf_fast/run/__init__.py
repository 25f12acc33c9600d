# SPDX-License-Identifier: Apache-2.0
"""Infrastructure of a run: options, folder, checkpoints, metrics, progress, signals."""
