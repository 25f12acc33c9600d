# SPDX-License-Identifier: Apache-2.0
"""Large buffers, returned to Linux piece by piece.

Not asked for in large pages: of 2 MiB each costs up to 3 ms in a virtual machine whose host has to find the memory, a
third of the time of a forward and backward of a head on 1024 rows; where they come free they gain 5 % (measured).
"""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any

from torch import Tensor

# From here on glibc maps every allocation afresh, so that memory given back early is what the next one is made of.
LEAST = 32 * 2**20
PAGE = mmap.PAGESIZE

_kept = False


def keep_freed_memory() -> None:
    """For a process told to keep what it frees: nothing is given back from now on.

    There a buffer is made of memory that is at hand, and what is given back must be asked for again page by page: a
    tenth of the time of a policy loss on 400 rows of a 135M model.
    """
    global _kept
    _kept = True


@cache
def _madvise() -> Any:
    if not hasattr(mmap, "MADV_DONTNEED"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def give_back(done: Tensor) -> None:
    """Returns the memory of a dense piece of a buffer larger than LEAST, whose values nobody will read again.

    Tiles thus make room for the weight gradient that they turn into. The piece may be written again later.
    """
    if (
        _kept
        or done.device.type != "cpu"
        or done.untyped_storage().nbytes() <= LEAST
        or (madvise := _madvise()) is None
    ):
        return
    begin = -(-done.data_ptr() // PAGE) * PAGE
    end = (done.data_ptr() + done.nbytes) // PAGE * PAGE  # whole pages inside
    madvise(begin, max(0, end - begin), mmap.MADV_DONTNEED)
