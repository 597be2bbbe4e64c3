"""tools/bench/loader.py on a tiny recipe."""

import json

import pytest
import yaml

from tests.data.prepared_folders import MIXED, write_prepared
from tests.tools.forked_python import call
from tools.bench import loader

TOOL = "tools/bench/loader.py"


def test_it_measures_both_and_compares_the_medians(tmp_path):
    prepared = write_prepared(tmp_path / "prepared", 60, MIXED[1:2])
    values = {"dataset_name": str(prepared.folder), "per_device_train_batch_size": 16, "embedding_dim": 8}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    tiny = ("--rounds", 3, "--steps", 2, "--world_size", 2)
    result = call(TOOL, "--config", tmp_path / "recipe.yaml", *tiny, "--json", "--at_least", 1e9)
    assert result.status == 1, result.stderr
    assert result.stderr.strip().endswith("is below 1e+09")
    measured = json.loads(result.stdout)
    assert measured["world_size"] == 2
    for name in ("loader", "training"):
        rates = sorted(one[name] for one in measured["rounds"])
        assert measured[f"{name}_rows_per_second"] == rates[1] > 0
    assert measured["ratio"] == measured["loader_rows_per_second"] / measured["training_rows_per_second"]


def test_a_mistake_in_the_recipe_is_one_line(tmp_path):
    (tmp_path / "recipe.yaml").write_text("dataset_name: none.tsv\n")
    result = call(TOOL, "--config", tmp_path / "recipe.yaml")
    assert result.status == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: none.tsv: no such file")
    assert "Traceback" not in result.stderr


def test_it_prints_a_table(capsys):
    rounds = [loader.Round(3000.0, 100.0), loader.Round(1000.0, 50.0)]
    loader.print_result(loader.Result("r.yaml", 64, rounds, 2000.0, 75.0, 26.7))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "r.yaml, batches of 64 rows, one core"
    assert lines[2].split() == ["1", "3,000", "100", "30.0"]
    assert lines[4].split() == ["median", "2,000", "75", "26.7"]


def test_a_wrong_number_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["loader.py", "--rounds", "0"])
    with pytest.raises(SystemExit) as end:
        loader.parse_options()
    assert end.value.code == 2
    assert "--rounds is 0. Use 1 or more." in capsys.readouterr().err
