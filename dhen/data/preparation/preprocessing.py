"""Prepares raw files for training: a prepared folder (dhen/data/schema.py), in up to three stages (stages.py).

Each stage leaves a folder per piece (reading/pieces.py) in the unfinished folder, in which a preparation that was
killed goes on with the pieces that are missing, and which several machines can fill together. Whoever prepares a piece,
and in whatever order: the result is the same to the bit.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from dhen.data.formats.raw_files import mark_of, of_each
from dhen.data.formats.raw_rows import BadRow, DataError
from dhen.data.formats.roles import COLUMNS_FILE
from dhen.data.preparation.encoding.vocabulary import VOCABULARY_FOLDER, copy_vocabulary
from dhen.data.preparation.reading import pieces as cutting
from dhen.data.preparation.reading.pieces import Piece
from dhen.data.preparation.reading.raw_stream import Raw
from dhen.data.preparation.reading.sources import Source, open_sources
from dhen.data.preparation.running.progress import LogProgress, ProgressCallback
from dhen.data.preparation.running.runners import LocalProcesses, Runner, num_cores
from dhen.data.preparation.running.unfinished import Shard, Unfinished, unfinished_folder
from dhen.data.preparation.settings import PreparationSettings
from dhen.data.preparation.stages import WRITING, run_stages
from dhen.data.preparation.writing import join_bad_rows, join_by_time, join_parts, sum_of
from dhen.data.schema import ESTIMATED_KEYS, FORMAT_VERSION, SCHEMA_FILE, SHARES, Schema, SplitCounts

_RESULT = "result"


def prepare(
    settings: PreparationSettings,
    folder: str | Path,
    *,
    progress: ProgressCallback | None = None,
    runner: Runner | None = None,
    shard: Shard | None = None,
) -> Schema | None:
    """Write the prepared folder atomically and return its schema; of a shard, prepare its pieces and return None.

    progress: called after each chunk. Without it, progress is logged every ten seconds. runner: runs the work on the
    pieces; by default, a process per core.

    Raises FileExistsError if `folder` exists, FileNotFoundError, ValueError for wrong settings, and DataError (a
    ValueError) for data that cannot be used. The message of a DataError names file and row.
    """
    folder = Path(folder)
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(folder)):
        raise ValueError(f"{folder}: a prepared folder is written to a disk, not to a URL. Use a path.")
    if folder.exists():
        raise FileExistsError(f"{folder}: the folder already exists. Remove it or choose another one.")
    reader, format_name, sources = open_sources(settings)
    facts = _facts(settings, sources, format_name)
    with unfinished_folder(folder, facts, is_shared=shard is not None) as path:
        work = Unfinished(path, runner or LocalProcesses(num_cores()), progress or LogProgress(), shard)
        try:
            pieces, encoder = run_stages(work, Raw(reader, settings), sources)
        except (ValueError, OSError) as error:
            work.give_up(error)
            raise
        if _facts(settings, sources, format_name) != facts:
            raise DataError("a file has changed while it was prepared. Run the same command again.")
        if shard is not None:
            return None
        source = _source(settings, format_name, sources)
        schema = _join(work, pieces, encoder, source, is_head=settings.head is not None)
        try:
            os.rename(path / _RESULT, folder)
        except OSError as error:
            if not folder.exists():
                raise
            raise FileExistsError(f"{folder}: another process has created this folder in the meantime.") from error
    return schema


def settings_without_effect(settings: PreparationSettings, schema: Schema) -> list[str]:
    """Return a sentence for each setting that differs from its default but did not affect the prepared data."""
    hashed, looked_up = ([c for c in schema.sparse if c.encoding == kind] for kind in ("hash", "vocabulary"))
    has_own_splits = len(schema.source.get("files", {})) > 1 or bool(settings.files_by_split())
    sizes, estimated = {c.num_embeddings for c in hashed}, schema.source.get(ESTIMATED_KEYS)
    reasons = {
        "hash_size": "" if settings.hash_size in sizes | {"auto" if estimated else 0} else "no table has this size",
        "max_hash_size": "" if estimated else "no hash_size is auto",
        "min_count": "" if any(c.min_count == settings.min_count for c in looked_up) else "no vocabulary uses it",
        "id_encoding": "" if any(c.encoding == settings.id_encoding for c in schema.sparse) else "no feature uses it",
        "vocabulary_keys": "" if settings.like and looked_up else "no trained model has a vocabulary here",
    }
    reasons |= dict.fromkeys(
        ("split_fractions", "split_order", "split_seed"), "the data has its own splits" if has_own_splits else ""
    )
    if not has_own_splits and settings.split_order == "sequential":
        reasons["split_seed"] = "rows are split in order"
    default = {item.name: item.default for item in fields(PreparationSettings)}
    return [
        f"{name} has no effect: {reason}"
        for name, reason in reasons.items()
        if reason and getattr(settings, name) != default[name]
    ]


def _facts(settings: PreparationSettings, sources: tuple[Source, ...], format_name: str) -> str:
    """A digest of what an unfinished folder depends on. Raw files and vocabularies count by their size and time."""
    values = {name: str(value) for name, value in asdict(settings).items() if name != "block_bytes"}
    files = [file for source in sources for file in source.files]
    models = [Path(model) for model in (settings.schema_from, settings.like) if model is not None]
    texts = [model / SCHEMA_FILE for model in models] + [Path(path) for path in (settings.dataset_schema,) if path]
    files += [str(file) for model in models for file in sorted((model / VOCABULARY_FOLDER).glob("*.parquet"))]
    if format_name == "hub":
        from dhen.data.formats.hub import hub_revision  # here, because importing `datasets` takes a second

        marks = [hub_revision(source.files) for source in sources]
    else:
        marks = list(zip(files, of_each(mark_of, files), strict=True))
    facts = [FORMAT_VERSION, cutting.PIECE_BYTES, values, marks, *(path.read_text(encoding="utf-8") for path in texts)]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()


def _join(work: Unfinished, pieces: list[Piece], encoder: Path, source: dict[str, Any], *, is_head: bool) -> Schema:
    """Move the rows of all pieces into one prepared folder, with what belongs beside them."""
    folder, results = work.path / _RESULT, [work.result(WRITING, piece) for piece in pieces]
    folder.mkdir(exist_ok=True)
    in_order = [work.folder(WRITING, piece) for piece in pieces]
    splits: dict[str, SplitCounts] = {}
    for split in dict.fromkeys(split for piece in pieces for split in piece.splits):
        splits[split] = sum_of([SplitCounts(**r["splits"][split]) for r in results if split in r["splits"]])
    _refuse_mostly_bad(splits, join_bad_rows(in_order, folder))
    has_weights = any(count.weight is not None for count in splits.values())
    by_time = source["settings"]["time_column"] is not None
    ties = " Rows of equal time are all in one split; a finer time tells them apart." if by_time else ""
    for split, count in splits.items():
        if count.rows == 0:
            raise DataError(
                f"the split {split} has no rows ({count.bad_rows} bad rows were skipped); all splits together have "
                f"{sum(c.rows for c in splits.values())}. Add rows, or change the files or split_fractions.{ties}"
            )
        if count.weight == 0 and source["settings"]["is_label_required"]:
            raise DataError(f"the weights of all rows of the split {split} are 0. Correct them, or row_weight.")
        if count.weight is not None:  # the same however the rows are cut into pieces
            weight = None if math.isnan(count.weight) else float(f"{count.weight:.8g}")
            count = splits[split] = replace(count, weight=weight)
        parts = [
            (path / split, r["parts"][split]) for path, r in zip(in_order, results, strict=True) if split in r["parts"]
        ]
        if by_time:
            splits[split] = replace(count, digest=join_by_time([path for path, _ in parts], folder / split))
        else:
            join_parts(parts, folder / split)
    if is_head:
        source = source | {SHARES: {split: r["share_read"] for r in results for split in r["splits"]}}
    columns = Schema.load(encoder)
    for name in columns.looked_up:
        copy_vocabulary(encoder, folder, name)
    shutil.copy(encoder / COLUMNS_FILE, folder)
    facts = {"has_weights": has_weights, "tasks": columns.tasks}
    schema = Schema(columns.dense, columns.sparse, splits, source | columns.source, **facts)
    schema.save(folder)
    return schema


def _refuse_mostly_bad(counts: Mapping[str, SplitCounts], first: BadRow | None) -> None:
    """Raise DataError if most rows were skipped: the format or schema is then probably wrong, not the rows."""
    good, bad = (sum(getattr(count, name) for count in counts.values()) for name in ("rows", "bad_rows"))
    if bad > good:
        raise DataError(
            f"{bad:,} of {good + bad:,} rows are bad. This is more than half, so the format or the schema is probably "
            f"wrong. The first bad row: {first}"
        )


def _source(settings: PreparationSettings, format_name: str, sources: tuple[Source, ...]) -> dict[str, object]:
    """Return the `source` entry of schema.json, which says where the rows came from."""
    values = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()}
    del values["block_bytes"], values["head"]
    files = {"+".join(source.splits): list(source.files) for source in sources}
    return {"format": format_name, "files": files, "settings": values}
