"""The heap's holes are returned to the system once they are worth it, and kept before: in a process of its own, by what
the kernel counts."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only glibc's heap is looked after")

_PREAMBLE = """
import resource
from pathlib import Path
import torch
from llmc.stream import memory

MB = 2**20

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def holes(size):
    '''Fills the heap with tensors of 64 KB and frees every other one, size bytes of them; returns those that stay.'''
    tensors = [torch.ones(2**14) for _ in range(size // 2**15)]
    return tensors[::2]

memory.share_heap()
memory.trim_heap()
"""


def _told(code: str) -> list[int]:
    """The integers that a process printed."""
    done = subprocess.run(
        [sys.executable, "-c", _PREAMBLE + code], capture_output=True, text=True, check=True, timeout=120
    )
    return [int(word) for word in done.stdout.split()]


def test_large_holes_are_returned() -> None:
    before, after, kept = _told("""
kept = holes(128 * MB)
before = resident()
memory.trim_heap()
print(before // MB, resident() // MB, len(kept) // 16)
""")
    assert kept == 128
    assert before - after > 100


def test_large_holes_are_returned_where_a_block_of_work_ends() -> None:
    before, after = _told("""
with memory.unheaped():
    kept = holes(128 * MB)
    before = resident()
print(before // MB, resident() // MB)
""")
    assert before - after > 100


def test_small_holes_are_used_again() -> None:
    """Work that comes again finds its pages, however often the heap is looked at in between."""
    first, later = _told("""
start = faults()
kept = holes(8 * MB)
first = faults() - start
for _ in range(20):
    memory.trim_heap()
    again = [torch.ones(2**14) for _ in range(60)]
    del again
start = faults()
for _ in range(20):
    memory.trim_heap()
    again = [torch.ones(2**14) for _ in range(60)]
    del again
print(first, faults() - start)
""")
    assert first > 4000
    assert later < 400  # 20 times 960 pages, had they been returned


def test_a_system_that_tells_nothing_has_its_heap_trimmed_each_time() -> None:
    before, after = _told("""
memory._resident = lambda: None
kept = holes(16 * MB)
before = resident()
memory.trim_heap()
print(before // MB, resident() // MB)
""")
    assert before - after > 10
