"""Which rank was lost: a dead one shows in the others as a closed connection, which doesn't say whose.

While it trains, every rank has a thread that waits on the job's store, without polling, for the question "are you
there?" and answers it. A rank whose collective fails asks all, and writes down who doesn't answer; at that all threads
end their ranks, also those that wait for a rank which is about to end.

That is so under gloo, whose collectives fail with an exception in Python. NCCL's don't: on GPUs the launcher ends the
ranks of the node where one was lost, and NCCL's watchdog the others after the job's timeout; their logs say which.
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

from dhen.runtime.topology import Topology

_QUESTION, _ANSWER, _LOST = "dhen/are_you_there/{}", "dhen/here/{}", "dhen/lost"
_LEAVING, _LEFT = b"leaving", "dhen/left/{}"
_SECONDS_TO_ANSWER, _SECONDS_TO_READ = 3.0, 2.0
_OF_A_CONNECTION = re.compile(r"connection|timed out|broken pipe|gloo|nccl|socket|store", re.IGNORECASE)
_ending = threading.Lock()


@contextlib.contextmanager
def naming_lost_ranks(topology: Topology) -> Iterator[None]:
    """Around training: where a collective fails because a rank is gone, say which, and end this rank with status 1."""
    answering = threading.Thread(target=_answer, args=(topology, _store().clone()), daemon=True)
    answering.start()
    try:
        yield
    except RuntimeError as error:
        lost = _find_lost(topology) if _OF_A_CONNECTION.search(str(error)) else []
        if not lost:
            raise
        _end(topology, lost)
    finally:
        with contextlib.suppress(RuntimeError):
            _leave(topology, answering)


def _leave(topology: Topology, answering: threading.Thread) -> None:
    """End the thread. Rank 0, which holds the store, lets the others do so first: they would report a lost store."""
    store = _store()
    store.set(_QUESTION.format(topology.rank), _LEAVING)
    answering.join(_SECONDS_TO_READ)
    store.set(_LEFT.format(topology.rank), "")
    if topology.is_main:
        everyone = [_LEFT.format(rank) for rank in range(topology.world_size)]
        store.wait(everyone, timedelta(seconds=_SECONDS_TO_READ))


def _answer(topology: Topology, store: dist.Store) -> None:
    """Wait to be asked, say that this rank is there, and end it when others are lost."""
    question = _QUESTION.format(topology.rank)
    with contextlib.suppress(RuntimeError):  # the store is gone with the job
        store.wait([question], timedelta(days=365))
        if store.get(question) == _LEAVING:
            return
        store.set(_ANSWER.format(topology.rank), "")
        store.wait([_LOST], timedelta(minutes=1))
        if lost := _read_lost(store):
            _end(topology, lost)


def _find_lost(topology: Topology) -> list[int]:
    """The ranks that don't answer within a few seconds; rank 0 if the store, which it holds, can't be reached."""
    try:
        store, ranks = _store(), range(topology.world_size)
        if not store.check([_LOST]):
            for rank in ranks:
                store.set(_QUESTION.format(rank), "")
            time.sleep(_SECONDS_TO_ANSWER)
            lost = [rank for rank in ranks if not store.check([_ANSWER.format(rank)])]
            store.compare_set(_LOST, "", ",".join(map(str, lost)))  # the first to write decides
        return _read_lost(store)
    except RuntimeError:
        return [0]


def _end(topology: Topology, lost: list[int]) -> None:
    """Name the lost ranks and leave at once: there is no waiting for collectives that never end."""
    with _ending:  # never released: one message a rank
        names = ", ".join(map(str, lost))
        print(
            f"[rank {topology.rank}] error: rank {names} of {topology.world_size} is gone, so the job ends. What it "
            "printed last says why, or its node's log if it was killed. Go on from the last checkpoint with "
            "--resume_from_checkpoint true.",
            file=sys.stderr,
            flush=True,
        )
        if topology.is_main:
            time.sleep(_SECONDS_TO_READ)  # the others read the store, which is here
        os._exit(1)


def _read_lost(store: dist.Store) -> list[int]:
    return [int(rank) for rank in store.get(_LOST).decode().split(",") if rank]


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()
