"""tools/importance.py: which feature decides the label, against a plain reference, on several ranks."""

import csv
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from transformers import AutoModel

import dhen.model.modeling_dhen  # noqa: F401 (registers the architecture)
from dhen.data.loading.batches import BatchLoader
from dhen.data.schema import DenseColumn, Schema, SparseColumn
from dhen.model.features import SparseIds
from tests.ranks import free_port, rank_environment
from tests.recipes.launch import TINY, prepared_click_log, run_script
from tests.tools.forked_python import Finished, call
from tools.importance import Rows, columns_of

TOOL, ROWS, REPEATS, SEED = "tools/importance.py", {"train": 4000, "validation": 600}, 3, 5
SCHEMA = """
label: clicked
dense: [price]
sparse: [decides, noise, {name: tags, separator: "|", weights: tag_weights, pooling: mean}]
"""
TOLERANCE = 1e-6
"""Absolute: float32 logits."""


def click_log(rows, generator):
    """`decides` decides the label, almost; `tags`, which are weighted, and `price` move it a little."""
    decides, noise = generator.integers(0, 6, (2, rows))
    tags = [generator.integers(0, 5, generator.integers(0, 4)) for _ in range(rows)]
    weights = [generator.uniform(0.5, 2.0, len(bag)).round(2) for bag in tags]
    price = generator.normal(size=rows).round(3)
    pulls = [sum(w * (tag - 2) for tag, w in zip(*bag, strict=True)) for bag in zip(tags, weights, strict=True)]
    z = 5.0 * (decides % 2) - 2.5 + 0.3 * np.array(pulls) + 1.0 * price
    joined = [["|".join(map(str, bag)) for bag in bags] for bags in (tags, weights)]
    clicked = (generator.random(rows) < 1 / (1 + np.exp(-z))).astype(int)
    columns = {"clicked": clicked, "price": price, "decides": decides, "noise": noise}
    return pl.DataFrame(columns | {"tags": joined[0], "tag_weights": joined[1]})


def test_an_indicator_of_blanks_moves_with_its_feature():
    dense = (DenseColumn("price"), DenseColumn("price_is_missing", missing_of="price"), DenseColumn("age"))
    schema = Schema(dense, (SparseColumn("user", 10),))
    assert columns_of(schema) == {"price": [0, 1], "age": [2], "user": [3]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run; its data has no test split."""
    folder = tmp_path_factory.mktemp("importance")
    generator = np.random.default_rng(0)
    for split, rows in ROWS.items():
        click_log(rows, generator).write_csv(folder / f"{split}.csv")
    (folder / "schema.yaml").write_text(SCHEMA)
    flags = [f"--{split}_file={folder / split}.csv" for split in ROWS]
    flags += [f"--dataset_schema={folder / 'schema.yaml'}", f"--output_dir={folder / 'run'}", "--skip_test", *TINY]
    flags += ["--per_device_train_batch_size=64", "--num_train_epochs=4", "--ds_config=ds_configs/zero2.json"]
    flags += ["--learning_rate=0.01", "--table_learning_rate=0.1", "--hash_size=64"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTEST_TMP", str(folder))
        done = run_script("train.py", *flags)
    assert done.status == 0, done.output
    return folder / "run"


def measured(trained, folder, *flags, ranks=1) -> tuple[Finished, dict[str, dict[str, float]]]:
    """What rank 0 left, and the rows of its CSV by feature, in their order."""
    path = folder / "new" / f"{ranks}.csv"
    flags = [f"--model_name_or_path={trained}", f"--seed={SEED}", f"--output={path}", *flags]
    port = free_port()
    with ThreadPoolExecutor(ranks) as pool:
        environments = [rank_environment(rank, ranks, port) for rank in range(ranks)]
        all_done = list(pool.map(lambda environment: call(TOOL, *flags, **environment), environments))
    assert [done.status for done in all_done] == [0] * ranks, all_done[0].stderr
    assert path.with_suffix(".png").is_file()
    assert not any(done.stdout for done in all_done[1:])
    with path.open() as file:
        rows = {row.pop("feature"): row for row in csv.DictReader(file)}
    return all_done[0], {name: {key: float(value or "nan") for key, value in row.items()} for name, row in rows.items()}


@pytest.fixture(scope="module")
def on_one_rank(trained, tmp_path_factory):
    return measured(trained, tmp_path_factory.mktemp("one"), f"--repeats={REPEATS}")


def test_the_feature_that_decides_is_far_ahead_and_noise_is_near_zero(on_one_rank):
    done, found = on_one_rank
    assert next(iter(found)) == "decides"
    increases = [row["ne_increase"] for row in found.values()]
    assert increases == sorted(increases, reverse=True)
    assert found["decides"]["ne_increase"] > 0.5
    assert found["decides"]["auc_decrease"] > 0.2
    assert all(abs(found["noise"][key]) < 0.01 for key in ("ne_increase", "logloss_increase", "auc_decrease"))
    assert 0.01 < found["price"]["ne_increase"] < 0.5 * found["decides"]["ne_increase"]
    assert done.stdout.index("decides") < done.stdout.index("noise")
    assert "600" in done.stdout.split("decides")[0], "the number of rows"


def plain_importance(trained, rows):
    """{feature: (mean, std) of each measure}, from Python lists of bags and a model of plain tables."""
    (prepared,) = [path for path in (trained.parent / "prepared").iterdir() if not path.name.startswith(".")]
    batch = next(BatchLoader(prepared, "validation", batch_size=rows, shuffle=True, seed=SEED).epoch(0))
    model = AutoModel.from_pretrained(trained / "model").eval()
    labels, sparse = batch.labels_B.numpy(), batch.sparse
    ends = sparse.lengths_FB.flatten().cumsum(0).tolist()
    bags = [
        list(zip(sparse.ids[a:b], sparse.weights[a:b], strict=True)) for a, b in zip([0, *ends], ends, strict=False)
    ]
    table = [list(batch.dense_BN[:, 0]), *(bags[f * rows : (f + 1) * rows] for f in range(sparse.num_features))]

    def metrics(columns):
        flat = [pair for column in columns[1:] for bag in column for pair in bag]
        lengths_FB = torch.tensor([[len(bag) for bag in column] for column in columns[1:]])
        ids, weights = (torch.stack(part) for part in zip(*flat, strict=True))
        with torch.no_grad():
            dense_BN = torch.stack(columns[0]).unsqueeze(1)
            logits = model(SparseIds(ids, len(lengths_FB), lengths_FB, weights), dense_BN).logits.double()
        loss, rate = log_loss(labels, logits.sigmoid().numpy()), labels.astype(float).mean()
        return np.array([loss / log_loss(labels, np.full(rows, rate)), loss, -roc_auc_score(labels, logits.numpy())])

    generator = torch.Generator().manual_seed(SEED)
    orders = [torch.randperm(rows, generator=generator).tolist() for _ in range(REPEATS)]
    found = {}
    for index, name in enumerate(["price", "decides", "noise", "tags"]):
        permuted = [[*table[:index], [table[index][at] for at in order], *table[index + 1 :]] for order in orders]
        worse = np.array([metrics(columns) for columns in permuted]) - metrics(table)
        found[name] = np.stack([worse.mean(0), worse.std(0, ddof=1)], axis=1).flatten()
    return found


def test_it_equals_a_plain_reference(trained, on_one_rank):
    found, expected = on_one_rank[1], plain_importance(trained, ROWS["validation"])
    assert set(found) == set(expected)
    for name, row in found.items():
        np.testing.assert_allclose(list(row.values()), expected[name], rtol=0, atol=TOLERANCE, err_msg=name)
    assert all(row["ne_increase_std"] > 100 * TOLERANCE for row in found.values()), "orders can be told apart"


def test_two_ranks_find_the_same_whatever_their_batches(trained, on_one_rank, tmp_path):
    # 600 rows in steps of 2 x 47: the last step has 36.
    _, found = measured(trained, tmp_path, f"--repeats={REPEATS}", "--per_device_eval_batch_size=47", ranks=2)
    assert found == {name: pytest.approx(row, abs=TOLERANCE) for name, row in on_one_rank[1].items()}


def test_some_features_of_some_rows_once(trained, tmp_path):
    flags = ["--features", "noise", "decides", "--max_rows=101", "--repeats=1"]
    done, found = measured(trained, tmp_path, *flags, ranks=2)
    assert list(found) == ["decides", "noise"]
    assert " 101\n" in done.stdout
    assert np.isnan(found["noise"]["ne_increase_std"])
    assert found["decides"]["ne_increase"] > 0.5


def test_new_files_are_scored_as_a_whole(trained, on_one_rank, tmp_path):
    flags = [
        f"--dataset_name={trained.parent / 'validation.csv'}",
        f"--dataset_schema={trained.parent / 'schema.yaml'}",
    ]
    _, found = measured(trained, tmp_path, *flags, f"--repeats={REPEATS}", f"--cache_dir={tmp_path}")
    assert found == {name: pytest.approx(row, abs=TOLERANCE) for name, row in on_one_rank[1].items()}


def test_rows_of_features_with_one_id_stay_so(tmp_path):
    folder = prepared_click_log(tmp_path, rows=100)
    loader = BatchLoader(folder, "validation", batch_size=7)
    rows = Rows.draw(loader, 150, SEED)
    assert len(rows.whole.rows_B.unique()) == 150  # of 200
    dense_BN, ids_FB = rows.whole.dense_BN, rows.whole.sparse.ids.view(-1, 150)
    at_B, order_B = torch.arange(40, 60), torch.randperm(150)[:20]
    for dense, sparse in ((1, None), (None, 2)):  # the column whose values are those of other rows
        column = dense_BN.shape[1] + sparse if dense is None else dense
        taken = rows.take(at_B, column, order_B)
        for feature, values_B in enumerate(dense_BN.t()):
            assert torch.equal(taken.dense_BN[:, feature], values_B[order_B if feature == dense else at_B])
        for feature, ids_B in enumerate(ids_FB):
            assert torch.equal(taken.sparse.ids.view(-1, 20)[feature], ids_B[order_B if feature == sparse else at_B])
        assert taken.sparse.lengths_FB is taken.sparse.weights is None
        assert torch.equal(taken.labels_B, rows.whole.labels_B[at_B])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--split=test"], "there is no split 'test'. The splits are train, validation."),
        (["--split=val"], "invalid choice: 'val' (choose from "),
        (
            ["--features", "price", "nois"],
            "unknown feature in --features 'nois'. Did you mean 'noise'? Allowed: decides, ",
        ),
        (["--repeats=0"], "repeats is 0. Use 1 or more."),
        (["--output=importance"], "--output importance is not a CSV file. Use a name that ends in .csv."),
        (["--max_rows=1"], "the labels of the 1 rows are all equal, so NE and AUC do not exist. Raise --max_rows"),
    ],
)
def test_a_mistake_is_one_line(trained, tmp_path, flags, message):
    done = call(TOOL, f"--model_name_or_path={trained}", f"--output={tmp_path / 'x.csv'}", *flags)
    assert done.status == 1
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert message in line
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
