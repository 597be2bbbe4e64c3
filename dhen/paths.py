"""Resolves the relative paths that a user types: in the working directory first, then in the repository. Writes files
that a crash does not leave half written.
"""

import glob
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import dhen

logger = logging.getLogger(__name__)

_MARK = "ds_configs"
"""A folder that exists only in the repository."""


@cache
def repository() -> Path | None:
    """The checkout that contains the package, or else the running script. None if there is none."""
    places = (Path(dhen.__file__).resolve().parents[1], Path(sys.argv[0]).resolve().parent.parent)
    return next((place for place in places if (place / _MARK).is_dir()), None)


def find(path: str) -> str:
    """Return the repository's path if a relative path or glob matches only there, else the path unchanged.

    >>> find("no_such_file.yaml")
    'no_such_file.yaml'
    """
    root = repository()
    if root is None or Path(path).is_absolute() or _exists(path) or not _exists(str(root / path)):
        return path
    logger.info("%s: taken from %s, because %s does not have it", path, root, Path.cwd())
    return str(root / path)


def looked_in(path: str | Path) -> str:
    """A sentence for an error about a missing path: the folders that were searched. Empty for an absolute path."""
    if Path(path).is_absolute():
        return ""
    places = dict.fromkeys(str(place) for place in (Path.cwd(), repository()) if place)
    return f" Looked in {' and '.join(places)}."


def write_atomically(path: Path, text: str) -> None:
    """Put a file with this text in the place of an earlier one, when all of it is on the disk."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    draft.write_text(text, encoding="utf-8")
    sync(draft)
    draft.replace(path)
    sync(path.parent)


def copy_file(path: Path, to: Path) -> None:
    """Copy a file's content, not its permissions: the original may be read-only. Makes the folder of the copy."""
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, to)


@contextmanager
def drafted(output: Path) -> Iterator[Path]:
    """A path to write a folder to, which takes the place of `output` at the end, unless something is raised.

    Raises ValueError if `output` is neither new nor an empty folder, or cannot be made.
    """
    taken = f"--output {output} exists and is not an empty folder. Choose another name, or remove it."
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(taken)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        place = tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.")
    except OSError as error:
        raise ValueError(f"--output {output} cannot be made: {error.strerror}. Choose another folder.") from error
    with place as between:
        draft = Path(between, output.name)
        yield draft
        try:
            draft.replace(output)
        except OSError as error:  # another process was faster
            raise ValueError(taken) from error


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exists(path: str) -> bool:
    return os.path.exists(path) or (glob.has_magic(path) and next(glob.iglob(path, recursive=True), None) is not None)
