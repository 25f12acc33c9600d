# SPDX-License-Identifier: Apache-2.0
"""Phase 1: supervised fine-tuning."""
