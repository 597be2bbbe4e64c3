"""Memory that a CPU rank frees stays with it: a step's large tensors take the pages of the step before.

glibc hands large blocks back to the system at once and asks for them again in the next step, page by page; the kernel
clears each. With a step's activations and exchanged embeddings that is much of a CPU step's time.
"""

import contextlib
import ctypes
import os

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
"""glibc's numbers of what `mallopt` sets (malloc.h)."""
_NEVER = -1


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for its later allocations. Returns whether it does.

    It doesn't where the C library isn't glibc, or where the user has set how memory is allocated (`MALLOC_...` or
    `GLIBC_TUNABLES` in the environment). Call it before other threads allocate.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        # One heap, for a thread's own can't hold more than 64 MiB; no block of its own mapping; nothing given back.
        wanted = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER))
        return all(mallopt(what, value) for what, value in wanted)
    return False
