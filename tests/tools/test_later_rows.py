"""tools/later_rows.py: earlier and later rows, with a feature gone and values that are new."""

import polars as pl
import pytest

from dhen.data.formats.roles import load_roles
from tests import ROOT
from tools import later_rows
from tools.later_rows import SHARES, SOURCES, write_later_rows

SHARED_DATA = ROOT.parent / "shared/data"
GONE = {"criteo": "C17", "flights": "tailnum", "planted": "C3"}
NEW = {"criteo": "C14", "flights": "dest", "planted": "C8"}
SPLITS = ["earlier_train", "earlier_validation", *(f"later_train_{share}" for share in SHARES)]
SPLITS += ["later_validation", "later_test"]


@pytest.fixture(scope="module", params=SOURCES)
def written(request, tmp_path_factory):
    if request.param != "planted" and not SHARED_DATA.is_dir():
        pytest.skip(f"no real data at {SHARED_DATA}: they may not be redistributed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(later_rows, "_PLANTED_ROWS", 3000)
        folder = tmp_path_factory.mktemp(request.param)
        write_later_rows(request.param, folder)
    return request.param, {name: pl.read_csv(folder / f"{name}.csv", infer_schema=False) for name in SPLITS}


def test_the_parts_have_their_shares(written):
    _, frames = written
    whole = sum(len(frames[name]) for name in ("later_train_100", "later_validation", "later_test"))
    assert len(frames["later_test"]) == pytest.approx(0.2 * whole, abs=1)
    for share in SHARES:
        assert len(frames[f"later_train_{share}"]) == len(frames["later_train_100"]) * share // 100
    ratio = len(frames["earlier_train"]) / len(frames["earlier_validation"])
    assert ratio == pytest.approx(9, rel=0.01)


def test_one_feature_is_gone_and_others_have_new_values(written):
    data, frames = written[0].removesuffix("_mixed"), written[1]
    earlier, later = frames["earlier_train"], frames["later_train_100"]
    assert later[GONE[data]].null_count() == len(later)
    assert earlier[GONE[data]].null_count() < len(earlier)
    column = {"criteo": "C4", "flights": "flight", "planted": "C2"}[data]
    assert not set(later[column].drop_nulls()) <= set(earlier[column].drop_nulls())


def test_the_schemas_know_their_part(written):
    data = written[0].removesuffix("_mixed")
    schemas = [load_roles(ROOT / f"recipes/configs/schemas/{data}_{part}.yaml") for part in ("earlier", "later")]
    names = [{column.name for column in schema.sparse} for schema in schemas]
    assert names[0] - names[1] == {GONE[data]}
    assert names[1] - names[0] == {NEW[data]}


def test_flights_and_criteo_are_in_time_order(written):
    """All splits, or, where the later ones are drawn at random, the two parts."""
    data, frames = written
    if data.startswith("flights"):
        months = {name: frame["month"].cast(int) for name, frame in frames.items()}
        assert months["earlier_train"].max() <= months["earlier_validation"].min() <= 6
        assert months["later_train_100"].min() == 7
        if data == "flights":
            assert months["later_validation"].max() <= months["later_test"].min()
        else:
            assert set(months["later_test"]) == set(months["later_train_1"]) == set(range(7, 13))
    if data == "criteo":
        first = frames["earlier_train"].row(0)
        assert first[:5] == ("0", "1", "1", "5", "0"), "the sample's first row"


def test_rows_in_time_order_and_the_same_ones_shuffled(tmp_path, monkeypatch):
    monkeypatch.setattr(later_rows, "_DAY_ROWS", 100)
    write_later_rows("in_time_order", tmp_path)
    read = {path.stem: pl.read_csv(path, infer_schema=False) for path in tmp_path.rglob("*.csv")}
    in_order, shuffled = read["train_in_order"], read["train_shuffled"]
    assert len(in_order) == 20 * 80
    assert len(read["validation"]) == len(read["test"]) == 20 * 10
    for day in (1, 20):
        part = in_order[(day - 1) * 80 : day * 80]
        assert len(part.join(read[f"day_{day:02d}"], on=part.columns, how="semi", nulls_equal=True)) == 80
    assert not in_order.equals(shuffled)
    assert in_order.sort(in_order.columns).equals(shuffled.sort(in_order.columns))
