"""Writes predictions, batch by batch, as Parquet, CSV or JSON lines: as the file's name says.

Each of several ranks writes a part of its own, a Parquet file. Nothing is gathered in memory.
"""

import json
import shutil
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
    """The file to write, or the folder if its name has no ending. Raises ArgumentError if it cannot be written."""
    path = Path(output or "predictions.parquet")
    if path.suffix.lower() not in ("", *_WRITERS):
        raise ArgumentError(
            f"--output is {output}. Use a name that ends in {', '.join(_WRITERS)}, or a name without an ending for a "
            "folder."
        )
    if not path.suffix and (path.is_file() or (path.is_dir() and any(path.iterdir()))):
        raise ArgumentError(f"--output is {output}, which exists. Remove it, or choose another name.")
    return path


def parts_folder(path: Path) -> Path:
    """Where several ranks write their parts of a file; a folder is its own."""
    return path.with_name(f".{path.name}.parts") if path.suffix else path


def part_of(folder: Path, rank: int) -> Path:
    return folder / f"part-{rank:05d}.parquet"


def join_parts(folder: Path, ranks: int, path: Path) -> None:
    """Write the rows of all parts to one file, in the order of the ranks, and remove the parts.

    Raises FileNotFoundError if a part is not there.
    """
    parts = [part_of(folder, rank) for rank in range(ranks)]
    for rank, part in enumerate(parts):
        if not part.is_file():
            raise FileNotFoundError(
                f"{part}: the part of rank {rank} is not there. If the ranks do not share this folder, use an --output "
                "without an ending: each rank's part then stays where it was written."
            )
    writer = PredictionWriter(path)
    for part in parts:
        with pyarrow.parquet.ParquetFile(part) as file:
            for batch in file.iter_batches():
                writer.write(pa.Table.from_batches([batch]))
    writer.finish()
    shutil.rmtree(folder)


class PredictionWriter:
    """Writes beside `path`, and renames the file into place when it is complete."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._draft = path, path.with_name(f".{path.name}.draft")
        self._file = self._draft.open("wb")
        self._writer = _WRITERS[path.suffix.lower()](self._file, COLUMNS)

    def write(self, table: pa.Table) -> None:
        self._writer.write_table(table)

    def finish(self) -> None:
        self._writer.close()
        self._file.close()
        self._draft.replace(self._path)
