"""Data, checkpoints and exports of a newer format are refused in one line; those without a version still work."""

import json
import shutil
from pathlib import Path

import pytest

from tests.recipes.launch import TINY, Finished, assert_same_metrics, losses, run_script, summary

SCHEMA, STATE, INDEX = "schema.json", "trainer_state.json", "model.safetensors.index.json"


def set_version(file: Path, version: int | None) -> None:
    """Write the file again with that version; None: with none, as files were before there were versions."""
    values = json.loads(file.read_text())
    holder = values["metadata"] if file.name == INDEX else values
    assert holder.pop("format_version") == 1
    if version is not None:
        holder["format_version"] = version
    file.write_text(json.dumps(values))


def train(data: Path, run: Path, *flags: str) -> Finished:
    more = [f"--dataset_name={data}", f"--output_dir={run}", "--ds_config=ds_configs/zero0.json", *TINY]
    return run_script("train.py", *more, "--per_device_train_batch_size=16", "--max_steps=4", "--save_steps=2", *flags)


@pytest.fixture(scope="module")
def finished(click_log, tmp_path_factory) -> Path:
    """A run of 4 steps with checkpoints at 2 and 4; read only."""
    run = tmp_path_factory.mktemp("finished") / "run"
    done = train(click_log, run)
    assert done.status == 0, done.output
    return run


@pytest.fixture
def copies(click_log, finished, tmp_path) -> tuple[Path, Path]:
    """The prepared data and the run, to be changed."""
    return Path(shutil.copytree(click_log, tmp_path / "data")), Path(shutil.copytree(finished, tmp_path / "run"))


NEWER = {
    "train on data": (SCHEMA, "train.py", ["--dataset_name={data}", "--output_dir={new}", *TINY]),
    "resume": (
        STATE,
        "train.py",
        ["--dataset_name={data}", "--output_dir={run}", "--resume_from_checkpoint=true", *TINY],
    ),
    "fine-tune": (INDEX, "train.py", ["--dataset_name={data}", "--output_dir={new}", "--model_name_or_path={run}"]),
    "evaluate": (INDEX, "evaluate.py", ["--model_name_or_path={run}"]),
    "evaluate on data": (SCHEMA, "evaluate.py", ["--model_name_or_path={run}", "--dataset_name={data}"]),
    "predict": (INDEX, "predict.py", ["--model_name_or_path={run}", "--dataset_name={data}", "--output={new}.parquet"]),
}


@pytest.mark.parametrize("name", NEWER)
def test_a_newer_format_is_refused_in_one_line(copies, tmp_path, name):
    kind, script, flags = NEWER[name]
    data, run = copies
    file = {SCHEMA: data / SCHEMA, STATE: run / "checkpoint-4" / STATE, INDEX: run / "model" / INDEX}[kind]
    set_version(file, 2)
    before = sorted(run.rglob("*"))
    done = run_script(script, *[flag.format(data=data, run=run, new=tmp_path / "new") for flag in flags])
    assert done.status == 1, done.output
    (line,) = [line for line in done.output.splitlines() if "error: " in line]
    assert line.startswith(f"error: {file}: format_version is 2, but this code reads version 1. Update this code, or ")
    assert done.output.strip().endswith(line), done.output
    assert sorted(run.rglob("*")) == before
    assert not list(tmp_path.glob("new*"))


def test_files_without_a_version_still_work(copies, finished, tmp_path):
    data, run = copies
    for file in (data / SCHEMA, run / "model" / SCHEMA, run / "model" / INDEX, run / "checkpoint-2" / STATE):
        set_version(file, None)
    resumed = tmp_path / "resumed"
    done = train(data, resumed, f"--resume_from_checkpoint={run / 'checkpoint-2'}")
    assert done.status == 0, done.output
    assert losses(resumed)[4] == losses(finished)[4]
    flags = [f"--model_name_or_path={run}", f"--dataset_name={data}", f"--output={tmp_path / 'metrics.json'}"]
    done = run_script("evaluate.py", *flags)
    assert done.status == 0, done.output
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert_same_metrics(metrics, summary(finished)["test"], 1e-6)
