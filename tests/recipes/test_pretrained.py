"""Runs whose tables start from pretrained vectors: exported, resumed without the file, scored, fine-tuned, refused."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from dhen.data.preparation.encoding.vocabulary import load_vocabulary
from dhen.pipeline import DhenPipeline
from dhen.training.saved.trained_model import TrainedModel
from tests.recipes.launch import TINY, Finished, losses, run_script
from tests.recipes.test_shared_tables import write_log as write_shared_log
from tests.recipes.test_user_errors import the_error

DIM = 8
SCHEMA = """label: label
sparse:
  - {name: item, pretrained: {file: FOLDER/items.parquet, key: id, frozen: true}}
  - {name: place, pretrained: {file: FOLDER/places.npz}}
  - {name: history, separator: "|", pooling: mean, table: item}
"""
STILL = ("--max_steps=1", "--learning_rate=1e-12", "--table_learning_rate=1e-12", "--warmup_steps=0")


def write_log(folder: Path, items: int = 20, seed: int = 0) -> Path:
    """A log of the items i0, i1, …, with vectors of the even ones, of one that the log does not have, and of places."""
    write_shared_log(folder, items)
    (folder / "schema.yaml").write_text(SCHEMA.replace("FOLDER", str(folder)))
    numbers = np.random.default_rng(seed)
    even = [f"i{item}" for item in range(0, items, 2)]
    vectors = numbers.normal(size=(len(even) + 1, DIM)).astype(np.float32)
    pl.DataFrame({"id": [*even, "none"], "vector": vectors.tolist()}).write_parquet(folder / "items.parquet")
    vectors = numbers.normal(size=(4, DIM)).astype(np.float32)
    np.savez(folder / "places.npz", keys=[f"p{place}" for place in range(4)], vectors=vectors)
    return folder


def run(folder: Path, name: str, *flags: str, dhen: dict | None = None, ranks: int = 2) -> Finished:
    values = json.loads(Path("ds_configs/zero3.json").read_text())
    values["dhen"] = values.get("dhen", {}) | {"placement": {"tables": {"item": [0, 1][:ranks]}}} | (dhen or {})
    (folder / "ds_config.json").write_text(json.dumps(values))
    data = f"--dataset_name={folder}/log.csv", f"--dataset_schema={folder}/schema.yaml"
    set_up = [f"--ds_config={folder}/ds_config.json", *TINY, f"--embedding_dim={DIM}"]
    batch = "--per_device_train_batch_size=32", "--table_learning_rate=0.1", f"--output_dir={folder}/{name}"
    return run_script("train.py", *data, *set_up, *batch, *flags, ranks=ranks)


def trained(folder: Path, name: str, *flags: str, **more: dict) -> tuple[Path, str]:
    done = run(folder, name, *flags, **more)
    assert done.status == 0, done.output
    return folder / name, done.output


def by_key(model: TrainedModel, table: str) -> dict[str, Tensor]:
    keys = load_vocabulary(model.folder, table).keys.to_pylist()
    return dict(zip(keys, model.table(table)[1:], strict=True))


def vectors_of(folder: Path) -> dict[str, Tensor]:
    items, places = pq.read_table(folder / "items.parquet"), np.load(folder / "places.npz")
    found = dict(zip(items["id"].to_pylist(), torch.tensor(items["vector"].to_pylist()), strict=True))
    return found | dict(zip(places["keys"].tolist(), torch.from_numpy(places["vectors"]), strict=True))


@pytest.fixture(scope="module", params=["rowwise_adagrad", "adam"])
def first_run(request, tmp_path_factory) -> tuple[Path, str, tuple[str, ...]]:
    """The run, its output and flags."""
    folder = write_log(tmp_path_factory.mktemp("pretrained") / "data")
    flags = "--save_steps=4", f"--table_optimizer={request.param}", "--looked_up_l2=0.01"
    return *trained(folder, "run", *flags), flags


def test_frozen_rows_keep_every_bit_and_the_others_do_not(first_run):
    run, output, _ = first_run
    model, vectors = TrainedModel.open(run), vectors_of(run.parent)
    items, places = by_key(model, "item"), by_key(model, "place")
    for item in range(0, 20, 2):
        assert torch.equal(items[f"i{item}"], vectors[f"i{item}"])
    for place, row in places.items():
        assert 1e-3 < (row - vectors[place]).abs().max() < 2
    assert f"item: 10 of 20 keys have a vector in {run.parent}/items.parquet, and 10 keep their initial" in output
    assert "1 of its 11 vectors have no key in the data" in output
    assert f"place: 4 of 4 keys have a vector in {run.parent}/places.npz, and 0 keep" in output


def test_frozen_rows_without_a_vector_keep_their_initial_values(first_run, tmp_path):
    run, _, _ = first_run
    still = trained(write_log(tmp_path / "data"), "still", *STILL, ranks=1)[0]
    before, after = by_key(TrainedModel.open(still), "item"), by_key(TrainedModel.open(run), "item")
    uses = TrainedModel.open(still).uses("item")[1:]
    rows = [key for key, count in zip(before, uses, strict=True) if count and int(key[1:]) % 2]
    assert len(rows) > 3
    for key in rows:
        assert torch.equal(before[key], after[key])


def test_a_resumed_run_needs_no_file_and_is_the_same_to_the_bit(first_run):
    run, _, flags = first_run
    names = ["items.parquet", "places.npz"]
    for name in names:
        (run.parent / name).rename(run.parent / f"away-{name}")
    again, output = trained(run.parent, "again", *flags, f"--resume_from_checkpoint={run}/checkpoint-4")
    for name in names:
        (run.parent / f"away-{name}").rename(run.parent / name)
    after = {step: loss for step, loss in losses(run).items() if step > 4}
    assert after
    assert after == {step: loss for step, loss in losses(again).items() if step > 4}
    for table in ("item", "place"):
        assert torch.equal(TrainedModel.open(again).table(table), TrainedModel.open(run).table(table))
    assert "have a vector" not in output


def test_the_exported_model_scores_without_the_files(first_run, tmp_path):
    run, _, _ = first_run
    scores = tmp_path / "scores.parquet"
    flags = [f"--model_name_or_path={run}", f"--dataset_name={run.parent}/log.csv", f"--output={scores}"]
    (run.parent / "items.parquet").rename(run.parent / "away.parquet")
    done = run_script("predict.py", *flags)
    rows = pl.read_csv(run.parent / "log.csv")
    found = DhenPipeline.from_pretrained(run / "model").predict(rows)
    (run.parent / "away.parquet").rename(run.parent / "items.parquet")
    assert done.status == 0, done.output
    np.testing.assert_allclose(pl.read_parquet(scores)["prediction"].to_numpy(), found, rtol=1e-5)


def test_fine_tuning_keeps_the_rows_of_the_model_and_new_keys_take_their_vectors(first_run, tmp_path):
    run, _, _ = first_run
    new = write_log(tmp_path / "new", items=26, seed=1)
    tuned = TrainedModel.open(trained(new, "run", f"--model_name_or_path={run}", *STILL)[0])
    old, vectors = TrainedModel.open(run), vectors_of(new)
    for table, frozen in (("item", True), ("place", False)):
        before, after = by_key(old, table), by_key(tuned, table)
        for key, row in before.items():
            torch.testing.assert_close(after[key], row, rtol=0, atol=0 if frozen else 1e-9)
    after = by_key(tuned, "item")
    assert sum(torch.equal(after[key], vectors[key]) for key in ("i20", "i22", "i24")) == 3
    assert not torch.equal(after["i18"], vectors["i18"])


def test_replicated_tables_start_from_their_vectors(tmp_path, costs_of_a_slow_machine):
    folder = write_log(tmp_path / "data")
    schema = (folder / "schema.yaml").read_text()
    placement = {"placement": {"replicate_below_rows": 100, "costs": str(costs_of_a_slow_machine)}}
    refused = the_error(run(folder, "refused", *STILL, dhen=placement))
    assert "for the vectors of item, which works without whole_table_l2 and on sharded tables only" in refused
    (folder / "schema.yaml").write_text(schema.replace(", frozen: true", ""))
    model = TrainedModel.open(trained(folder, "run", *STILL, dhen=placement)[0])
    assert set(json.loads((folder / "run/placement.json").read_text())["replicated"]) == {"item", "place"}
    vectors = vectors_of(folder)
    rows = by_key(model, "item") | by_key(model, "place")
    for key in vectors.keys() - {"none"}:
        torch.testing.assert_close(rows[key], vectors[key], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--whole_table_l2=1e-4"], ["`frozen: true` for the vectors of item", "Set whole_table_l2 and"]),
        (["--embedding_dim=16"], ["items.parquet: row 1: the vector has 8 numbers, but embedding_dim is 16"]),
        (["--embedding_dim=16", "--check"], ["items.parquet: row 1: the vector has 8 numbers"]),
    ],
)
def test_what_cannot_be_is_refused_before_training(tmp_path, flags, words):
    line = the_error(run(write_log(tmp_path / "data"), "run", *flags))
    for word in words:
        assert word in line
    assert not (tmp_path / "data/run").exists()


def test_a_missing_file_is_refused_on_one_line(tmp_path):
    folder = write_log(tmp_path / "data")
    (folder / "places.npz").unlink()
    assert "places.npz: no such file of pretrained vectors. Correct the schema." in the_error(run(folder, "run"))
