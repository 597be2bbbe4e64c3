"""The generated click log is reproducible and in Criteo's format, and its best possible NE is correct."""

import gzip
import hashlib
import json
import math

import numpy as np
import pytest
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

from dhen.data import synthetic
from dhen.data.loading.batches import BatchLoader
from dhen.data.preparation.preprocessing import prepare
from dhen.data.preparation.settings import PreparationSettings
from dhen.data.synthetic import (
    PLANTED,
    QUICKSTART,
    RECIPES,
    TRUTH_FILE,
    VERSION,
    ClickModel,
    generate_click_log,
    generated_log,
    holds_click_log,
)

ROWS = {"train": 1500, "validation": 300, "test": 400}


def entropy(labels):
    rate = labels.mean()
    return -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def truth_of(folder):
    return json.loads((folder / TRUTH_FILE).read_text())["files"]


@pytest.fixture(scope="module")
def click_log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("click_log")
    generate_click_log(folder, ROWS, seed=3)
    return folder, truth_of(folder)


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request):
    return RECIPES[request.param]


@pytest.fixture(scope="module")
def drawn(recipe):
    return ClickModel(0, recipe).draw(60_000, 9)


def test_a_seed_gives_the_same_bytes_and_another_seed_others(tmp_path, click_log):
    first = contents(click_log[0])
    generate_click_log(tmp_path / "again", ROWS, seed=3)
    generate_click_log(tmp_path / "other", ROWS, seed=4)
    assert contents(tmp_path / "again") == first
    assert list(first) == ["test.tsv.gz", "train.tsv.gz", TRUTH_FILE, "validation.tsv.gz"]
    assert all(content != first[name] for name, content in contents(tmp_path / "other").items())


def test_splits_do_not_repeat_one_another(click_log):
    lines = [line for path in click_log[0].glob("*.gz") for line in gzip.decompress(path.read_bytes()).splitlines()]
    assert len(lines) == sum(ROWS.values())
    assert len(set(lines)) == len(lines)


def test_the_stated_best_ne_is_that_of_the_drawn_probabilities(tmp_path, monkeypatch, click_log):
    _, truths = click_log
    model = ClickModel(seed=3)
    for number, split in enumerate(ROWS):
        rows = model.draw(ROWS[split], number, 0)
        best = log_loss(rows.labels, rows.probabilities) / entropy(rows.labels)
        truth = truths[f"{split}.tsv.gz"]
        assert truth["best_possible_ne"] == pytest.approx(best, rel=1e-12)
        assert (truth["rows"], truth["clicks"]) == (ROWS[split], rows.labels.sum())
    monkeypatch.setattr(synthetic, "CHUNK_ROWS", 170)
    generate_click_log(tmp_path, {"test": 400}, seed=3)
    chunks = [model.draw(count, 0, chunk) for chunk, count in enumerate((170, 170, 60))]
    labels = np.concatenate([chunk.labels for chunk in chunks])
    best = log_loss(labels, np.concatenate([chunk.probabilities for chunk in chunks])) / entropy(labels)
    assert truth_of(tmp_path)["test.tsv.gz"]["best_possible_ne"] == pytest.approx(best, rel=1e-12)


def test_truth_json_says_how_the_log_was_made(click_log):
    said = json.loads((click_log[0] / TRUTH_FILE).read_text())
    assert (said["version"], said["seed"]) == (VERSION, 3)


def test_a_log_of_other_rows_seed_or_version_is_not_taken_for_the_one_wanted(tmp_path, monkeypatch):
    rows = {"train": 300, "test": 200}
    assert not holds_click_log(tmp_path, rows)
    generate_click_log(tmp_path, rows)
    assert holds_click_log(tmp_path, rows)
    others = {"more": {"train": 301, "test": 200}, "fewer": {"train": 300}, "order": {"test": 200, "train": 300}}
    assert [name for name, other in others.items() if holds_click_log(tmp_path, other)] == []
    assert not holds_click_log(tmp_path, rows, seed=1)
    monkeypatch.setattr(synthetic, "VERSION", VERSION + 1)
    assert not holds_click_log(tmp_path, rows)


def test_a_log_from_before_versions_is_not_taken_for_this_one(tmp_path):
    generate_click_log(tmp_path, {"test": 200})
    said = json.loads((tmp_path / TRUTH_FILE).read_text())
    del said["version"]
    (tmp_path / TRUTH_FILE).write_text(json.dumps(said))
    assert not holds_click_log(tmp_path, {"test": 200})


@pytest.mark.parametrize(("name", "expected"), [("quickstart", "5c47ccfc5a1abb21"), ("planted", "7221071a4c8072b9")])
def test_the_version_stands_for_this_log(tmp_path, name, expected):
    """If this fails, the generator has changed. Raise VERSION, so that old logs are not reused, and the digest."""
    generate_click_log(tmp_path, {"test": 500}, recipe=RECIPES[name])
    digest = hashlib.blake2b(gzip.decompress((tmp_path / "test.tsv.gz").read_bytes()), digest_size=8).hexdigest()
    assert (VERSION, digest) == (1, expected)


def test_clicks_follow_the_probabilities(drawn, recipe):
    """In each decile of the probabilities and overall, the clicks are within four standard deviations."""
    deviations = []
    for tenth in np.array_split(np.argsort(drawn.probabilities), 10):
        chances = drawn.probabilities[tenth]
        deviations.append((drawn.labels[tenth].sum() - chances.sum()) / math.sqrt((chances * (1 - chances)).sum()))
    assert np.abs(deviations).max() < 4
    assert abs(sum(deviations)) < 4 * math.sqrt(10)
    assert drawn.labels.mean() == pytest.approx(recipe.click_rate, abs=0.01)


def test_the_probability_is_the_stated_function(drawn, recipe):
    """The module's formula, row by row in plain Python."""
    model = ClickModel(0, recipe)
    for row in range(0, 60_000, 6000):
        categories = drawn.categories[row]
        t = []
        for j, x in enumerate(drawn.integers[row]):
            log = math.copysign(math.log1p(abs(x)), x)
            t.append(0.0 if math.isnan(x) else (log - model._location[j]) / model._spread[j])

        def entry(table, feature, categories=categories):
            return table[categories[feature]] if categories[feature] >= 0 else np.zeros(table.shape[1:])

        z = model._bias + sum(slope * value for slope, value in zip(model._slopes, t, strict=True))
        z += sum(entry(table, feature) for feature, table in enumerate(model._main))
        for interaction, factors in zip(recipe.interactions, model._factors, strict=True):
            product = math.prod(entry(table, f) for f, table in zip(interaction.categories, factors, strict=True))
            z += sum(product) * (1 if interaction.integer is None else t[interaction.integer])
        assert drawn.probabilities[row] == pytest.approx(1 / (1 + math.exp(-z)), rel=1e-9)


def test_interactions_matter():
    """Even the best linear model on all features explains far less than the true probabilities."""
    drawn = ClickModel(0).draw(60_000, 9)
    logs = np.nan_to_num(np.sign(drawn.integers) * np.log1p(np.abs(drawn.integers)))
    features = np.concatenate([logs, np.isnan(drawn.integers), drawn.categories], axis=1)
    train, test = slice(0, 40_000), slice(40_000, None)
    one_hot = OneHotEncoder(handle_unknown="ignore")
    encode = make_column_transformer((one_hot, list(range(26, 52))), remainder="passthrough")
    linear = make_pipeline(encode, LogisticRegression(C=0.1, max_iter=300))
    linear.fit(features[train], drawn.labels[train])
    labels = drawn.labels[test]
    linear_ne = log_loss(labels, linear.predict_proba(features[test])[:, 1]) / entropy(labels)
    best_ne = log_loss(labels, drawn.probabilities[test]) / entropy(labels)
    assert best_ne < linear_ne < 1
    assert linear_ne - best_ne > 0.1


def test_depth_pays_on_the_planted_log():
    """Most of the variance of z is of orders 4 and 5, and without them the best possible NE is out of reach."""
    model = ClickModel(0, PLANTED)
    drawn = model.draw(100_000, 9)
    z = np.log(drawn.probabilities / (1 - drawn.probabilities))
    model._main, model._slopes = [table * 0 for table in model._main], model._slopes * 0
    for place, interaction in enumerate(PLANTED.interactions):
        if len(interaction.categories) < 4:
            model._factors[place] = tuple(table * 0 for table in model._factors[place])
    of_high_order = model._score(drawn.integers, drawn.categories)
    assert 0.5 < of_high_order.var() / z.var() < 0.65
    assert drawn.labels.mean() == pytest.approx(0.25, abs=0.01)

    def ne(probabilities):
        return log_loss(drawn.labels, probabilities) / entropy(drawn.labels)

    rest = (z - of_high_order)[:, None]
    known = LogisticRegression(C=1e6).fit(rest, drawn.labels).predict_proba(rest)[:, 1]
    assert 0.75 < ne(drawn.probabilities) < 0.77
    assert ne(known) > 0.87


def test_a_log_is_named_with_its_training_rows():
    assert generated_log("quickstart") is QUICKSTART
    assert generated_log("planted-500k").rows == {"train": 500_000, "validation": 50_000, "test": 50_000}
    assert generated_log("planted-3M").rows["test"] == 300_000
    assert [generated_log(name) for name in ("planted-", "planted-0k", "planted-500", "log.csv", "planted.csv")] == [
        None
    ] * 5


def test_the_files_are_criteos_format(tmp_path, click_log):
    folder, truths = click_log
    files = {f"{split}_file": str(folder / f"{split}.tsv.gz") for split in ROWS}
    schema = prepare(PreparationSettings(dataset_format="criteo", id_encoding="vocabulary", **files), tmp_path / "out")
    assert {split: counts.rows for split, counts in schema.splits.items()} == ROWS
    assert {f"{split}.tsv.gz": counts.clicks for split, counts in schema.splits.items()} == {
        name: truth["clicks"] for name, truth in truths.items()
    }
    assert sum(counts.bad_rows for counts in schema.splits.values()) == 0
    for column, cardinality in zip(schema.sparse, QUICKSTART.cardinalities, strict=True):
        assert column.num_embeddings <= cardinality + 1
    (batch,) = BatchLoader(tmp_path / "out", "train", batch_size=ROWS["train"]).epoch(0)
    rows = ClickModel(seed=3).draw(ROWS["train"], 0, 0)
    assert batch.labels_B.tolist() == rows.labels.tolist()
    logs = np.nan_to_num(np.sign(rows.integers) * np.log1p(np.abs(rows.integers)))
    np.testing.assert_allclose(batch.dense_BN, logs, atol=1e-6)
    ids_FB = batch.sparse.ids.view(26, -1).numpy()
    for feature in range(26):
        categories = rows.categories[:, feature]
        pairs = set(zip(ids_FB[feature].tolist(), categories.tolist(), strict=True))
        assert len(pairs) == len(np.unique(categories)) == len(np.unique(ids_FB[feature]))
        assert ((ids_FB[feature] == 0) == (categories < 0)).all()


def test_truth_json_is_written_last_and_never_beside_unfinished_files(tmp_path, monkeypatch):
    generate_click_log(tmp_path, ROWS)
    seen = []

    def failing_draw(model, rows, *stream):
        seen.append((tmp_path / TRUTH_FILE).exists())
        if stream[0] == 2:
            raise KeyboardInterrupt
        return draw(model, rows, *stream)

    draw = ClickModel.draw
    monkeypatch.setattr(ClickModel, "draw", failing_draw)
    with pytest.raises(KeyboardInterrupt):
        generate_click_log(tmp_path, ROWS, seed=1)
    assert seen == [False] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.tsv.gz", "train.tsv.gz", "validation.tsv.gz"]
    assert gzip.decompress((tmp_path / f"{list(ROWS)[2]}.tsv.gz").read_bytes()), "a file is whole, or the one before"


def test_too_few_rows_for_an_ne_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"test\.tsv\.gz: [01] of 1 rows are clicks.*Generate more rows"):
        generate_click_log(tmp_path, {"test": 1})
    assert not (tmp_path / TRUTH_FILE).exists()
