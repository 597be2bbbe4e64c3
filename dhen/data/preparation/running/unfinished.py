"""The hidden folder of an unfinished preparation: what each stage made of each piece.

A preparation that was killed goes on with the pieces that are missing. Several machines that share the folder can each
prepare a share of the pieces.
"""

import fcntl
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any
from uuid import uuid4

from dhen.data.formats.raw_files import UnreachableError
from dhen.data.preparation.reading.pieces import Piece
from dhen.data.preparation.reading.raw_stream import Report
from dhen.data.preparation.running.progress import PreparationProgress, ProgressCallback
from dhen.data.preparation.running.runners import Runner
from dhen.paths import sync

_MARK = ".unfinished-"
_RESULT, _FAILED = "result.json", "failed-"
_KEPT_SECONDS, _EMPTY_KEPT_SECONDS = 7 * 86_400, 3_600
_PATIENCE_SECONDS = 7_200.0
_POLL_SECONDS = 1.0

PieceTask = Callable[[Piece, Path, Report], dict[str, Any]]
"""Writes files into the folder, and returns what is to be remembered, with the number of `rows`, as JSON."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """The share of the pieces that one of `count` machines prepares; `index` counts from 0."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read `index/count`. Raises ValueError."""
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise ValueError(f"--shard is {text!r}. Use index/count, such as 0/8 for the first of 8, 7/8 for the last.")
        return cls(int(index), int(count))


class OtherShardError(ValueError):
    """Another shard failed."""


class Unfinished:
    """Runs the stages of a preparation in a folder. A shard does its own pieces and waits for those of the others."""

    def __init__(self, path: Path, runner: Runner, progress: ProgressCallback, shard: Shard | None = None) -> None:
        self.path = path
        self._runner, self._progress, self._shard = runner, progress, shard
        if shard is not None:
            start = path / f".began-{shard.index}"
            start.touch()  # by the clock of the file system, which all shards share
            self._began = start.stat().st_mtime_ns

    def folder(self, stage: str, piece: Piece) -> Path:
        """What a stage made of a piece. The folder exists only if it is complete."""
        return _folder(self._stage(stage), piece)

    def result(self, stage: str, piece: Piece) -> dict[str, Any]:
        """What the task of a stage returned for a piece."""
        return json.loads((self.folder(stage, piece) / _RESULT).read_text(encoding="utf-8"))

    def run(self, stage: str, task: PieceTask, pieces: Sequence[Piece]) -> None:
        """Run a stage for the pieces that are missing, and return when all are there."""
        shard = self._shard
        own = [piece for piece in pieces if shard is None or piece.index % shard.count == shard.index]
        done, missing = [], []
        for piece in own:
            (done if self.folder(stage, piece).exists() else missing).append(piece)
        rows, num_bytes = (sum(self.result(stage, piece)["rows"] for piece in done), sum(p.num_bytes for p in done))
        if done:
            logger.info("%s: goes on; %d of %d pieces were done before", stage, len(done), len(own))
        total, lock = sum(piece.num_bytes for piece in own), Lock()

        def report(more_rows: int, more_bytes: int) -> None:
            nonlocal rows, num_bytes
            with lock:
                rows, num_bytes = rows + more_rows, num_bytes + more_bytes
                self._progress(PreparationProgress(stage, rows, num_bytes, total))

        self._runner(partial(_do, self._stage(stage), task), missing, report)
        self._progress(PreparationProgress(stage, rows, total, total, is_done=True))
        self._wait(stage, [self.folder(stage, piece) for piece in pieces])

    def once(self, name: str, make: Callable[[Path], None]) -> Path:
        """Return the folder of this name, which the first shard makes, if there are several."""
        path = self.path / name
        if not path.exists() and (self._shard is None or self._shard.index == 0):
            _make(path, make)
        self._wait(name, [path])
        return path

    def give_up(self, error: Exception) -> None:
        """Tell the other shards that this one failed, unless one of them told it so."""
        if self._shard is not None and not isinstance(error, OtherShardError):
            (self.path / f"{_FAILED}{self._shard.index}").write_text(str(error), encoding="utf-8")

    def _stage(self, stage: str) -> Path:
        return self.path / stage.replace(" ", "_")

    def _wait(self, what: str, paths: Sequence[Path]) -> None:
        """Wait for what other shards make."""
        count, since = len(paths), time.monotonic()
        while missing := [path for path in paths if not path.exists()]:
            if self._shard is None:
                raise FileNotFoundError(f"{missing[0]}: a worker made this folder, but it is not seen here.")
            for failed in self.path.glob(f"{_FAILED}*"):
                if failed.stat().st_mtime_ns > self._began:
                    which, why = failed.name.removeprefix(_FAILED), failed.read_text(encoding="utf-8")
                    raise OtherShardError(f"shard {which} failed: {why} Run it, and this one, again.")
            if len(missing) < count:
                count, since = len(missing), time.monotonic()
                logger.info("%s: waiting for other shards, which have %d pieces left", what, count)
            if time.monotonic() - since > _PATIENCE_SECONDS:
                numbers = sorted({int(p.name) % self._shard.count if p.name.isdecimal() else 0 for p in missing})
                raise TimeoutError(
                    f"{self.path}: in {_PATIENCE_SECONDS / 3600:.0f} hours, nothing came from shard "
                    f"{', '.join(map(str, numbers))}. Start it, and this one, again; what is done stays."
                )
            time.sleep(_POLL_SECONDS)


def _folder(stage: Path, piece: Piece) -> Path:
    return stage / f"{piece.index:06d}"


def _do(stage: Path, task: PieceTask, piece: Piece, report: Report) -> None:
    def make(draft: Path) -> None:
        result = task(piece, draft, report)
        (draft / _RESULT).write_text(json.dumps(result), encoding="utf-8")

    _make(_folder(stage, piece), make)


def _make(path: Path, make: Callable[[Path], None]) -> None:
    """Make a folder atomically, unless another process does so meanwhile."""
    draft = path.with_name(f".{path.name}-{uuid4().hex}")
    draft.mkdir(parents=True)
    try:
        make(draft)
        for file in (*draft.rglob("*"), draft):
            sync(file)
        draft.rename(path)
    except OSError:
        if not path.exists():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def unfinished_folder(folder: Path, facts: str, *, is_shared: bool) -> Iterator[Path]:
    """Provide a hidden sibling of `folder` to gather pieces in: the one that an earlier process left, if there is one.

    facts: a digest of the settings and files; the sibling belongs to these. is_shared: other shards use it, too. It is
    removed on success, after a ValueError, and if `folder` exists; but it stays where a piece is finished if the
    process is killed, interrupted or out of disk, or a server does not answer. The next preparation in the same parent
    folder removes what others left a week ago, or an hour ago without a finished piece, unless another one runs there.
    Raises FileExistsError if a shard finds it in use by no shard.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}{_MARK}{facts}")
    parent = own = os.open(folder.parent, os.O_RDONLY)
    is_alone = None
    try:
        if _lock(parent, fcntl.LOCK_EX):  # no other preparation runs here
            for leftover in folder.parent.glob(f".*{_MARK}*"):
                kept = _KEPT_SECONDS if _has_pieces(leftover) else _EMPTY_KEPT_SECONDS
                if leftover != path and time.time() - _last_change(leftover) > kept:
                    shutil.rmtree(leftover, ignore_errors=True)
        _lock(parent, fcntl.LOCK_SH)
        path.mkdir(exist_ok=True)  # with the usual permissions; those of tempfile's folders exclude other users
        own = os.open(path, os.O_RDONLY)
        is_alone = _lock(own, fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX)
        if is_alone is False:
            if is_shared:
                raise FileExistsError(f"{path}: a preparation without --shard uses this folder. Wait for its end.")
            path, is_alone = path.with_name(f"{path.name}-{uuid4().hex}"), True
            path.mkdir()
        yield path
    except BaseException as error:
        is_final = isinstance(error, ValueError | FileExistsError) and not isinstance(error, UnreachableError)
        if is_alone and not is_shared and (is_final or not _has_pieces(path)):
            _remove(path)
        raise
    else:
        if not is_shared:
            _remove(path)
    finally:
        for descriptor in {parent, own}:
            os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a folder. If that is interrupted, no preparation goes on with what is left."""
    path = path.rename(path.with_name(f"{path.name}-{uuid4().hex}"))
    shutil.rmtree(path, ignore_errors=True)


def _last_change(path: Path) -> float:
    try:
        return max(each.stat().st_mtime for each in (path, *path.rglob("*")))
    except OSError:  # another machine is at work there
        return math.inf


def _has_pieces(path: Path) -> bool:
    return next(path.glob(f"*/*/{_RESULT}"), None) is not None


def _lock(descriptor: int, mode: int) -> bool | None:
    """Whether the lock was to be had at once; None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
