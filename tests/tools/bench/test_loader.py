"""tools/bench/loader.py, on a tiny recipe."""

import importlib.util
import json
import subprocess
import sys

import pytest
import yaml

from tests import ROOT
from tests.data.prepared_folders import MIXED, write_prepared

TOOL = ROOT / "tools/bench/loader.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("bench_loader", TOOL)
    module = sys.modules["bench_loader"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_loader"]


def test_it_measures_both_and_compares_the_medians(tmp_path):
    prepared = write_prepared(tmp_path / "prepared", 60, MIXED[1:2])
    values = {"dataset_name": str(prepared.folder), "per_device_train_batch_size": 16, "embedding_dim": 8}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    options = ("--config", tmp_path / "recipe.yaml", "--rounds", 3, "--steps", 2, "--json", "--at_least", 1e9)
    options += ("--world_size", 2)
    result = subprocess.run([sys.executable, TOOL, *map(str, options)], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.strip().endswith("is below 1e+09")
    measured = json.loads(result.stdout)
    assert measured["world_size"] == 2
    for name in ("loader", "training"):
        rates = sorted(one[name] for one in measured["rounds"])
        assert measured[f"{name}_rows_per_second"] == rates[1] > 0
    assert measured["ratio"] == measured["loader_rows_per_second"] / measured["training_rows_per_second"]


def test_a_mistake_in_the_recipe_is_one_line(tmp_path):
    (tmp_path / "recipe.yaml").write_text("dataset_name: none.tsv\n")
    options = ("--config", tmp_path / "recipe.yaml")
    result = subprocess.run([sys.executable, TOOL, *map(str, options)], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: none.tsv: no such file")
    assert "Traceback" not in result.stderr


def test_it_prints_a_table(tool, capsys):
    tool.print_result(
        tool.Result("r.yaml", 64, [tool.Round(3000.0, 100.0), tool.Round(1000.0, 50.0)], 2000.0, 75.0, 26.7)
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "r.yaml, batches of 64 rows, one core"
    assert lines[2].split() == ["1", "3,000", "100", "30.0"]
    assert lines[4].split() == ["median", "2,000", "75", "26.7"]


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--help"], 0, "python tools/bench/loader.py --config recipes/configs/quickstart.yaml"),
        (["--rounds", "0"], 2, "--rounds is 0; use 1 or more"),
    ],
)
def test_help_shows_an_example_and_a_mistake_says_what_is_allowed(tool, capsys, monkeypatch, options, status, words):
    monkeypatch.setattr(sys, "argv", ["bench_loader.py", *options])
    with pytest.raises(SystemExit) as end:
        tool.parse_options()
    assert end.value.code == status
    said = capsys.readouterr()
    assert words in said.out + said.err
