"""What reaches the terminal besides progress: the log, and a user's mistakes as one message that says what to do."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from dhen.runtime.environment import EnvironmentMismatchError

MISTAKES = (ValueError, OSError, EnvironmentMismatchError)
"""ValueError is for the user's mistakes, assert for ours: so the errors of set-up are of these kinds."""
SECONDS_TO_BE_ENDED = 5.0
"""Launchers look after their processes once a second or more often."""


def log_to_stderr() -> None:
    """Show what the project logs: all of it from rank 0, warnings from the others."""
    rank = int(os.environ.get("RANK", "0"))
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    project = logging.getLogger("dhen")
    project.handlers, project.propagate = [handler], False
    # A home without a writable cache is no trouble for one picture, so matplotlib needn't say so.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    project.setLevel(logging.INFO if rank == 0 else logging.WARNING)


@contextmanager
def user_errors(*also: type[Exception]) -> Iterator[None]:
    """Around setting up: print a mistake's message and exit with status 1; DHEN_TRACEBACK=1 shows where.

    also: kinds of errors that are a user's mistake here. The ranks of a node mostly meet the same mistake, or lose the
    rank that met it: so its first rank speaks, and the others only if nobody has ended them after a while.
    """
    try:
        yield
    except Exception as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(SECONDS_TO_BE_ENDED)
        if not isinstance(error, (*MISTAKES, *also)) or os.environ.get("DHEN_TRACEBACK"):
            raise
        is_one_of_many = int(os.environ.get("WORLD_SIZE", "1")) > 1
        who = f"[rank {os.environ['RANK']}] " if is_one_of_many else ""
        print(f"{who}error: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # no waiting for other ranks: the launcher ends them
