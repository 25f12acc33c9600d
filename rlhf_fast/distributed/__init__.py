# SPDX-License-Identifier: Apache-2.0
"""The processes of a run: who does what share, and tensors that are sharded over them."""
