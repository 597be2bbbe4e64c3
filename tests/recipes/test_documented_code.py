"""The Python code of the pages runs, and does what the pages say."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests import ROOT
from tests.recipes.launch import run_script, summary
from tests.recipes.test_documentation import GUIDE, IN_BLOCKS, blocks, script_and_flags, table


def block_with(word: str) -> str:
    """The one Python block of the pages that holds `word`."""
    (block,) = [block for _, block in blocks("python") if word in block]
    return block


def run_code(code: str, folder: Path) -> str:
    """Run it as a script in `folder`; returns what it printed."""
    (folder / "block.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "block.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The worked example of DATA.md: a folder with its raw files, its training file and its run."""
    folder = tmp_path_factory.mktemp("example")
    run_code(block_with("scan_csv"), folder)
    (command,) = [command for _, command in IN_BLOCKS if "example/train.csv" in command]
    _, flags = script_and_flags(command)
    done = run_script(
        "train.py", *(str(folder / word) if re.match(r"(example|runs)/", word) else word for word in flags), ranks=2
    )
    assert done.status == 0, done.output
    return folder


def test_the_worked_example_trains_a_model_that_has_learned(example):
    rows = pl.read_csv(example / "example/train.csv")
    impressions = pl.read_csv(example / "raw/impressions.csv")
    assert len(rows) == len(impressions)
    assert rows["label"].sum() == impressions.filter(pl.col("outcome") != "none").height
    assert rows["price"].null_count() > 0  # of the ads that are missing
    assert set(rows["hour"]) == set(range(24))
    assert set(rows["weekday"]) == set(range(1, 8))
    assert summary(example / "runs/example")["test"]["auc"] > 0.7


def test_the_guide_lists_what_a_run_leaves_behind(example):
    listed = " ".join(row[0] for row in table(GUIDE, "What a run leaves behind"))
    for path in (example / "runs/example").iterdir():
        name = re.sub(r"^checkpoint-\d+$", "checkpoint-<step>", path.name) + "/" * (
            path.is_dir() and path.name != "latest"
        )
        assert f"`{name}`" in listed, name


def test_rows_are_scored_in_python_as_predict_scores_them(example):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    of_training = [re.match(r"[\w-]+", package).group() for package in extras["train"]] + ["fbgemm_gpu"]
    without = f"import sys\nsys.modules |= dict.fromkeys({of_training})  # None: as if not installed\n"
    more = """
import json
import polars as pl
rows = pl.read_csv("example/train.csv").to_dicts()[:500]
rows += [{"ad": 3}, {}, {"user": 10**9, "hour": 2, "topics": "unseen|news"}]
print(json.dumps(click_probabilities(rows).tolist()))
"""
    printed = run_code(without + block_with("click_probabilities") + more, example)
    lines = (example / "example/train.csv").read_text().splitlines()[: 1 + 500]
    (example / "rows.csv").write_text("\n".join([*lines, "0,,,,3,,,", "0,,,,,,,", "0,2,,1000000000,,,,unseen|news"]))
    done = run_script(
        "predict.py", f"--model_name_or_path={example / 'runs/example'}", f"--dataset_name={example / 'rows.csv'}",
        f"--dataset_schema={example / 'example/schema.yaml'}", f"--output={example / 'scores.parquet'}",
    )  # fmt: skip
    assert done.status == 0, done.output
    expected = pl.read_parquet(example / "scores.parquet")["prediction"].to_numpy()
    np.testing.assert_allclose(json.loads(printed.splitlines()[-1]), expected, rtol=1e-5)
    assert expected.std() > 0.05  # or any order of the rows would do


def test_the_guide_loads_a_model(example, monkeypatch):
    (example / "runs/frappe").symlink_to(example / "runs/example")
    monkeypatch.chdir(example)
    names: dict[str, Any] = {}
    exec(block_with("runs/frappe/model"), names)
    assert type(names["model"]).__name__ == "DhenForClickPrediction"


def test_no_block_of_code_is_left_out():
    known = (
        "scan_csv",
        "click_probabilities",
        "runs/frappe/model",
        "register_interaction",
    )  # test_users_interaction.py
    for name, block in blocks("python"):
        assert sum(word in block for word in known) == 1, f"{name}: no test runs {block[:200]}"
