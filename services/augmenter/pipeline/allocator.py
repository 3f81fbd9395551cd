"""Tunes memory allocation: blocks of a megabyte are allocated and freed a hundred times a second."""

import ctypes
import gc

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_TRIM_THRESHOLD_BYTES = 32 * 2**20
_MMAP_THRESHOLD_BYTES = (
    4 * 2**20
    # Larger than a block of lines. Parts of an upload are larger still, and return to the kernel at once.
)
_GC_THRESHOLD = 100_000


def tune_allocator() -> None:
    """Tune garbage collector and allocator, once all modules are imported.

    Measured: it saves an eighth of the processor time of a run.
    """
    # Imported modules stay. Augmenting a line creates no reference cycles, so that searching for them after
    # every 700 objects, the default, is wasted.
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD)
    # By default glibc would return each block to the kernel, which zeroes the memory of the next one.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
