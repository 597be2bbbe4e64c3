"""The exported model's card: metadata that the Hugging Face hub reads, and the metrics of every split."""

import math
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from dhen.data.schema import Schema, SplitCounts
from dhen.model.configuration_dhen import DhenConfig
from dhen.training.saved.model_card import model_card

CONFIG = DhenConfig(num_layers=2, num_dense_features=3, sparse_features=[{"name": "user", "num_embeddings": 50}])
METRICS = {"auc": 0.75, "ne": 0.8, "logloss": 0.4, "calibration": 1.01, "examples": 1200}


def card_of(source=None, folder="model", **splits):
    schema = Schema(dense=(), sparse=(), splits={"train": SplitCounts(rows=4321, clicks=1)}, source=source or {})
    run = {"steps": 77, "seconds": 1.5, "ds_config": "mine.json", "setup": "AdamW"}
    return ModelCard(model_card(CONFIG, schema, run | splits, {}, Path(folder)))


def test_the_hub_reads_library_tags_and_metrics():
    data = card_of(test=METRICS).data
    assert data.library_name == "transformers"
    assert "dhen" in data.tags
    found = {(result.dataset_split, result.metric_type): result.metric_value for result in data.eval_results}
    assert found == {("test", name): value for name, value in METRICS.items() if name != "examples"}


def test_a_metric_that_does_not_exist_is_left_out_of_the_metadata():
    card = card_of(test=METRICS | {"auc": math.nan})
    assert {result.metric_type for result in card.data.eval_results} == {"ne", "logloss", "calibration"}
    nothing = dict.fromkeys(("auc", "ne", "logloss", "calibration"), math.nan) | {"examples": 0}
    assert "model-index" not in yaml.safe_load(card_of(test=nothing).content.split("---")[1])


def test_the_text_says_what_training_never_saw():
    text = card_of(test=METRICS | {"unseen": {"day": 1.0, "user": 0.3}}, eval=METRICS | {"unseen": {"day": 0.0}}).text
    assert "A row of a table that training never used holds the mean of the table's rows" in text
    assert "\n- test: day 100.0%, user 30.0%\n- eval: none\n" in text


def test_paths_with_spaces_are_words_of_the_command():
    text = card_of({"format": "csv", "files": {"test": ["my rows.csv"]}}, "my run/model", test=METRICS).text
    assert "--model_name_or_path 'my run/model' --dataset_name 'my rows.csv' --output" in text


def test_the_text_has_layers_rows_and_metrics():
    text = card_of(test=METRICS, eval=METRICS).text
    assert "2 layers over" in text
    assert "Trained on 4,321 rows for 77 steps." in text
    assert text.count("| 0.75000 | 0.80000 | 0.40000 | 1.0100 | 1,200 |") == 2
    without = card_of().text
    assert "\nThe run had no validation split and no test split.\n" in without
    assert "| AUC |" not in without
    assert "never saw" not in without


@pytest.mark.parametrize(
    ("settings", "files", "words"),
    [
        (
            {"dataset_name": ["a.csv", "b.csv"], "split_seed": 3},
            ["all"],
            "`a.csv`, `b.csv` (csv), split at random (seed 3).",
        ),
        ({"dataset_name": "a.csv", "split_order": "sequential", "time_column": "t"}, ["all"], "in the order of t."),
        ({"dataset_name": "a.csv", "split_order": "sequential"}, ["all"], "in the order of its rows."),
        ({"train_file": "a.csv"}, ["train", "test"], "`a.csv` (csv), with files of its own for each split."),
        ({}, [], "Another program prepared the data."),
    ],
)
def test_the_text_says_how_the_data_was_split(settings, files, words):
    source = {"format": "csv", "settings": settings, "files": {name: ["a.csv"] for name in files}}
    assert words in card_of(source=source, test=METRICS).text


def test_the_text_says_that_the_weights_are_an_average():
    assert "moving average" not in card_of(test=METRICS, ema_decay=0.0).text
    assert (
        "The weights are moving averages over the steps, with decay 0.9." in card_of(test=METRICS, ema_decay=0.9).text
    )
