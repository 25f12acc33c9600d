# SPDX-License-Identifier: Apache-2.0
"""`python -m rlhf_fast` is the command `rlhf-fast`, in the form that torchrun and `accelerate launch` start."""

import sys

from rlhf_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
