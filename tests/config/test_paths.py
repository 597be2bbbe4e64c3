"""Relative paths: the working directory first, then the repository; the name of a run folder."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from dhen.config.arguments import parse_arguments
from dhen.config.ds_config import read_json, read_section
from dhen.data.formats.roles import load_roles
from dhen.data.preparation.reading.sources import open_sources
from dhen.data.preparation.settings import PreparationSettings
from dhen.paths import drafted, find, looked_in
from dhen.training.saved.scoring import parse_scoring_arguments
from dhen.training.saved.trained_model import TrainedModel
from tests import ROOT

FRAPPE = "recipes/configs/frappe.yaml"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_what_the_working_directory_lacks_is_taken_from_the_repository(tmp_path):
    assert find(FRAPPE) == str(ROOT / FRAPPE)
    assert find("recipes/configs/*.yaml") == str(ROOT / "recipes/configs/*.yaml")
    (tmp_path / "recipes/configs").mkdir(parents=True)
    (tmp_path / FRAPPE).write_text("seed: 5\n")
    assert find(FRAPPE) == FRAPPE
    assert find("recipes/configs/*.yaml") == "recipes/configs/*.yaml"
    assert find("nowhere.csv") == "nowhere.csv"
    assert find(str(tmp_path / "nowhere.csv")) == str(tmp_path / "nowhere.csv")


def test_every_path_of_a_run_is_looked_up():
    arguments = parse_arguments(["--config", FRAPPE, "--ds_config", "ds_configs/hsdp.json"])
    assert arguments.ds_config == str(ROOT / "ds_configs/hsdp.json")
    assert arguments.data.dataset_schema == str(ROOT / "recipes/configs/schemas/frappe.yaml")
    assert arguments.training.output_dir == "runs/frappe", "what is written goes to the working directory"
    scoring = parse_scoring_arguments(["--model_name_or_path=tests", "--dataset_name", "README.md", "mine.csv"], "")
    assert scoring.model_name_or_path == str(ROOT / "tests")
    assert scoring.dataset_name == [str(ROOT / "README.md"), "mine.csv"]


def test_what_opens_a_file_looks_it_up_too():
    """Also for the tools, and for the paths that a run folder's arguments.yaml holds."""
    settings = PreparationSettings("recipes/configs/*.yaml", dataset_schema="recipes/configs/schemas/frappe.yaml")
    assert settings.dataset_name == str(ROOT / "recipes/configs/*.yaml")
    assert settings.dataset_schema == str(ROOT / "recipes/configs/schemas/frappe.yaml")
    assert load_roles("recipes/configs/schemas/frappe.yaml").sparse
    assert read_section("ds_configs/hsdp.json").shard_group == "node"
    with pytest.raises(ValueError, match=r"hsdp\.json"):  # the alternatives are the repository's
        read_section("ds_configs/nothing.json")


@pytest.mark.parametrize(
    ("look_up", "words"),
    [
        (lambda: parse_arguments(["--config=none.yaml"]), "none.yaml: no such file"),
        (lambda: read_json(Path("none.json")), "none.json: no such ds_config"),
        (lambda: parse_arguments(["--interaction_files=none.py"]), "none.py: no such Python file"),
        (lambda: open_sources(PreparationSettings("none.csv")), "none.csv: no such file"),
        (lambda: open_sources(PreparationSettings("none_*.csv")), "none_*.csv: no file matches"),
        (lambda: load_roles("none.yaml"), "none.yaml: no such file"),
        (lambda: TrainedModel.open("runs/none"), "runs/none: no trained model here"),
    ],
)
def test_a_file_in_neither_place_is_an_error_that_lists_both(tmp_path, look_up, words):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        look_up()
    said = str(caught.value)
    assert words in said
    assert said.endswith(f"Looked in {tmp_path} and {ROOT}.")
    assert looked_in("/none.yaml") == "", "an absolute path has one place"


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--dataset_name=a/log.csv"], "log"),
        (["--dataset_name=b/click_log.tsv.gz"], "click_log"),
        (["--dataset_name", "days/day_*.gz", "more.gz"], "day"),
        (["--dataset_name=owner/clicks"], "clicks"),
        (["--dataset_name=days/*.gz"], "days"),
        (["--train_file=avazu/train.csv"], "avazu"),
        (["--train_file=monday.csv", "--test_file=tuesday.csv"], "monday"),
        (["--train_file=avazu/train-00001.csv"], "avazu"),
        (["--dataset_name=adult/prepared"], "adult"),
        (["--dataset_name=a/log.csv", "--output_dir=runs/mine"], "mine"),
    ],
)
def test_a_run_folder_is_named_after_its_data(flags, name):
    assert parse_arguments(flags).training.output_dir == f"runs/{name}"


def test_of_two_that_write_a_folder_at_once_one_is_refused(tmp_path):
    output, late = tmp_path / "there/new", ExitStack()
    late.enter_context(drafted(output)).mkdir()
    with drafted(output) as early:
        early.mkdir()
        (early / "file").touch()
    with pytest.raises(ValueError, match=r"new exists and is not an empty folder\. Choose"):
        late.close()
    assert [path.name for path in output.parent.iterdir()] == ["new"]
    assert [path.name for path in output.iterdir()] == ["file"]
