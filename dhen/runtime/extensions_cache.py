"""Where DeepSpeed's C++ extensions are compiled: one folder per environment, cleared of stale locks.

DeepSpeedCPUAdam and FusedAdam are compiled at first use, and the run says so. torch guards each build with a file
`lock` in the extension's folder. If a build is killed, its lock stays, and later runs would silently wait for it.
"""

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import platform
import shutil
import sys
import time
from pathlib import Path

import psutil
import torch

FOLDER = "TORCH_EXTENSIONS_DIR"
_SECONDS_OF_A_START = 60.0
"""Younger locks are left alone: another run may have created them after this run listed the open files."""
logger = logging.getLogger(__name__)


def keep_extensions_apart() -> None:
    """Give this environment its own folder for extensions, unless the user set one. Handle stale locks in it.

    Our folder belongs to one machine, so the first rank of a node removes stale locks. Machines may share a folder that
    the user set, so there a stale lock is only reported.
    """
    ours = _folder_of_this_environment()
    folder = Path(os.environ.setdefault(FOLDER, str(ours)))
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    for lock in dead_locks(folder):
        if folder == ours:
            lock.unlink(missing_ok=True)
            logger.warning(
                "%s: removed this stale lock. A killed build left it, and every run would wait for it.", lock
            )
        else:
            logger.warning(
                "%s: no process on this machine holds this lock, so a run that needs the extension will wait for it. "
                "Remove the file, unless another machine is building there now.",
                lock,
            )


def announce_builds() -> None:
    """Let each node say in a line what DeepSpeed compiles, and where, and in another how long it took. Idempotent."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    load = OpBuilder.jit_load
    if load.__module__ == __name__:
        return

    def announced(builder: OpBuilder, verbose: bool = True) -> object:
        folder, start = Path(os.environ[FOLDER]) / builder.name, time.monotonic()
        is_silent = os.environ.get("LOCAL_RANK", "0") != "0" or (folder / f"{builder.name}.so").exists()
        if not is_silent:
            logger.warning("compiling DeepSpeed's %s in %s, once; this takes about a minute", builder.name, folder)
        extension = load(builder, verbose)
        if not is_silent:
            logger.warning("compiled %s in %.0f s", builder.name, time.monotonic() - start)
        return extension

    OpBuilder.jit_load = announced


def _folder_of_this_environment() -> Path:
    """A folder for this Python prefix, torch, DeepSpeed and machine: extensions may not run under another."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    where = (sys.prefix, torch.__version__, importlib.metadata.version("deepspeed"), platform.node())
    key = hashlib.sha256("\n".join(where).encode()).hexdigest()
    return cache / "dhen" / "torch_extensions" / key[:16]


def dead_locks(folder: Path) -> list[Path]:
    """This user's locks that no running process holds. torch's FileBaton keeps the lock file open while it builds."""
    locks = list(folder.glob("*/lock"))
    if not (locks and Path("/proc/self/fd").is_dir()):  # without /proc there is no way to tell
        return []
    held, newest, dead = _open_files(), time.time() - _SECONDS_OF_A_START, []
    for lock in locks:
        with contextlib.suppress(FileNotFoundError):  # the build has just ended
            status = lock.stat()
            if status.st_uid == os.geteuid() and status.st_mtime < newest and lock.resolve() not in held:
                dead.append(lock)
    return dead


def _open_files() -> set[Path]:
    """All files that this user's processes have open."""
    processes = psutil.process_iter(["open_files"])  # None for a process of another user, or one that has ended
    return {Path(file.path) for process in processes for file in process.info["open_files"] or ()}


def missing_compiler() -> str | None:
    """The names of the C++ compilers that torch looks for, if none of them is on PATH."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    return None if any(map(shutil.which, names)) else " or ".join(names)
