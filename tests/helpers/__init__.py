# SPDX-License-Identifier: Apache-2.0
"""What several tests share: inputs, truths, tolerances, jobs of the trainer, programs of other processes."""
