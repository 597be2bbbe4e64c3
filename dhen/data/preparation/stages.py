"""The stages of a preparation, over the pieces of the data.

1. Count rows, without parsing them, where the row numbers or the splits of later pieces depend on it. Or read times.
2. Count keys and fit numbers of the train split: only for a vocabulary, an `auto`, bins or a scale.
3. Encode all rows and write them.

Rows are read, encoded and written chunk by chunk. A process therefore holds a few copies of one input block (8 MiB of
text, or 65,536 Parquet rows) and one row group per split, regardless of the input's size. While keys are counted, each
feature with a vocabulary takes up to 300 MB, and while its counts are merged, up to 2 GB. Each feature with bins takes
up to 16 MB.
"""

import logging
import math
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dhen.data.formats.canonical import canonical_keys
from dhen.data.formats.raw_rows import DataError
from dhen.data.formats.roles import COLUMNS_FILE, ColumnRoles, as_yaml, load_roles
from dhen.data.preparation.encoding.encoder import (
    MOST_KEYS,
    AskedEncoding,
    Encoder,
    asked_encodings,
    check_same_features,
    check_same_meaning,
    hash_rows,
    new_columns,
)
from dhen.data.preparation.encoding.key_counts import KeyCounts, KeySketch, estimated_keys
from dhen.data.preparation.encoding.numbers import BinFit, number_fits
from dhen.data.preparation.encoding.vocabulary import (
    KeyIds,
    build_vocabulary,
    copy_vocabulary,
    load_vocabulary,
    save_key_ids,
)
from dhen.data.preparation.reading import pieces as cutting
from dhen.data.preparation.reading.pieces import Piece
from dhen.data.preparation.reading.raw_stream import Raw, Report, split_starts
from dhen.data.preparation.reading.sources import Source
from dhen.data.preparation.running.unfinished import Unfinished
from dhen.data.preparation.writing import SplitWriter, list_bad_rows
from dhen.data.schema import ESTIMATED_KEYS, FILE, ORDER, ROW, TIME, Schema, TaskColumn, kept_column

COUNTING, TIMES, KEYS, WRITING = "counting rows", "reading times", "counting keys", "writing"
_KEYS_FOLDER, _NUMBERS_FOLDER, _TIMES_FILE, _ENCODER = "keys", "numbers", "times.npz", "encoder"
logger = logging.getLogger(__name__)


def run_stages(work: Unfinished, raw: Raw, sources: tuple[Source, ...]) -> tuple[list[Piece], Path]:
    """Run all stages. Returns the pieces, and the folder of the encoder."""
    settings = raw.settings
    is_sequential, by_time = settings.split_order == "sequential", settings.time_column is not None
    pieces = cutting.cut(raw.reader, sources, cutting.PIECE_BYTES if settings.head is None else math.inf)
    if counted := cutting.to_count(pieces, in_order=is_sequential and not by_time):
        work.run(COUNTING, partial(_count_rows, raw), counted)
    pieces = cutting.place(pieces, {piece.index: work.result(COUNTING, piece)["parts"] for piece in counted})
    if is_sequential and by_time:
        raw = replace(raw, starts=_first_times(work, raw, [piece for piece in pieces if len(piece.splits) > 1]))
    encoder = _fit_encoder(work, raw, pieces) if settings.schema_from is None else _given_encoder(work, raw)
    work.run(WRITING, partial(_write_rows, raw, encoder), pieces)
    return pieces, encoder


def _count_rows(raw: Raw, piece: Piece, folder: Path, report: Report) -> dict[str, Any]:
    counts = raw.count(piece, report)
    return {"rows": sum(counts), "parts": counts}


def _first_times(work: Unfinished, raw: Raw, pieces: list[Piece]) -> tuple[float, ...]:
    """The first time of each split but the first. Of many rows, from a sample: see BinFit."""
    work.run(TIMES, partial(_read_times, raw), pieces)
    fit = BinFit(bins=0)
    for piece in pieces:
        fit.merge(work.folder(TIMES, piece) / _TIMES_FILE)
    return fit.values_at(split_starts(raw.settings))


def _read_times(raw: Raw, piece: Piece, folder: Path, report: Report) -> dict[str, Any]:
    fit, rows = BinFit(bins=0, piece=piece.index), 0
    for chunk, _, _ in raw.chunks(piece, report):
        fit.add(chunk.table[TIME].to_numpy())
        rows += len(chunk.rows)
    fit.save(folder / _TIMES_FILE)
    return {"rows": rows}


def _given_encoder(work: Unfinished, raw: Raw) -> Path:
    """Copy the encoder of a prepared folder or a saved model."""
    origin = Path(raw.settings.schema_from)
    schema = Schema.load(origin)
    roles = raw.reader.roles
    check_same_features(roles, schema, origin)
    if (origin / COLUMNS_FILE).is_file():
        check_same_meaning(roles, load_roles(origin / COLUMNS_FILE), origin)

    def make(folder: Path) -> None:
        for name in schema.looked_up:
            copy_vocabulary(origin, folder, name)
        _save_encoder(folder, replace(schema, splits={}, source={}, tasks=_tasks_of(raw)), roles)

    return work.once(_ENCODER, make)


def _fit_encoder(work: Unfinished, raw: Raw, pieces: list[Piece]) -> Path:
    """Count keys and fit numbers in a stage of its own, where needed. Returns the folder of the encoder.

    Only the train split counts: a key that never occurs there cannot be trained.
    """
    roles, settings = raw.reader.roles, raw.settings
    asked = asked_encodings(roles, settings)
    trained = Schema.load(Path(settings.like)) if settings.like else None
    kept, fits = number_fits(roles, trained)
    counted = {name: each for name, each in asked.items() if each.encoding != "hash" or each.hash_size == "auto"}
    train = [piece for piece in pieces if "train" in piece.splits]
    if not train:
        needs = {"vocabulary": "a vocabulary", "hash": "the hash_size auto"}
        wanted = [f"the bins or the scale of {name!r}" for name in fits]
        wanted += [needs[each.encoding] for each in counted.values() if each.encoding in needs]
        if wanted:
            raise DataError(f"{wanted[0]} needs a train split. Add train rows or set schema_from.")
        counted = {}
    if counted or fits:
        work.run(KEYS, partial(_count_keys, raw, counted, trained), train)

    def make(folder: Path) -> None:
        made = [work.folder(KEYS, piece) for piece in train]
        for name, fit in fits.items():
            for path in made:
                fit.merge(path / _NUMBERS_FOLDER / f"{name}.npz")
        table_rows: dict[str, int] = {}
        num_keys: dict[str, int] = {}
        for name, of_feature in counted.items():
            folders = [path / _KEYS_FOLDER / name for path in made]
            if of_feature.encoding == "hash":
                num_keys[name] = estimated_keys(folders)
                rows = hash_rows(num_keys[name], settings.max_hash_size)
                logger.info("%s: %s rows for about %s distinct keys", name, f"{rows:,}", f"{num_keys[name]:,}")
                asked[name] = replace(of_feature, hash_size=rows)
                continue
            if not all(path.exists() for path in folders):
                continue  # auto, and too many keys in one piece alone
            files = [file for path in folders for file in sorted(path.iterdir())]
            most_keys = MOST_KEYS if of_feature.encoding == "auto" else None
            rows = build_vocabulary(files, folder, name, min_count=of_feature.min_count, most_keys=most_keys)
            if rows is not None:
                table_rows[name] = rows
        if trained and settings.vocabulary_keys == "union":
            for name in set(trained.looked_up) & set(table_rows):
                union = load_vocabulary(Path(settings.like), name).union(load_vocabulary(folder, name))
                union.save(folder, name)
                table_rows[name] = union.num_embeddings
        fitted = kept | {name: fit.result(name) for name, fit in fits.items()}
        source = {ESTIMATED_KEYS: num_keys} if num_keys else {}
        columns = new_columns(roles, asked, table_rows, fitted)
        _save_encoder(folder, Schema(*columns, {}, source, tasks=_tasks_of(raw)), roles)

    return work.once(_ENCODER, make)


def _tasks_of(raw: Raw) -> tuple[TaskColumn, ...]:
    return tuple(TaskColumn(name, role.given_click) for name, role in raw.reader.roles.tasks.items())


def _save_encoder(folder: Path, schema: Schema, roles: ColumnRoles) -> None:
    """Write what the workers encode with, beside the vocabularies. All of them share the files of a vocabulary."""
    schema.save(folder)
    (folder / COLUMNS_FILE).write_text(as_yaml(replace(roles, ignored="*")), encoding="utf-8")
    for name in schema.looked_up:
        save_key_ids(folder, name)


def _count_keys(
    raw: Raw,
    counted: Mapping[str, AskedEncoding],
    trained: Schema | None,
    piece: Piece,
    folder: Path,
    report: Report,
) -> dict[str, Any]:
    """Count the keys of the train rows in a piece, or estimate their number for a hash_size, and fit its numbers.

    A table whose encoding is auto gets no counts if it has more than MOST_KEYS keys.
    """
    counts: dict[str, KeyCounts | KeySketch] = {}
    for name, of_feature in counted.items():
        path, most_keys = folder / _KEYS_FOLDER / name, 2 * MOST_KEYS if of_feature.encoding == "auto" else None
        counts[name] = KeySketch(path) if of_feature.encoding == "hash" else KeyCounts(path, most_keys)
    fits = number_fits(raw.reader.roles, trained, piece.index)[1]
    rows = 0
    for chunk, split_of_row, _ in raw.chunks(piece, report):
        table = chunk.table.filter(split_of_row == piece.splits.index("train"))
        rows += table.num_rows
        for name, fit in fits.items():
            fit.add(table[name].drop_null().to_numpy())
        for role in raw.reader.roles.sparse:
            name = role.table_name
            if (count := counts.get(name)) is None:
                continue
            keys = table[role.name].combine_chunks()
            keys = keys.flatten() if pa.types.is_list(keys.type) else keys
            count.add(canonical_keys(keys))
            if counted[name].encoding == "auto" and len(count.merged) > MOST_KEYS:
                del counts[name]
        if not counts and not fits:
            break
    for name, fit in fits.items():
        fit.save(folder / _NUMBERS_FOLDER / f"{name}.npz")
    for count in counts.values():
        count.save()
    return {"rows": rows}


@lru_cache(maxsize=1)
def _encoder_of(folder: Path, mark: int) -> Encoder:
    """The encoder in a folder, kept for the next piece. mark: of the folder with this name."""
    schema = Schema.load(folder)
    return Encoder(schema.dense, schema.sparse, {name: KeyIds.load(folder, name) for name in schema.looked_up})


def _write_rows(raw: Raw, encoder_folder: Path, piece: Piece, folder: Path, report: Report) -> dict[str, Any]:
    """Encode and write the rows of a piece. Rows to predict get the file and row number that they came from."""
    encoder, bytes_read = _encoder_of(encoder_folder, encoder_folder.stat().st_ino), 0
    max_lengths = {column.name: column.max_length for column in encoder.sparse if column.max_length}
    writers = {split: SplitWriter(folder / split, max_lengths) for split in piece.splits}

    def report_and_add(rows: int, num_bytes: int) -> None:
        nonlocal bytes_read
        bytes_read += num_bytes
        report(rows, num_bytes)

    with ExitStack() as stack:
        for writer in writers.values():
            stack.enter_context(closing(writer))
        for chunk, split_of_row, split_of_bad in raw.chunks(piece, report_and_add):
            list_bad_rows(folder, chunk.bad)
            encoded, unknown = encoder.encode_and_count(chunk.table)
            if not raw.settings.is_label_required:
                files = pa.repeat(pa.scalar(chunk.file), len(encoded))
                encoded = encoded.append_column(FILE, files).append_column(ROW, pa.array(chunk.rows))
            for name in map(kept_column, raw.settings.keep):
                encoded = encoded.append_column(name, chunk.table[name])
            if raw.settings.time_column is not None:
                before = (piece.index << 40) + sum(writer.rows for writer in writers.values())
                order = pa.array(np.arange(before, before + len(encoded)))
                encoded = encoded.append_column(TIME, chunk.table[TIME]).append_column(ORDER, order)
            for index, split in enumerate(piece.splits):
                is_here, writer = split_of_row == index, writers[split]
                writer.write(encoded if is_here.all() else encoded.filter(is_here))
                writer.bad_rows += int(np.count_nonzero(split_of_bad == index))
                writer.unknown_keys.update({name: int(of_row[is_here].sum()) for name, of_row in unknown.items()})
    return {
        "rows": sum(writer.rows for writer in writers.values()),
        "splits": {split: asdict(writer.counts()) for split, writer in writers.items()},
        "parts": {split: writer.num_parts for split, writer in writers.items()},
        "share_read": min(bytes_read / piece.num_bytes, 1.0) if piece.num_bytes else 1.0,
    }
