"""Preparing raw files: splits, determinism, atomicity, memory, reused schemas, and unreadable files."""

import gc
import gzip
import os
import re
import subprocess
import sys
import time
from dataclasses import replace

import polars as pl
import pyarrow as pa
import pytest

from dhen.data.formats.raw_rows import DataError
from dhen.data.preparation import writing
from dhen.data.preparation.encoding.vocabulary import load_vocabulary
from dhen.data.preparation.preprocessing import prepare, settings_without_effect
from dhen.data.preparation.settings import PreparationSettings
from dhen.data.preparation.writing import SplitWriter
from dhen.data.schema import Schema, SplitCounts
from tests.data.preparation import reference_preparation as reference

LINES = reference.criteo_lines(300)
FRACTIONS = (0.6, 0.3, 0.1)


@pytest.fixture
def raw(tmp_path):
    return write(tmp_path / "raw.txt", LINES)


def write(path, lines):
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def rows_of(folder, split="train"):
    return pl.read_parquet(folder / split / "*.parquet").to_dicts()


def content_of(folder):
    """Every byte of a prepared folder, except the source entry in schema.json."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    del files["schema.json"]
    return files, replace(Schema.load(folder), source={})


def test_a_random_split_is_the_documented_one(tmp_path, raw):
    wanted = PreparationSettings(raw, split_fractions=FRACTIONS, split_seed=3, hash_size=1000)
    schema = prepare(wanted, tmp_path / "out")
    expected = reference.prepared_criteo(LINES, 1000)
    split_of = [reference.random_split(i, 3, FRACTIONS) for i in range(len(LINES))]
    for split, counts in schema.splits.items():
        mine = [row for row, where in zip(expected, split_of, strict=True) if where == split]
        reference.assert_same_rows(rows_of(tmp_path / "out", split), mine)
        assert (counts.rows, counts.clicks) == (len(mine), sum(row["label"] == 1 for row in mine))
    assert list(schema.splits) == ["train", "validation", "test"]


def test_another_seed_is_another_split(tmp_path, raw):
    first = prepare(PreparationSettings(raw), tmp_path / "first")
    second = prepare(PreparationSettings(raw, split_seed=1), tmp_path / "second")
    assert first.splits != second.splits


@pytest.mark.parametrize("num_files", [1, 3])
def test_a_sequential_split_keeps_the_order_over_files(tmp_path, num_files):
    size = len(LINES) // num_files
    files = [write(tmp_path / f"day_{i}.txt", LINES[i * size : (i + 1) * size]) for i in range(num_files)]
    wanted = PreparationSettings(files, split_fractions=FRACTIONS, split_order="sequential", hash_size=1000)
    schema = prepare(wanted, tmp_path / "out")
    assert [counts.rows for counts in schema.splits.values()] == [180, 90, 30]
    expected = reference.prepared_criteo(LINES, 1000)
    for split, mine in (("train", expected[:180]), ("validation", expected[180:270]), ("test", expected[270:])):
        reference.assert_same_rows(rows_of(tmp_path / "out", split), mine)


def test_files_by_split_and_globs(tmp_path):
    for i in range(4):
        write(tmp_path / f"day_{i}.txt", LINES[i * 10 : (i + 1) * 10])
    wanted = PreparationSettings(
        train_file=str(tmp_path / "day_[01].txt"), test_file=[str(tmp_path / "day_3.txt"), str(tmp_path / "day_2.txt")]
    )
    schema = prepare(replace(wanted, hash_size=1000), tmp_path / "out")
    expected = reference.prepared_criteo(LINES, 1000)
    assert list(schema.splits) == ["train", "test"]
    reference.assert_same_rows(rows_of(tmp_path / "out"), expected[:20])
    reference.assert_same_rows(rows_of(tmp_path / "out", "test"), expected[30:40] + expected[20:30])


@pytest.mark.parametrize("encoding", ["hash", "vocabulary"])
@pytest.mark.parametrize("order", ["random", "sequential"])
def test_the_size_of_chunks_and_where_files_are_cut_change_nothing(tmp_path, encoding, order):
    raw = write(tmp_path / "raw.txt", LINES[:40])
    halves = [write(tmp_path / "a.txt", LINES[:13]), write(tmp_path / "b.txt", LINES[13:40])]
    inputs = [(raw, 1), (raw, 777), (raw, 1 << 20), (halves, 3000)]
    contents = []
    for i, (files, block_bytes) in enumerate(inputs):
        wanted = PreparationSettings(files, split_order=order, id_encoding=encoding, block_bytes=block_bytes)
        prepare(wanted, tmp_path / f"out{i}")
        contents.append(content_of(tmp_path / f"out{i}"))
    assert all(content == contents[0] for content in contents)


def test_row_groups_are_full_and_parts_follow_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "ROW_GROUPS_PER_PART", 2)
    monkeypatch.setattr(writing, "ROW_GROUP_ROWS", 20)
    table = pa.table({"label": pa.array([0.0, 1.0, float("nan")] * 35, pa.float32()), "x": list(range(105))})
    writer = SplitWriter(tmp_path / "train")
    for start in range(0, 105, 7):
        writer.write(table.slice(start, 7))
        assert writer._waiting_rows < 20
    writer.close()
    parts = [pa.parquet.ParquetFile(path) for path in sorted((tmp_path / "train").iterdir())]
    groups = [[part.metadata.row_group(i).num_rows for i in range(part.num_row_groups)] for part in parts]
    assert groups == [[20, 20], [20, 20], [20, 5]]
    assert [x for part in parts for x in part.read()["x"].to_pylist()] == list(range(105))
    counts = writer.counts()
    assert counts == SplitCounts(105, 35, 0, 35, digest=counts.digest)


def test_a_vocabulary_is_made_of_the_train_split(tmp_path, raw):
    wanted = PreparationSettings(raw, split_order="sequential", id_encoding="vocabulary", min_count=2)
    schema = prepare(wanted, tmp_path / "out")
    columns = [line.split("\t") for line in LINES]
    for j, column in enumerate(schema.sparse):
        keys = [values[14 + j] for values in columns]
        ids = reference.vocabulary(keys[:240], min_count=2)
        assert column.num_embeddings == len(ids) + 1
        assert load_vocabulary(tmp_path / "out", column.name).keys.to_pylist() == list(ids)
        for split, mine in (("train", keys[:240]), ("validation", keys[240:270]), ("test", keys[270:])):
            assert [row[column.name] for row in rows_of(tmp_path / "out", split)] == [ids.get(key, 0) for key in mine]
    with pytest.raises(DataError, match="a vocabulary needs a train split"):
        prepare(PreparationSettings(test_file=raw, id_encoding="vocabulary"), tmp_path / "none")


@pytest.mark.parametrize("encoding", ["hash", "vocabulary"])
def test_a_given_schema_keeps_ids_and_transforms(tmp_path, encoding):
    first, second = write(tmp_path / "1.txt", LINES[:200]), write(tmp_path / "2.txt", LINES[200:])
    wanted = PreparationSettings(first, split_fractions=(1, 0, 0), id_encoding=encoding, hash_size=777)
    trained = prepare(wanted, tmp_path / "trained")
    new = prepare(PreparationSettings(test_file=second, schema_from=tmp_path / "trained"), tmp_path / "new")
    assert (new.dense, new.sparse) == (trained.dense, trained.sparse)
    if encoding == "hash":
        expected = [row["C1"] for row in reference.prepared_criteo(LINES[200:], 777)]
    else:
        ids = reference.vocabulary([line.split("\t")[14] for line in LINES[:200]], 1)
        expected = [ids.get(line.split("\t")[14], 0) for line in LINES[200:]]
        assert load_vocabulary(tmp_path / "new", "C1").keys.equals(load_vocabulary(tmp_path / "trained", "C1").keys)
    assert [row["C1"] for row in rows_of(tmp_path / "new", "test")] == expected


def test_a_given_schema_must_have_the_same_features(tmp_path, raw):
    prepare(PreparationSettings(raw), tmp_path / "trained")
    (tmp_path / "new.csv").write_text("label,C1\n1,a\n")
    (tmp_path / "schema.yaml").write_text("sparse: [C1]")
    wanted = PreparationSettings(
        str(tmp_path / "new.csv"), dataset_schema=tmp_path / "schema.yaml", schema_from=tmp_path / "trained"
    )
    with pytest.raises(DataError, match="the feature 'I1' is dense, but the raw data does not have it"):
        prepare(wanted, tmp_path / "out")


def test_skipped_rows_move_no_other_row_and_count_in_their_split(tmp_path, raw):
    clean = prepare(PreparationSettings(raw, hash_size=1000), tmp_path / "clean")
    bad = [*LINES]
    where = {split: [] for split in clean.splits}
    for i in range(0, len(LINES), 11):
        bad[i] = "9" + LINES[i][1:]
        where[reference.random_split(i, 0, (0.8, 0.1, 0.1))].append(i)
    dirty = PreparationSettings(write(tmp_path / "bad.txt", bad), hash_size=1000, bad_rows="skip")
    schema = prepare(dirty, tmp_path / "dirty")
    for split, counts in schema.splits.items():
        assert counts.bad_rows == len(where[split])
        assert counts.rows == clean.splits[split].rows - len(where[split])
    assert all(where.values())


class StopHereError(Exception):
    pass


def test_an_interrupted_preparation_leaves_nothing(tmp_path, raw):
    def interrupt(state):
        raise StopHereError

    with pytest.raises(StopHereError):
        prepare(PreparationSettings(raw), tmp_path / "out", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["raw.txt"]


def test_a_killed_preparation_leaves_nothing_that_looks_complete(tmp_path, raw):
    program = (
        "import os, sys; from dhen.data.preparation.preprocessing import prepare; "
        "from dhen.data.preparation.settings import PreparationSettings as S; "
        "prepare(S(sys.argv[1], id_encoding='hash'), sys.argv[2], progress=lambda state: os._exit(9))"
    )
    result = subprocess.run([sys.executable, "-c", program, raw, str(tmp_path / "out")], check=False)
    assert result.returncode == 9
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*/schema.json"))
    (left,) = tmp_path.glob(".out.unfinished-*")
    an_hour_ago = time.time() - 3700
    for path in (*left.rglob("*"), left):
        os.utime(path, (an_hour_ago, an_hour_ago))
    prepare(PreparationSettings(raw), tmp_path / "other")
    assert not list(tmp_path.glob(".out.unfinished-*")), "what the killed one left is still there"


def test_what_another_process_prepares_meanwhile_is_let_be(tmp_path, raw):
    def meanwhile(state):
        if not (tmp_path / "inner").exists():
            prepare(PreparationSettings(raw), tmp_path / "inner")

    assert prepare(PreparationSettings(raw), tmp_path / "outer", progress=meanwhile).splits["train"].rows
    assert not list(tmp_path.glob(".*unfinished*"))


def test_more_bad_rows_than_good_ones_is_no_success(tmp_path):
    lines = [("9" + line[1:]) if i < 61 else line for i, line in enumerate(LINES[:120])]
    wanted = PreparationSettings(write(tmp_path / "bad.txt", lines), bad_rows="skip")
    with pytest.raises(
        DataError, match=r"61 of 120 rows are bad. This is more than half.*first bad row: .*bad\.txt: row 1: .*label"
    ):
        prepare(wanted, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_count_before_a_sequential_split_shows_how_far_it_is(tmp_path, raw):
    states = []
    prepare(PreparationSettings(raw, split_order="sequential"), tmp_path / "out", progress=states.append)
    counting = [state for state in states if state.stage == "counting rows"]
    assert counting[0].bytes_total == counting[0].bytes_read > 0
    assert counting[-1].is_done
    assert counting[-1].rows == len(LINES)
    assert states[-1].stage == "writing"


@pytest.mark.parametrize(("suffix", "rows_per_member"), [(".gz", 300), (".gz", 1), (".zst", 1), (".bz2", 1)])
def test_the_error_about_a_truncated_file_says_how_far_it_could_be_read(tmp_path, suffix, rows_per_member):
    lines = [f"{line}\n" for line in LINES]
    members = ["".join(lines[i : i + rows_per_member]).encode() for i in range(0, len(lines), rows_per_member)]
    data = b"".join(map(reference.PACK[suffix], members))
    (tmp_path / f"raw{suffix}").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError) as caught:
        prepare(PreparationSettings(str(tmp_path / f"raw{suffix}"), dataset_format="criteo"), tmp_path / "out")
    rows = int(re.search(r"after row (\d+)", str(caught.value))[1])
    assert 0.3 * len(LINES) < rows < 0.7 * len(LINES)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"id_encoding": "hash", "min_count": 3}, ["min_count"]),
        ({"id_encoding": "vocabulary", "hash_size": 77}, ["hash_size"]),
        ({"split_order": "sequential", "split_seed": 3}, ["split_seed"]),
        ({"train_file": True, "split_fractions": (0.5, 0.5, 0)}, ["split_fractions"]),
        ({"hash_size": 77, "split_seed": 3, "split_fractions": (0.5, 0.2, 0.3)}, []),
        ({"id_encoding": "vocabulary", "min_count": 2}, []),
    ],
)
def test_settings_that_made_no_difference_are_named(tmp_path, raw, given, names):
    where = {"train_file": raw} if given.pop("train_file", False) else {"dataset_name": raw}
    wanted = PreparationSettings(**where, **given)
    schema = prepare(wanted, tmp_path / "out")
    assert [line.split(" has no effect: ")[0] for line in settings_without_effect(wanted, schema)] == names


def test_an_existing_folder_is_not_touched(tmp_path, raw):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="already exists"):
        prepare(PreparationSettings(raw), tmp_path / "out")


def test_memory_is_bounded_whatever_the_size_of_the_input(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "ROW_GROUP_ROWS", 500)
    monkeypatch.setattr(writing, "ROW_GROUPS_PER_PART", 2)
    peaks = []
    for copies in (20, 100):
        text = write(tmp_path / f"{copies}.txt", LINES * copies)
        held = []
        wanted = PreparationSettings(text, block_bytes=100_000)
        gc.collect()  # what earlier tests left
        before = pa.total_allocated_bytes()
        prepare(
            wanted, tmp_path / f"out{copies}", progress=lambda _, held=held: held.append(pa.total_allocated_bytes())
        )
        peaks.append(max(held) - before)
    assert peaks[1] < 1.2 * peaks[0]
    assert peaks[1] < 0.2 * (tmp_path / "100.txt").stat().st_size


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.999])
@pytest.mark.parametrize("bad_rows", ["error", "skip"])
@pytest.mark.parametrize(("suffix", "tool"), [(".gz", "gzip"), (".zst", "zstd"), (".bz2", "bzip2")])
def test_a_truncated_file_is_always_an_error(tmp_path, cut, bad_rows, suffix, tool):
    data = reference.PACK[suffix](("\n".join(LINES) + "\n").encode())
    (tmp_path / f"raw.txt{suffix}").write_bytes(data[: int(cut * len(data))])
    wanted = PreparationSettings(str(tmp_path / f"raw.txt{suffix}"), dataset_format="criteo", bad_rows=bad_rows)
    with pytest.raises(DataError, match=rf"raw\.txt\{suffix}: the \{suffix} is truncated or damaged.*`{tool} -t`"):
        prepare(wanted, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2"])
def test_members_are_all_read_or_named_as_damaged(tmp_path, suffix):
    """Python's bz2 ends in silence where a second stream is damaged."""
    first, second = (
        reference.PACK[suffix](("\n".join(LINES[half]) + "\n").encode()) for half in (slice(100), slice(100, 200))
    )
    (tmp_path / f"raw{suffix}").write_bytes(first + second)
    wanted = PreparationSettings(str(tmp_path / f"raw{suffix}"), dataset_format="criteo")
    schema = prepare(wanted, tmp_path / "out")
    assert sum(counts.rows for counts in schema.splits.values()) == 200
    (tmp_path / f"raw{suffix}").write_bytes(first + second[:1] + b"?" + second[2:])
    with pytest.raises(DataError, match=rf"raw\{suffix}: the \{suffix} is truncated or damaged"):
        prepare(wanted, tmp_path / "damaged")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", r"empty\.txt: the file is empty"),
        ("empty.gz", gzip.compress(b"", mtime=0), r"empty\.gz: the file is empty"),
        ("blank.txt", b"\n\n", r"blank\.txt: the file has only blank lines"),
        ("raw.zip", b"PK\x03\x04....", r"raw\.zip: this is a zip archive"),
        ("what.txt", b"hello world\n", r"what\.txt: cannot detect the format from the name or the first lines"),
    ],
)
def test_files_that_hold_no_rows_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare(PreparationSettings(str(tmp_path / name), bad_rows="skip"), tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.txt", "none.txt: no such file. Check the path"),
        ("planted-500", "planted-500: no such file. Only train.py makes a log, such as planted-500k"),
        ("no*.gz", "no file matches"),
        ("folder", "the folder has no files"),
    ],
)
def test_files_that_are_not_there_are_named(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match=message):
        prepare(PreparationSettings(str(tmp_path / name), bad_rows="skip"), tmp_path / "out")


def test_a_file_given_twice_is_refused(tmp_path, raw):
    with pytest.raises(DataError, match="given twice"):
        prepare(PreparationSettings([raw, raw]), tmp_path / "out")
    with pytest.raises(DataError, match="given twice"):
        prepare(PreparationSettings(train_file=raw, test_file=raw), tmp_path / "out")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"split_fractions": (0.5, 0.2, 0.2)}, "three shares for train, validation and test that sum to 1"),
        ({"hash_size": 1}, "hash_size: 1 is not allowed"),
        ({"min_count": 0}, "min_count is 0"),
        ({"bad_rows": "drop"}, "unknown bad_rows 'drop'. .*Allowed: error, skip"),
        ({"dataset_format": "tsv"}, "unknown dataset_format 'tsv'. .*Allowed: auto, criteo"),
        ({"train_file": "b"}, "give either dataset_name"),
        ({"dataset_name": None}, "give either dataset_name"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        PreparationSettings(**({"dataset_name": "a"} | wrong))


def test_a_pipe_is_refused_by_name(tmp_path):
    os.mkfifo(tmp_path / "rows.csv")
    with pytest.raises(DataError, match=r"rows\.csv: a pipe or a device, .* Save them to a file first"):
        prepare(PreparationSettings(train_file=str(tmp_path / "rows.csv"), dataset_format="criteo"), tmp_path / "out")
