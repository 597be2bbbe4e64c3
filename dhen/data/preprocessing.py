"""Raw files to a prepared folder (dhen/data/schema.py), in a stream.

Hashed ids take one pass over the data, a vocabulary one more before it (which counts the rows of the train
split), a sequential split a first one that only counts lines. Rows are read, encoded and written chunk by chunk, so
memory holds a block of the input (8 MiB of text, or 65,536 Parquet rows) with its few copies, and one row group of
each split, whatever the input's size. One thing grows with the data: the distinct keys of the features that are
encoded by a vocabulary (`KeyCounts` says how much a key takes).
"""

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dhen.data.encoding import Encoder, check_same_features, new_columns
from dhen.data.raw_rows import BadRow, DataError, RawChunk, Reader
from dhen.data.schema import Schema, SplitCounts
from dhen.data.settings import PreparationSettings
from dhen.data.sources import Source, open_sources
from dhen.data.text_blocks import one_array
from dhen.data.vocabulary import KeyCounts, Vocabulary, flat_keys, load_vocabulary
from dhen.data.writing import BadRowList, SplitWriter

FORMAT_VERSION = 1
"""Goes up when the same input and settings give another folder: then nothing old is taken from a cache."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparationProgress:
    """How far a pass is. `bytes_total` is 0 where it isn't known."""

    stage: str
    rows: int
    bytes_read: int
    bytes_total: int
    is_done: bool = False


ProgressCallback = Callable[[PreparationProgress], None]


def prepare(settings: PreparationSettings, folder: str | Path, *, progress: ProgressCallback | None = None) -> Schema:
    """Write the prepared folder and return its schema. The folder appears whole or not at all.

    progress: called after each chunk; without it a log line tells the state every ten seconds.

    Raises FileExistsError where `folder` exists, FileNotFoundError, ValueError, and DataError (a ValueError) for data
    that can't be used: the message names file and row.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder}: it exists already. Remove it or choose another folder.")
    with _appearing_whole(folder) as unfinished:
        return _prepare_in(unfinished, settings, progress or _LogProgress())


def _prepare_in(folder: Path, settings: PreparationSettings, progress: ProgressCallback) -> Schema:
    reader, format_name, sources = open_sources(settings)
    encoder = _encoder(reader, sources, settings, progress)
    for name, vocabulary in encoder.vocabularies.items():
        vocabulary.save(folder, name)
    splits = _write_splits(folder, reader, sources, encoder, settings, progress)
    schema = Schema(encoder.dense, encoder.sparse, splits, _source(settings, format_name, sources))
    schema.save(folder)
    return schema


def _encoder(
    reader: Reader, sources: tuple[Source, ...], settings: PreparationSettings, progress: ProgressCallback
) -> Encoder:
    if settings.schema_from is not None:
        schema = Schema.load(Path(settings.schema_from))
        check_same_features(reader.roles, schema.dense, schema.sparse, str(settings.schema_from))
        with_vocabulary = [column.name for column in schema.sparse if column.encoding == "vocabulary"]
        vocabularies = {name: load_vocabulary(Path(settings.schema_from), name) for name in with_vocabulary}
        return Encoder(schema.dense, schema.sparse, vocabularies)
    vocabularies = _count_vocabularies(reader, sources, settings, progress)
    return Encoder(*new_columns(reader.roles, settings, vocabularies), vocabularies)


def _count_vocabularies(
    reader: Reader, sources: tuple[Source, ...], settings: PreparationSettings, progress: ProgressCallback
) -> dict[str, Vocabulary]:
    """The first of two passes. Keys of the train split count: a key that only tests know has nothing to learn from."""
    roles = {r.name: r for r in reader.roles.sparse if (r.encoding or settings.id_encoding) == "vocabulary"}
    if not roles:
        return {}
    sources = tuple(source for source in sources if "train" in source.rule.splits)
    if not sources:
        raise DataError("a vocabulary is made from the train split, but there is none. Give train rows or schema_from.")
    counts = {name: KeyCounts() for name in roles}
    for source, chunk, split_of_row, _ in _chunks(reader, sources, settings, progress, "counting keys"):
        table = chunk.table.filter(split_of_row == source.rule.splits.index("train"))
        for name, count in counts.items():
            count.add(flat_keys(one_array(table[name])))
    return {name: count.vocabulary(roles[name].min_count or settings.min_count) for name, count in counts.items()}


def _write_splits(
    folder: Path,
    reader: Reader,
    sources: tuple[Source, ...],
    encoder: Encoder,
    settings: PreparationSettings,
    progress: ProgressCallback,
) -> dict[str, SplitCounts]:
    """The last pass."""
    splits = [split for source in sources for split in source.rule.splits]
    writers = {split: SplitWriter(folder / split) for split in splits}
    bad_rows = dict.fromkeys(splits, 0)
    with ExitStack() as stack:
        for writer in writers.values():
            stack.callback(writer.close)
        bad_row_list = stack.enter_context(BadRowList(folder))
        for source, chunk, split_of_row, split_of_bad in _chunks(reader, sources, settings, progress, "writing"):
            bad_row_list.write(chunk.bad)
            encoded = encoder.encode(chunk.table)
            for index, split in enumerate(source.rule.splits):
                is_here = split_of_row == index
                writers[split].write(encoded if is_here.all() else encoded.filter(is_here))
                bad_rows[split] += int(np.count_nonzero(split_of_bad == index))
    counts = {split: writer.counts(bad_rows[split]) for split, writer in writers.items()}
    for split, count in counts.items():
        if count.rows == 0:
            raise DataError(
                f"the split {split} has no rows ({count.bad_rows} bad ones were skipped), of "
                f"{sum(c.rows for c in counts.values())} in all. Give more rows, or other files or split_fractions."
            )
    return counts


def _chunks(
    reader: Reader,
    sources: tuple[Source, ...],
    settings: PreparationSettings,
    progress: ProgressCallback,
    stage: str,
) -> Iterator[tuple[Source, RawChunk, np.ndarray, np.ndarray]]:
    """All chunks in order: (source, chunk, the split of each of its good rows, the split of each of its bad rows)."""
    bytes_total = sum(_size(file) for source in sources for file in source.files)
    rows, bytes_before = 0, 0
    for source in sources:
        position = 0
        for file in source.files:
            end_position = position
            for chunk in reader.chunks(file):
                _stop_at_bad_row(chunk.bad, settings)
                first = position - 1 - chunk.header_rows
                bad = np.array([bad_row.row for bad_row in chunk.bad], dtype=np.int64)
                yield source, chunk, source.rule.assign(first + chunk.rows), source.rule.assign(first + bad)
                rows += len(chunk.rows)
                end_position = position + max(chunk.end_row - chunk.header_rows, 0)
                progress(PreparationProgress(stage, rows, bytes_before + chunk.bytes_read, bytes_total))
            position = end_position
            bytes_before += _size(file)
    progress(PreparationProgress(stage, rows, bytes_total, bytes_total, is_done=True))


def _stop_at_bad_row(bad_rows: tuple[BadRow, ...], settings: PreparationSettings) -> None:
    if bad_rows and settings.bad_rows == "error":
        raise DataError(f"{bad_rows[0]} Correct it, or skip and list such rows with --bad_rows skip.")


def _size(file: str) -> int:
    path = Path(file)
    return path.stat().st_size if path.is_file() else 0


def _source(settings: PreparationSettings, format_name: str, sources: tuple[Source, ...]) -> dict[str, object]:
    """What schema.json says about where the rows came from."""
    said = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()}
    del said["block_bytes"]
    files = {"+".join(source.rule.splits): list(source.files) for source in sources}
    return {"format": format_name, "format_version": FORMAT_VERSION, "files": files, "settings": said}


@contextmanager
def _appearing_whole(folder: Path) -> Iterator[Path]:
    """A hidden sibling to write into, which takes the folder's name at the end, or goes if anything fails.

    A killed process leaves the sibling, `.<name>.unfinished-*`; it has no schema.json before its very last moment, and
    nobody looks for it by that name. Where another process finished the same folder first, raises FileExistsError.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.unfinished-", dir=folder.parent))
    # mkdtemp makes it for the owner alone; the finished folder is like any other.
    unfinished.chmod(0o777 & ~_umask())
    try:
        yield unfinished
        try:
            os.rename(unfinished, folder)
        except OSError as error:
            if not folder.exists():
                raise
            raise FileExistsError(f"{folder}: another process has made it in the meantime.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


class _LogProgress:
    """One log line every ten seconds, and one at the end of a pass."""

    _EVERY_SECONDS = 10.0

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()

    def __call__(self, state: PreparationProgress) -> None:
        now = time.monotonic()
        if not state.is_done and now - self._last < self._EVERY_SECONDS:
            return
        self._last = now
        share = f"{state.bytes_read / state.bytes_total:.0%} | " if state.bytes_total else ""
        seconds = now - self._start
        logger.info(
            "%s | %s%s rows | %s rows/s",
            state.stage,
            share,
            f"{state.rows:,}",
            f"{state.rows / max(seconds, 1e-9):,.0f}",
        )
