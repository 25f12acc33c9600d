# SPDX-License-Identifier: Apache-2.0
"""The processes of a run, their shares of the work, and tensors sharded over them."""
