"""A small click log for the recipes' tests, prepared once; a run trained on its raw files; a place for output."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import ROOT
from tests.recipes.launch import TINY, prepared_click_log, run_script


@pytest.fixture(scope="session", autouse=True)
def _place_for_output(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["PYTEST_TMP"] = str(tmp_path_factory.mktemp("output"))


@pytest.fixture(scope="session")
def click_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared folder: 640 training rows, 200 validation, 300 test."""
    return prepared_click_log(tmp_path_factory.mktemp("click_log"))


@dataclass(frozen=True)
class TrainedRun:
    """A finished run, the raw files that it was trained on, and where it kept them once prepared."""

    folder: Path
    raw: Path
    prepared: Path


@pytest.fixture(scope="session")
def trained(click_log: Path) -> TrainedRun:
    """Trained by 2 ranks under ZeRO 3, with batch norm and dropout, from the raw files of `click_log`."""
    raw, run = click_log.parent.parent / "raw", click_log.parent.parent / "runs" / "trained"
    files = [f"--{split}_file={raw / split}.tsv.gz" for split in ("train", "validation", "test")]
    flags = [
        *files, "--dataset_format=criteo", "--id_encoding=vocabulary", f"--output_dir={run}", *TINY,
        "--ds_config=ds_configs/zero3.json", "--per_device_train_batch_size=16", "--num_train_epochs=2",
        "--learning_rate=0.01", "--table_learning_rate=0.1", "--batch_norm", "--dropout=0.1",
    ]  # fmt: skip
    done = run_script("train.py", *flags, ranks=2)
    assert done.status == 0, done.output
    (prepared,) = [path for path in (run.parent / "prepared").iterdir() if not path.name.startswith(".")]
    return TrainedRun(run, raw, prepared)


@pytest.fixture(scope="session")
def costs_of_a_slow_machine(tmp_path_factory) -> Path:
    """Where gradients of small tables are cheap to reduce, and every lookup takes a while."""
    raw = json.loads((ROOT / "dhen/tables/placement/costs/cpu.json").read_text())
    free = dict.fromkeys(raw["lookup"]["fp32"], 0.0)
    raw["update"]["adagrad/fp32"], raw["lookup"]["fp32"] = free, free
    for kind in ("rowwise_adagrad/fp32", "rowwise_adagrad/fp16 rounded"):
        raw["update"][kind] = free | {"seconds_per_id": 1e-3}
    path = tmp_path_factory.mktemp("costs") / "costs.json"
    path.write_text(json.dumps(raw))
    return path
