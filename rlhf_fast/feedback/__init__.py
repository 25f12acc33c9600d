# SPDX-License-Identifier: Apache-2.0
"""What people, or functions, think of completions: one schema, readers of other tools' files, checks, collecting."""
