"""Where DeepSpeed's C++ extensions are compiled: a folder for each environment, without dead locks.

DeepSpeedCPUAdam and FusedAdam are compiled at their first use. torch guards a build by a file named `lock` in the
extension's folder. A build that is killed leaves it, and every later run waits for it in silence, for good.
"""

import contextlib
import hashlib
import logging
import os
import platform
import sys
import time
from pathlib import Path

import torch

FOLDER = "TORCH_EXTENSIONS_DIR"
_SECONDS_OF_A_START = 60.0
"""A younger lock is left alone: another run may have made it since this one looked."""
logger = logging.getLogger(__name__)


def keep_extensions_apart() -> None:
    """Give this environment a folder for its extensions, unless the user named one; a node's first rank clears it.

    Ours is for one machine and is cleared. In a user's folder, which machines may share, a lock without a process here
    is only reported.
    """
    ours = _folder_of_this_environment()
    folder = Path(os.environ.setdefault(FOLDER, str(ours)))
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    for lock in _dead_locks(folder):
        if folder == ours:
            lock.unlink(missing_ok=True)
            logger.warning("%s: removed. A build that was killed left it, and every run would wait for it.", lock)
        else:
            logger.warning(
                "%s: no process of this machine holds this lock, so a run that needs the extension will wait for it. "
                "Unless another machine builds there now, remove the file.",
                lock,
            )


def _folder_of_this_environment() -> Path:
    """By Python's prefix, torch's version and the machine: what is compiled for one may not run in another."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = hashlib.sha256("\n".join((sys.prefix, torch.__version__, platform.node())).encode()).hexdigest()
    return cache / "dhen" / "torch_extensions" / key[:16]


def _dead_locks(folder: Path) -> list[Path]:
    """This user's locks that no living process holds. torch's FileBaton keeps its lock open as long as it builds."""
    locks = list(folder.glob("*/lock"))
    if not (locks and Path("/proc/self/fd").is_dir()):  # without /proc nobody can tell
        return []
    held, newest, dead = _open_files(), time.time() - _SECONDS_OF_A_START, []
    for lock in locks:
        with contextlib.suppress(FileNotFoundError):  # its build has just ended
            status = lock.stat()
            if status.st_uid == os.geteuid() and status.st_mtime < newest and lock.resolve() not in held:
                dead.append(lock)
    return dead


def _open_files() -> set[Path]:
    """What this user's processes have open."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found.add(Path(os.readlink(link)))
        except OSError:  # another user's, or closed meanwhile
            continue
    return found
