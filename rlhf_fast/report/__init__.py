# SPDX-License-Identifier: Apache-2.0
"""Looking at what was trained: the report page, evaluation, chat."""
