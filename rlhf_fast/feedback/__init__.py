# SPDX-License-Identifier: Apache-2.0
"""Ratings and rankings of completions: the schema, readers of other tools' files, checks, the labelling page."""
