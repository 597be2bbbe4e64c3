"""The format version of a saved file, so that files in another format are refused, not misread."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

VERSION_KEY = "format_version"


def check_format_version(file: Path, values: Mapping[str, Any], reads: int, way_out: str) -> None:
    """Raise ValueError, which names the file and both versions, unless the file is in the format that this code reads.

    values: the entries of the file. reads: the version that this code reads and writes. way_out: what the user can do
    instead of using other code, as the end of a sentence.
    """
    version = values.get(VERSION_KEY)
    if version != reads:
        raise ValueError(
            f"{file}: {VERSION_KEY} is {version!r}, but this code reads version {reads}. Use the code that wrote the "
            f"file, or {way_out}."
        )
