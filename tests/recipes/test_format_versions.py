"""Data, checkpoints and exported models of another format are refused in one line, before anything is written."""

import json
import shutil
from pathlib import Path

import pytest

from tests.recipes.launch import TINY, Finished, run_script

SCHEMA, STATE, INDEX = "schema.json", "trainer_state.json", "model.safetensors.index.json"
WAYS_OUT = {
    SCHEMA: "Use the code that wrote the file, or prepare the data and train the model again.",
    STATE: "Use the code that wrote the file, or start a new run, without a resume.",
    INDEX: "Use the code that wrote the file, or train the model again.",
}


def make_old(file: Path) -> None:
    """Write the file again as one without a version, as files were before there were versions."""
    values = json.loads(file.read_text())
    del (values["metadata"] if file.name == INDEX else values)["format_version"]
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


OLD = {
    "train on data": (SCHEMA, "train.py", ["--dataset_name={data}", "--output_dir={new}", *TINY]),
    "resume": (
        STATE,
        "train.py",
        ["--train_file={new}.csv", "--output_dir={run}", "--resume_from_checkpoint=true", *TINY],
    ),
    "fine-tune": (INDEX, "train.py", ["--dataset_name={data}", "--output_dir={new}", "--model_name_or_path={run}"]),
    "evaluate": (INDEX, "evaluate.py", ["--model_name_or_path={run}"]),
    "evaluate on data": (SCHEMA, "evaluate.py", ["--model_name_or_path={run}", "--dataset_name={data}"]),
    "predict": (INDEX, "predict.py", ["--model_name_or_path={run}", "--dataset_name={data}", "--output={new}.parquet"]),
}


@pytest.mark.parametrize("name", OLD)
def test_an_old_format_is_refused_in_one_line(copies, tmp_path, name):
    kind, script, flags = OLD[name]
    data, run = copies
    file = {SCHEMA: data / SCHEMA, STATE: run / "checkpoint-4" / STATE, INDEX: run / "model" / INDEX}[kind]
    make_old(file)
    before = sorted(run.rglob("*"))
    done = run_script(script, *[flag.format(data=data, run=run, new=tmp_path / "new") for flag in flags])
    assert done.status == 1, done.output
    (line,) = [line for line in done.output.splitlines() if "error: " in line]
    assert line.startswith(f"error: {file}: format_version is None, but this code reads version ")
    assert line.endswith(WAYS_OUT[kind])
    assert done.output.strip().endswith(line), done.output
    assert sorted(run.rglob("*")) == before
    assert not list(tmp_path.glob("new*"))


def test_a_model_without_row_uses_is_refused_in_one_line(copies, tmp_path):
    data, run = copies
    for file in (run / "model").glob("row-uses-*"):
        file.unlink()
    done = run_script("evaluate.py", f"--model_name_or_path={run}", f"--dataset_name={data}")
    assert done.status == 1, done.output
    assert done.output.strip().splitlines()[-1].startswith(f"error: {run / 'model'}: no file row-uses-*.safetensors")
