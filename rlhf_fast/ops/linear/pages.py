# SPDX-License-Identifier: Apache-2.0
"""Large buffers: in large pages where Linux gives them on request, and returned to it piece by piece."""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any

from torch import Tensor

# From here on glibc maps every allocation afresh and returns it when freed, so that the advice ends with the tensor,
# and every call pays for its pages: 47 ms for 113 MB in pages of 4 KiB, 15 ms in those of 2 MiB (two Zen 4 threads of a
# virtual machine), of 180 ms in which a head of 49152 x 576 is trained on 128 rows.
LEAST = 32 * 2**20
PAGE = mmap.PAGESIZE


@cache
def _madvise() -> Any:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def in_large_pages(fresh: Tensor) -> Tensor:
    """The tensor, dense and not yet written to; a kernel that has no large pages to give changes nothing."""
    _advise(fresh, "MADV_HUGEPAGE")
    return fresh


def give_back(done: Tensor) -> None:
    """Returns the memory of a piece of a large buffer, whose values nobody will read again, before the rest is freed.

    Tiles thus make room for the weight gradient that they turn into. The piece may be written again later.
    """
    _advise(done, "MADV_DONTNEED")


def _advise(x: Tensor, advice: str) -> None:
    """To the whole pages inside x, a dense part of a buffer larger than LEAST."""
    if x.device.type != "cpu" or x.untyped_storage().nbytes() <= LEAST or (madvise := _madvise()) is None:
        return
    begin = -(-x.data_ptr() // PAGE) * PAGE
    end = (x.data_ptr() + x.nbytes) // PAGE * PAGE
    madvise(begin, max(0, end - begin), getattr(mmap, advice))
