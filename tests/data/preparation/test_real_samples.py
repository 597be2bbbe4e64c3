"""Known counts of real click logs. Skipped without the logs, whose rows are not part of the project."""

import pytest

from dhen.data.preparation.preprocessing import prepare
from dhen.data.preparation.settings import PreparationSettings
from tests import ROOT, SHARED_DATA

DATA = SHARED_DATA
SCHEMAS = ROOT / "recipes" / "configs" / "schemas"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}: they may not be redistributed")


def test_criteo(tmp_path):
    wanted = PreparationSettings(
        str(DATA / "criteo" / "kaggle_first_10000.txt.gz"), split_fractions=(1, 0, 0), id_encoding="vocabulary"
    )
    schema = prepare(wanted, tmp_path / "out")
    assert schema.splits["train"].rows == 10_000
    assert round(schema.splits["train"].clicks / 10_000, 3) == 0.218
    assert sum(column.num_embeddings - 1 for column in schema.sparse) == 43_579


def test_avazu(tmp_path):
    wanted = PreparationSettings(
        str(DATA / "avazu" / "sample_2994.csv.gz"),
        dataset_schema=SCHEMAS / "avazu.yaml",
        split_fractions=(1, 0, 0),
        id_encoding="vocabulary",
    )
    schema = prepare(wanted, tmp_path / "out")
    assert schema.splits["train"].rows == 2_994
    assert round(schema.splits["train"].clicks / 2_994, 3) == 0.174
    assert len(schema.sparse) == 22
    hours = next(column for column in schema.sparse if column.name == "hour_of_day")
    assert hours.num_embeddings == 2, "one hour, and blank"


def test_frappe(tmp_path):
    files = {f"{split}_file": str(DATA / "frappe" / f"{name}.csv.gz") for split, name in FRAPPE.items()}
    wanted = PreparationSettings(**files, dataset_schema=SCHEMAS / "frappe.yaml", id_encoding="vocabulary")
    schema = prepare(wanted, tmp_path / "out")
    assert {split: counts.rows for split, counts in schema.splits.items()} == {
        "train": 202_027,
        "validation": 57_722,
        "test": 28_860,
    }
    shares = [round(counts.clicks / counts.rows, 3) for counts in schema.splits.values()]
    assert shares == [0.335, 0.330, 0.330]
    assert (
        sum(column.num_embeddings - 1 for column in schema.sparse) == 5_379
    )  # ids of the train split; 5,382 in all three


FRAPPE = {"train": "train", "validation": "valid", "test": "test"}
