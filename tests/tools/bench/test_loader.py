"""tools/bench/loader.py on a tiny recipe."""

import json

import pytest
import yaml

from tests.data.prepared_folders import MIXED, write_prepared
from tests.tools.forked_python import call
from tools.bench import loader

TOOL = "tools/bench/loader.py"


def test_it_measures_both(tmp_path):
    prepared = write_prepared(tmp_path / "prepared", 60, MIXED[1:2])
    values = {"dataset_name": str(prepared.folder), "per_device_train_batch_size": 16, "embedding_dim": 8}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    tiny = ("--rounds", 3, "--steps", 2, "--world_size", 2)
    result = call(TOOL, "--config", tmp_path / "recipe.yaml", *tiny, "--json", tmp_path / "rates.json")
    assert result.status == 0, result.stderr
    assert "the loader of one rank of 2" in result.stdout
    rates = json.loads((tmp_path / "rates.json").read_text())
    assert rates.keys() == {"loader", "training"}
    assert all(len(of_one) == 3 and min(of_one) > 0 for of_one in rates.values())


def test_a_mistake_in_the_recipe_is_one_line(tmp_path):
    (tmp_path / "recipe.yaml").write_text("dataset_name: none.tsv\n")
    result = call(TOOL, "--config", tmp_path / "recipe.yaml")
    assert result.status == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: none.tsv: no such file")
    assert "Traceback" not in result.stderr


def test_the_medians_are_compared(capsys):
    loader.show({"loader": [3000.0, 1000.0], "training": [100.0, 50.0]})
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1] == ["1", "3,000", "100", "30.0"]
    assert rows[3] == ["median", "2,000", "75", "26.7"]


def test_a_wrong_number_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["loader.py", "--rounds", "0"])
    with pytest.raises(SystemExit) as end:
        loader.parse_options()
    assert end.value.code == 2
    assert "--rounds is 0. Use 1 or more." in capsys.readouterr().err
