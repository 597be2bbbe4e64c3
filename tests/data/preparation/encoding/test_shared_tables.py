"""Features with the same `table` give equal values equal ids, by the hash and by a vocabulary of all of them."""

from pathlib import Path

import polars as pl
import pytest

from dhen.data.formats.roles import parse_roles
from dhen.data.loading.sealing import seal
from dhen.data.preparation.encoding.vocabulary import load_vocabulary
from dhen.data.preparation.preprocessing import prepare
from dhen.data.preparation.reading import pieces as cutting
from dhen.data.preparation.running.runners import LocalProcesses
from dhen.data.preparation.settings import PreparationSettings
from dhen.data.schema import Schema

SPARSE = (
    '[item, {name: history, separator: "|", table: item}, {name: seller, table: people}, {name: buyer, table: people}]'
)


def settings_of(folder: Path, sparse: str = SPARSE, **more) -> PreparationSettings:
    lines = ["label,item,history,seller,buyer"]
    lines += [
        f"{row % 2},i{row % 7},{'|'.join(f'i{n}' for n in range(5, 5 + row % 6))},p{row % 3},p{row % 5}"
        for row in range(200)
    ]
    folder.mkdir(exist_ok=True)
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    (folder / "schema.yaml").write_text(f"sparse: {sparse}\n")
    files = {"train_file": str(folder / "log.csv"), "dataset_schema": str(folder / "schema.yaml")}
    return PreparationSettings(**files, **more)


def ids_by_value(folder: Path, columns: dict[str, str]) -> dict[str, dict[str, int]]:
    """By column, the id of each raw value."""
    raw, rows = pl.read_csv(folder / "log.csv"), pl.read_parquet(folder / "out/train")
    found = {}
    for name in columns:
        values = raw[name].cast(pl.String)
        values = (
            values.fill_null("")
            .str.split("|")
            .list.eval(pl.element().filter(pl.element() != ""))
            .explode()
            .drop_nulls()
        )
        ids = rows[name].explode().drop_nulls() if rows[name].dtype == pl.List else rows[name]
        found[name] = dict(zip(values, ids, strict=True))
    return found


@pytest.mark.parametrize("given", [{"id_encoding": "vocabulary"}, {"id_encoding": "hash"}, {"hash_size": "auto"}, {}])
@pytest.mark.parametrize("workers", [1, 2])
def test_equal_values_of_two_features_have_equal_ids(tmp_path, monkeypatch, given, workers):
    monkeypatch.setattr(cutting, "PIECE_BYTES", 10**9 if workers == 1 else 900)
    schema = prepare(settings_of(tmp_path, **given), tmp_path / "out", runner=LocalProcesses(workers))
    rows = {column.name: column.num_embeddings for column in schema.sparse}
    assert rows["item"] == rows["history"]
    assert rows["seller"] == rows["buyer"]
    assert [column.table_name for column in schema.sparse] == ["item", "item", "people", "people"]
    ids = ids_by_value(tmp_path, ["item", "history", "seller", "buyer"])
    shared = ids["item"].keys() & ids["history"].keys()
    assert shared == {"i5", "i6"}
    assert all(ids["item"][value] == ids["history"][value] for value in shared)
    assert all(ids["buyer"][value] == ids["seller"][value] for value in ids["seller"])
    assert len({*ids["item"].items(), *ids["history"].items()}) == 10, "i0 to i9"
    if all(column.encoding == "vocabulary" for column in schema.sparse):
        assert rows["item"] == 11
        assert {path.name for path in (tmp_path / "out/vocabulary").iterdir()} == {"item.parquet", "people.parquet"}
        people = load_vocabulary(tmp_path / "out", "people")
        assert dict(zip(people.keys.to_pylist(), people.counts.tolist(), strict=True))["p0"] == 67 + 40, (
            "of both columns"
        )
    else:
        assert not (tmp_path / "out/vocabulary").exists()
    assert seal(tmp_path / "out").sparse == Schema.load(tmp_path / "out").sparse == schema.sparse


def test_without_shared_tables_the_schema_says_nothing_of_them(tmp_path):
    prepare(settings_of(tmp_path, "[item, history, seller, buyer]"), tmp_path / "out")
    assert '"table"' not in (tmp_path / "out/schema.json").read_text()


def test_data_to_predict_has_the_ids_of_the_model(tmp_path):
    prepare(settings_of(tmp_path / "a", id_encoding="vocabulary", min_count=2), tmp_path / "a/out")
    again = settings_of(tmp_path / "b", schema_from=tmp_path / "a/out", is_label_required=False)
    prepare(again, tmp_path / "b/out")
    columns = ["item", "history", "seller", "buyer"]
    assert ids_by_value(tmp_path / "b", columns) == ids_by_value(tmp_path / "a", columns)


@pytest.mark.parametrize(
    ("sparse", "message"),
    [
        ("[a, {name: b, table: c}]", "unknown table 'c'.* Allowed: a. Only 'b' has it as `table`"),
        (
            "[{name: a, table: x}, {name: b, table: a}, {name: c, table: x}]",
            "unknown table 'a'. Allowed: x. Only 'b'",
        ),
        (
            "[{name: a, hash_size: 9}, {name: b, table: a, hash_size: 8}]",
            "a, b share the table 'a'.*hash_size 9 of 'a', hash_size 8 of 'b'",
        ),
        (
            "[{name: a, encoding: hash}, {name: b, table: a, encoding: vocabulary}]",
            "encoding 'hash' of 'a', encoding 'vocabulary' of 'b'",
        ),
        (
            "[{name: a, encoding: vocabulary}, {name: b, table: a, hash_size: 8}]",
            "'a' has a hash_size, but the encoding vocabulary",
        ),
        ("[{name: a, min_count: 2}, {name: b, table: a, min_count: 3}]", "min_count 2 of 'a', min_count 3 of 'b'"),
        ("[{name: a, bins: 9}, {name: b, table: a}]", "a, b share the table 'a'.*bins 9 of 'a'"),
        ("[b, {name: a, bins: 9, table: b}]", "'a' has bins, which make ids of numbers, and table"),
        ("[{name: a, table: x/y}, {name: b, table: x/y}]", "'x/y' is not allowed"),
    ],
)
def test_what_a_table_cannot_be(sparse, message):
    with pytest.raises(ValueError, match=rf"schema\.yaml: .*{message}") as error:
        parse_roles(f"sparse: {sparse}", "schema.yaml")
    assert "\n" not in str(error.value)


def test_a_pattern_may_name_the_table_of_all_its_columns():
    roles = parse_roles("sparse: [{name: 'site_*', table: sites}]\nlabel: y", "schema.yaml")
    assert {role.table_name for role in roles.expanded(["y", "site_1", "site_2"], "f").sparse} == {"sites"}
    with pytest.raises(ValueError, match="f: unknown table 'sites'"):
        roles.expanded(["y", "site_1"], "f")
