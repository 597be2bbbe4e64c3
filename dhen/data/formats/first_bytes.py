"""What a file is, by its first bytes. Its name may say something else."""

import bz2
import gzip
import io
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from dhen.data.formats.raw_files import is_url, open_file

START_BYTES = 4096
"""How much of a file's start is looked at."""
_UNPACK = "Unpack it first; only plain text, gzip, zstd and bzip2 can be read."
_CONVERT = "Save the table as Parquet or CSV."
PARQUET = "this is a Parquet file. Use --dataset_format parquet, and no text files beside it."
_COMPLAINTS = {
    b"PAR1": PARQUET,
    b"PK\x03\x04": f"this is a zip archive or an Excel file. {_UNPACK} Save a sheet of Excel as CSV.",
    b"\xfd7zXZ": f"this is an xz file. {_UNPACK}",
    b"7z\xbc\xaf\x27\x1c": f"this is a 7z archive. {_UNPACK}",
    b"\x04\x22\x4d\x18": f"this is an lz4 file. {_UNPACK}",
    **dict.fromkeys((b"ARROW1", b"FEA1", b"\xff\xff\xff\xff"), f"this is an Arrow or Feather file. {_CONVERT}"),
    b"ORC": f"this is an ORC file. {_CONVERT}",
    b"Obj\x01": f"this is an Avro file. {_CONVERT}",
    b"SQLite format 3\x00": f"this is an SQLite database. {_CONVERT}",
    b"\x89HDF\r\n\x1a\n": f"this is an HDF5 file. {_CONVERT}",
    b"\x93NUMPY": f"this is a NumPy file. {_CONVERT}",
    b"\xd0\xcf\x11\xe0": f"this is an Excel file. {_CONVERT}",
    **{bytes((0x80, version)): f"this is a pickle. {_CONVERT}" for version in range(2, 6)},
    **dict.fromkeys((b"\xff\xfe", b"\xfe\xff"), "this is UTF-16 text. Convert it with `iconv -f UTF-16 -t UTF-8`."),
}


@dataclass(frozen=True)
class Compression:
    """How text may be compressed: by which tool, how such files begin, and what reads them.

    contents: returns the contents of all members, streams or frames in a file. Reading these raises one of DAMAGED.
    """

    tool: str
    suffix: str
    start: re.Pattern[bytes]
    contents: Callable[[BinaryIO], BinaryIO]


class _Bzip2Streams(io.RawIOBase):
    """All streams in a bzip2 file. Python's BZ2File takes what is damaged behind the first for rubbish, in silence."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self._stream = raw, bz2.BZ2Decompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        data = b""
        while not data:
            packed = b""
            if self._stream.eof:
                packed = self._stream.unused_data or self._raw.read(io.DEFAULT_BUFFER_SIZE)
                if not packed:
                    return 0
                self._stream = bz2.BZ2Decompressor()
            elif self._stream.needs_input:
                packed = self._raw.read(io.DEFAULT_BUFFER_SIZE)
                if not packed:
                    raise EOFError("the file ends within a stream")
            data = self._stream.decompress(packed, len(buffer))
        buffer[: len(data)] = data
        return len(data)


COMPRESSIONS = (
    Compression("gzip", ".gz", re.compile(rb"\x1f\x8b"), lambda raw: gzip.GzipFile(fileobj=raw)),
    Compression(
        "bzip2",
        ".bz2",
        re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
        lambda raw: io.BufferedReader(_Bzip2Streams(raw), START_BYTES),
    ),
    Compression(
        "zstd",
        ".zst",
        re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
        lambda raw: io.BufferedReader(pa.CompressedInputStream(raw, "zstd"), START_BYTES),
    ),
)
DAMAGED = (EOFError, OSError, zlib.error)
"""What reading a truncated or damaged compressed file raises."""
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")


def first_bytes(file: str) -> bytes:
    """Return the first bytes of a file. Raises FileNotFoundError, or UnreachableError for a URL."""
    if not is_url(file) and not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such file. Check the path.")
    with open_file(file, START_BYTES) as content:
        return content.read(START_BYTES)


def compression_of(start: bytes) -> Compression | None:
    """Return how a file is compressed, or None if it is not. `start`: its first bytes."""
    return next((each for each in COMPRESSIONS if each.start.match(start)), None)


def complaint(start: bytes) -> str | None:
    """Return what a file is and what to do with it, or None if it is text or unknown. `start`: its first bytes."""
    if start[257:262] == b"ustar":
        return f"this is a tar archive. {_UNPACK}"
    if packed := compression_of(start):
        return f"this is a {packed.tool} file. Unpack it first, or use --dataset_format csv if it holds plain text."
    for magic, sentence in _COMPLAINTS.items():
        # A text may start with the letters PAR1 or ORC, as the name of a column.
        if start.startswith(magic) and (not magic.isalnum() or _CONTROL.search(start)):
            return sentence
    return None
