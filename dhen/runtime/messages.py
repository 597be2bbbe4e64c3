"""The log on the terminal, and user errors printed as one message that says what to do."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from dhen.runtime.environment import EnvironmentMismatchError

MISTAKES = (ValueError, OSError, EnvironmentMismatchError)
"""Exceptions that report a user's mistake. Our own mistakes are assertion errors."""
SECONDS_TO_BE_ENDED = 5.0
"""How long to wait for the launcher to end this process. Launchers check their processes at least once per second."""


def log_to_stderr() -> None:
    """Print the project's log to stderr: everything from rank 0, and warnings from the other ranks."""
    rank = int(os.environ.get("RANK", "0"))
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    project = logging.getLogger("dhen")
    project.handlers, project.propagate = [handler], False
    # matplotlib warns if it has no writable cache, which does not matter for a single figure.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    project.setLevel(logging.INFO if rank == 0 else logging.WARNING)


@contextmanager
def user_errors(*also: type[Exception]) -> Iterator[None]:
    """Wrap set-up: print a user's mistake as one message and exit with status 1. DHEN_TRACEBACK=1 shows the traceback.

    also: further exceptions that are user errors here. Usually all ranks of a node hit the same error, or lose the rank
    that hit it. So a node's first rank prints it, and the others print theirs only if they are still running a few
    seconds later.
    """
    try:
        yield
    except Exception as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(SECONDS_TO_BE_ENDED)
        is_too_large = isinstance(error, MemoryError | RuntimeError) and "alloca" in str(error)  # CPU or CUDA
        if not (isinstance(error, (*MISTAKES, *also)) or is_too_large) or os.environ.get("DHEN_TRACEBACK"):
            raise
        is_one_of_many = int(os.environ.get("WORLD_SIZE", "1")) > 1
        who = f"[rank {os.environ['RANK']}] " if is_one_of_many else ""
        text = f"out of memory, so use a smaller model, batch or table: {error!s:.200}" if is_too_large else error
        print(f"{who}error: {text}", file=sys.stderr, flush=True)
        os._exit(1)  # does not wait for other ranks: the launcher ends them
