"""Where a relative path that a user types is looked for: the working directory, then the repository."""

import glob
import sys
from functools import cache
from pathlib import Path

import dhen

_MARK = "ds_configs"
"""A folder that only the repository has."""


@cache
def repository() -> Path | None:
    """The checkout that the package, or else the running script, lies in; None where there is none."""
    places = (Path(dhen.__file__).resolve().parents[1], Path(sys.argv[0]).resolve().parent.parent)
    return next((place for place in places if (place / _MARK).is_dir()), None)


def find(path: str) -> str:
    """The path or glob as it is, if something is there or it is absolute; else the repository's, if it is there.

    >>> find("no_such_file.yaml")
    'no_such_file.yaml'
    """
    root = repository()
    if root is None or Path(path).is_absolute() or _is_there(path):
        return path
    return str(root / path) if _is_there(str(root / path)) else path


def looked_in(path: str | Path) -> str:
    """For an error about a path that is not there: the places where it was looked for, as a sentence."""
    if Path(path).is_absolute():
        return ""
    places = dict.fromkeys(str(place) for place in (Path.cwd(), repository()) if place)
    return f" Looked in {' and '.join(places)}."


def _is_there(path: str) -> bool:
    return Path(path).exists() or (glob.has_magic(path) and next(glob.iglob(path, recursive=True), None) is not None)
