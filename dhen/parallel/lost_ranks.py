"""Which rank was lost: a dead one shows in the others as a closed connection, which doesn't say whose.

Every rank has a thread that waits on the job's store, without polling, for the question "who is there?" and answers it.
A rank whose collective fails asks; who doesn't answer is lost.
"""

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from dhen.parallel.topology import Topology

_QUESTION, _ANSWER = "dhen/who_is_there", "dhen/here/{}"
_SECONDS_TO_ANSWER = 3.0
_OF_A_CONNECTION = re.compile(r"connection|timed out|broken pipe|gloo|nccl|socket|store", re.IGNORECASE)


def answer_when_asked(topology: Topology) -> None:
    """Start the thread that answers for this rank. It ends with the process."""
    store = _store().clone()

    def answer() -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone with the job
            store.wait([_QUESTION], timedelta(days=365))
            store.set(_ANSWER.format(topology.rank), "")

    threading.Thread(target=answer, daemon=True, name="answer_when_asked").start()


def lost_ranks(topology: Topology) -> list[int]:
    """The ranks that don't answer within a few seconds; rank 0 if the store, which it holds, can't be reached."""
    try:
        store = _store()
        store.set(_QUESTION, "")
        time.sleep(_SECONDS_TO_ANSWER)
        return [rank for rank in range(topology.world_size) if not store.check([_ANSWER.format(rank)])]
    except RuntimeError:
        return [0]


@contextlib.contextmanager
def naming_lost_ranks(topology: Topology) -> Iterator[None]:
    """Around training: where a collective fails because a rank is gone, say which, and end this rank with status 1."""
    try:
        yield
    except RuntimeError as error:
        lost = lost_ranks(topology) if _OF_A_CONNECTION.search(str(error)) else []
        if not lost:
            raise
        names = ", ".join(map(str, lost))
        print(
            f"[rank {topology.rank}] error: rank {names} of {topology.world_size} is gone, so the job ends. What it "
            "printed last says why, or its node's log if it was killed. Go on from the last checkpoint with "
            "--resume_from_checkpoint true.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # no waiting for collectives that never end


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()
