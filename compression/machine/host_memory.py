"""What keeps a process no larger than its tensors: how glibc, torch and oneDNN hold on to memory.

glibc serves blocks from heaps, which only shrink from their end, and keeps what is freed in them. A block
that is mapped by itself goes back at once, and costs a page fault for every 4 KiB when it is written. oneDNN
keeps the code that it makes for a product of one shape, for the last 1,024 of them; with experts nearly every
product has its own. Together they were up to two fifths of a run's memory (docs/memory.md). No bits depend on
any of this.

Torch and oneDNN read their variables when they are first used, so compression/__init__.py sets them. What the
caller's environment says goes first.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
"""Of malloc.h."""
_MMAP_BYTES = 32 << 20
"""Blocks from this size on are mapped one by one: few enough for what mapping costs. With 4 MiB a fifth of
the time on a small model went into page faults (docs/memory.md)."""
_KEPT_AT_THE_END = 2 * _MMAP_BYTES
"""Free bytes at the end of a heap that are kept without being asked for, as glibc does by default."""
FREED_BYTES = 32 << 20
"""Growth that is left alone. Pages that went back are soon wanted again, at a page fault each: to trim at
every call was a sixth of the time on a small model."""

_STATM = Path("/proc/self/statm")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

_libc = ctypes.CDLL(None)
_least_resident = 0
"""Bytes, since the heaps were trimmed; 0 before."""


def set_library_variables() -> None:
    """Say to torch and oneDNN, which have not been used yet, what to do; what is set already stays."""
    # activations on huge pages, where the kernel lends them on request: fewer page faults
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")


def map_large_blocks() -> None:
    """From here on, blocks of 32 MiB and more go back to the system when they are freed.

    Smaller ones wait for `give_back`. Without effect where malloc is not glibc's, as for `give_back`.
    """
    if mallopt := getattr(_libc, "mallopt", None):
        mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_AT_THE_END)


def give_back() -> None:
    """Return to the system what is free in the heaps, if the process grew by 32 MiB since that was done."""
    global _least_resident
    malloc_trim = getattr(_libc, "malloc_trim", None)
    if malloc_trim is None:
        return
    resident = _resident_bytes()
    if resident < _least_resident + FREED_BYTES:
        _least_resident = min(_least_resident, resident)
    else:
        malloc_trim(0)
        _least_resident = _resident_bytes()


def _resident_bytes() -> int:
    return int(_STATM.read_bytes().split()[1]) * _PAGE_BYTES
