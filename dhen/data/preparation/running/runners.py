"""Runs a task on each piece: in this process, in several on this machine, or on a cluster of Dask.

A task is called as task(piece, report) and leaves its result in a folder, so nothing comes back. Where it raises, the
exception of the first such piece is raised again.
"""

import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol

from dhen.data.preparation.reading.pieces import Piece
from dhen.data.preparation.reading.raw_stream import Report

Task = Callable[[Piece, Report], None]
TRIES = 3
"""How often a piece is begun whose process ends, before the preparation stops."""
_ENDED = f"{{}}: {TRIES} workers ended while they prepared this file, perhaps for want of memory. {{}}."
_ONE_THREAD = {"POLARS_MAX_THREADS": "1", "OMP_NUM_THREADS": "1"}

logger = logging.getLogger(__name__)


class Runner(Protocol):
    """Runs a task on each piece, and returns when all have ended."""

    def __call__(self, task: Task, pieces: Sequence[Piece], report: Report) -> None:
        """`report` is called in this process."""


def num_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


class LocalProcesses:
    """Up to `workers` processes on this machine. A single piece is read in this process.

    A process that ends without a result, because the kernel killed it for its memory or somebody else did, is replaced,
    and its piece is begun again.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def __call__(self, task: Task, pieces: Sequence[Piece], report: Report) -> None:
        """Run the task on each piece."""
        if min(self._workers, len(pieces)) <= 1:
            for piece in pieces:
                task(piece, report)
            return
        workers, is_over, lock = threading.local(), threading.Event(), threading.Lock()
        started: list[subprocess.Popen] = []

        def work(piece: Piece) -> None:
            for _ in range(TRIES):
                with lock:
                    if is_over.is_set():
                        return
                    if getattr(workers, "mine", None) is None:
                        workers.mine = _start_worker()
                        started.append(workers.mine)
                if _is_done_by(workers.mine, task, piece, report):
                    return
                status, workers.mine = workers.mine.wait(), None
                if is_over.is_set():
                    return
                logger.warning("a worker ended with status %s; its piece of the data is begun again", status)
            raise ChildProcessError(_ENDED.format(piece.parts[0][0], "Use fewer --workers"))

        with ThreadPoolExecutor(min(self._workers, len(pieces))) as threads:
            futures = [threads.submit(work, piece) for piece in pieces]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                with lock:
                    is_over.set()
                threads.shutdown(wait=False, cancel_futures=True)
                for worker in started:
                    worker.kill()
                raise
            finally:
                for worker in started:
                    with suppress(BrokenPipeError):  # it ended with a task unread
                        worker.stdin.close()
                    worker.wait()


def nobody(task: Task, pieces: Sequence[Piece], report: Report) -> None:
    """Raise FileNotFoundError if there is a piece to do: shards should have done all."""
    if pieces:
        raise FileNotFoundError(
            f"{len(pieces)} pieces are missing, the first of {pieces[0].parts[0][0]}. Wait for the shards that are at "
            f"work, and run those that did not end again; or leave out --merge to prepare the rest here."
        )


class DaskCluster:
    """The workers of a Dask scheduler at `address`. They need the project, and must see the same files and folders."""

    def __init__(self, address: str) -> None:
        try:
            from dask import distributed
        except ImportError as error:
            raise ValueError("--dask needs Dask: pip install 'dhen[dask]'") from error
        self._distributed, self._address = distributed, address
        try:
            self._connect().close()
        except (OSError, ValueError) as error:
            raise ValueError(f"--dask is {address!r}, but no scheduler answers there. Check the address.") from error

    def __call__(self, task: Task, pieces: Sequence[Piece], report: Report) -> None:
        """Run the task on each piece. Dask begins the pieces of a worker that ended again."""
        with self._connect() as client:
            futures = [client.submit(_counted, os.getcwd(), task, piece, pure=False) for piece in pieces]
            for future, piece in zip(futures, pieces, strict=True):
                try:
                    report(*future.result())
                except self._distributed.KilledWorker as error:
                    raise ChildProcessError(_ENDED.format(piece.parts[0][0], "Give Dask's more memory")) from error
                except CancelledError as error:
                    raise ConnectionError(f"--dask {self._address}: the scheduler ended. Start it again.") from error

    def _connect(self) -> Any:
        return self._distributed.Client(self._address, timeout=30)


def _counted(folder: str, task: Task, piece: Piece) -> tuple[int, int]:
    """Run the task in the folder that its relative paths start from. Returns how many rows and bytes it reported."""
    os.chdir(folder)
    total = [0, 0]

    def report(rows: int, num_bytes: int) -> None:
        total[0] += rows
        total[1] += num_bytes

    task(piece, report)
    return total[0], total[1]


def _start_worker() -> subprocess.Popen:
    """Start a process that runs `main`. Unlike those of multiprocessing it does not import the calling script."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", __name__],  # -P: no file of the current folder hides a module
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is the starting process's to handle
        env=os.environ | _ONE_THREAD | {"PYTHONPATH": path},
    )


def _is_done_by(worker: subprocess.Popen, task: Task, piece: Piece, report: Report) -> bool:
    """Whether the worker did the task; False if it ended. Raises what the task raised."""
    rows = num_bytes = 0
    try:
        pickle.dump((task, piece), worker.stdin)
        worker.stdin.flush()
        while isinstance(message := pickle.load(worker.stdout), tuple):
            report(*message)
            rows, num_bytes = rows + message[0], num_bytes + message[1]
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
        report(-rows, -num_bytes)
        return False
    if message is not None:
        raise message
    return True


def main() -> None:
    """Do tasks from stdin until it ends, and write reports to stdout: an exception if there was one, and None."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    out, tasks = sys.stdout.buffer, sys.stdin.buffer
    sys.stdout = sys.stderr

    def send(message: object) -> None:
        pickle.dump(message, out)
        out.flush()

    with suppress(BrokenPipeError):  # the starting process has ended
        while tasks.peek(1):
            try:
                task, piece = pickle.load(tasks)
                task(piece, lambda *numbers: send(numbers))
                send(None)
            except Exception as error:
                send(error if _can_be_sent(error) else ChildProcessError(f"{type(error).__name__}: {error}"))


def _end_with(starter: int) -> None:
    """End this process soon after the one that started it, even within a piece."""
    while os.getppid() == starter:
        time.sleep(0.5)
    os._exit(1)


def _can_be_sent(error: Exception) -> bool:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return True


if __name__ == "__main__":
    main()
