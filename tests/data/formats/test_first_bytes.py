"""A file is what its first bytes say, whatever its name."""

import bz2
import gzip
import io
import lzma
import pickle
import sqlite3
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.feather
import pyarrow.orc
import pytest

from dhen.data.formats.raw_rows import DataError
from dhen.data.preparation.preprocessing import prepare
from dhen.data.preparation.settings import PreparationSettings
from dhen.data.schema import Schema

FRAME = pl.DataFrame({"label": [0, 1, 0], "user": ["anna", "böb", "anna"]})
TEXT = FRAME.write_csv().encode()


def prepared(folder: Path, name: str, content: bytes, **settings: object) -> Schema:
    (folder / name).write_bytes(content)
    (folder / "schema.yaml").write_text("sparse: [user]\n")
    given = {"dataset_schema": folder / "schema.yaml", "split_fractions": (1, 0, 0)} | settings
    return prepare(PreparationSettings(str(folder / name), **given), folder / "out")


def parquet() -> bytes:
    FRAME.write_parquet(file := io.BytesIO())
    return file.getvalue()


def zstd(content: bytes) -> bytes:
    return pa.compress(content, "zstd", asbytes=True)


def zipped() -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr("log.csv", TEXT)
    return file.getvalue()


def tarred() -> bytes:
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w") as archive:
        entry = tarfile.TarInfo("log.csv")
        entry.size = len(TEXT)
        archive.addfile(entry, io.BytesIO(TEXT))
    return file.getvalue()


def in_arrow(write: object, **options: object) -> bytes:
    write(pa.table({"label": [0, 1], "user": ["a", "b"]}), file := io.BytesIO(), **options)
    return file.getvalue()


def in_sqlite() -> bytes:
    database = sqlite3.connect(":memory:")
    database.execute("create table log (label, user)")
    return database.serialize()


def in_numpy() -> bytes:
    np.save(file := io.BytesIO(), np.arange(3))
    return file.getvalue()


def without_bytes(value: object) -> str | None:
    """The part of a test's name for a parameter."""
    return "" if isinstance(value, bytes) else None


@pytest.mark.parametrize(
    ("name", "content", "read_as"),
    [
        ("log.csv", gzip.compress(TEXT, mtime=0), "csv"),
        ("log.csv", zstd(TEXT), "csv"),
        ("log", bz2.compress(TEXT), "csv"),
        ("log.csv.gz", TEXT, "csv"),
        ("log.csv.bz2", zstd(TEXT), "csv"),
        ("log", TEXT, "csv"),
        ("log.gz", b"\xef\xbb\xbf" + TEXT, "csv"),
        ("log.csv", gzip.compress(b"\xef\xbb\xbf" + TEXT, mtime=0), "csv"),
        ("log.csv", parquet(), "parquet"),
        ("log.gz", parquet(), "parquet"),
        ("log", parquet(), "parquet"),
    ],
    ids=without_bytes,
)
def test_files_with_other_names_are_read(tmp_path, name, content, read_as):
    schema = prepared(tmp_path, name, content, id_encoding="vocabulary")
    assert schema.source["format"] == read_as
    assert (schema.splits["train"].rows, schema.splits["train"].clicks) == (3, 1)
    assert schema.sparse[0].num_embeddings == 3


BINARY = {
    "a zip archive or an Excel file": zipped(),
    "an xz file": lzma.compress(TEXT),
    "a tar archive": tarred(),
    "an Arrow or Feather file": in_arrow(pyarrow.feather.write_feather),
    "an ORC file": in_arrow(pyarrow.orc.write_table),
    "an SQLite database": in_sqlite(),
    "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(40),
    "a NumPy file": in_numpy(),
    "a pickle": pickle.dumps(FRAME.to_dicts()),
    "UTF-16 text": TEXT.decode().encode("utf-16"),
}


@pytest.mark.parametrize("is_gzip", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("name", ["log.csv", "log.txt", "log.gz", "log.svm"])
@pytest.mark.parametrize("kind", BINARY)
def test_binary_files_are_refused_in_one_line(tmp_path, kind, name, is_gzip):
    content = gzip.compress(BINARY[kind]) if is_gzip else BINARY[kind]
    within = "within the gzip, " if is_gzip else ""
    with pytest.raises(DataError, match=rf"log\.\w+: {within}this is {kind}\. (Unpack|Save|Convert) .*\.$") as caught:
        prepared(tmp_path, name, content, bad_rows="skip")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", BINARY)
def test_a_parquet_name_hides_nothing(tmp_path, kind):
    with pytest.raises(DataError, match=rf"log\.parquet: this is {kind}"):
        prepared(tmp_path, "log.parquet", BINARY[kind])


@pytest.mark.parametrize(
    ("name", "content", "asked", "message"),
    [
        ("log.parquet", TEXT, "auto", "not a complete Parquet file .* if it is text, use --dataset_format csv"),
        (
            "log.parquet",
            gzip.compress(TEXT, mtime=0),
            "auto",
            "this is a gzip file. Unpack it first, or use --dataset_format",
        ),
        (
            "log.csv",
            gzip.compress(gzip.compress(TEXT, mtime=0), mtime=0),
            "auto",
            "within the gzip, this is a gzip file",
        ),
        ("log.csv", gzip.compress(parquet(), mtime=0), "auto", "within the gzip, this is a Parquet file"),
        ("log.csv", zstd(parquet()), "auto", "within the zstd, this is a Parquet file"),
        ("log.csv", bz2.compress(zstd(TEXT)), "auto", "within the bzip2, this is a zstd file"),
        ("log.csv", parquet(), "csv", "this is a Parquet file. Use --dataset_format parquet"),
        ("log.csv", b"\xfe\xff" + TEXT.decode().encode("utf-16-be"), "auto", "this is UTF-16 text. .* `iconv"),
    ],
    ids=without_bytes,
)
def test_a_format_that_does_not_fit_the_content_is_refused(tmp_path, name, content, asked, message):
    with pytest.raises(DataError, match=f"{name}: {message}"):
        prepared(tmp_path, name, content, dataset_format=asked)


@pytest.mark.parametrize("name", ["PAR1", "ORC", "BZh91", "ARROW1", "FEA1"])
def test_a_column_may_have_the_name_of_a_format(tmp_path, name):
    (tmp_path / "roles.yaml").write_text(f"sparse: [{name}]\n")
    schema = prepared(tmp_path, "log.csv", f"{name},label\na,1\n".encode(), dataset_schema=tmp_path / "roles.yaml")
    assert schema.splits["train"].rows == 1
