# SPDX-License-Identifier: Apache-2.0
"""Phase 3: reinforcement learning from a reward."""
