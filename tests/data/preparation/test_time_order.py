"""A time column puts rows in the order of time, splits them by it, and is checked like any other column."""

import random
import sys
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from itertools import chain, pairwise

import polars as pl
import pyarrow as pa
import pytest

from dhen.data.formats.raw_rows import DataError
from dhen.data.loading.batches import BatchLoader
from dhen.data.preparation.preprocessing import prepare
from dhen.data.preparation.reading import pieces as cutting
from dhen.data.preparation.running.runners import LocalProcesses
from dhen.data.preparation.settings import PreparationSettings
from dhen.data.schema import Schema
from tests.data.preparation.running.test_pieces import contents, files_of

SCHEMA = """
label: click
dense: [{name: number, transform: identity}]
sparse: [user, {name: tags, separator: "|", weights: weights}, {name: item, encoding: vocabulary}]
ignored: [when]
"""
START = datetime(2024, 2, 28)


def times_of(count: int) -> list[datetime]:
    """In no order, and some of them equal."""
    draw = random.Random(0)
    return [START + timedelta(minutes=draw.randrange(count // 2)) for _ in range(count)]


def frame_of(times: list) -> pl.DataFrame:
    """A column `when`, and other columns. `number` counts the rows."""
    draw, count = random.Random(1), len(times)
    return pl.DataFrame({
        "click": [draw.randint(0, 1) for _ in range(count)],
        "number": range(count),
        "user": [f"u{draw.randrange(50)}" for _ in range(count)],
        "tags": [draw.choice(["", "a|b", "c"]) for _ in range(count)],
        "item": [f"i{draw.randrange(20)}" for _ in range(count)],
        "when": times,
    }).with_columns(weights=pl.col("tags").replace({"a|b": "1|2", "c": "0.5"}))  # fmt: skip


@pytest.fixture
def settings(tmp_path) -> PreparationSettings:
    """700 rows in three files."""
    (tmp_path / "schema.yaml").write_text(SCHEMA)
    frame, files = frame_of(times_of(700)), []
    for start, end in ((0, 400), (400, 410), (410, 700)):
        files.append(str(tmp_path / f"{start:03d}.csv"))
        frame[start:end].write_csv(files[-1], datetime_format="%Y-%m-%dT%H:%M:%S")
    return PreparationSettings(files, dataset_schema=tmp_path / "schema.yaml", time_column="when")


def numbers_of(folder, split: str = "train") -> list[int]:
    """The number of each raw row of a split, in the order of its rows."""
    return pl.read_parquet(sorted((folder / split).glob("*.parquet")))["number"].cast(int).to_list()


@pytest.mark.parametrize("order", ["random", "sequential"])
def test_rows_are_in_the_order_of_time(tmp_path, settings, order):
    times = times_of(700)
    schema = prepare(replace(settings, split_order=order), tmp_path / "out")
    numbers = [numbers_of(tmp_path / "out", split) for split in schema.splits]
    assert sorted(chain(*numbers)) == list(range(700))
    for of_split in numbers:
        assert of_split == sorted(of_split, key=lambda number: (times[number], number))
    assert {"when", ":time", ":order"}.isdisjoint(pl.read_parquet(tmp_path / "out/train/*.parquet").columns)
    assert {column.name for column in (*schema.dense, *schema.sparse)} == {"number", "user", "tags", "item"}
    if order == "sequential":
        assert list(chain(*numbers)) == sorted(range(700), key=lambda number: (times[number], number))
        assert all(times[one[-1]] < times[two[0]] for one, two in pairwise(numbers))
        assert all(abs(len(one) - share) < 5 for one, share in zip(numbers, (560, 70, 70), strict=True))


def test_files_per_split_stay_splits(tmp_path, settings):
    files = {"train_file": settings.dataset_name[::2], "test_file": settings.dataset_name[1]}
    prepare(replace(settings, dataset_name=None, **files), tmp_path / "out")
    times = times_of(700)
    raw = {"train": [*range(400), *range(410, 700)], "test": range(400, 410)}
    for split, expected in raw.items():
        assert numbers_of(tmp_path / "out", split) == sorted(expected, key=lambda number: (times[number], number))


@pytest.mark.parametrize("order", ["random", "sequential"])
def test_workers_pieces_and_duckdb_change_nothing(tmp_path, monkeypatch, settings, order):
    settings = replace(settings, split_order=order)
    prepare(settings, tmp_path / "whole", runner=LocalProcesses(1))
    monkeypatch.setattr(cutting, "PIECE_BYTES", 2_000)
    for workers in (1, 3):
        prepare(settings, tmp_path / f"{workers}", runner=LocalProcesses(workers))
    monkeypatch.setitem(sys.modules, "duckdb", None)
    prepare(settings, tmp_path / "memory", runner=LocalProcesses(1))
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3") == files_of(tmp_path / "memory")
    assert contents(tmp_path / "1") == contents(tmp_path / "whole")
    assert Schema.load(tmp_path / "1").splits == Schema.load(tmp_path / "whole").splits, "also the digests"


def test_training_in_this_order_resumes_in_it(tmp_path, settings):
    prepare(replace(settings, split_order="sequential"), tmp_path / "out")
    loader = BatchLoader(tmp_path / "out", "train", batch_size=32)
    rows = [[int(number) for number in batch.dense_BN[:, 0]] for batch in loader.epoch(0)]
    assert list(chain(*rows)) == numbers_of(tmp_path / "out")
    resumed = [[int(number) for number in batch.dense_BN[:, 0]] for batch in loader.epoch(1, first_step=7)]
    assert resumed == rows[7:]


FORMS = [
    "2024-02-28", "2024-02-28T00:30", "2024-02-28 01:00:00", "2024-02-28T01:00:00.25Z", "2024-02-28T00:00:00-02:00",
    " 2024-02-28 03:00 ", "2024-02-29T05:30:00.123456+02:30", "2024-03-01",
]  # fmt: skip
WRONG = ["", "yesterday", "2024-02-30", "20240228", "1709078400", "2024-02-28T25:00", "2024-02-28Z", "28.02.2024"]


def prepared(tmp_path, times: list, **more) -> Schema:
    (tmp_path / "schema.yaml").write_text(SCHEMA)
    name = "rows.csv" if all(isinstance(time, str) for time in times) else "rows.parquet"
    frame = frame_of(times)
    frame.write_csv(tmp_path / name) if name.endswith("csv") else frame.write_parquet(tmp_path / name)
    return prepare(
        PreparationSettings(
            tmp_path / name, dataset_schema=tmp_path / "schema.yaml", time_column="when", id_encoding="hash",
            split_fractions=(1, 0, 0), **more,
        ),
        tmp_path / "out",
    )  # fmt: skip


@pytest.mark.parametrize(
    "times",
    [
        FORMS,
        ["-1e3", "-5", "-0.0", "0", " 2.5", "1706659200", "1706659201000"],
        [-7, 3, 20240131, 2**40],
        [0.25, 1.5, 3e9],
        [START + timedelta(microseconds=i * i) for i in range(5)],
        [datetime(2024, 3, 31, hour, tzinfo=UTC) for hour in range(5)],
        [date(2024, 2, 28) + timedelta(days=i) for i in range(5)],
    ],
    ids=["dates", "numbers", "integers", "floats", "timestamps", "with a zone", "days"],
)
def test_what_is_a_time(tmp_path, times):
    prepared(tmp_path, times[::-1])
    assert numbers_of(tmp_path / "out") == sorted(range(len(times)), reverse=True) or times[2:4] == ["-0.0", "0"]
    if times[2:4] == ["-0.0", "0"]:  # equal, so they stay in their order
        assert numbers_of(tmp_path / "out") == [6, 5, 3, 4, 2, 1, 0]


def test_bad_times_are_counted_and_named(tmp_path):
    times = [*FORMS, *WRONG, *FORMS]
    assert prepared(tmp_path, times, bad_rows="skip").splits["train"].bad_rows == len(WRONG)
    bad = pl.read_csv(tmp_path / "out/bad_rows.csv")
    assert bad["row"].to_list() == list(range(len(FORMS) + 2, len(FORMS) + 2 + len(WRONG)))
    assert bad["file"].unique().to_list() == [str(tmp_path / "rows.csv")]
    assert bad["reason"][1] == (
        "column 'when': the time is 'yesterday'; it must be an ISO 8601 date or date and time, as most are"
    )


@pytest.mark.parametrize(
    ("times", "row", "complaint"),
    [
        (["1", "2", "3", "2024-02-28"], 5, "the time is '2024-02-28'; it must be a finite number"),
        (["1", "2", "inf", "3"], 4, "the time is 'inf'; it must be a finite number"),
        ([1.0, None, 3.0], 2, "the time is blank; it must be a finite number"),
        ([START, None, START], 2, "the time is blank; it must be an ISO 8601 date"),
    ],
)
def test_a_bad_time_stops_the_preparation(tmp_path, times, row, complaint):
    with pytest.raises(DataError, match=rf"rows\.(csv|parquet): row {row}: column 'when': {complaint}"):
        prepared(tmp_path, times)


def test_what_cannot_be_a_time_column_is_refused_in_one_line(tmp_path, settings):
    with pytest.raises(ValueError, match=r"no column 'whn'.* are .* Did you mean 'when'\? Correct --time_column"):
        prepare(replace(settings, time_column="whn"), tmp_path / "out")
    log = tmp_path / "log.txt"
    log.write_text("1\t2\n")
    for name in ("criteo", "libsvm"):
        with pytest.raises(ValueError, match=f"^time_column: files of the format {name} do not name columns"):
            prepare(PreparationSettings(log, dataset_format=name, time_column="when"), tmp_path / "out")
    for kind, complaint in ((pa.time64("us"), "has no date"), (pa.list_(pa.int64()), "has lists")):
        columns = {"click": [0, 1], "number": [1, 2], "user": ["a", "b"], "tags": ["", ""], "weights": ["", ""]}
        table = pa.table({**columns, "item": ["a", "b"], "when": pa.array([None, None], kind)})
        pa.parquet.write_table(table, tmp_path / "odd.parquet")
        with pytest.raises(DataError, match=f"column 'when' .*{complaint}"):
            prepare(replace(settings, dataset_name=tmp_path / "odd.parquet"), tmp_path / "out")


def test_rows_to_predict_keep_their_origins(tmp_path, settings):
    prepare(
        replace(settings, is_label_required=False, id_encoding="hash", split_fractions=(0.5, 0, 0.5)), tmp_path / "out"
    )
    rows = pl.read_parquet(tmp_path / "out/test/*.parquet").rows(named=True)
    starts = dict(zip(settings.dataset_name, (0, 400, 410), strict=True))
    assert all(row["number"] == starts[row[":file"]] + row[":row"] - 2 for row in rows)
