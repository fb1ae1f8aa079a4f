"""The C library's allocator: blocks that were freed stay with the process, since faulting them in anew costs as much as
the arithmetic of a layer."""

import ctypes

# mallopt's numbers in glibc's malloc.h, and the values of launch/train.sh.
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = (-1, 1 << 30), (-2, 64 << 20), (-3, 1 << 30)


def keep_freed_memory() -> str:
    """For this process, from now on: blocks below 1 GiB come from its heap, which keeps 1 GiB of what is freed.

    Returns what is in force, in words: other C libraries than glibc are left as they are."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return "the system's allocator as it is"
    taken = [library.mallopt(*setting) for setting in (MMAP_THRESHOLD, TRIM_THRESHOLD, TOP_PAD)]
    if not all(taken):
        return "glibc's allocator, which refused to keep freed blocks"
    return "glibc's allocator, keeping freed blocks (mmap and trim thresholds 1 GiB)"
