"""Ends a run on request: all ranks agree on a step, save there, and leave together with exit status 75.

A request is a SIGTERM, SIGUSR1 or SIGINT to any rank, or the end of the launcher that started the rank. Outside of
`deferred`, where there is nothing to save, a request ends the rank at once.
"""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from dhen.runtime.lost_ranks import end_all_ranks
from dhen.runtime.topology import Topology

STATUS = 75
"""EX_TEMPFAIL of sysexits.h: start the same command again to go on."""
_INTERRUPTED = 130
_CAUSES = ("", "SIGINT", "SIGUSR1", "SIGTERM", "the end of its launcher")
_SECONDS_TO_SAVE = 25.0
"""After SIGTERM. Launchers send SIGKILL 30 seconds after it."""
_SECONDS_BETWEEN_INTERRUPTS = 3.0
"""A launcher passes on the SIGINT that the terminal has already sent to the rank."""
_SECONDS_BETWEEN_LOOKS, _SECONDS_TO_LEAVE = 1.0, 15.0
_SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)
_LAUNCHERS = ("deepspeed", "torchrun", "accelerate")
_LAUNCHER_MODULES = ("deepspeed.launcher.", "torch.distributed.", "accelerate.commands.")


class StopRequest:
    """Whether this run shall stop, and why. Its first request counts; later ones change nothing.

    done_by_all: the least number of `done` pieces of work that a rank had at the call before the last of `is_agreed`.

    SIGTERM leaves the ranks 25 seconds to save: then they leave without it. A second SIGINT, at least 3 seconds after
    the first, ends this rank at once with status 130.
    """

    def __init__(self) -> None:
        self._cause = 0
        self._is_deferred = self._is_agreed = False
        self._interrupted_at: float | None = None
        self._deadline: threading.Timer | None = None
        self._group: dist.ProcessGroup | None = None
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        self.done_by_all = 0

    @property
    def cause(self) -> str:
        """What made the request, such as SIGTERM; empty if there is none."""
        return _CAUSES[self._cause]

    def listen(self) -> None:
        """Take requests from now on, in a thread: the main one may wait for others for long. The main one calls it."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)  # Python writes the number into the pipe
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a closed terminal ends no run
        os.register_at_fork(after_in_child=_forget)
        threading.Thread(target=self._watch, args=(reader, _launchers()), daemon=True).start()

    @contextlib.contextmanager
    def deferred(self, topology: Topology) -> Iterator[None]:
        """While training, only note requests: `is_agreed` tells. Communicates; all ranks call it."""
        if topology.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=topology.timeout)
        self._is_deferred = True
        yield
        self._is_deferred = False
        if self._cause and not self._is_agreed:  # too late for the last question
            _leave(f"stopped by {self.cause} at the end of training", STATUS)

    def is_agreed(self, done: int = 0, *, is_last: bool = False) -> bool:
        """Whether any rank had a request before the last call. All ranks call it, and get the same answer.

        It looks one call back, so that no rank waits for a message. done: pieces of work that this rank has finished.
        is_last: look at this moment too, and wait.
        """
        if self._group is None:
            self.done_by_all, self._is_agreed = done, self._cause > 0
            return self._is_agreed
        seen = self._take_pending()
        news = torch.tensor([self._cause, -done])
        self._pending = dist.all_reduce(news, dist.ReduceOp.MAX, group=self._group, async_op=True), news
        if is_last or seen:
            seen = max(seen, self._take_pending())
        self._cause, self._is_agreed = self._cause or seen, seen > 0
        return self._is_agreed

    def _take_pending(self) -> int:
        """The cause that any rank had at the last call, 0 if none."""
        if self._pending is None:
            return 0
        work, news = self._pending
        self._pending = None
        work.wait()
        cause, not_done = news.tolist()
        self.done_by_all = -not_done
        return cause

    def _watch(self, reader: int, launchers: list[psutil.Process]) -> None:
        while True:
            if select.select([reader], [], [], _SECONDS_BETWEEN_LOOKS)[0]:
                for number in os.read(reader, 64):
                    if number in _SIGNALS:  # the pipe gets those of other libraries' handlers too
                        self._on_signal(number)
            if not all(_is_alive(launcher) for launcher in launchers):
                self._request(_CAUSES[-1])

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            self._interrupted_at = self._interrupted_at or now
            if now - self._interrupted_at >= _SECONDS_BETWEEN_INTERRUPTS:
                _leave("stopped by a second SIGINT: the last whole checkpoint stays", _INTERRUPTED)
        self._request(signal.Signals(number).name)

    def _request(self, cause: str) -> None:
        if cause in ("SIGTERM", _CAUSES[-1]) and self._deadline is None:
            self._deadline = _timer(_SECONDS_TO_SAVE, self._give_up, cause)
        if self._cause:
            return
        self._cause = _CAUSES.index(cause)
        if not self._is_deferred:
            _leave(f"stopped by {cause}, outside of training: there is nothing to save", STATUS)

    def _give_up(self, cause: str) -> None:
        if self._is_deferred:
            what = f"stopped by {cause}: not saved within {_SECONDS_TO_SAVE:.0f} s"
            _leave(f"{what}, so the last whole checkpoint stays", STATUS)


def _launchers() -> list[psutil.Process]:
    """The launcher that started this rank, and the one that started that: `deepspeed` runs as two processes.

    A shell, tmux or nohup does not count: ranks that it started live on after it.
    """
    found = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents():
            words = process.cmdline()[:5]  # python, options, a script or -m and a module
            names = [Path(word).name in _LAUNCHERS or word.startswith(_LAUNCHER_MODULES) for word in words]
            if not any(names):
                break
            found.append(process)
    return found


def _is_alive(process: psutil.Process) -> bool:
    """Also of a process whose number was given away since: psutil compares the time at which it began."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _leave(what: str, status: int) -> None:
    """Print one line, and exit at once with all ranks, without waiting for collectives or for buffers in use.

    A rank whose node's first rank has ended is silent: that one has said why, and the launcher ends the others.
    """
    _timer(_SECONDS_TO_LEAVE, os._exit, status)  # if the store that tells the others is gone
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if is_first:
        _print(what)
    if end_all_ranks(status) and not is_first:
        _print(what)
    os._exit(status)


def _print(what: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{what}\n".encode())


def _timer(seconds: float, function: Callable[..., object], *arguments: object) -> threading.Timer:
    timer = threading.Timer(seconds, function, arguments)
    timer.daemon = True
    timer.start()
    return timer


def _forget() -> None:
    """In a forked child: signals do to it what they do to any process."""
    signal.set_wakeup_fd(-1)
    for number in _SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
