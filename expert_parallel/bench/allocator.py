"""Makes glibc's malloc keep freed memory: page faults on fresh memory can cost as much time as a layer's arithmetic."""

import ctypes

# (number of the mallopt parameter in glibc's malloc.h, value); the values are those of launch/train.sh.
TRIM_THRESHOLD = (-1, 1 << 30)
TOP_PAD = (-2, 64 << 20)
MMAP_THRESHOLD = (-3, 1 << 30)


def keep_freed_memory() -> str:
    """Makes this process keep freed memory from now on: blocks below 1 GiB are allocated on the heap, and up to 1 GiB
    of free heap is not returned to the system.

    Returns a description of the allocator for the report. C libraries other than glibc are left as they are."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return "the system's allocator as it is"
    taken = [library.mallopt(*setting) for setting in (MMAP_THRESHOLD, TRIM_THRESHOLD, TOP_PAD)]
    if not all(taken):
        return "glibc's allocator, which refused to keep freed blocks"
    return "glibc's allocator, keeping freed blocks (mmap and trim thresholds 1 GiB)"
