"""evaluate.py and predict.py give what the run itself found, wherever the model and the rows come from."""

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from sklearn.metrics import roc_auc_score
from transformers import AutoModel

import dhen.model.modeling_dhen  # noqa: F401 (registers the architecture)
from dhen.config.command_line import ArgumentError
from dhen.data.formats.roles import load_roles
from dhen.data.loading.batches import Batch, BatchLoader
from dhen.data.preparation.caching import prepare_cached
from dhen.data.preparation.settings import PreparationSettings
from dhen.data.schema import Schema, TaskColumn
from dhen.training.dataset import check_prepared_for
from dhen.training.saved.predictions import columns_of, join_parts, part_writer, parts_folder, prediction_file
from tests import ROOT
from tests.recipes.launch import TINY, assert_same_metrics, run_script, summary

TOLERANCE = 1e-6
"""Relative: float32 logits summed in another order; DeepSpeed's engine and the plain module round alike."""


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> Path:
    """The exported model alone, away from its run."""
    return Path(shutil.copytree(trained.folder / "model", tmp_path_factory.mktemp("export") / "model"))


@pytest.fixture(scope="module")
def rows_of_test(trained) -> Batch:
    (batch,) = BatchLoader(trained.prepared, "test", batch_size=300).epoch(0)
    return batch


@pytest.fixture(scope="module")
def expected(trained, rows_of_test) -> np.ndarray:
    """Predictions of the exported model as transformers loads it: plain tables, no DeepSpeed, no FBGEMM."""
    model = AutoModel.from_pretrained(trained.folder / "model").eval()
    with torch.no_grad():
        return model(rows_of_test.sparse, rows_of_test.dense_BN).logits.sigmoid().numpy()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("source", ["run", "export and prepared", "export and raw"])
def test_evaluate_gives_the_runs_own_metrics(trained, exported, tmp_path, source, ranks):
    flags = {
        "run": [f"--model_name_or_path={trained.folder}"],
        "export and prepared": [f"--model_name_or_path={exported}", f"--dataset_name={trained.prepared}"],
        "export and raw": [f"--model_name_or_path={exported}", f"--dataset_name={trained.raw / 'test.tsv.gz'}"],
    }[source]
    # 300 rows in steps of 128: the last one is smaller.
    batch = ["--per_device_eval_batch_size", str(128 // ranks)]
    output = tmp_path / "new folder" / "metrics.json"
    done = run_script("evaluate.py", *flags, *batch, f"--output={output}", ranks=ranks)
    assert done.status == 0, done.output
    metrics = json.loads(output.read_text())
    assert_same_metrics(metrics, summary(trained.folder)["test"], TOLERANCE)
    assert metrics["examples"] == 300
    assert f"{metrics['auc']:.5f}" in done.output
    assert "prepared earlier" in done.output if source == "run" else True  # not prepared anew


def test_evaluate_measures_groups_by_their_raw_values(trained, tmp_path, rows_of_test, expected):
    output = tmp_path / "metrics.json"
    flags = [f"--model_name_or_path={trained.folder}", "--metrics_by", "C1", "C9", f"--output={output}"]
    done = run_script("evaluate.py", *flags, ranks=2)
    assert done.status == 0, done.output
    by = json.loads(output.read_text())["by"]
    names = [column.name for column in Schema.load(trained.prepared).sparse]
    ids = rows_of_test.sparse.select([names.index("C9")]).ids.numpy()
    frame = pl.DataFrame({"group": ids, "p": expected, "label": rows_of_test.labels_B.numpy()})
    aucs = [
        (len(of), roc_auc_score(of["label"], of["p"]))
        for _, of in frame.group_by("group")
        if of["label"].n_unique() > 1
    ]
    sizes = [size for size, _ in aucs]
    gauc = sum(size * auc for size, auc in aucs) / sum(sizes)
    assert by["C9"]["gauc"] == pytest.approx(gauc, abs=1e-6)
    assert by["C9"]["left_out"] == 300 - sum(sizes)
    assert f"test by C9: gAUC {by['C9']['gauc']:.5f}" in done.output
    table = pl.read_csv(tmp_path / "metrics-by-C9.csv", schema_overrides={"group": pl.String})
    assert table["examples"].sum() == 300
    keys = set(pl.read_parquet(trained.prepared / "vocabulary/C9.parquet")["key"])
    assert set(table["group"]) - {"(blank or unknown)"} <= keys
    assert len(table) == frame["group"].n_unique()
    assert (tmp_path / "metrics-by-C1.png").stat().st_size > 1000


def test_a_run_measures_groups_as_evaluate_does(trained, tmp_path):
    flags = [f"--dataset_name={trained.prepared}", f"--model_name_or_path={trained.folder}", "--learning_rate=1e-9"]
    flags += ["--ds_config=ds_configs/zero0.json", "--max_steps=2", "--metrics_by", "C9", "--calibrate"]
    done = run_script("train.py", *flags, f"--output_dir={tmp_path / 'run'}", ranks=2)
    assert done.status == 0, done.output
    of_run = json.loads((tmp_path / "run" / "summary.json").read_text())["test"]
    output = tmp_path / "metrics.json"
    done = run_script(
        "evaluate.py", f"--model_name_or_path={tmp_path / 'run'}", "--metrics_by", "C9", f"--output={output}"
    )
    assert done.status == 0, done.output
    for key, value in json.loads(output.read_text())["by"]["C9"].items():
        assert of_run["by"]["C9"][key] == pytest.approx(value, rel=1e-6), key
    ours, theirs = (pl.read_csv(path) for path in (tmp_path / "run/test-by-C9.csv", tmp_path / "metrics-by-C9.csv"))
    for key in ("ne", "calibration"):  # of the scaled logits
        assert ours[key].to_list() == pytest.approx(theirs[key].to_list(), rel=1e-4, nan_ok=True)
    done = run_script("train.py", *flags[:-3], "--metrics_by", "I1", f"--output_dir={tmp_path / 'wrong'}")
    assert done.status == 1
    assert "--metrics_by: 'I1' is no sparse feature" in done.output


def test_a_run_with_gates_says_how_open_they_are(trained, tmp_path):
    flags = [f"--dataset_name={trained.prepared}", "--gate=soft", "--num_layers=2", "--max_steps=2", "--skip_test"]
    flags += ["--ds_config=ds_configs/zero3.json", "--metrics_by", "C9", f"--output_dir={tmp_path / 'run'}"]
    done = run_script("train.py", *flags, ranks=2)
    assert done.status == 0, done.output
    gates = json.loads((tmp_path / "run" / "summary.json").read_text())["eval"]["gates"]
    assert f"eval: mean openness of the gates: layer 0 {gates['layer 0']:.3f}, layer 1" in done.output
    table = pl.read_csv(tmp_path / "run/eval-by-C9.csv")
    for place in (0, 1):
        mean = (table[f"gate_{place}"] * table["examples"]).sum() / table["examples"].sum()
        assert gates[f"layer {place}"] == pytest.approx(mean, rel=1e-6)
    assert (tmp_path / "run/eval-by-C9-gates.png").stat().st_size > 1000
    index = tmp_path / "run/model/model.safetensors.index.json"  # of a time when the gates' weights meant other things
    index.write_text(index.read_text().replace('"format_version": 3', '"format_version": 2'))
    done = run_script("evaluate.py", f"--model_name_or_path={tmp_path / 'run'}")
    assert (done.status, "format_version is 2, but this code reads version 3." in done.output) == (1, True)


def test_a_group_must_be_a_sparse_feature(trained):
    done = run_script("evaluate.py", f"--model_name_or_path={trained.folder}", "--metrics_by", "I1")
    assert done.status == 1
    assert "--metrics_by: 'I1' is no sparse feature. Use one of C1, C2," in done.output


def test_evaluate_takes_another_split(trained, tmp_path):
    flags = [f"--model_name_or_path={trained.folder}", "--split=validation", f"--output={tmp_path / 'metrics.json'}"]
    assert run_script("evaluate.py", *flags).status == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert_same_metrics(metrics, summary(trained.folder)["eval"], TOLERANCE)
    assert metrics["ne"] != pytest.approx(
        summary(trained.folder)["test"]["ne"], rel=0.001
    )  # or the splits can't be told apart


def raw_labels(trained) -> list[float]:
    with gzip.open(trained.raw / "test.tsv.gz", "rt") as file:
        return [float(line[0]) for line in file]


@pytest.mark.parametrize("name", ["scores.parquet", "scores"])
def test_predict_writes_rows_in_order_as_transformers_predicts_them(trained, tmp_path, expected, name):
    output = tmp_path / name
    flags = [f"--model_name_or_path={trained.folder}", f"--output={output}", "--per_device_eval_batch_size=64"]
    done = run_script("predict.py", *flags, ranks=2)
    assert done.status == 0, done.output
    parts = sorted(output.iterdir()) if output.is_dir() else [output]
    assert [part.name for part in parts] == ([name] if output.suffix else ["part-00000.parquet", "part-00001.parquet"])
    assert {path.name for path in tmp_path.iterdir()} == {name, "scores.unseen.csv"}, "no draft and no part is left"
    table = pa.concat_tables(pyarrow.parquet.read_table(part) for part in parts)
    assert table.column_names == ["row", "prediction", "label", "file", "line"]
    assert table["file"].null_count == table["line"].null_count == 300  # the run's own data says no files
    assert table["row"].to_pylist() == list(range(300))
    assert table["label"].to_pylist() == raw_labels(trained)
    np.testing.assert_allclose(table["prediction"].to_numpy(), expected, rtol=TOLERANCE)
    assert np.abs(np.roll(expected, 1) - expected).max() > 0.01  # one row off would be seen


def test_a_folder_that_is_not_empty_is_not_written_to(tmp_path):
    assert prediction_file(str(tmp_path)) == tmp_path
    (tmp_path / "part-00007.parquet").touch()
    with pytest.raises(ArgumentError, match="which exists"):
        prediction_file(str(tmp_path))


def test_a_part_that_is_missing_is_named(tmp_path):
    path = tmp_path / "scores.csv"
    folder = parts_folder(path)
    with part_writer(folder, 0, columns_of([])):
        pass
    with pytest.raises(FileNotFoundError, match=r"part-00001\.parquet: the part of rank 1 is not there"):
        join_parts(folder, 2, path)
    assert not path.exists()


@pytest.mark.parametrize(("suffix", "read"), [(".csv", pl.read_csv), (".jsonl", pl.read_ndjson)])
def test_predict_writes_what_the_name_of_the_file_says(trained, tmp_path, expected, suffix, read):
    output = tmp_path / f"scores{suffix}"
    done = run_script("predict.py", f"--model_name_or_path={trained.folder}", f"--output={output}")
    assert done.status == 0, done.output
    table = read(output)
    assert table.columns == ["row", "prediction", "label", "file", "line"]
    assert table["row"].to_list() == list(range(300))
    np.testing.assert_allclose(table["prediction"].to_numpy(), expected, rtol=TOLERANCE)
    assert {path.name for path in tmp_path.iterdir()} == {output.name, "scores.unseen.csv"}, "no draft is left"


@pytest.mark.parametrize("ranks", [1, 2])
def test_predict_needs_no_labels(trained, exported, tmp_path, expected, ranks):
    raw = tmp_path / "unlabelled.tsv"
    with gzip.open(trained.raw / "test.tsv.gz", "rt") as file:
        raw.write_text("".join(line.partition("\t")[2] for line in file))
    output = tmp_path / "scores" / "scores.parquet"
    flags = [f"--model_name_or_path={exported}", f"--dataset_name={raw}", f"--output={output}"]
    done = run_script("predict.py", *flags, "--per_device_eval_batch_size=70", ranks=ranks)
    assert done.status == 0, done.output
    table = pyarrow.parquet.read_table(output)
    assert table["line"].to_pylist() == list(range(1, 301))
    assert table["label"].null_count == table.num_rows == 300
    np.testing.assert_allclose(table["prediction"].to_numpy(), expected, rtol=TOLERANCE)
    assert (exported.parent / "prepared").is_dir()


def test_rows_without_labels_are_not_evaluated(trained, exported, tmp_path):
    with gzip.open(trained.raw / "test.tsv.gz", "rt") as file:
        (tmp_path / "unlabelled.tsv").write_text("".join(line.partition("\t")[2] for line in file))
    flags = [f"--model_name_or_path={exported}", f"--dataset_name={tmp_path / 'unlabelled.tsv'}"]
    done = run_script("evaluate.py", *flags)
    assert done.status == 1
    assert done.output.splitlines()[-1].startswith("error: Some rows have no label"), done.output


def test_skipped_rows_are_reported(trained, exported, tmp_path):
    with gzip.open(trained.raw / "test.tsv.gz", "rt") as file:
        lines = file.readlines()
    files = [str(tmp_path / "rows.tsv"), str(tmp_path / "more.tsv")]
    Path(files[0]).write_text("".join([lines[0], "9" + lines[1][1:], *lines[2:30]]))
    Path(files[1]).write_text("".join(lines[30:50]))
    flags = [f"--model_name_or_path={exported}", "--bad_rows=skip", "--dataset_name", *files]
    done = run_script("predict.py", *flags, f"--output={tmp_path / 'scores.parquet'}")
    assert done.status == 0, done.output
    assert "1 bad rows were skipped" in done.output
    assert "49 rows scored" in done.output
    table = pyarrow.parquet.read_table(tmp_path / "scores.parquet")
    assert table["file"].to_pylist() == [files[0]] * 29 + [files[1]] * 20
    assert table["line"].to_pylist() == [1, *range(3, 31), *range(1, 21)]
    assert table["row"].to_pylist() == list(range(49))


def test_columns_of_the_files_are_kept_beside_the_predictions(trained, exported, tmp_path):
    with gzip.open(trained.raw / "test.tsv.gz", "rt") as file:
        lines = file.readlines()
    files = [str(tmp_path / "rows.tsv"), str(tmp_path / "more.tsv")]
    Path(files[0]).write_text("".join([lines[0], "9" + lines[1][1:], *lines[2:30]]))
    Path(files[1]).write_text("".join(lines[30:150]))
    flags = [f"--model_name_or_path={exported}", "--bad_rows=skip", "--dataset_name", *files, "--keep", "C3", "I2"]
    flags += [f"--output={tmp_path / 'scores.jsonl'}", "--per_device_eval_batch_size=32"]
    done = run_script("predict.py", *flags, ranks=2)
    assert done.status == 0, done.output
    table = pl.read_ndjson(tmp_path / "scores.jsonl")
    assert table.columns == ["row", "prediction", "label", "file", "line", "C3", "I2"]
    cells = [line.rstrip("\n").split("\t") for line in [lines[0], *lines[2:150]]]
    assert table["C3"].to_list() == [row[16] or None for row in cells]
    assert table["I2"].to_list() == [row[2] or None for row in cells]


def raw_table(trained) -> pa.Table:
    """The test rows as a table, with three columns that the model does not know."""
    names = load_roles(trained.folder / "model/columns.yaml").columns
    frame = pl.read_csv(trained.raw / "test.tsv.gz", separator="\t", has_header=False, new_columns=names)
    more = [pl.int_range(pl.len()).alias("user"), pl.lit("day 1").cast(pl.Categorical).alias("day")]
    return frame.with_columns(*more, pl.concat_list("I1", "I2").alias("pair")).to_arrow()


def test_kept_columns_of_parquet_keep_their_types(trained, exported, tmp_path):
    rows, table = tmp_path / "rows.parquet", raw_table(trained)
    pyarrow.parquet.write_table(table, rows, row_group_size=70)
    flags = [f"--model_name_or_path={exported}", f"--dataset_schema={exported / 'columns.yaml'}"]
    keep = ["--keep", "user", "day", "pair", "I1"]
    done = run_script("predict.py", *flags, f"--dataset_name={rows}", *keep, f"--output={tmp_path / 'out.parquet'}")
    assert done.status == 0, done.output
    found = pl.read_parquet(tmp_path / "out.parquet")
    assert found["user"].dtype == pl.Int64
    for name in keep[1:]:
        assert found[name].to_list() == pl.from_arrow(table)[name].to_list(), name
    pyarrow.parquet.write_table(
        table.set_column(40, "user", table["user"].cast(pa.string())), tmp_path / "text.parquet"
    )
    for more, words in (
        ([f"--dataset_name={rows}", *keep, f"--output={tmp_path / 'out.csv'}"], "--keep pair: .csv has no values of"),
        (["--dataset_name", str(rows), str(tmp_path / "text.parquet"), *keep], "has the type string, but int64 in the"),
        ([f"--dataset_name={rows}", "--keep", "user", "label"], "already has a column 'label'"),
        ([f"--dataset_name={rows}", "--keep", "usr"], "no column 'usr'. The columns are label, I1, "),
    ):
        done = run_script("predict.py", *flags, *more)
        assert done.status == 1
        assert words in done.output.splitlines()[-1], done.output


def test_predictions_go_through_a_pipe(trained, exported):
    rows = gzip.decompress((trained.raw / "test.tsv.gz").read_bytes())
    command = [sys.executable, "recipes/predict.py", f"--model_name_or_path={exported}", "--dataset_name", "-"]
    done = subprocess.run([*command, "--keep", "C1", "--output", "-"], cwd=ROOT, input=rows, capture_output=True)
    assert done.returncode == 0, done.stderr
    table = pl.read_csv(done.stdout)
    assert table["row"].to_list() == list(range(300))
    assert table["C1"].to_list() == [line.split("\t")[14] or None for line in rows.decode().splitlines()]
    assert b"300 rows scored and written to -" in done.stderr


def test_a_reader_that_closes_the_pipe_ends_nothing(trained, exported, tmp_path):
    command = [sys.executable, "recipes/predict.py", f"--model_name_or_path={exported}", "--output", "-"]
    command.append(f"--dataset_name={trained.raw / 'test.tsv.gz'}")
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        done = subprocess.run(
            command, cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path)}
        )
    assert (done.returncode, b"error" in done.stderr) == (0, False), done.stderr
    assert not [path for path in tmp_path.glob("tmp*") if list(path.glob("*.csv"))]


def test_metrics_are_not_written_to_a_file_called_dash(exported):
    done = run_script("evaluate.py", f"--model_name_or_path={exported}", "--dataset_name=-", "--output=-")
    assert (done.status, "--output -: the metrics are a file. Name it" in done.output) == (1, True)


def _with_pipes(rows: Path, output: Path) -> None:
    os.dup2(os.open(rows, os.O_RDONLY), 0)
    sys.stdin = os.fdopen(0)
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)


def test_two_ranks_share_the_pipes(trained, exported, tmp_path, expected):
    flags = [f"--model_name_or_path={exported}", "--dataset_name=-", "--output=-.jsonl"]
    pipes = partial(_with_pipes, trained.raw / "test.tsv.gz", tmp_path / "stdout")
    done = run_script("predict.py", *flags, ranks=2, patch=pipes)
    assert done.status == 0, done.output
    np.testing.assert_allclose(pl.read_ndjson(tmp_path / "stdout")["prediction"], expected, rtol=TOLERANCE)


def test_each_way_of_the_model_card_loads_the_model(trained, tmp_path, expected):
    card = (trained.folder / "model/README.md").read_text()
    in_python, of_transformers = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = f"{in_python}\n{of_transformers}"  # of a row of blanks, which has id 0 and number 0 everywhere
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    one, other = (float(re.search(r"\[([\d.e-]+)", line)[1]) for line in done.stdout.splitlines())
    assert one == pytest.approx(other, abs=1e-4)
    (command,) = re.findall(r"```bash\n(.*?)```", card, re.DOTALL)
    python, script, *flags = shlex.split(command)
    assert (python, script, flags[-1]) == ("python", "recipes/predict.py", "predictions.csv")
    done = run_script("predict.py", *flags[:-1], str(tmp_path / flags[-1]))
    assert done.status == 0, done.output
    np.testing.assert_allclose(pl.read_csv(tmp_path / flags[-1])["prediction"], expected, rtol=TOLERANCE)


def test_the_model_card_says_what_the_run_was(trained):
    card, of_run = (trained.folder / "model/README.md").read_text(), summary(trained.folder)
    versions = json.loads((trained.folder / "environment.json").read_text())["versions"]
    counts = Schema.load(trained.prepared).splits["validation"]
    share, feature = max((share, name) for name, share in of_run["test"]["unseen"].items())
    for words in (
        f"`{trained.raw / 'train.tsv.gz'}` (criteo), with files of its own for each split.",
        f"| validation | 200 | {counts.clicks} ({counts.clicks / 200:.2%}) |",
        f"| test | {of_run['test']['auc']:.5f} |",
        "`ds_configs/zero3.json`: AdamW, ZeRO stage 3, fp32, dhen {}; 2 ranks on cpu.",
        f"torch {versions['torch']}, deepspeed {versions['deepspeed']}, fbgemm-gpu",
        "--ds_config=ds_configs/zero3.json --per_device_train_batch_size=16",
        f"- test: {feature} {share:.1%}",
    ):
        assert words in card, words


def test_a_split_of_a_hub_data_set_is_scored_alone(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "set"
    folder.mkdir()
    for split, rows in (("train", 120), ("validation", 30), ("test", 40)):
        columns = {"label": [0, 1] * (rows // 2), "a": rng.integers(0, 5, rows), "b": rng.integers(0, 5, rows)}
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"{split}.parquet")
    (tmp_path / "columns.yaml").write_text("sparse: [a, b]")
    data = [f"--dataset_name={folder}", "--dataset_format=hub", f"--dataset_schema={tmp_path / 'columns.yaml'}"]
    run = [f"--output_dir={tmp_path / 'run'}", "--ds_config=ds_configs/zero0.json", "--max_steps=1"]
    done = run_script("train.py", *data, *run, *TINY, "--split_fractions", "0.5", "0.5", "0")
    assert done.status == 0, done.output
    assert "split_fractions has no effect: the data has its own splits" in done.output
    for split, rows in ((None, 40), ("validation", 30)):
        output = tmp_path / "metrics.json"
        flags = [f"--split={split}"] if split else []
        done = run_script(
            "evaluate.py", f"--model_name_or_path={tmp_path / 'run'}", *data, *flags, f"--output={output}"
        )
        assert done.status == 0, done.output
        assert json.loads(output.read_text())["examples"] == rows
    flags = ["--keep", "a", f"--output={tmp_path / 'scores.csv'}"]
    done = run_script("predict.py", f"--model_name_or_path={tmp_path / 'run'}", *data, *flags)
    assert done.status == 0, done.output
    assert pl.read_csv(tmp_path / "scores.csv")["a"].to_list() == columns["a"].tolist()
    pl.DataFrame(columns).write_csv(tmp_path / "rows.csv")
    pipes = partial(_with_pipes, tmp_path / "rows.csv", tmp_path / "stdout")
    flags = [f"--model_name_or_path={tmp_path / 'run'}", "--dataset_name=-", "--keep", "b", "b", "--output=-"]
    done = run_script("predict.py", *flags, patch=pipes)
    assert done.status == 0, done.output
    assert pl.read_csv(tmp_path / "stdout")["b"].to_list() == columns["b"].tolist()


def prepared_otherwise(trained, folder: Path, **settings) -> Path:
    """The run's data with other settings."""
    files = {f"{split}_file": str(trained.raw / f"{split}.tsv.gz") for split in ("train", "validation", "test")}
    return prepare_cached(PreparationSettings(**files, dataset_format="criteo", **settings), folder)


def test_another_vocabulary_or_schema_is_refused(trained, exported, tmp_path):
    assert check_prepared_for(trained.prepared, exported).sparse == Schema.load(exported).sparse
    hashed = prepared_otherwise(trained, tmp_path, id_encoding="hash", hash_size=50)
    done = run_script("evaluate.py", f"--model_name_or_path={exported}", f"--dataset_name={hashed}")
    assert done.status == 1
    (line,) = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert all(word in line for word in ("'C1'", "hash", "Use the raw files")), line
    # A vocabulary of the same size with other keys: the schemas are equal.
    other = Path(shutil.copytree(trained.prepared, tmp_path / "other"))
    path = other / "vocabulary" / "C3.parquet"
    table = pyarrow.parquet.read_table(path)
    keys = table["key"].to_pylist()
    pyarrow.parquet.write_table(table.set_column(0, "key", [[keys[1], keys[0], *keys[2:]]]), path)
    with pytest.raises(ValueError, match="vocabulary of 'C3' differs from that of the model"):
        check_prepared_for(other, exported)


def test_tasks_with_another_meaning_are_refused(exported, tmp_path):
    folders = [tmp_path / "model", tmp_path / "data"]
    for folder, given_click in zip(folders, (False, True), strict=True):
        shutil.copytree(exported, folder)
        replace(Schema.load(folder), tasks=(TaskColumn("buy", given_click),)).save(folder)
    assert [task.name for task in check_prepared_for(folders[0], folders[0]).tasks] == ["buy"]
    with pytest.raises(ValueError, match=r"'buy'.* has another given_click than in the model"):
        check_prepared_for(folders[1], folders[0])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model_name_or_path=none"], "none: no trained model here"),
        ([], "--model_name_or_path is missing"),
        (["--model_name_or_path={exported}"], "Add --dataset_name"),
        (["--model_name_or_path={exported}", "--dataset_name=none.tsv"], "none.tsv: no such file"),
        (["--model_name_or_path={exported}", "--dataset_name={raw}", "--split=test"], "--split has no effect"),
        (["--model_name_or_path={run}", "--bad_rows=skip"], "--bad_rows has no effect"),
        (["--model_name_or_path={run}", "--output=scores.txt"], "Use a name that ends in .parquet, .pq, .csv"),
        (["--model_name_or_path={run}", "--splits=test"], "Did you mean '--split'?"),
        (["--model_name_or_path={run}", "--keep", "C1"], "--keep needs raw files"),
    ],
)
def test_mistakes_are_one_line(trained, exported, flags, words):
    places = {"exported": exported, "raw": trained.raw / "test.tsv.gz", "run": trained.folder}
    done = run_script("predict.py", *[flag.format(**places) for flag in flags])
    assert done.status == 1
    (line,) = done.output.strip().splitlines()
    assert line.startswith("error: ")
    assert words in line
