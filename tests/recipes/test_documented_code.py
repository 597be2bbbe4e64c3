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
import pyarrow as pa
import pytest

from dhen.data.hashing import hashed_ids
from dhen.data.loading.batches import BatchLoader
from dhen.data.schema import FORMAT_VERSION, Schema
from tests import ROOT
from tests.data.prepared_folders import rows_of
from tests.recipes.launch import TINY, run_script, summary
from tests.recipes.test_documentation import GUIDE, IN_BLOCKS, blocks, script_and_flags, table
from tests.tools import forked_python


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
assert not {"deepspeed", "fbgemm_gpu"} & {name.partition(".")[0] for name, module in sys.modules.items() if module}
rows = pl.read_csv("example/train.csv").to_dicts()[:500]
rows += [{"ad": 3}, {}, {"user": 10**9, "hour": 2, "topics": "unseen|news"}]
print(json.dumps(pipeline.predict(rows).tolist()))
"""
    printed = run_code(without + block_with("predict([row])") + more, example)
    lines = (example / "example/train.csv").read_text().splitlines()[: 1 + 500]
    (example / "rows.csv").write_text("\n".join([*lines, "0,,,,3,,,,", "0,,,,,,,,", "0,2,,1000000000,,,,unseen|news,"]))
    done = run_script(
        "predict.py", f"--model_name_or_path={example / 'runs/example'}", f"--dataset_name={example / 'rows.csv'}",
        f"--output={example / 'scores.parquet'}",
    )  # fmt: skip
    assert done.status == 0, done.output
    expected = pl.read_parquet(example / "scores.parquet")["prediction"].to_numpy()
    np.testing.assert_allclose(json.loads(printed.splitlines()[-1]), expected, rtol=1e-5)
    assert expected.std() > 0.05  # or any order of the rows would do


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a prepared folder that the page's code wrote, and with one of the same rows by prepare_data.py."""
    folder = tmp_path_factory.mktemp("by_hand")
    run_code(block_with("scan_csv"), folder)
    code = block_with("row_ids")
    assert "dhen" not in code
    run_code(code, folder)
    raw = ("--dataset_name", folder / "example/train.csv", "--dataset_schema", folder / "example/schema.yaml")
    same = ("--hash_size", 1000, "--split_order", "sequential", "--output", folder / "ours")
    for arguments in (("--seal", folder / "by_hand"), (*raw, *same)):
        done = forked_python.call("tools/prepare_data.py", *arguments)
        assert done.status == 0, done.stderr
    return folder


def test_a_folder_that_is_written_by_hand_gives_the_batches_of_a_prepared_one(by_hand):
    batches = {}
    for name in ("by_hand", "ours"):
        schema = Schema.load(by_hand / name)
        options = {"schema": schema, "batch_size": 64, "rank": 0, "world_size": 1}
        train = BatchLoader(by_hand / name, "train", shuffle=True, seed=3, **options)
        test = BatchLoader(by_hand / name, "test", **options)
        batches[name] = [rows_of(batch, schema) for loader in (train, test) for batch in loader.epoch(0)]
    assert batches["by_hand"] == batches["ours"]
    assert sum(map(len, batches["ours"])) == 4_800 + 600


def test_a_folder_that_is_written_by_hand_trains_and_is_evaluated(by_hand):
    run, data = by_hand / "run", f"--dataset_name={by_hand / 'by_hand'}"
    done = run_script("train.py", *TINY, data, "--ds_config=ds_configs/zero0.json", f"--output_dir={run}")
    assert done.status == 0, done.output
    assert summary(run)["test"]["examples"] == 600
    done = run_script("evaluate.py", f"--model_name_or_path={run}", data)
    assert done.status == 0, done.output


def test_a_folder_must_be_sealed(by_hand, tmp_path):
    (tmp_path / "schema.json").write_text(
        json.dumps({"format_version": FORMAT_VERSION, "dense": [{"name": "price"}], "sparse": []})
    )
    done = run_script("train.py", f"--dataset_name={tmp_path}", "--ds_config=ds_configs/zero0.json")
    assert done.status != 0
    assert "schema.json has no splits. Run `python tools/prepare_data.py --seal" in done.output


def test_the_page_hashes_keys_as_the_preparation_does():
    names: dict[str, Any] = {}
    exec(block_with("row_ids").partition("def hashed")[0], names)
    random = np.random.default_rng(0)
    letters = "abc 019é漢字🙂\0"
    keys = ["".join(letters[at] for at in random.integers(0, len(letters), 1 + number % 70)) for number in range(5_000)]
    keys += [str(number) for number in range(5_000)] + ["x" * length for length in range(1, 40)]
    for feature, rows in (("user", 2), ("C3", 1000), ("größe 1", 40_000_000), ("tags", 2**40)):
        for some in ([*keys, None], ["long " * 5_000, "x"]):
            expected = hashed_ids(pa.array(some), feature, rows)
            assert np.array_equal(names["row_ids"](some, feature, rows), expected)
    assert names["row_ids"](["", None], "user", 9).tolist() == [0, 0]
    assert names["row_ids"]([], "user", 9).tolist() == []


def test_the_guide_loads_a_model(example, monkeypatch):
    (example / "runs/frappe").symlink_to(example / "runs/example")
    monkeypatch.chdir(example)
    names: dict[str, Any] = {"rows": pl.read_csv("example/train.csv")}
    exec(block_with("runs/frappe/model"), names)
    assert names["probabilities"].shape == names["rows"]["label"].shape


def test_no_block_of_code_is_left_out():
    known = (
        "scan_csv",
        "predict([row])",
        "row_ids",
        "runs/frappe/model",
        "register_interaction",  # test_users_interaction.py
        "hybrid_shards",  # test_hybrid_shards.py
        "aoti_load_package",  # test_export_model.py
    )
    for name, block in blocks("python"):
        assert sum(word in block for word in known) == 1, f"{name}: no test runs {block[:200]}"
