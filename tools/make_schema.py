"""Writes a schema for a CSV or Parquet file by guessing from its first rows which columns are numbers or categories.

    python tools/make_schema.py log.csv --label clicked --output schema.yaml
    python tools/make_schema.py log.parquet --label rating --greater_than 3

Comments in the schema say what was dropped, and what is doubtful. Check it before you train.
"""

import argparse
import csv
import re
import sys
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from dhen.data.formats import text_blocks
from dhen.data.formats.column_role import LabelRole
from dhen.data.formats.columns import parse_numbers
from dhen.data.formats.first_bytes import PARQUET, complaint, first_bytes
from dhen.data.formats.guessing import BLANKS, Guess, date_parts, guess_column, guess_label
from dhen.data.formats.parquet import open_parquet
from dhen.data.formats.raw_rows import BadRow, DataError
from dhen.data.formats.roles import parse_roles
from dhen.data.schema import LABEL
from dhen.model.names import is_valid_table_name, unknown_name

DELIMITERS = ",\t;|"
FEWEST_OF_A_PATTERN = 4
"""A pattern that stands for fewer columns is longer to read than their names."""


def main() -> int:
    """Exit status: 0, or 1 with a message on stderr."""
    arguments = parse_arguments()
    try:
        label = LabelRole(arguments.label, arguments.positive, arguments.greater_than)
        text = make_schema(arguments.file, label, arguments.rows)
        if arguments.output is None:
            print(text, end="")
        elif arguments.output.exists():
            raise ValueError(f"{arguments.output}: the file exists. Remove it or choose another name.")
        else:
            arguments.output.write_text(text, encoding="utf-8")
    except (ValueError, OSError, csv.Error) as error:
        print(f"make_schema: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="CSV or other delimited text with a header, plain or compressed; or Parquet")
    parser.add_argument("--label", required=True, metavar="COLUMN", help="column that says which rows are clicks")
    click = parser.add_mutually_exclusive_group()
    click.add_argument("--positive", metavar="VALUE", help="the label's value for a click, if it is not 0 or 1")
    click.add_argument("--greater_than", type=float, metavar="X", help="larger labels are clicks")
    parser.add_argument("--rows", type=int, default=100_000, help="rows to look at; default: %(default)s")
    parser.add_argument("--output", type=Path, metavar="YAML", help="file to write; default: standard output")
    arguments = parser.parse_args()
    if arguments.rows < 1 or (arguments.positive is not None and not arguments.positive.strip()):
        parser.error("--rows must be 1 or more, and --positive not blank")
    return arguments


def make_schema(file: str, label: LabelRole, rows: int) -> str:
    """Return the schema as YAML. Raises FileNotFoundError, or ValueError for a file or a label that cannot be used."""
    is_parquet = complaint(first_bytes(file)) == PARQUET or Path(file).suffix in (".parquet", ".pq")
    columns, file_keys = (_parquet_sample if is_parquet else _text_sample)(file, label.column, rows)
    num_rows = len(columns[label.column])
    if not num_rows:
        raise DataError(f"{file}: there are no rows below the header. Use a file with rows.")
    label, clicks = guess_label(columns[label.column], label, file)
    guesses = [guess_column(name, values) for name, values in columns.items() if name != label.column]
    given = {key: getattr(label, key) for key in ("column", "positive", "greater_than")}
    given = {key: value for key, value in given.items() if value is not None}
    lines = [
        f"# Guessed from the first {num_rows:,} rows of {Path(file).name!r}. Check it before you train.",
        *(f"{key}: {_flow([value])}  # in all columns" for key, value in file_keys.items()),
        f"label: {_flow([given if len(given) > 1 else label.column])}  # {clicks:.1%} clicks",
        *_section("dense", "numbers", guesses, list(columns)),
        *_section("sparse", "categories", guesses, list(columns)),
        *_section("ignored", "not used", guesses, list(columns)),
    ]
    text = "\n".join(lines) + "\n"
    parse_roles(text, file).expanded(list(columns), file)  # raises ValueError if the schema cannot be used
    return text


def _parquet_sample(file: str, label: str, rows: int) -> tuple[dict[str, pa.Array], dict[str, Any]]:
    """Return (the first rows by column, what the schema has to say about the file). Raises DataError."""
    with open_parquet(file) as parquet:
        _check_header(parquet.schema_arrow.names, label, file)
        try:
            table = pa.Table.from_batches(islice(parquet.iter_batches(rows), 1), parquet.schema_arrow)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{file}: the first rows are damaged. Download or copy the file again.") from error
    return {name: table[name].combine_chunks() for name in table.column_names}, {}


def _text_sample(file: str, label: str, rows: int) -> tuple[dict[str, pa.Array], dict[str, Any]]:
    """The same for delimited text."""
    number, line = text_blocks.first_lines(file, is_first_good=True)[0]
    headers = {each: next(csv.reader([line], delimiter=each)) for each in DELIMITERS}
    delimiter = max(DELIMITERS, key=lambda each: (label in headers[each], len(headers[each])))
    _check_header(headers[delimiter], label, file)
    tables: list[pa.Table] = []
    bad: list[BadRow] = []
    quoting, text = text_blocks.Quoting('"', delimiter), {"quote": '"', "null_values": ()}
    for block in text_blocks.text_blocks(file, header_rows=number, quoting=quoting):
        table, _, some = text_blocks.split_columns(block, headers[delimiter], delimiter=delimiter, **text)
        tables.append(table)
        bad.extend(some)
        if sum(map(len, tables)) >= rows:
            break
    if len(bad) > sum(map(len, tables)):
        raise DataError(f"{bad[0]} More than half of the first rows are bad. Check that this is delimited text.")
    table = pa.concat_tables(tables).slice(0, rows)
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    file_keys: dict[str, Any] = {} if delimiter == "," else {"delimiter": delimiter}
    blanks = sorted({word for values in columns.values() for word in _blank_words(values)})
    if blanks:
        file_keys["null_values"] = ["", *blanks]
        none, words = pa.scalar(None, pa.string()), pa.array(blanks)
        columns = {name: pc.if_else(pc.is_in(values, words), none, values) for name, values in columns.items()}
    return columns, file_keys


def _check_header(names: list[str], label: str, file: str) -> None:
    if label not in names:
        if any(not name or not parse_numbers(pa.array([name]), pl.Float64)[1][0] for name in names):
            raise DataError(
                f"{file}: there is no column {label!r}, and the first line looks like a row: {', '.join(names):.80}. "
                f"Put the names of the columns above the rows. Criteo's and libsvm's formats need no schema."
            )
        raise DataError(f"{file}: {unknown_name('column', label, names)}")
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{file}: two columns are named {name!r}. Rename one of them.")


def _blank_words(values: pa.Array) -> list[str]:
    """The words that stand for blank in a column of numbers or dates."""
    is_word = pc.is_in(values, pa.array(BLANKS))
    words, others = values.filter(is_word), values.filter(pc.invert(is_word)).drop_null()
    is_known = not parse_numbers(others, pl.Float64)[1].any() or date_parts(others)
    return words.unique().to_pylist() if is_known and len(others) else []


def _section(kind: str, title: str, guesses: list[Guess], header: list[str]) -> list[str]:
    """The lines of a list of columns: one line for each remark, and one for all columns without a remark."""
    by_remark: dict[str, list[Any]] = {"": []}
    for guess in guesses:
        if guess.kind == kind:
            by_remark.setdefault(guess.remark, []).append(guess.column if kind == "ignored" else _entry(guess))
    lines = [(_flow(_with_patterns(entries, header)), remark) for remark, entries in by_remark.items() if entries]
    if len(lines) == 1 and not lines[0][1]:
        return [f"{kind}: [{lines[0][0]}]  # {title}"]
    inner = [f"  {entries},{f'  # {remark}' if remark else ''}" for entries, remark in lines]
    return [f"{kind}: [  # {title}", *inner, "]"] if lines else []


def _entry(guess: Guess) -> str | dict[str, Any]:
    """The entry of a feature. One whose column has a name that no feature may have gets another name."""
    name = re.sub(r"[^A-Za-z0-9_ -]+", "_", guess.column)
    if name == LABEL or not name[0].isalnum() or not is_valid_table_name(name):
        name = f"feature_{name.strip()}"
    renamed = {} if name == guess.column else {"column": guess.column}
    return {"name": name} | renamed | guess.options if renamed or guess.options else name


def _with_patterns(entries: list[Any], header: list[str]) -> list[Any]:
    """Put a pattern in place of columns that share a prefix with no other column of the file."""
    shortened = list(entries)
    for prefix in sorted({match[0] for each in entries if (match := re.match(r"[A-Za-z0-9]*_|[A-Za-z]+", str(each)))}):
        matched = [name for name in header if fnmatchcase(name, f"{prefix}*")]
        if len(matched) >= FEWEST_OF_A_PATTERN and all(name in shortened for name in matched):
            at = shortened.index(matched[0])
            shortened[at] = f"{prefix}*"
            shortened = [each for each in shortened if each not in matched]
    return shortened


def _flow(values: list[Any]) -> str:
    """Values in YAML, in one line with commas between them."""
    text = yaml.safe_dump(values, default_flow_style=True, sort_keys=False, allow_unicode=True, width=float("inf"))
    return text.strip()[1:-1]


if __name__ == "__main__":
    sys.exit(main())
