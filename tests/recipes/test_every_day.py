"""Training further every day: --keep_optimizer goes on as if the run had not ended."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dhen.training.saved import kept_optimizer
from dhen.training.saved.trained_model import TrainedModel
from tests import ROOT
from tests.recipes.launch import run_script

ROWS, BATCH = 256, 32
SCHEMA = """label: click
sparse:
  - {name: user, encoding: %s}
  - {name: page, encoding: hash, hash_size: 8}
"""
MODEL = ("--embedding_dim=4", "--num_layers=2", "--num_embeddings_out=4", "--batch_norm=false", "--num_train_epochs=1",
         "--shuffle=none", "--lr_scheduler_type=constant", "--learning_rate=0.01", "--table_learning_rate=0.1",
         "--split_fractions", "1", "0", "0")  # fmt: skip


def write_days(folder: Path, user: str = "hash, hash_size: 30") -> Path:
    """day_1.csv, day_2.csv, and both.csv with the rows of both in order. Every value of day 2 is in day 1."""
    rng, head = np.random.default_rng(0), "click,user,page\n"
    days = [[f"{rng.integers(2)},u{rng.integers(20)},p{rng.integers(40)}\n" for _ in range(ROWS)] for _ in range(2)]
    (folder / "schema.yaml").write_text(SCHEMA % user)
    for name, lines in (("day_1", days[0]), ("day_2", days[1]), ("both", days[0] + days[1])):
        (folder / f"{name}.csv").write_text(head + "".join(lines))
    return folder


def train(days: Path, day: str, run: str, *more: str, stage: int = 0, ranks: int = 1, dhen: dict | None = None) -> str:
    raw = json.loads((ROOT / f"ds_configs/zero{stage}.json").read_text())
    raw["dhen"] |= dhen or {}
    (days / f"{run}.json").write_text(json.dumps(raw))
    done = run_script(
        "train.py", *MODEL, f"--ds_config={days / run}.json", f"--train_file={days / day}.csv", "--dataset_format=csv",
        f"--dataset_schema={days / 'schema.yaml'}", f"--output_dir={days / run}",
        f"--per_device_train_batch_size={BATCH // ranks}", *more, ranks=ranks,
    )  # fmt: skip
    assert done.status == 0, done.output
    return done.output


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    model = TrainedModel.open(run)
    return model.dense_weights() | {name: model.table(name) for name in ("user", "page")}


def largest_difference(one: Path, other: Path) -> float:
    one, other = weights_of(one), weights_of(other)
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "adam"])
def test_two_days_equal_one_run_over_both(tmp_path, optimizer):
    days = write_days(tmp_path)
    table = f"--table_optimizer={optimizer}"
    train(days, "both", "once", table)
    train(days, "day_1", "first", table)
    yesterday = f"--model_name_or_path={days / 'first'}"
    train(days, "day_2", "forgot", table, yesterday)
    output = train(days, "day_2", "second", table, yesterday, "--keep_optimizer=true")
    print(largest_difference(days / "once", days / "second"), largest_difference(days / "once", days / "forgot"))
    assert "keep_optimizer: the optimizers go on from" in output
    assert largest_difference(days / "once", days / "second") < 1e-6
    assert largest_difference(days / "once", days / "forgot") > 1e-3, "the test cannot fail"
