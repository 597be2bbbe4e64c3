"""What reaches the terminal besides progress: the log, and a user's mistakes as one message that says what to do."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dhen.parallel.environment import EnvironmentMismatchError
from dhen.parallel.topology import Topology

MISTAKES = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, EnvironmentMismatchError)
"""ValueError is for the user's mistakes, assert for ours: so the errors of set-up are of these kinds."""


def log_to_stderr() -> None:
    """Show what the project logs: all of it from rank 0, warnings from the others."""
    rank = int(os.environ.get("RANK", "0"))
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    project = logging.getLogger("dhen")
    project.handlers, project.propagate = [handler], False
    project.setLevel(logging.INFO if rank == 0 else logging.WARNING)


@contextmanager
def user_errors(topology: Topology | None = None) -> Iterator[None]:
    """Around setting up: print a mistake's message and exit with status 1; DHEN_TRACEBACK=1 shows where."""
    try:
        yield
    except MISTAKES as error:
        if os.environ.get("DHEN_TRACEBACK"):
            raise
        rank = int(os.environ.get("RANK", "0")) if topology is None else topology.rank
        many = int(os.environ.get("WORLD_SIZE", "1")) > 1
        print(f"[rank {rank}] error: {error}" if many else f"error: {error}", file=sys.stderr, flush=True)
        sys.stderr.flush()
        os._exit(1)  # no waiting for other ranks: the launcher ends them
