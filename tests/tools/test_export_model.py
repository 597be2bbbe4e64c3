"""tools/export_model.py: each format scores as the model does; quantized tables are small and hardly worse."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import polars as pl
import pytest
import torch
from sklearn.metrics import roc_auc_score

from dhen.exported_graph import GRAPH_FILES
from dhen.exported_index import FORMAT_VERSION
from dhen.model.configuration_dhen import DhenConfig
from dhen.model.features import SparseIds
from dhen.model.modeling_dhen import DhenForClickPrediction
from dhen.pipeline import DhenPipeline
from dhen.training.saved.table_precision import save_with_precision
from dhen.training.saved.trained_model import TrainedModel
from tests import ROOT
from tests.recipes.launch import run_script
from tests.recipes.test_documentation import blocks
from tests.tools.forked_python import Finished, call
from tests.tools.test_importance import SCHEMA, click_log
from tools.export_model import compare

TOOL, DIM = "tools/export_model.py", 8
EXPORTS = [
    ("safetensors", "fp32"), ("safetensors", "int8"), ("safetensors", "int4"), ("onnx", "fp32"), ("onnx", "int4"),
    ("aot", "fp32"),
]  # fmt: skip
BYTES_PER_ROW = {"fp32": 4 * DIM, "int8": DIM + 8, "int4": DIM // 2 + 4}
ROWS = 4_000


def export(model: Path, kind: str, tables: str, output: Path, **environment: str) -> Finished:
    return call(TOOL, model, f"--format={kind}", f"--tables={tables}", f"--output={output}", **environment)


def train(folder: Path, *flags: str, schema: str = SCHEMA) -> Path:
    """A run on bags with weights, an id and a number."""
    click_log(ROWS, np.random.default_rng(0)).write_csv(folder / "rows.csv")
    (folder / "schema.yaml").write_text(schema)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTEST_TMP", str(folder))
        done = run_script(
            "train.py", f"--dataset_name={folder / 'rows.csv'}", f"--dataset_schema={folder / 'schema.yaml'}",
            f"--output_dir={folder / 'run'}", "--ds_config=ds_configs/zero0.json", "--skip_test", "--hash_size=64",
            f"--embedding_dim={DIM}", "--learning_rate=0.01", "--table_learning_rate=0.1", "--num_train_epochs=1",
            "--per_device_train_batch_size=100", *flags,
        )  # fmt: skip
    assert done.status == 0, done.output
    return folder / "run"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("trained"), "--num_layers=1", "--gate=hard")


@pytest.fixture(scope="module")
def exports(trained) -> dict[tuple[str, str], Path]:
    """By format and precision."""
    folders = {}
    for kind, tables in EXPORTS:
        folders[kind, tables] = trained.parent / f"{kind}_{tables}"
        done = export(trained, kind, tables, folders[kind, tables])
        assert done.status == 0, done.stderr
    return folders


@pytest.fixture(scope="module")
def scores(trained, exports) -> dict[str, list[float]]:
    """Of new rows by each export, in a process without DeepSpeed and FBGEMM."""
    rows = trained.parent / "new.csv"
    click_log(ROWS, np.random.default_rng(1)).write_csv(rows)
    code = f"""
import json, sys
sys.modules |= dict.fromkeys(["deepspeed", "fbgemm_gpu"])  # as if not installed
import polars as pl
from dhen.pipeline import DhenPipeline
rows = pl.read_csv({str(rows)!r})
folders = {[str(folder) for folder in (trained, *exports.values())]!r}
print(json.dumps([DhenPipeline.from_pretrained(folder).predict(rows, 1500).tolist() for folder in folders]))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = ["model", *(" ".join(key) for key in EXPORTS)]
    return dict(zip(names, map(np.array, json.loads(done.stdout.splitlines()[-1])), strict=True))


def test_every_format_scores_as_the_model_does(scores):
    for name in ("safetensors fp32", "onnx fp32", "aot fp32"):
        np.testing.assert_allclose(scores[name], scores["model"], rtol=0, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(scores["onnx int4"], scores["safetensors int4"], rtol=0, atol=1e-6)
    assert np.abs(scores["safetensors int4"] - scores["model"]).max() > 1e-4


def test_tables_have_the_bytes_of_their_precision(exports):
    for tables, of_row in BYTES_PER_ROW.items():
        index = json.loads((exports["safetensors", tables] / "model.safetensors.index.json").read_text())
        weights = TrainedModel.open(exports["safetensors", tables]).dense_weights()
        dense = sum(weight.nbytes for weight in weights.values())
        assert index["metadata"]["total_size"] - dense == 3 * 64 * of_row


def test_the_auc_is_hardly_lower(trained, scores):
    clicked = pl.read_csv(trained.parent / "new.csv")["clicked"].to_numpy()
    auc = {name: roc_auc_score(clicked, of) for name, of in scores.items()}
    assert auc["model"] > 0.8
    assert auc["safetensors int8"] > auc["model"] - 1e-4
    assert auc["safetensors int4"] > auc["model"] - 5e-3


def test_evaluate_takes_quantized_tables(trained, exports, scores, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTEST_TMP", str(tmp_path))
    flags = [f"--dataset_name={trained.parent / 'new.csv'}", f"--output={tmp_path / 'metrics.json'}"]
    done = run_script("evaluate.py", f"--model_name_or_path={exports['safetensors', 'int4']}", *flags)
    assert done.status == 0, done.output
    clicked = pl.read_csv(trained.parent / "new.csv")["clicked"].to_numpy()
    expected = roc_auc_score(clicked, scores["safetensors int4"])
    assert json.loads((tmp_path / "metrics.json").read_text())["auc"] == pytest.approx(expected, abs=1e-6)
    done = export(exports["safetensors", "int4"], "onnx", "fp32", tmp_path / "new")
    assert "its tables are quantized. Export the model that it was made of" in done.stderr


def test_a_graph_needs_only_what_inputs_json_says(exports):
    folder = exports["onnx", "fp32"]
    described = json.loads((folder / "inputs.json").read_text())
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    assert {each.name for each in session.get_inputs()} == {"dense", "ids", "lengths", "weights"}
    for each in session.get_inputs():
        assert described["inputs"][each.name]["shape"] == each.shape
    assert [lookup["feature"] for lookup in described["lookups"]] == ["decides", "noise", "tags"]
    row = {"dense": [[0.5]], "ids": [3, 1, 2, 4], "lengths": [[1], [1], [2]], "weights": [1, 1, 0.7, 1.5]}
    row = {name: np.array(values, described["inputs"][name]["dtype"]) for name, values in row.items()}
    (probabilities,) = session.run(None, row)
    assert probabilities.shape == (1, 1)
    assert 0 < probabilities.item() < 1


def test_single_ids_are_a_matrix(tmp_path):
    run = train(tmp_path, "--num_layers=1", schema=SCHEMA.partition(", {name: tags")[0] + ']\nignored: "*"')
    done = export(run, "onnx", "int8", tmp_path / "new")
    assert done.status == 0, done.stderr
    described = json.loads((tmp_path / "new/inputs.json").read_text())
    assert described["inputs"]["ids"] == {"dtype": "int64", "shape": ["batch", 2]}
    rows = pl.read_csv(tmp_path / "rows.csv").head(999)
    expected, found = (DhenPipeline.from_pretrained(folder).predict(rows) for folder in (run, tmp_path / "new"))
    np.testing.assert_allclose(found, expected, atol=0.01)
    assert expected.std() > 0.05


MISTAKES = [
    "no model", "model not whole", "damaged model", "output exists", "output in a file", "output in the model",
    "unknown format", "no compiler", "no onnx",
]  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(case, trained, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    if case == "no model":
        done, said = export(tmp_path, "onnx", "fp32", tmp_path / "new"), "no trained model here"
    elif case == "model not whole":
        model = Path(shutil.copytree(trained / "model", tmp_path / "model"))
        (model / "schema.json").unlink()
        done, said = export(model, "safetensors", "int8", tmp_path / "new"), "schema.json: no such file"
    elif case == "damaged model":
        shutil.copytree(trained / "model", tmp_path / "model")
        (table,) = (tmp_path / "model").glob("model-tables-*")
        table.write_bytes(table.read_bytes()[:-1])
        done, said = export(tmp_path / "model", "onnx", "fp32", tmp_path / "new"), f"{table}: damaged: "
    elif case == "output in a file":
        done, said = export(trained, "onnx", "fp32", tmp_path / "full/file/new"), "cannot be made: "
    elif case == "output in the model":
        done, said = export(trained, "safetensors", "fp32", trained / "model/new"), "is in the folder of the model"
        assert not (trained / "model/new").exists()
    elif case == "output exists":
        done, said = export(trained, "onnx", "fp32", tmp_path / "full"), "exists and is not an empty folder"
    elif case == "unknown format":
        done, said = export(trained, "pickle", "fp32", tmp_path / "new"), "invalid choice: 'pickle'"
    elif case == "no compiler":
        done, said = export(trained, "aot", "fp32", tmp_path / "new", CXX="no-such"), "needs a C++ compiler (no-such)"
    else:
        code = f"import runpy, sys; sys.modules['onnxruntime'] = None; runpy.run_path({TOOL!r}, run_name='__main__')"
        command = [sys.executable, "-c", code, str(trained), "--format=onnx", f"--output={tmp_path / 'new'}"]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        done, said = Finished(run.returncode, run.stdout, run.stderr), "needs onnxruntime. Run `pip install onnx"
    assert done.status in (1, 2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("kind", "file"), [("onnx", "model.onnx"), ("onnx", "model.onnx.data"), ("aot", "model.pt2")])
def test_a_damaged_graph_is_refused(exports, tmp_path, kind, file):
    folder = Path(shutil.copytree(exports[kind, "fp32"], tmp_path / "copy"))
    (folder / file).write_bytes((folder / file).read_bytes()[:99])
    with pytest.raises(
        ValueError, match=rf"{GRAPH_FILES[kind]}: cannot be loaded .*Copy or export the model again"
    ) as e:
        DhenPipeline.from_pretrained(folder)
    assert "\n" not in str(e.value)


def test_a_model_without_a_graph_is_refused(tmp_path):
    run = train(tmp_path, "--num_layers=1", "--experts=ensembles")
    done = export(run, "onnx", "fp32", tmp_path / "new")
    assert done.status == 1
    assert "the model has a mixture of experts" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if "new" in path.name) == []


def test_tables_are_converted_in_slices_and_weights_beside_them_are_kept(tmp_path, monkeypatch):
    """`save_pretrained` puts tables and dense weights into one file, where a file has room."""
    monkeypatch.setattr("dhen.tables.storage.PIECE_BYTES", 1000)
    features = [{"name": name, "num_embeddings": 100} for name in ("user", "item")]
    model = DhenForClickPrediction(DhenConfig(embedding_dim=DIM, sparse_features=features, num_layers=1)).eval()
    model.save_pretrained(tmp_path / "model", max_shard_size="12KB")
    index = tmp_path / "model/model.safetensors.index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps(content | {"metadata": {"format_version": FORMAT_VERSION}}))
    files = [{file for name, file in content["weight_map"].items() if name.startswith("tables.") == of_tables}
             for of_tables in (False, True)]  # fmt: skip
    assert set.intersection(*files)
    save_with_precision(TrainedModel.open(tmp_path / "model"), "int8", tmp_path / "int8")
    ids = SparseIds(torch.arange(200) % 100, 2)
    expected, found = (
        each(ids).logits for each in (model, DhenForClickPrediction.from_pretrained(tmp_path / "int8").eval())
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)
    assert not torch.equal(found, expected)


def test_a_value_that_the_precision_cannot_hold_is_refused(tmp_path):
    features = [{"name": "user", "num_embeddings": 3}]
    model = DhenForClickPrediction(DhenConfig(embedding_dim=2, sparse_features=features, interactions=["linear"]))
    with torch.no_grad():
        model.tables.user.weight[1] = torch.tensor([1e5, 9e4])
    model.save_pretrained(tmp_path / "model", max_shard_size="1KB")
    trained = TrainedModel(tmp_path / "model")
    save_with_precision(trained, "int8", tmp_path / "int8")
    for precision in ("fp16", "int4"):
        with pytest.raises(ValueError, match=r"table .user. has a value that is not finite in (float16|int4)\."):
            save_with_precision(trained, precision, tmp_path / precision)


def test_a_graph_that_gives_no_number_is_refused(trained):
    model = DhenForClickPrediction.from_pretrained(trained / "model").eval()
    schema = TrainedModel.open(trained).schema
    assert compare(model, lambda *rows: model(*rows).probabilities, schema) == 0
    with pytest.raises(ValueError, match="computes something else"):
        compare(model, lambda *rows: model(*rows).probabilities * torch.nan, schema)


def test_an_export_disturbs_no_other_and_takes_no_permissions_over(trained, tmp_path):
    """A released model is often read-only, and two exports may have one output."""
    shutil.copytree(trained / "model", tmp_path / "model")
    for path in (*(tmp_path / "model").rglob("*"), tmp_path / "model"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    other = tmp_path / ".new.draft/weights"
    other.mkdir(parents=True)
    assert export(tmp_path / "model", "safetensors", "int8", tmp_path / "new").status == 0
    assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "new").rglob("*"))
    assert other.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".new.draft", "model", "new"]


def test_no_rows_have_no_inputs(exports):
    for rows in ([], click_log(0, np.random.default_rng(0))):
        with pytest.raises(ValueError, match="there are no rows"):
            DhenPipeline.from_pretrained(exports["onnx", "fp32"]).inputs(rows)


def test_the_page_loads_graphs(exports, monkeypatch, tmp_path):
    (tmp_path / "exports").mkdir()
    for kind in ("onnx", "aot"):
        (tmp_path / f"exports/frappe_{kind}").symlink_to(exports[kind, "fp32"])
    monkeypatch.chdir(tmp_path)
    (block,) = [block for name, block in blocks("python") if name == "recipes/EXPORT.md"]
    names = {"rows": click_log(20, np.random.default_rng(2))}
    exec(block, names)
    np.testing.assert_allclose(names["by_onnx"][:, 0], names["probabilities"], atol=1e-6)
    np.testing.assert_allclose(names["by_aot"][:, 0], names["probabilities"], atol=1e-6)
    assert names["probabilities"].std() > 0.05
