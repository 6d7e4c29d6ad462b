"""What keeps a process no larger than its tensors: how glibc, torch and oneDNN hold on to memory.

glibc keeps freed blocks for itself: once it has seen blocks of up to 32 MiB freed, it serves such blocks from
heaps, which only shrink from their end. oneDNN keeps the code that it makes for a product of one shape, for
the last 1,024 of them; with experts nearly every product has a shape of its own. Together they were up to two
fifths of a run's memory (docs/memory.md). No bits depend on any of this.

Torch and oneDNN read their variables when they are first used, so this module is imported before anything
computes. What the caller's environment says goes first.
"""

from __future__ import annotations

import ctypes
import os

# Activations on huge pages, where the kernel lends them on request: fewer page faults (benchmarks/README.md).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")

_M_MMAP_THRESHOLD = -3
"""Of malloc.h."""
_MMAP_BYTES = 4 << 20
"""Blocks from this size on are mapped one by one: few enough for what mapping costs."""

_libc = ctypes.CDLL(None)


def map_large_blocks() -> None:
    """From here on, blocks of 4 MiB and more go back to the system when they are freed.

    Without effect where malloc is not glibc's, as for `give_back`.
    """
    if mallopt := getattr(_libc, "mallopt", None):
        mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)


def give_back() -> None:
    """Return to the system what is free in the heaps."""
    if malloc_trim := getattr(_libc, "malloc_trim", None):
        malloc_trim(0)
