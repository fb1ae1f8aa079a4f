"""Makes glibc return the memory of tensors to the system as soon as they are freed."""

import ctypes

MMAP_THRESHOLD, SIZE = -3, 2**20  # the number of mallopt's parameter in glibc's malloc.h, and its value in bytes


def return_freed_memory() -> None:
    """Gives each tensor of 1 MiB or more pages of its own, for the rest of the process. Does nothing without glibc.

    A conversion makes and frees tensors of a few sizes, one after another. malloc would keep those below 32 MiB on a
    heap, whose holes add up to about the size of the shard that is in memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, SIZE)
