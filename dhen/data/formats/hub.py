"""Data sets on the Hugging Face hub, streamed through `datasets`. A YAML schema names the columns.

Here a "file" is `name:split`, or `name:split:i/n` for the i-th part of a split that consists of several shards. Its
rows are numbered from 1.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa

from dhen.data.formats.parquet import BATCH_ROWS, check_types, typed_chunk, used_columns
from dhen.data.formats.raw_rows import WHOLE, DataError, RawChunk, Stretch
from dhen.data.formats.roles import ColumnRoles

_SPLIT_NAMES = {"train": "train", **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"), "test": "test"}
"""Maps the hub's names for splits to ours."""
_MOST_PARTS = 256
"""Of a split. Each part is prepared by one process."""


@dataclass(frozen=True)
class HubReader:
    """Streams the splits of a data set, `owner/name` or `owner/name/configuration`, without storing it on disk."""

    roles: ColumnRoles
    is_label_required: bool = True

    def stretches(self, file: str, num_bytes: float) -> list[Stretch]:
        """A part of a split is not cut."""
        return [WHOLE]

    def chunks(self, file: str, stretch: Stretch = WHOLE) -> Iterator[RawChunk]:
        """Yield the rows of a part in order. Raises DataError, or ValueError for wrong columns."""
        row = 0
        for table in self._tables(file):
            if row == 0:
                self.roles.check_columns(table.column_names, file, is_label_required=self.is_label_required)
                check_types(table.schema, self.roles, file)
            used = used_columns(self.roles, table.column_names, self.roles.kept)
            raw = {name: table[name].combine_chunks() for name in used}
            yield typed_chunk(raw, self.roles, file, row, self.is_label_required)
            row += table.num_rows

    def column_names(self, file: str) -> list[str]:
        """Return the names of all columns, from the first rows."""
        return next(self._tables(file), pa.table({})).column_names

    def row_counts(self, file: str, stretch: Stretch = WHOLE) -> Iterator[tuple[int, int]]:
        """Yield the number of rows so far, by streaming through a part once. Its size in bytes is not known."""
        rows = 0
        for table in self._tables(file):
            rows += table.num_rows
            yield rows, 0

    def _tables(self, file: str) -> Iterator[pa.Table]:
        name, split, part = _parsed(file)
        with _reaching(file):
            stream = _stream(name, split)
            if part is not None:
                stream = stream.shard(num_shards=part[1], index=part[0] - 1)
            yield from stream.with_format("arrow").iter(batch_size=BATCH_ROWS)


def _stream(name: str, split: str) -> datasets.IterableDataset:
    return datasets.load_dataset(*_path_and_configuration(name), split=split, streaming=True)


def hub_splits(name: str) -> dict[str, tuple[str, ...]]:
    """Return the "files" of each split, by our names. Raises DataError if the data set is unreachable or has none."""
    with _reaching(name):
        present = datasets.get_dataset_split_names(*_path_and_configuration(name))
    found: dict[str, str] = {}
    for split in present:
        ours = _SPLIT_NAMES.get(split)
        if ours in found:
            raise DataError(
                f"{name}: the splits {found[ours].rpartition(':')[2]} and {split} both map to {ours}. "
                "Save the right one as Parquet files and use those."
            )
        if ours is not None:
            found[ours] = f"{name}:{split}"
    if not found:
        raise DataError(
            f"{name}: the splits are {', '.join(present)}, but at least one of {', '.join(_SPLIT_NAMES)} is needed. "
            "Save the rows as Parquet files and use those."
        )
    return {split: _parts(file) for split, file in found.items()}


def _parts(file: str) -> tuple[str, ...]:
    with _reaching(file):
        num_parts = min(_stream(*_parsed(file)[:2]).num_shards, _MOST_PARTS)
    return (file,) if num_parts == 1 else tuple(f"{file}:{index}/{num_parts}" for index in range(1, num_parts + 1))


def hub_revision(files: Sequence[str]) -> str:
    """Return a string that changes whenever the content of a split changes. files: all of the split."""
    name, split, _ = _parsed(files[0])
    with _reaching(name):
        builder = datasets.load_dataset_builder(*_path_and_configuration(name))
    return f"{builder.config.name}:{builder.hash}:{split}:{len(files)}"


def _parsed(file: str) -> tuple[str, str, tuple[int, int] | None]:
    """Return the data set's name, the split, and (i, n) of its part."""
    name, split, index, num_parts = re.fullmatch(r"(.+?):([^:]+)(?::(\d+)/(\d+))?", file).groups()
    return name, split, None if index is None else (int(index), int(num_parts))


def _path_and_configuration(name: str) -> tuple[str, str | None]:
    parts = name.split("/")
    if len(parts) == 3 and all(parts) and not Path(name).exists():
        return "/".join(parts[:2]), parts[2]
    return name, None


@contextmanager
def _reaching(place: str) -> Iterator[None]:
    """Turn an error of `datasets` into a DataError that begins with `place`."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{place}: no such local path, and the data set cannot be read from the Hugging Face hub ({text:.300}). "
            "Check the name and the connection."
        ) from error
