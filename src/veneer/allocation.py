"""Memory that is freed stays with the process, for the next training step asks for the same again.

glibc gives blocks above a threshold back to the system as soon as they are freed, and takes them anew when they are
asked for. The system clears such memory page by page, each page at the price of a fault.
"""

import ctypes
import os
import sys

# Parameters of mallopt(3), from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT = 2**30
# The most that glibc took as a threshold on 64 bits before version 2.35.
_KEPT_BEFORE = 2**25
_OF_USERS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed blocks of up to 1 GiB (32 MiB with old versions) rather than give them back.

    `veneer train` does so unless memory is said to be short. In a program of your own, call it before the model is
    loaded: blocks that are there already stay as they are. The process's peak hardly changes; between peaks it shows
    what it once needed.

    Returns:
        Whether it was done: not with another C library or system, and not where a `MALLOC_` variable or
        `GLIBC_TUNABLES` says what the user wants.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _OF_USERS):
        return False
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    # Each returns 1 where the value is taken.
    kept = libc.mallopt(_M_MMAP_THRESHOLD, _KEPT) or libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BEFORE)
    return bool(kept and libc.mallopt(_M_TRIM_THRESHOLD, _KEPT))


def release_freed_memory() -> None:
    """Gives freed pages back now, whatever the thresholds are: after a lot was freed for good. With glibc only."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
