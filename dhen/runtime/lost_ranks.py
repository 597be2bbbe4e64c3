"""Names the rank that was lost. When a rank dies, the others only see a closed connection, which does not say whose.

A thread of every rank waits on the job's store, without polling, for the question "are you there?" and
answers it. A rank whose collective fails asks all ranks and records the ones that do not answer. Then the threads end
all remaining ranks, including those that wait for a rank that is about to exit.

This works with gloo, whose collectives raise a Python exception on failure. NCCL's do not: on GPUs, the launcher ends
the other ranks of the same node, and NCCL's watchdog ends the ranks on other nodes after the job's timeout. Their logs
name the lost rank.
"""

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta

import torch.distributed as dist

from dhen.runtime.messages import SECONDS_TO_BE_ENDED
from dhen.runtime.topology import Topology

_QUESTION, _ANSWER, _LOST = "dhen/are_you_there/{}", "dhen/here/{}", "dhen/lost"
_ASKED, _LEAVING, _STATUS, _LEFT = "asked", b"leaving", b"status ", "dhen/left/{}"
_SECONDS_TO_ANSWER, _SECONDS_TO_READ, _SECONDS_TO_LEAVE = 3.0, 2.0, 10.0
_OF_A_CONNECTION = re.compile(r"connection|timed out|timeout|broken pipe|gloo|nccl|socket|store", re.IGNORECASE)
_ending, _has_left, _is_training = threading.Lock(), threading.Event(), threading.Event()
_clones: list[dist.Store] = []
"""A connection to the store for `end_all_ranks`. The main thread may hold its own while it waits for a late rank."""


@contextlib.contextmanager
def naming_lost_ranks(topology: Topology) -> Iterator[None]:
    """Wrap a run: if a collective fails because a rank was lost, name that rank and exit with status 1."""
    answering = threading.Thread(target=_answer, args=(topology, _store().clone()), daemon=True)
    answering.start()
    _clones.append(_store().clone())
    try:
        yield
    except RuntimeError as error:
        if not _OF_A_CONNECTION.search(str(error)):
            raise
        # Before training, a rank is mostly lost to a mistake of the user, which it has printed. The launcher ends us.
        time.sleep(SECONDS_TO_BE_ENDED if topology.local_rank and not _is_training.is_set() else 0)
        lost = _find_lost(topology)
        if not lost:
            raise
        _end(topology, lost)
    except BaseException:
        with contextlib.suppress(RuntimeError):
            _leave(topology, answering, range(topology.world_size) if topology.is_main else [topology.rank])
        raise
    with contextlib.suppress(RuntimeError):
        _leave(topology, answering, [topology.rank])


def end_all_ranks(status: int) -> bool:
    """Let all other ranks exit with this status, without a word. For a rank that is about to do so.

    Returns whether they were there to do it.
    """
    if _has_left.is_set():
        return False
    with contextlib.suppress(RuntimeError, ValueError):  # there is no store yet, or no longer
        store = _clones[-1] if _clones else _store()
        others = set(range(dist.get_world_size())) - {dist.get_rank()}
        for rank in others:
            store.set(_QUESTION.format(rank), _STATUS + str(status).encode())
        with contextlib.suppress(RuntimeError):
            if others:
                store.wait([_LEFT.format(rank) for rank in others], timedelta(seconds=_SECONDS_TO_LEAVE))
            store.set(_LEFT.format(dist.get_rank()), "")  # now rank 0 may take the store with it
        return True
    return False


def training_begins() -> None:
    """From now on, every rank says at once which one was lost."""
    _is_training.set()


def _leave(topology: Topology, answering: threading.Thread, ranks: Iterable[int]) -> None:
    """End the threads of these ranks: this one's, and all when rank 0 fails, which holds the store.

    Rank 0 lets the others' threads end first, or torch would report a lost store.
    """
    store = _store()
    for rank in ranks:
        store.set(_QUESTION.format(rank), _LEAVING)
    answering.join(_SECONDS_TO_READ)
    if topology.is_main:
        _wait_for_all(topology, store)


def _wait_for_all(topology: Topology, store: dist.Store) -> None:
    """Wait for all ranks' threads to end, but not for long. Raises RuntimeError if some do not."""
    everyone = [_LEFT.format(rank) for rank in range(topology.world_size)]
    store.wait(everyone, timedelta(seconds=_SECONDS_TO_READ))


def _answer(topology: Topology, store: dist.Store) -> None:
    """Wait for the question, answer it, and end this rank if others are lost."""
    question = _QUESTION.format(topology.rank)
    with contextlib.suppress(RuntimeError):  # the store disappears when the job ends
        store.wait([question], timedelta(days=365))
        word = store.get(question)
        if word == _LEAVING:
            _has_left.set()  # the store may be gone soon
            store.set(_LEFT.format(topology.rank), "")
            return
        if word.startswith(_STATUS):
            store.set(_LEFT.format(topology.rank), "")
            if topology.is_main:  # which holds the store, where the others still read the word
                with contextlib.suppress(RuntimeError):
                    _wait_for_all(topology, store)
            os._exit(int(word.removeprefix(_STATUS)))
        store.set(_ANSWER.format(topology.rank), "")
        store.wait([_LOST], timedelta(minutes=1))
        if lost := _read_lost(store):
            _end(topology, lost)


def _find_lost(topology: Topology) -> list[int]:
    """The ranks that do not answer within a few seconds; rank 0 if the store, which it holds, cannot be reached."""
    try:
        store, ranks = _store(), range(topology.world_size)
        if not store.check([_LOST]):
            for rank in ranks:
                store.compare_set(_QUESTION.format(rank), "", _ASKED)  # not over a word to leave
            time.sleep(_SECONDS_TO_ANSWER)
            lost = [rank for rank in ranks if not store.check([_ANSWER.format(rank)])]
            store.compare_set(_LOST, "", ",".join(map(str, lost)))  # the first to write decides
        return _read_lost(store)
    except RuntimeError:
        return [0]


def _end(topology: Topology, lost: list[int]) -> None:
    """Print the lost ranks and exit at once, without waiting for collectives that never finish."""
    with _ending:  # never released, so each rank prints one message
        names = ", ".join(map(str, lost))
        print(
            f"[rank {topology.rank}] error: rank {names} of {topology.world_size} is gone, so the job ends. See the "
            "last output of that rank for the reason, or the log of its node if it was killed. Continue from the last "
            "checkpoint with --resume_from_checkpoint auto.",
            file=sys.stderr,
            flush=True,
        )
        if topology.is_main:
            time.sleep(_SECONDS_TO_READ)  # rank 0 holds the store, and the others still read it
        os._exit(1)


def _read_lost(store: dist.Store) -> list[int]:
    return [int(rank) for rank in store.get(_LOST).decode().split(",") if rank]


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()
