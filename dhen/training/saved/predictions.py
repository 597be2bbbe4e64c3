"""Writes predictions, batch by batch, as Parquet, CSV or JSON lines: as the file's name says."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from dhen.config.command_line import ArgumentError

COLUMNS = pa.schema([("row", pa.int64()), ("prediction", pa.float32()), ("label", pa.float32()),
                     ("file", pa.string()), ("line", pa.int64())])  # fmt: skip


class _JsonLines:
    """One JSON object per row."""

    def __init__(self, file: BinaryIO, _: pa.Schema) -> None:
        self._file = file

    def write_table(self, table: pa.Table) -> None:
        self._file.writelines(f"{json.dumps(row, ensure_ascii=False)}\n".encode() for row in table.to_pylist())

    def close(self) -> None:
        self._file.flush()


_parquet = partial(pyarrow.parquet.ParquetWriter, compression="zstd")
_WRITERS: dict[str, Callable[[BinaryIO, pa.Schema], Any]] = {
    ".parquet": _parquet,
    ".pq": _parquet,
    ".csv": pyarrow.csv.CSVWriter,
    ".jsonl": _JsonLines,
}
"""What appends tables to a file, by the file's name: it has the methods write_table and close."""


def prediction_file(output: str | None) -> Path:
    """The file to write. Raises ArgumentError if its name doesn't end in one of _WRITERS."""
    path = Path(output or "predictions.parquet")
    if path.suffix.lower() not in _WRITERS:
        raise ArgumentError(f"--output is {output}. Use a name that ends in {', '.join(_WRITERS)}.")
    return path


class PredictionWriter:
    """Writes beside `path`, and renames the file into place when it is complete."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._draft = path, path.with_name(f".{path.name}.draft")
        self._file = self._draft.open("wb")
        self._writer = _WRITERS[path.suffix.lower()](self._file, COLUMNS)

    def write(self, table: pa.Table) -> None:
        """Append rows."""
        self._writer.write_table(table)

    def finish(self) -> None:
        """Complete the file."""
        self._writer.close()
        self._file.close()
        self._draft.replace(self._path)
