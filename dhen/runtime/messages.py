"""The log on the terminal and in the run folder, and user errors printed as one message that says what to do."""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dhen.runtime.environment import EnvironmentMismatchError

MISTAKES = (ValueError, OSError, EnvironmentMismatchError, SafetensorError)
"""Exceptions that report a user's mistake, or a full disk. Our own mistakes are assertion errors."""
SECONDS_TO_BE_ENDED = 5.0
"""How long to wait for the launcher to end this process. Launchers check their processes at least once per second."""


_SECONDS_OF_SILENCE = 60.0
_RECORDS = 10_000
logger = logging.getLogger(__name__)


class _Terminal:
    """A stream whose failures do not end a run: the terminal was closed, or nobody reads the pipe."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _ToStderr(logging.StreamHandler):
    """Writes to what sys.stderr is at that moment: a progress bar takes its place and keeps below the lines."""

    stream = property(lambda self: sys.stderr, lambda self, _: None)


class _ToFile(logging.FileHandler):
    """Drops what a full disk cannot take: the terminal has it."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        pass


class Heartbeat(logging.Handler):
    """Logs what the run is doing, after a minute without a line."""

    def __init__(self) -> None:
        super().__init__()
        self.doing, self._last = "starting", 0.0

    def emit(self, record: logging.LogRecord) -> None:
        self._last = time.monotonic()

    def watch(self) -> None:
        """Never returns; for a thread."""
        self._last = time.monotonic()
        while True:
            time.sleep(max(0.0, self._last + _SECONDS_OF_SILENCE - time.monotonic()))
            if (silence := time.monotonic() - self._last) >= _SECONDS_OF_SILENCE:
                logger.info("%.0f s without a line: the run is %s", silence, self.doing)


heartbeat = Heartbeat()
_early = MemoryHandler(_RECORDS, flushLevel=logging.CRITICAL + 1)
"""Keeps the lines until there is a folder to write them to."""


def log_to_stderr() -> None:
    """Print the project's log to stderr: everything from rank 0, and warnings from the other ranks.

    From now on, a terminal that is closed, or a pipe that nobody reads, does not end the process.
    """
    rank = int(os.environ.get("RANK", "0"))
    sys.stdout, sys.stderr = _Terminal(sys.stdout), _Terminal(sys.stderr)
    handler = _ToStderr()
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    project = logging.getLogger("dhen")
    project.handlers, project.propagate = [handler], False
    if rank == 0:
        project.handlers += [_early, heartbeat]
        threading.Thread(target=heartbeat.watch, daemon=True).start()
    # matplotlib warns if it has no writable cache, which does not matter for a single figure.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    project.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def log_to_file(path: Path) -> None:
    """Write the log to this file as well, with the time: the lines so far, and those to come. Rank 0 calls it."""
    file = _ToFile(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    _early.setTarget(file)
    _early.flush()
    project = logging.getLogger("dhen")
    project.handlers = [file if handler is _early else handler for handler in project.handlers]


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
