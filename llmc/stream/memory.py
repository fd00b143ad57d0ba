"""Memory that is free goes back to the system."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress

import torch

_MMAP_THRESHOLD = -3  # of mallopt, in malloc.h
_LARGE = 1 << 20


def map_large_tensors() -> None:
    """Let the C library map every allocation from 1 MiB by itself, so that it's gone when it's freed.

    Left alone, it raises that limit as it goes and serves large tensors from its heap, where those that are kept and
    those that are freed lie side by side: the peak creeps up from block to block.
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").mallopt(_MMAP_THRESHOLD, _LARGE)


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
