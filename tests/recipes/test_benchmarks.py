"""Logs with which models are compared: the planted one, and those of the CTR benchmark, made of real samples."""

import csv
import gzip
import math
from pathlib import Path

import pyarrow.parquet
import pytest

from dhen.data.schema import Schema
from tests import SHARED_DATA
from tests.recipes.launch import TINY, run_script, summary

SMALL = (
    *TINY,
    "--max_steps=2",
    "--per_device_train_batch_size=64",
    "--head_mlp",
    "8",
    "--ds_config=ds_configs/zero0.json",
)


def train(folder: Path, recipe: str, *flags: str) -> Path:
    """Start a recipe and return its prepared folder."""
    done = run_script(
        "train.py", f"--config=recipes/configs/{recipe}.yaml", f"--output_dir={folder / 'run'}", *SMALL, *flags
    )
    assert done.status == 0, done.output
    (prepared,) = (folder / "prepared").glob("*/schema.json")
    return prepared.parent


def test_a_planted_log_of_any_size_trains_and_knows_its_best(tmp_path):
    schema = Schema.load(train(tmp_path, "planted", "--dataset_name=planted-3k"))
    assert {split: counts.rows for split, counts in schema.splits.items()} == {
        "train": 3000, "validation": 300, "test": 300
    }  # fmt: skip
    found = summary(tmp_path / "run")["test"]
    assert found["best_possible_ne"] == schema.best_possible_ne["test"] < found["ne"]


INTEGERS, CATEGORIES = [f"I{i}" for i in range(1, 14)], [f"C{i}" for i in range(1, 27)]


def sample(name: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of real samples in the layout of the benchmark's CSV files."""
    if name.startswith("criteo"):
        with gzip.open(SHARED_DATA / "criteo/kaggle_first_10000.txt.gz", "rt") as file:
            rows = [line.rstrip("\n").split("\t") for line in file][:2000]
    else:
        with gzip.open(SHARED_DATA / "avazu/sample_2994.csv.gz", "rt") as file:
            header, *rows = csv.reader(file)
    ids: dict[tuple[int, str], str] = {}

    def unique(first: int, row: list[str]) -> list[str]:
        """Ids that are unique over all fields."""
        return [ids.setdefault((place, value), str(len(ids))) for place, value in enumerate(row[first:])]

    if name == "criteo_x4":
        return ["Label", *INTEGERS, *CATEGORIES], rows
    if name == "criteo_x1":
        numbers = [[str(math.log1p(max(0, int(value or 0))) / 20) for value in row[1:14]] for row in rows]
        mixed = [[row[0], *some, *unique(14, row)] for row, some in zip(rows, numbers, strict=True)]
        return ["label", *INTEGERS, *CATEGORIES], mixed
    if name == "avazu_x1":
        return ["label", *(f"feat_{i}" for i in range(1, 23))], [[row[1], *unique(2, row)] for row in rows]
    return header, rows


FEATURES = {"criteo_x1": (13, 26), "criteo_x4": (0, 39), "avazu_x1": (0, 22), "avazu_x4": (0, 24)}


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"no real data at {SHARED_DATA}: they may not be redistributed")
@pytest.mark.parametrize("name", FEATURES)
def test_a_public_benchmark_trains_on_real_rows(tmp_path, name):
    header, rows = sample(name)
    for split, part in (("train", rows[:-600]), ("validation", rows[-600:-300]), ("test", rows[-300:])):
        with (tmp_path / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([header, *part])
    files = [f"--{split}_file={tmp_path / split}.csv" for split in ("train", "validation", "test")]
    prepared = train(tmp_path, name, *files)
    schema = Schema.load(prepared)
    assert (len(schema.dense), len(schema.sparse)) == FEATURES[name]
    assert schema.splits["train"].rows == len(rows) - 600
    assert {column.min_count for column in schema.sparse} == {{"criteo_x4": 10, "avazu_x4": 2}.get(name, 1)}
    table = pyarrow.parquet.read_table(next((prepared / "train").glob("*.parquet")))

    def keys(feature: str) -> list[str | None]:
        vocabulary = pyarrow.parquet.read_table(prepared / "vocabulary" / f"{feature}.parquet").to_pydict()
        by_id = dict(zip(vocabulary["id"], vocabulary["key"], strict=True))
        return [by_id.get(i) for i in table[feature].to_pylist()]

    if name == "criteo_x1":
        assert table["I5"].to_pylist() == pytest.approx([float(row[5]) for row in rows[:-600]], rel=1e-6)
    if name == "criteo_x4":  # numbers as the benchmark makes them categories
        for place, key in zip((row[2] for row in rows), keys("I2"), strict=False):
            number = int(place or 0)
            expected = str(math.floor(math.log(number) ** 2) if number > 2 else number)
            assert key == expected if key is not None else True
        assert sum(key is not None for key in keys("I2")) > 1000
    if name == "avazu_x4":  # 2014-10-21 was a Tuesday
        found = {part: set(keys(f"at_{part}")) for part in ("hour", "weekday", "weekend")}
        assert found == {"hour": {str(int(rows[0][2][6:]))}, "weekday": {"2"}, "weekend": {"0"}}
