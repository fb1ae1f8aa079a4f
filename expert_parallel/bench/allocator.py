"""Makes the C library's allocator keep freed blocks: page faults on new ones cost as much as a layer's arithmetic."""

import ctypes

# (number of the mallopt parameter in glibc's malloc.h, value); the values are those of launch/train.sh.
TRIM_THRESHOLD = (-1, 1 << 30)
TOP_PAD = (-2, 64 << 20)
MMAP_THRESHOLD = (-3, 1 << 30)


def keep_freed_memory() -> str:
    """Makes this process keep freed memory from now on: blocks below 1 GiB come from its heap, which keeps up to 1 GiB
    free.

    Returns in words what is in force; C libraries other than glibc are left as they are."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return "the system's allocator as it is"
    taken = [library.mallopt(*setting) for setting in (MMAP_THRESHOLD, TRIM_THRESHOLD, TOP_PAD)]
    if not all(taken):
        return "glibc's allocator, which refused to keep freed blocks"
    return "glibc's allocator, keeping freed blocks (mmap and trim thresholds 1 GiB)"
