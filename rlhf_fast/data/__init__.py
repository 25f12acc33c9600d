# SPDX-License-Identifier: Apache-2.0
"""Prompts and demonstrations: reading them, and turning them into token ids."""
