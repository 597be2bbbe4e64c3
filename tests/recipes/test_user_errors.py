"""A user's mistake is one line that says what to do, an exit status, and no loss of what an earlier run left."""

import hashlib
import json
import os
import shutil
import socket
from pathlib import Path

import pytest

from tests import ROOT
from tests.recipes.launch import TINY, Finished, run_script

ROW = "\t".join(["1", *["5"] * 13, *["68fd1e64"] * 26]) + "\n"
BAD_ROW = "\t".join(["1", *["5"] * 12, "five", *["68fd1e64"] * 26]) + "\n"


def the_error(done: Finished) -> str:
    """The one line of a failed script."""
    assert done.status == 1, done.output
    assert "Traceback" not in done.output, done.output
    (line,) = [line for line in done.output.splitlines() if "error: " in line]
    assert done.output.strip().endswith(line), done.output
    return line


@pytest.fixture(scope="module")
def earlier_run(trained, tmp_path_factory) -> Path:
    """A copy of a finished run, that no other test needs."""
    return Path(shutil.copytree(trained.folder, tmp_path_factory.mktemp("earlier") / "run"))


@pytest.fixture(scope="module")
def places(click_log, earlier_run, tmp_path_factory) -> dict[str, str]:
    """Files with mistakes in them, by the name under which the flags below mention them."""
    folder = tmp_path_factory.mktemp("mistakes")
    contents = {
        "unknown_key.yaml": "learning_rates: 0.1\n",
        "wrong_type.yaml": "num_layers: many\n",
        "bad_row.tsv": ROW * 3 + BAD_ROW + ROW,
        "not_strict.json": '{"optimizer": {},}',
        "unknown_key.json": json.dumps(ds_config() | {"gradient_cliping": 1.0}),
        "other_lr.json": json.dumps(ds_config(lr=0.5)),
        "wrong_section.json": json.dumps(ds_config() | {"dhen": {"table_optimiser": "sgd"}}),
    }
    for name, text in contents.items():
        (folder / name).write_text(text)
    return {"mistakes": str(folder), "log": str(click_log), "run": str(earlier_run), "new": str(folder / "new_run")}


def ds_config(**optimizer: float) -> dict:
    """zero0.json with other options of the optimizer."""
    values = json.loads((ROOT / "ds_configs" / "zero0.json").read_text())
    values["optimizer"]["params"] |= optimizer
    return values


LOG, NEW, RUN = "--dataset_name={log}", "--output_dir={new}", "--output_dir={run}"
BAD = "--dataset_name={mistakes}/bad_row.tsv"
MISTAKES = {
    "unknown flag": (1, [LOG, NEW, "--learning_rates=1"], ["'--learning_rates'", "Did you mean '--learning_rate'?"]),
    "unknown flag, 2 ranks": (2, [LOG, NEW, "--learning_rates=1"], ["[rank 0]", "Did you mean '--learning_rate'?"]),
    "flag of a wrong type": (1, [LOG, NEW, "--num_layers=many"], ["num_layers", "'many'"]),
    "unknown YAML key": (
        1,
        ["--config={mistakes}/unknown_key.yaml"],
        ["unknown_key.yaml: ", "Did you mean 'learning_rate'?"],
    ),
    "YAML value of a wrong type": (
        1,
        ["--config={mistakes}/wrong_type.yaml"],
        ["wrong_type.yaml: num_layers is 'many'"],
    ),
    "no such YAML": (1, ["--config={mistakes}/none.yaml"], ["none.yaml: no such file"]),
    "no such data": (1, ["--dataset_name={mistakes}/none.tsv", NEW], ["none.tsv: no such file"]),
    "bad row": (1, [BAD, NEW], ["bad_row.tsv: row 4: ", "'five'"]),
    "bad row, 2 ranks": (2, [BAD, NEW], ["[rank 0] error: ", "bad_row.tsv: row 4: ", "'five'"]),
    "a run is there": (1, [LOG, RUN], ["already holds a run", "--resume_from_checkpoint", "--overwrite_output_dir"]),
    "a run is there, 2 ranks": (2, [LOG, RUN], ["[rank 0] error: ", "already holds a run"]),
    "not to be overwritten before all is right": (1, [BAD, RUN, "--overwrite_output_dir"], ["bad_row.tsv: row 4: "]),
    "nor before the schedule is checked": (
        1,
        [LOG, RUN, "--overwrite_output_dir", "--lr_scheduler_type=reduce_lr_on_plateau", "--plateau_factor=2"],
        ["plateau_factor is 2.0"],
    ),
    "nor where it is the start": (
        1,
        [LOG, RUN, "--overwrite_output_dir", "--model_name_or_path={run}/model"],
        ["overwrite_output_dir would delete"],
    ),
    "output_dir is a file": (1, [LOG, "--output_dir={mistakes}/bad_row.tsv"], ["bad_row.tsv is a file"]),
    "no such checkpoint": (1, [LOG, NEW, "--resume_from_checkpoint=true"], ["no complete checkpoint"]),
    "no such model": (1, [LOG, NEW, "--model_name_or_path={new}"], ["no trained model here"]),
    "no such ds_config": (1, [LOG, NEW, "--ds_config=ds_configs/zero9.json"], ["no such ds_config", "zero2.json"]),
    "not strict JSON": (1, [LOG, NEW, "--ds_config={mistakes}/not_strict.json"], ["not_strict.json: not strict JSON"]),
    "unknown ds_config key": (
        1,
        [LOG, NEW, "--ds_config={mistakes}/unknown_key.json"],
        ["unknown_key.json: ", "Did you mean 'gradient_clipping'?"],
    ),
    "unknown key of our section": (
        1,
        [LOG, NEW, "--ds_config={mistakes}/wrong_section.json"],
        ["wrong_section.json: dhen: ", "Did you mean 'table_optimizer'?"],
    ),
    "ds_config against recipe": (
        1,
        [LOG, NEW, "--ds_config={mistakes}/other_lr.json"],
        ["optimizer.params.lr is 0.5", "0.001"],
    ),
    "an architecture that can't be": (1, [LOG, NEW, "--dropout=1.5"], ["dropout is 1.5"]),
}


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "predict.py"])
def test_help_has_an_example(script):
    done = run_script(script, "--help")
    assert done.status == 0, done.output
    assert f"    deepspeed recipes/{script} --" in done.output


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha1(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_costs_nothing(earlier_run, places, name):
    ranks, flags, words = MISTAKES[name]
    before = contents(earlier_run)
    assert len(before) > 8
    line = the_error(run_script("train.py", *[flag.format(**places) for flag in flags], ranks=ranks))
    assert line.startswith("[rank 0] error: " if ranks > 1 else "error: ")
    assert [word for word in words if word not in line] == []
    assert contents(earlier_run) == before
    assert not Path(places["new"]).exists()


def test_a_taken_port_is_one_line_that_says_how_to_choose_another(click_log, tmp_path):
    with socket.socket() as other_job:
        other_job.bind(("127.0.0.1", 0))
        other_job.listen()
        port = other_job.getsockname()[1]
        flags = [f"--dataset_name={click_log}", f"--output_dir={tmp_path / 'run'}", *TINY]
        line = the_error(run_script("train.py", *flags, port=port))
    assert line == (
        f"error: Port {port} of this machine is taken, probably by another job. Use another port, such as {port + 1}: "
        "--master_port with deepspeed and torchrun, --main_process_port with accelerate."
    )


def test_overwriting_replaces_the_run_and_leaves_other_files(click_log, earlier_run, tmp_path):
    run = Path(shutil.copytree(earlier_run, tmp_path / "run"))
    (run / "notes.txt").write_text("mine")
    flags = [f"--dataset_name={click_log}", f"--output_dir={run}", "--overwrite_output_dir", "--max_steps=1", *TINY]
    done = run_script("train.py", *flags, "--ds_config=ds_configs/zero0.json")
    assert done.status == 0, done.output
    assert (run / "notes.txt").read_text() == "mine"
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-1"]
    assert len((run / "metrics.csv").read_text().splitlines()) == 3  # head, step 1, its evaluation
    assert len(list((run / "tensorboard").iterdir())) == 1


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("zero0", ["--table_learning_rate=1e18"], "step 2: the loss or its gradient is not finite. It began in "),
        ("zero2", ["--learning_rate=1e18"], "step 2: the loss or its gradient is not finite. It began in "),
        ("zero0", ["--learning_rate=1e18", "--eval_steps=1"], "step 1: the validation loss is nan."),
    ],
    ids=["tables", "dense part", "evaluation"],
)
def test_a_loss_that_is_not_finite_ends_the_run_in_its_step_with_advice(click_log, tmp_path, name, flags, words):
    run, ds_config = tmp_path / "run", tmp_path / "sgd.json"
    ds_config.write_text((ROOT / f"ds_configs/{name}.json").read_text().replace("rowwise_adagrad", "sgd"))
    given = [f"--dataset_name={click_log}", f"--output_dir={run}", *TINY, "--warmup_steps=0", "--save_steps=1", *flags]
    given += [f"--ds_config={ds_config}", "--per_device_train_batch_size=64", "--logging_steps=20"]
    line = the_error(run_script("train.py", *given, ranks=2))
    assert line.startswith(f"[rank 0] error: {words}")
    assert " Lower learning_rate or table_learning_rate, add warmup_steps, or set max_grad_norm. " in line
    saved = [path.name for path in run.glob("checkpoint-*")]
    assert saved == (["checkpoint-1"] if words.startswith("step 2") else [])
    assert line.endswith(f"The newest checkpoint is {run}/checkpoint-1." if saved else "has no checkpoint yet.")
    assert not (run / "model").exists()


def test_a_huge_dense_value_is_blamed_not_the_learning_rate(tmp_path):
    rows = [f"{index % 3 // 2},{index / 400},k{index % 7}" for index in range(400)]
    rows[100:110] = ["0,1e30,k1"] * 10
    (tmp_path / "log.csv").write_text("\n".join(["click,price,key", *rows]))
    roles = "label: click\ndense: [{name: price, transform: identity}]\nsparse: [key]\n"
    (tmp_path / "schema.yaml").write_text(roles)
    data = [f"--dataset_name={tmp_path}/log.csv", f"--dataset_schema={tmp_path}/schema.yaml"]
    flags = [*data, f"--output_dir={tmp_path / 'run'}", *TINY, "--ds_config=ds_configs/zero3.json"]
    line = the_error(run_script("train.py", *flags, "--per_device_train_batch_size=64", ranks=2))
    assert "It began in the dense input: feature 'price' of row " in line
    assert " is 1e+30. Correct such values, or give the feature the transform log1p in dataset_schema." in line
    assert "learning_rate" not in line
    assert line.endswith(f"{tmp_path / 'run'} has no checkpoint yet.")


def test_settings_that_a_prepared_folder_leaves_no_work_for_are_named(click_log, tmp_path):
    flags = [f"--dataset_name={click_log}", f"--output_dir={tmp_path / 'run'}", *TINY, "--max_steps=1"]
    done = run_script("train.py", *flags, "--hash_size=77", "--ds_config=ds_configs/zero0.json")
    assert done.status == 0, done.output
    (line,) = [line for line in done.output.splitlines() if "has no effect" in line]
    assert line.startswith("hash_size has no effect")


def die_on_rank_1() -> None:
    """A patch: rank 1 alone makes a mistake, while rank 0 is fine and waits."""
    from dhen.training import dataset

    if os.environ["RANK"] == "1":
        dataset.prepare_dataset = fail
        os.environ["LOCAL_RANK"] = "1"


def fail(*args: object, **kwargs: object) -> None:
    raise ValueError("only here")


def test_a_mistake_of_another_rank_alone_is_heard(click_log, tmp_path):
    flags = [f"--dataset_name={click_log}", f"--output_dir={tmp_path / 'run'}", *TINY]
    done = run_script("train.py", *flags, ranks=2, patch=die_on_rank_1)
    assert "[rank 1] error: only here" in done.output, done.output
    assert done.status != 0


def test_an_output_does_not_overwrite_an_input(tmp_path):
    rows = tmp_path / "rows.csv"
    rows.write_text("label,user\n1,a\n")
    for script in ("predict.py", "evaluate.py"):
        done = run_script(script, "--model_name_or_path=m", f"--dataset_name={tmp_path}/*.csv", f"--output={rows}")
        assert done.status == 1
        assert f"--output {rows} is an input, which it would overwrite. Choose another name." in done.output
    assert rows.read_text() == "label,user\n1,a\n"


def test_a_training_split_of_one_class_is_refused(tmp_path):
    rows, schema = tmp_path / "rows.csv", tmp_path / "schema.yaml"
    rows.write_text("label,user\n" + "1,a\n" * 50)
    schema.write_text("label: label\nsparse: [user]\n")
    flags = [f"--dataset_name={rows}", f"--dataset_schema={schema}", f"--output_dir={tmp_path / 'run'}"]
    done = run_script("train.py", *flags, "--interactions=linear", "--ds_config=ds_configs/zero0.json")
    assert done.status == 1
    assert "training rows are all 1, so there is nothing to learn. Check the label in dataset_schema" in done.output
