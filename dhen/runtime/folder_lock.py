"""Keeps a second run out of a folder. The kernel drops the lock with the process, so a killed run blocks nobody."""

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path
from typing import TextIO

LOCK_FILE = ".lock"
_held: list[TextIO] = []
logger = logging.getLogger(__name__)


def check_folder_is_free(folder: Path) -> None:
    """Raise ValueError, which says which, if another run has the folder. Changes nothing."""
    if not _held and (folder / LOCK_FILE).is_file() and (file := _lock(folder)):
        file.close()


def lock_folder(folder: Path) -> None:
    """Lock an existing folder until this process ends, and write into the lock who has it. Raises ValueError."""
    if file := _lock(folder):
        _held.append(file)  # to close it would drop the lock
        file.truncate(0)
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            who = f"on {socket.gethostname()}, process {os.getpid()}, since {time.strftime('%F %T')}"
            print(who, file=file, flush=True)


def _lock(folder: Path) -> TextIO | None:
    """The locked file; None, after a warning, on a disk without locks."""
    file = (folder / LOCK_FILE).open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        with file:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                logger.warning("%s: this disk has no locks (%s). Start no other run in it", folder, error.strerror)
                return None
            file.seek(0)
            raise ValueError(
                f"output_dir {folder} is in use by another run ({file.read().strip()}). Choose another --output_dir, "
                "or wait until that run has ended."
            ) from error
    return file
