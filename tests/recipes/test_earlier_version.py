"""A run of an earlier version, whose ids are made of texts as they were written, keeps working.

The run is in tests/recipes/fixtures/keys_as_written. The README.md there says how it was made.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch

from dhen.data.preparation.caching import prepare_cached
from dhen.data.preparation.settings import PreparationSettings
from dhen.data.schema import PREPARATION_VERSION_WRITTEN, VERSION, Schema
from dhen.training.dataset import check_prepared_for
from dhen.training.saved.trained_model import TrainedModel
from tests import ROOT
from tests.recipes.launch import Finished, assert_same_metrics, losses, run_script

FIXTURE = ROOT / "tests/recipes/fixtures/keys_as_written"
RAW = [f"--dataset_name={FIXTURE / 'clicks.csv'}", f"--dataset_schema={FIXTURE / 'schema.yaml'}"]
SCORES_TOLERANCE, LOSS_TOLERANCE = 1e-6, 1e-5
"""Absolute for probabilities, otherwise relative. That version's AdamW was not fused, and rounds differently."""


@pytest.fixture
def earlier(tmp_path) -> Path:
    """A copy, because scripts write beside what they read."""
    return Path(shutil.copytree(FIXTURE, tmp_path / "earlier"))


@pytest.fixture(scope="module")
def of_today(tmp_path_factory) -> Path:
    """The same raw file, prepared by this version."""
    settings = PreparationSettings(
        dataset_name=str(FIXTURE / "clicks.csv"), dataset_schema=str(FIXTURE / "schema.yaml")
    )
    folder = prepare_cached(settings, tmp_path_factory.mktemp("of_today"))
    assert Schema.load(folder).is_canonical
    return folder


def only_folder(place: Path) -> Path:
    (folder,) = [path for path in place.iterdir() if path.is_dir()]
    return folder


def train(earlier: Path, run: Path, *flags: str) -> Finished:
    """With the arguments of the earlier run; `flags` override them."""
    more = [f"--config={earlier / 'run/arguments.yaml'}", f"--output_dir={run}", f"--cache_dir={run.parent / 'cache'}"]
    return run_script("train.py", *more, "--ds_config=ds_configs/zero0.json", *flags)


def assert_same_rows(prepared: Path, *, is_same_name: bool = True) -> None:
    """The folder has the ids of the earlier one, and its name, by which a cache finds it again."""
    before = only_folder(FIXTURE / "prepared")
    assert (prepared.name == before.name) == is_same_name
    for split in ("train", "validation", "test"):
        assert pyarrow.parquet.read_table(prepared / split) == pyarrow.parquet.read_table(before / split)


def test_the_fixture_is_small_and_of_an_earlier_version(of_today):
    assert sum(path.stat().st_size for path in FIXTURE.rglob("*") if path.is_file()) < 200_000
    before, now = Schema.load(only_folder(FIXTURE / "prepared")), Schema.load(of_today)
    assert not before.is_canonical
    rows = {
        name: [column.num_embeddings for column in schema.sparse] for name, schema in (("before", before), ("now", now))
    }
    assert rows == {"before": [7, 27, 16, 6, 12], "now": [4, 13, 16, 3, 12]}, "or the difference does not show"


@pytest.mark.parametrize("source", ["csv", "prepared"])
def test_a_model_scores_as_it_did(earlier, tmp_path, source):
    data = RAW if source == "csv" else [f"--dataset_name={only_folder(earlier / 'prepared')}"]
    model = f"--model_name_or_path={earlier / 'run/model'}"
    done = run_script("evaluate.py", model, *data, f"--output={tmp_path / 'metrics.json'}")
    assert done.status == 0, done.output
    recorded = json.loads((FIXTURE / f"{source}.json").read_text())
    assert_same_metrics(json.loads((tmp_path / "metrics.json").read_text()), recorded, SCORES_TOLERANCE)
    done = run_script("predict.py", model, *data, f"--output={tmp_path / 'scores.parquet'}")
    assert done.status == 0, done.output
    now, before = (
        pyarrow.parquet.read_table(path) for path in (tmp_path / "scores.parquet", FIXTURE / f"{source}.parquet")
    )
    np.testing.assert_allclose(now["prediction"], before["prediction"], rtol=0, atol=SCORES_TOLERANCE)
    for column in ("row", "label", "line"):
        assert now[column] == before[column]


def test_a_run_is_evaluated_on_its_own_data_prepared_anew(earlier, tmp_path):
    shutil.rmtree(earlier / "prepared")
    done = run_script("evaluate.py", f"--model_name_or_path={earlier / 'run'}", f"--output={tmp_path / 'metrics.json'}")
    assert done.status == 0, done.output
    recorded = json.loads((FIXTURE / "prepared.json").read_text())
    assert_same_metrics(json.loads((tmp_path / "metrics.json").read_text()), recorded, SCORES_TOLERANCE)
    assert_same_rows(only_folder(earlier / "prepared"))


@pytest.mark.parametrize("source", ["csv", "prepared"])
def test_a_checkpoint_resumes_with_the_losses_of_that_version(earlier, tmp_path, source):
    data = RAW if source == "csv" else [f"--dataset_name={only_folder(earlier / 'prepared')}"]
    run = tmp_path / "resumed"
    done = train(earlier, run, *data, f"--resume_from_checkpoint={earlier / 'run/checkpoint-7'}")
    assert done.status == 0, done.output
    before, now = ({step: float(loss) for step, loss in losses(of).items()} for of in (FIXTURE / "run", run))
    assert list(now) == list(range(8, 41))
    assert now == pytest.approx({step: before[step] for step in now}, rel=LOSS_TOLERANCE)
    assert not Schema.load(run / "model").is_canonical
    if source == "csv":
        assert_same_rows(only_folder(tmp_path / "cache"))


def test_a_new_model_on_the_earlier_folder_has_ids_of_texts_as_written(earlier, tmp_path):
    run = tmp_path / "run"
    done = train(earlier, run, f"--dataset_name={only_folder(earlier / 'prepared')}", "--max_steps=1")
    assert done.status == 0, done.output
    assert not Schema.load(run / "model").is_canonical


def test_fine_tuning_makes_ids_of_the_texts_as_they_were_written(earlier, tmp_path):
    run, model = tmp_path / "tuned", earlier / "run/model"
    done = train(earlier, run, *RAW, f"--model_name_or_path={model}", "--freeze=tables", "--max_steps=2")
    assert done.status == 0, done.output
    assert "  tables: 68 of 68 rows kept, 0 new" in done.output
    before, now = TrainedModel.open(model), TrainedModel.open(run)
    for column in before.schema.sparse:
        assert torch.equal(before.table(column.name), now.table(column.name)), column.name
    prepared = only_folder(tmp_path / "cache")
    assert_same_rows(prepared, is_same_name=False)  # it has the keys of the model too
    for folder in (prepared, now.folder):
        schema = Schema.load(folder)
        assert schema.source[VERSION] == PREPARATION_VERSION_WRITTEN
        assert not schema.is_canonical


REFUSED = {
    "evaluate": ("evaluate.py", ["--model_name_or_path={earlier}/run/model"], "run/model"),
    "fine-tune": ("train.py", ["--model_name_or_path={earlier}/run/model", "--output_dir={new}"], "run/model"),
    "resume": (
        "train.py",
        [
            "--config={earlier}/run/arguments.yaml",
            "--resume_from_checkpoint={earlier}/run/checkpoint-7",
            "--output_dir={new}",
        ],
        "run/checkpoint-7",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_data_prepared_today_is_refused_in_a_line_that_says_what_to_do(earlier, of_today, tmp_path, name):
    script, flags, origin = REFUSED[name]
    flags = [flag.format(earlier=earlier, new=tmp_path / "new") for flag in flags]
    done = run_script(script, *flags, f"--dataset_name={of_today}")
    assert done.status == 1, done.output
    assert done.output.strip().splitlines()[-1] == (
        f"error: {of_today}: the ids in {earlier / origin} are made of texts as they were written, and those in "
        f"{of_today} of canonical ones, so they have other meanings. Use the raw files instead: their ids are made as "
        "the model's are."
    )
    assert not (tmp_path / "new").exists()


def test_data_prepared_by_the_earlier_version_is_refused_for_a_model_of_today(of_today):
    with pytest.raises(ValueError, match="are made of texts as they were written, and those in"):
        check_prepared_for(only_folder(FIXTURE / "prepared"), of_today)
