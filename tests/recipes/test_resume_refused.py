"""A checkpoint is resumed by the model and the data that wrote it, or refused in words that name what differs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from dhen.model.configuration_dhen import DhenConfig
from dhen.training.saved.checkpoint import check_same_model, read_state
from dhen.training.saved.checkpoint_folder import CheckpointError, sealed
from tests import ROOT
from tests.recipes.launch import TINY, Finished, run_script, summary

ZERO0 = ROOT / "ds_configs/zero0.json"
DENSE, SPARSE = ["age", "price"], ["app", "city"]


def write_log(folder: Path, dense: list[str], sparse: list[str], seed: int = 0) -> list[str]:
    """120 rows of a CSV whose sparse features all have the same table sizes; the flags that name it."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    numbers = {name: rng.normal(size=120).round(3) for name in sorted(DENSE)}
    keys = {name: rng.integers(0, 9, 120) for name in sorted(SPARSE)}
    columns = {"label": [0, 1] * 60, **numbers, **keys}
    lines = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    (folder / "columns.yaml").write_text(yaml.safe_dump({"dense": dense, "sparse": sparse}))
    return [f"--train_file={folder / 'rows.csv'}", f"--dataset_schema={folder / 'columns.yaml'}", "--hash_size=20"]


def train(data: list[str], run: Path, *flags: str) -> Finished:
    more = [*TINY, "--per_device_train_batch_size=12", "--save_steps=4", f"--output_dir={run}", "--max_steps=8"]
    return run_script("train.py", *data, *more, "--ds_config=ds_configs/zero0.json", *flags)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    return write_log(tmp_path_factory.mktemp("data") / "log", DENSE, SPARSE)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """A run of 8 steps with checkpoints at 4 and 8; read only."""
    run = tmp_path_factory.mktemp("finished") / "run"
    done = train(data, run)
    assert done.status == 0, done.output
    return run


DIFFERENCES = {
    "sparse features in another order": ([DENSE, SPARSE[::-1]], [], "sparse features 'app', now 'city' (at 1)"),
    "dense features in another order": ([DENSE[::-1], SPARSE], [], "dense features 'age', now 'price' (at 1)"),
    "a feature less": ([DENSE, SPARSE[:1]], ["ignored"], "sparse features ['app', 'city'], now ['app']"),
    "other rows, as many": ([DENSE, SPARSE, 1], [], "saved with data "),
    "another size of tables": ([DENSE, SPARSE], ["--hash_size=21"], "rows of tables 20, now 21 (at 'app')"),
    "another order": ([DENSE, SPARSE], ["--shuffle=none"], "saved with shuffle 'window', now 'none'"),
    "another activation": ([DENSE, SPARSE], ["--activation=gelu"], "activation 'relu', now 'gelu'"),
    "another depth": ([DENSE, SPARSE], ["--num_layers=2"], "num_layers 1, now 2"),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_what_differs_is_named(tmp_path, finished, name):
    log, flags, words = DIFFERENCES[name]
    other = write_log(tmp_path / "other", *log)
    if flags == ["ignored"]:
        path, flags = tmp_path / "other" / "columns.yaml", []
        path.write_text(path.read_text() + "ignored: [city]\n")
    before = (finished / "metrics.csv").read_text()
    done = train(other, finished, "--resume_from_checkpoint=true", *flags)
    assert done.status == 1
    assert "Traceback" not in done.output, done.output
    (line,) = [line for line in done.output.splitlines() if "error: " in line]
    assert words in line
    assert "--model_name_or_path" in line
    assert (finished / "metrics.csv").read_text() == before


def test_a_finished_run_keeps_its_speed(tmp_path, finished, data):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    done = train(data, run, "--resume_from_checkpoint=true")
    assert done.status == 0, done.output
    assert summary(run)["samples_per_second"] == summary(finished)["samples_per_second"] > 0
    assert summary(run)["seconds"] > 0


def test_after_a_resume_from_an_earlier_checkpoint_that_is_the_newest(tmp_path, finished, data):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    done = train(data, run, f"--resume_from_checkpoint={run / 'checkpoint-4'}", "--max_steps=4")
    assert done.status == 0, done.output
    assert (run / "latest").read_text().strip() == "checkpoint-4"


def fail_to_export() -> None:
    """A patch: writing the model fails as on a full disk."""
    from dhen.training import finish

    def full(*args: object) -> None:
        raise OSError("No space left on device: 'model'")

    finish.export_model = full


def test_a_failure_at_the_end_is_one_line_too(tmp_path, data):
    done = run_script(
        "train.py", *data, *TINY, f"--output_dir={tmp_path / 'run'}", "--max_steps=1",
        "--ds_config=ds_configs/zero0.json", patch=fail_to_export,
    )  # fmt: skip
    assert done.status == 1
    assert done.output.strip().splitlines()[-1] == "error: No space left on device: 'model'"


def test_another_optimizer_is_refused_and_another_setting_is_said(tmp_path, finished, data):
    run, zero0 = Path(shutil.copytree(finished, tmp_path / "run")), json.loads(ZERO0.read_text())
    sgd, bf16 = tmp_path / "sgd.json", tmp_path / "bf16.json"
    sgd.write_text(json.dumps(zero0 | {"optimizer": {"type": "SGD"}, "zero_allow_untested_optimizer": True}))
    bf16.write_text(json.dumps(zero0 | {"dhen": zero0["dhen"] | {"all_to_all_dtype": "bf16"}}))
    refused = train(data, run, "--resume_from_checkpoint=true", f"--ds_config={sgd}", "--max_steps=9")
    assert refused.status == 1
    assert "saved with optimizer.type 'AdamW', now 'SGD'" in refused.output, refused.output
    assert "Traceback" not in refused.output
    said = train(data, run, "--resume_from_checkpoint=true", f"--ds_config={bf16}", "--max_steps=9")
    assert said.status == 0, said.output
    lines = [line for line in said.output.splitlines() if line.startswith("ds_config: ")]
    directions = ("backward", "forward")
    assert lines == [
        f"ds_config: dhen.all_to_all_dtype.{each} was fp32, now bf16: the resumed run honours it" for each in directions
    ]


def test_an_option_that_the_checkpoint_does_not_have_must_have_its_default(tmp_path, finished):
    state = json.loads((finished / "checkpoint-8/trainer_state.json").read_text())
    del state["model"]["head_inputs"]
    (tmp_path / "trainer_state.json").write_text(json.dumps(sealed(state)))
    config = DhenConfig.from_pretrained(finished / "model")
    check_same_model(finished / "checkpoint-8", config)
    check_same_model(tmp_path, config)
    config.head_inputs = "all"
    with pytest.raises(CheckpointError, match="saved with head_inputs 'last', now 'all'"):
        check_same_model(tmp_path, config)


def test_gates_of_another_meaning_are_refused(tmp_path, finished):
    state, config = read_state(finished / "checkpoint-8"), DhenConfig.from_pretrained(finished / "model")
    config.gate = state["model"]["gate"] = "soft"
    (tmp_path / "trainer_state.json").write_text(json.dumps(sealed(state)))
    with pytest.raises(CheckpointError, match="saved with start of gates None, now 0"):
        check_same_model(tmp_path, config)


@pytest.mark.parametrize(("lanes", "words"), [(None, "step 5/8"), (2, "saved with lanes 2, now 1.")])
def test_another_order_of_the_rows_is_refused(tmp_path, data, finished, lanes, words):
    """A checkpoint that says no lanes is from before there were any: its rows are in one."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    file = run / "checkpoint-4/trainer_state.json"
    state = json.loads(file.read_text())
    assert state["data_order"].pop("lanes") == 1
    state["data_order"] |= {"lanes": lanes} if lanes else {}
    file.write_text(json.dumps(sealed(state)))
    done = train(data, run, f"--resume_from_checkpoint={run / 'checkpoint-4'}")
    assert done.status == (1 if lanes else 0)
    assert words in done.output, done.output
