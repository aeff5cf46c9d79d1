"""The CPU's memory: what the cache may take, and how freed memory is kept."""

from __future__ import annotations

import contextlib
import ctypes
import os

_SHARE = 0.25
"""Of the memory that is available: a CPU machine runs more than the engine."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h


def cache_bytes() -> int:
    """What the cache may take, once the weights are loaded."""
    return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * _SHARE)


def keep_freed_memory() -> None:
    """Lets glibc keep what a step frees for the next one, up to a gigabyte. Given back and asked for again, every page
    of it would be a page fault: a quarter of a long prompt's feed-forward blocks."""
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most it takes
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        mallopt(_M_ARENA_MAX, 1)  # the arenas of other threads give back whatever is empty, thresholds or not
