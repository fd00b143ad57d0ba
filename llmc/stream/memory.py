"""Memory that is free goes back to the system."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress

import torch


def trim_heap() -> None:
    """Return the holes in the C library's heap. What is freed between tensors that are kept isn't reused for larger
    ones: without this, a block's peak would be a third above what it holds."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def give_back_memory() -> None:
    """The same after collecting Python's garbage, and for what CUDA's allocator caches."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim_heap()
