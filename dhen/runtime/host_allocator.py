"""Lets a CPU rank keep the memory it frees, so that the large tensors of a step reuse the pages of the step before.

By default, glibc returns large blocks to the system at once. The next step requests them again page by page, and the
kernel clears every page. For activations and exchanged embeddings, this is a large part of a step's time on CPU.
"""

import contextlib
import ctypes
import os

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
"""Numbers of `mallopt` parameters in glibc's malloc.h."""
_NEVER = -1


def keep_freed_memory() -> bool:
    """Let this process keep freed memory for later allocations. Returns whether this took effect.

    It has no effect if the C library is not glibc, or if the user has configured the allocator (`MALLOC_...` or
    `GLIBC_TUNABLES` in the environment). Call it before other threads allocate.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        # Use one heap, because a heap per thread is limited to 64 MiB; never mmap a block; never return memory.
        wanted = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER))
        return all(mallopt(parameter, value) for parameter, value in wanted)
    return False
