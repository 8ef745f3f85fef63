"""Keeps the process small and quick: what the C library and the collector do with freed memory.

A chunk's bytes pass through a handful of buffers of some 300 KB. By default glibc hands each of them back
to the kernel when it is freed and faults it in again, page by page, for the next chunk: measured, a third of
the CPU of the door.
"""

import ctypes
import gc

# mallopt's parameters, from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8

KEPT_BYTES = 2 * 1024 * 1024
LARGEST_BYTES = 4 * 1024 * 1024  # above it an allocation is its own mapping, gone when freed

# httpx leaves each request in a cycle of some 100 objects, which only the collector ends; no body is in it.
# The default of 700 would have each chunk of events collect twice.
COLLECT_AFTER = 5_000


def keep_freed() -> None:
    """Call before the first thread is made; does nothing where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, LARGEST_BYTES)
        mallopt(_TRIM_THRESHOLD, 2 * KEPT_BYTES)
        mallopt(_TOP_PAD, KEPT_BYTES)
        mallopt(_ARENA_MAX, 1)  # the worker threads' memory is the main thread's the next moment


def settle_in() -> None:
    """Call once, when everything is loaded: what is there now is never collected."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER)
