"""Turns the user's settings into files, a reader for their format, and the splits of each set of files."""

import glob
import re
from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from dhen.data.formats import text_blocks
from dhen.data.formats.criteo import CriteoReader
from dhen.data.formats.delimited import DelimitedReader
from dhen.data.formats.first_bytes import COMPRESSIONS, PARQUET, complaint, first_bytes
from dhen.data.formats.libsvm import LibsvmReader
from dhen.data.formats.parquet import ParquetReader, open_parquet
from dhen.data.formats.raw_files import files_at, is_url
from dhen.data.formats.raw_rows import DataError, Reader
from dhen.data.formats.roles import COLUMNS_FILE, KeptRoles, TimedRoles, load_roles
from dhen.data.preparation.settings import FORMATS, PreparationSettings, as_tuple
from dhen.data.schema import SCHEMA_FILE, SPLITS, Schema
from dhen.data.synthetic import RECIPES
from dhen.paths import looked_in

_SUFFIXES = {
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    ".csv": "csv",
    **dict.fromkeys((".libsvm", ".svm", ".libfm", ".libffm", ".ffm"), "libsvm"),
}
_COMPRESSED = tuple(each.suffix for each in COMPRESSIONS)
_LIBSVM_LINE = re.compile(r"\S+(\s+\d+(:\d+)?:\S+)+\s*$")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """Files to read one after another, and the splits that their rows go to."""

    files: tuple[str, ...]
    splits: tuple[str, ...]


def open_sources(settings: PreparationSettings) -> tuple[Reader, str, tuple[Source, ...]]:
    """Return (reader, name of its format, sources to read). Raises FileNotFoundError, ValueError or DataError."""
    format_name = format_of(settings)
    if format_name == "hub":
        found = _on_the_hub(settings)
    else:
        found = {split: _files(patterns) for split, patterns in settings.files_by_split().items()}
    only = settings.only_split
    if only is not None:
        if only not in found:
            raise DataError(f"{settings.dataset_name}: there is no split {only}. Use one of: {', '.join(found)}.")
        found = {only: found[only]}
    if only is not None or len(found) > 1 or (found and format_name != "hub"):
        sources = tuple(Source(some, (split,)) for split, some in found.items())
    else:
        files = next(iter(found.values())) if found else _files(as_tuple(settings.dataset_name))
        shares = zip(SPLITS, settings.split_fractions, strict=True)
        sources = (Source(files, tuple(split for split, share in shares if share > 0)),)
    file, times = Counter(file for source in sources for file in source.files).most_common(1)[0]
    if times > 1:
        raise DataError(f"{file}: the file is given twice, so its rows would count twice. Give each file once.")
    reader = _reader(format_name, settings, sources[0].files[0])
    if settings.keep:
        reader = _keeping(reader, settings.keep, sources[0].files[0])
    return reader, format_name, sources


def _on_the_hub(settings: PreparationSettings) -> dict[str, tuple[str, ...]]:
    names = as_tuple(settings.dataset_name)
    if len(names) != 1:
        raise ValueError("the format hub needs one dataset_name, and no train_file, validation_file or test_file.")
    from dhen.data.formats.hub import hub_splits  # here, because importing `datasets` takes a second

    return hub_splits(names[0])


def _reader(format_name: str, settings: PreparationSettings, first_file: str) -> Reader:
    is_required, block_bytes = settings.is_label_required, settings.block_bytes
    if settings.time_column is not None and format_name in ("criteo", "libsvm"):
        raise ValueError(f"time_column: files of the format {format_name} do not name columns. Sort them by time.")
    given = settings.dataset_schema if format_name in ("criteo", "libsvm") else _schema_file(settings)
    roles = load_roles(given) if given else None
    if format_name == "criteo":
        reader = CriteoReader(is_label_required=is_required, block_bytes=block_bytes)
        return reader.with_encodings(roles, settings.dataset_schema) if roles else reader
    if format_name == "libsvm":
        return LibsvmReader.for_file(first_file, roles, is_label_required=is_required, block_bytes=block_bytes)
    if roles is None:
        raise ValueError(
            f"the format {format_name} needs dataset_schema, a YAML file that says which columns are label, dense and "
            f"sparse. For a file, tools/make_schema.py writes one."
        )
    if format_name == "csv":
        reader = DelimitedReader(roles, is_required, block_bytes)
    elif format_name == "parquet":
        reader = ParquetReader(roles, is_required)
    else:
        from dhen.data.formats.hub import HubReader

        reader = HubReader(roles, is_required)
    if roles.has_patterns:
        columns = reader.column_names(first_file)
        reader = replace(reader, roles=roles.expanded(columns, first_file, is_label_required=is_required))
    return reader if settings.time_column is None else _timed(reader, settings.time_column, first_file)


def _schema_file(settings: PreparationSettings) -> str | Path | None:
    """The given schema, else that of the trained model, if its data had named columns."""
    if settings.dataset_schema is None:
        for model in (Path(model) for model in (settings.schema_from, settings.like) if model):
            is_named = Schema.load(model).source.get("format") not in ("criteo", "libsvm")
            if is_named and (model / COLUMNS_FILE).is_file():
                return model / COLUMNS_FILE
    return settings.dataset_schema


def _timed(reader: Reader, column: str, first_file: str) -> Reader:
    """The reader with a time column: of dates, if more of the file's first rows have a date there than a number."""
    kinds = [TimedRoles(**vars(reader.roles), time_column=column, has_dates=has_dates) for has_dates in (False, True)]
    readers = [replace(reader, roles=roles) for roles in kinds]
    numbers, dates = (sum(len(chunk.rows) for chunk in islice(each.chunks(first_file), 1)) for each in readers)
    return readers[dates > numbers]


def _keeping(reader: Reader, columns: tuple[str, ...], first_file: str) -> Reader:
    """The reader, which also yields the raw values of these columns."""
    if isinstance(reader, LibsvmReader):
        raise ValueError("--keep: files of the format libsvm do not name columns. Remove it.")
    kept = dict.fromkeys(columns)
    if isinstance(reader, ParquetReader):
        with open_parquet(first_file) as parquet:
            kept |= {item.name: item.type for item in parquet.schema_arrow if item.name in kept}
    return replace(reader, roles=KeptRoles(**vars(reader.roles), kept=kept))


def _files(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Return the files for paths, URLs, globs and folders, in the given order, sorted by name within each pattern."""
    found: list[str] = []
    for pattern in patterns:
        path = Path(pattern)
        if is_url(pattern):
            some = files_at(pattern)
            if any(file.endswith(f"/{SCHEMA_FILE}") for file in some):
                raise DataError(f"{pattern}: a prepared folder cannot be at a URL. Copy it to a disk first.")
        elif path.is_file():
            some = [pattern]
        elif path.is_dir():
            if (path / SCHEMA_FILE).is_file():
                raise DataError(f"{pattern}: this is already a prepared folder. Use the raw files.")
            some = [str(file) for file in sorted(path.iterdir()) if file.is_file() and file.name[0] not in "._"]
            if not some:
                raise FileNotFoundError(f"{pattern}: the folder has no files. Check the path.")
        elif path.exists():
            raise DataError(
                f"{pattern}: a pipe or a device, but rows are read twice. Save them to a file first; predict.py reads "
                "standard input as --dataset_name -."
            )
        elif glob.has_magic(pattern):
            some = sorted(file for file in glob.glob(pattern, recursive=True) if Path(file).is_file())
            if not some:
                raise FileNotFoundError(f"{pattern}: no file matches. Check the pattern.{looked_in(pattern)}")
        else:
            check = "Check the path."
            if path.name.partition("-")[0] in RECIPES:
                check = "Only train.py makes a log, such as planted-500k. Name its file: <cache>/<log>/test.tsv.gz."
            raise FileNotFoundError(f"{pattern}: no such file. {check}{looked_in(pattern)}")
        found.extend(some)
    return tuple(found)


def format_of(settings: PreparationSettings) -> str:
    """Return the name of the format, from dataset_format or, for `auto`, from the first file's start and name."""
    if settings.dataset_format != "auto":
        return settings.dataset_format
    patterns = as_tuple(settings.dataset_name) or tuple(p for some in settings.files_by_split().values() for p in some)
    name = patterns[0]
    if (
        _HUB_NAME.fullmatch(name)
        and not Path(name).exists()
        and Path(name).suffix not in {*_SUFFIXES, *_COMPRESSED, ".txt", ".tsv"}
    ):
        return "hub"
    file = _files((name,))[0]
    if complaint(first_bytes(file)) == PARQUET:
        return "parquet"
    path = Path(file)
    suffix = (path.with_suffix("") if path.suffix in _COMPRESSED else path).suffix.lower()
    if suffix in _SUFFIXES:
        return _SUFFIXES[suffix]
    if _schema_file(settings) is not None:
        return "csv"
    lines = [line for _, line in text_blocks.first_lines(file)]
    if 2 * sum(line.count("\t") in (38, 39) for line in lines) > len(lines):
        return "criteo"
    if 2 * sum(_LIBSVM_LINE.match(line) is not None for line in lines) > len(lines):
        return "libsvm"
    raise DataError(
        f"{file}: cannot detect the format from the name or the first lines. Set --dataset_format to one of "
        f"{', '.join(FORMATS[1:])}; csv, parquet and hub also need --dataset_schema."
    )
