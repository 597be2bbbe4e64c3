"""The format version of a saved file, so that files in another format are refused, not misread."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

VERSION_KEY = "format_version"
_BEFORE_VERSIONS = 1
"""The version of files that were written before files had one."""


class FormatVersionError(ValueError):
    """A file in a newer or an older format. The message names the file, both versions, and what to do."""


def check_format_version(file: Path, values: Mapping[str, Any], reads: int, way_out: str) -> None:
    """Raise FormatVersionError unless the file is in the format that this code reads.

    values: the entries of the file. reads: the version that this code reads and writes. way_out: what the user can do
    instead of changing the code, as the end of a sentence.
    """
    version = values.get(VERSION_KEY, _BEFORE_VERSIONS)
    if version == reads:
        return
    is_older = isinstance(version, int) and version < reads
    other_code = "Use the earlier release that wrote it" if is_older else "Update this code"
    raise FormatVersionError(
        f"{file}: {VERSION_KEY} is {version!r}, but this code reads version {reads}. {other_code}, or {way_out}."
    )
