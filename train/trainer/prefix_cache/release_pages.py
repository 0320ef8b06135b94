"""Give memory back that will not be read for a while, without giving up what is in it."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable

from torch import Tensor

_MADV_PAGEOUT = 21  # Linux 5.4


def release_pages(tensors: Iterable[Tensor]) -> None:
    """Ask the system to take back the memory of contiguous CPU tensors; they can be read as before, at a cost.

    What is mapped from a checkpoint, as transformers loads it, is read from the checkpoint again; other memory goes to
    swap, or stays where it is if there is none. Does nothing on systems that cannot, and for pages that another process
    has mapped too.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            first = tensor.data_ptr()
            start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages of its own only
            end = (first + tensor.numel() * tensor.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
            if end > start:
                # A refusal (an older kernel) leaves everything as it was.
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_PAGEOUT)
