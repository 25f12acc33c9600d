# SPDX-License-Identifier: Apache-2.0
"""What `rlhf-fast init` writes: a commented configuration, sample data in each format, and a reward function."""
