# SPDX-License-Identifier: Apache-2.0
"""Phase 2: a reward model from people's rankings or ratings."""
