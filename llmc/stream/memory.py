"""Memory that is free goes back to the system."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from mmap import PAGESIZE, mmap
from pathlib import Path

import torch
from torch import Tensor

_M_TRIM_THRESHOLD = -1  # malloc.h
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_MOST = 2**25  # what the threshold rises to by itself, and the most it may be
_KEPT = 2**25  # what may stay free in the heap


def _allocator() -> ctypes.CDLL | None:
    """glibc, if that's the C library."""
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt, library.malloc_trim  # noqa: B018
        return library
    return None


def _resident() -> int | None:
    """Bytes of this process that are in memory; None where nobody tells."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGESIZE
    except OSError:
        return None


@dataclass
class _Holes:
    """Whether the heap can have holes that are worth returning."""

    least: int = 0

    def return_them(self, allocator: ctypes.CDLL) -> None:
        """Trim the heap, if the process has grown by more than may stay free since it was smallest or trimmed. Pages
        that come back are zeroed again, which takes as long as the work of a simple rounding does."""
        now = _resident()
        if now is not None and now - self.least <= _KEPT:
            self.least = min(self.least, now)
            return
        allocator.malloc_trim(_KEPT)
        self.least = _resident() or 0


_holes = _Holes()


def trim_heap() -> None:
    """Return the holes in the C library's heap. What is freed between tensors that are kept isn't reused for larger
    ones: without this, a block's peak would be a third above what it holds."""
    if (allocator := _allocator()) is not None:
        _holes.return_them(allocator)


def share_heap() -> None:
    """Let new threads allocate from the one heap. Weights are placed by threads that come and go; a heap for each would
    keep holes of its own, as many as happened to be made.

    A little of what is freed stays: to whoever works strip by strip the same pages come back, where the system would
    zero them for each.
    """
    if (allocator := _allocator()) is not None:
        allocator.mallopt(_M_ARENA_MAX, 1)
        allocator.mallopt(_M_TRIM_THRESHOLD, _KEPT)


@contextmanager
def unheaped() -> Iterator[None]:
    """Within the context whatever takes more than a megabyte is returned the moment it's freed.

    For work that goes once through a block, a weight after the other, and makes copies of each on the way. Not for
    searches: each new copy costs the zeroing of its pages.
    """
    allocator = _allocator()
    if allocator is None:
        yield
        return
    allocator.mallopt(_M_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        allocator.mallopt(_M_MMAP_THRESHOLD, _MOST)
        _holes.return_them(allocator)


def own_memory(size: int) -> Tensor:
    """``size`` uninitialized bytes (uint8) that come from the system and go back to it the moment they're freed.

    For a thread that reads ahead: it allocates while others hold what they will free sooner, which would leave holes.
    """
    if size < 2**16:
        return torch.empty(size, dtype=torch.uint8)
    return torch.frombuffer(mmap(-1, size), dtype=torch.uint8)


def peak_host_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024


def give_back_memory() -> None:
    """The same after collecting Python's garbage, and for what CUDA's allocator caches."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim_heap()


@contextmanager
def short_collections() -> Iterator[None]:
    """Within the context ``give_back_memory`` doesn't look at the objects that are there now.

    Those are modules and classes by the hundred thousand: they stay anyway, and looking at them takes 0.2 s each time.
    What nobody needs any more, a tokenizer say, goes first.
    """
    give_back_memory()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
