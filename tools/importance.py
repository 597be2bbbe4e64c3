"""Permutation feature importance: how much worse a trained model predicts without what a feature tells it.

    python tools/importance.py --model_name_or_path runs/frappe
    python tools/importance.py --model_name_or_path runs/frappe --features user item --repeats 10 --max_rows 1000000
    deepspeed tools/importance.py --model_name_or_path runs/frappe/model --dataset_name rows.csv \\
        --dataset_schema recipes/configs/schemas/frappe.yaml --output importance/frappe.csv

The values of one feature are permuted among all rows that are scored (at most --max_rows), and the rows are scored
again (Breiman 2001; Fisher, Rudin and Dominici 2019). A row keeps its label and its other features; the ids of a
multi-valued feature move together, with their weights. The importance is the increase of NE and of log loss, and the
decrease of AUC: mean and standard deviation over --repeats permutations. Without --dataset_name, the rows are those of
the validation split of the data that the run was trained on.

It prints a table, writes it to --output as CSV, and draws the increase of NE beside it, as PNG. It runs on any number
of ranks, which permute and score the same rows, so the result does not depend on their number.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a call by path finds tools.bench

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

import torch
from matplotlib.figure import Figure
from torch import Tensor

from dhen.config.command_line import ArgumentError
from dhen.data.loading.batches import Batch, BatchLoader
from dhen.data.loading.lanes import share
from dhen.data.schema import Schema
from dhen.model.configuration_dhen import option
from dhen.model.features import SparseIds
from dhen.model.names import check_names
from dhen.model.ranges import Count, Seed
from dhen.runtime import topology as job
from dhen.runtime.messages import heartbeat, log_to_stderr, user_errors
from dhen.training.evaluation.metrics import MetricValues
from dhen.training.loop import score_batches
from dhen.training.parallel_model import ScoringDhen
from dhen.training.reporting.run_folder import print_metrics
from dhen.training.saved.scoring import ScoringArguments, load_for_scoring, parse_scoring_arguments
from tools.bench.report import print_table
from tools.over_seeds import Statistic, over_seeds

COLUMNS = {"ne_increase": ("ne", 1), "logloss_increase": ("logloss", 1), "auc_decrease": ("auc", -1)}
"""The metric of each column, and the sign of a change for the worse."""
MOST_BARS = 40


@dataclass
class ImportanceArguments(ScoringArguments):
    """Which rows to score, with which model, and how to permute them."""

    default_split: ClassVar[str] = "validation"
    split: Literal["train", "validation", "test"] | None = option(
        None,
        "Split to score. Default: validation. Not allowed with raw files, because all their rows are scored.",
    )
    output: str = option("importance.csv", "CSV file to write. The plot is beside it, with the ending .png.")
    features: list[str] = option([], "Features to permute, sparse or dense. Default: all.")
    repeats: Count = option(3, "Permutations of each feature.")
    max_rows: Count = option(
        100_000,
        "Rows to score. If the split has more, so many are drawn, from row groups that are drawn at random. "
        "The values of a feature are permuted among all of these rows. Each rank holds them in memory.",
    )
    seed: Seed = option(0, "Decides which rows are drawn, and the permutations.")


def parse_arguments(command_line: Sequence[str] | None = None) -> ImportanceArguments:
    """The arguments, by default of this process. Raises ArgumentError."""
    arguments = parse_scoring_arguments(command_line, __doc__, ImportanceArguments)
    if not arguments.output.endswith(".csv"):
        raise ArgumentError(f"--output {arguments.output} is not a CSV file. Use a name that ends in .csv.")
    return arguments


def main() -> None:
    """Read the arguments, join the job, permute, and report."""
    log_to_stderr()
    with user_errors():
        arguments = parse_arguments()
        topology = job.start()
        model, loader = load_for_scoring(arguments, topology)
        columns = columns_of(loader.schema)
        check_names("feature in --features", arguments.features, columns)
        loader.schema.check_weights(loader.split)
        rows = Rows.draw(loader, arguments.max_rows, arguments.seed)
        batch_size = arguments.per_device_eval_batch_size
        whole = score(model, rows, batch_size, [], torch.arange(len(rows.whole.labels_B)))
        if math.isnan(whole.ne):
            raise ValueError(
                f"{loader.split}: the labels of the {whole.examples:,} rows are all equal, so NE and AUC do not exist. "
                "Raise --max_rows, or choose another --split."
            )
        generator = torch.Generator().manual_seed(arguments.seed)
        orders = [torch.randperm(whole.examples, generator=generator) for _ in range(arguments.repeats)]
        found = {}
        for name in arguments.features or columns:
            heartbeat.doing = f"permuting {name}, feature {len(found) + 1} of {len(arguments.features or columns)}"
            permuted = [score(model, rows, batch_size, columns[name], order) for order in orders]
            found[name] = importance(whole, permuted)
        if topology.is_main:
            print_metrics({loader.split: asdict(whole)})
            report(found, Path(arguments.output))
    job.stop()


def columns_of(schema: Schema) -> dict[str, list[int]]:
    """The places of each feature's columns, dense ones first. An indicator of blanks belongs to its feature."""
    columns: dict[str, list[int]] = {}
    for place, column in enumerate((*schema.dense, *schema.lookups)):
        columns.setdefault(getattr(column, "missing_of", None) or column.name, []).append(place)
    return columns


@dataclass(frozen=True)
class Rows:
    """Rows in memory. lengths_FB: of their bags of ids. starts_FB: where each bag starts in the ids."""

    whole: Batch
    lengths_FB: Tensor
    starts_FB: Tensor

    @classmethod
    def draw(cls, loader: BatchLoader, most: int, seed: int) -> "Rows":
        """Rows of the loader's split: all, or `most` of some row groups at random; the same on every rank."""
        drawn = BatchLoader(loader.folder, loader.split, batch_size=most, shuffle=True, seed=seed, schema=loader.schema)
        with closing(drawn.epoch(0)) as batches:
            whole = next(batches)
        lengths_FB = whole.sparse.lengths_FB
        if lengths_FB is None:
            lengths_FB = torch.ones(whole.sparse.num_features, len(whole.labels_B), dtype=torch.int64)
        ends_FB = lengths_FB.flatten().cumsum(0).view_as(lengths_FB)
        return cls(whole, lengths_FB, ends_FB - lengths_FB)

    def take(self, at_B: Tensor, columns: Sequence[int], values_at_B: Tensor) -> Batch:
        """Rows `at_B`, but with the values that rows `values_at_B` have in these columns; dense features come first."""
        whole, sparse, num_dense = self.whole, self.whole.sparse, self.whole.dense_BN.shape[1]
        at_CB = at_B.repeat(num_dense + sparse.num_features, 1)
        at_CB[columns] = values_at_B
        at_FB = at_CB[num_dense:]
        lengths_FB = self.lengths_FB.gather(1, at_FB)
        lengths, starts = lengths_FB.flatten(), self.starts_FB.gather(1, at_FB).flatten()
        at = (starts - lengths.cumsum(0) + lengths).repeat_interleave(lengths) + torch.arange(int(lengths.sum()))
        dense_BN = whole.dense_BN.gather(0, at_CB[:num_dense].t())
        weights = None if sparse.weights is None else sparse.weights[at]
        bags = SparseIds(sparse.ids[at], len(at_FB), None if sparse.lengths_FB is None else lengths_FB, weights)
        weights_B = None if whole.weights_B is None else whole.weights_B[at_B]
        return Batch(whole.labels_B[at_B], dense_BN, bags, whole.rows_B[at_B], len(at_B), weights_B)


def score(model: ScoringDhen, rows: Rows, batch_size: int, columns: Sequence[int], order_B: Tensor) -> MetricValues:
    """The metrics of all rows, with the values of these columns in this order. Communicates; all ranks call it."""
    topology = model.topology

    def batches() -> Iterator[Batch]:
        for at_B in torch.arange(len(order_B)).split(batch_size * topology.world_size):
            own = share(len(at_B), topology.rank, topology.world_size)
            own_B = at_B[own.start : own.stop]
            yield rows.take(own_B, columns, order_B[own_B])

    return score_batches(model, batches()).compute(topology.world)


def importance(whole: MetricValues, permuted: Sequence[MetricValues]) -> dict[str, Statistic]:
    """By how much the metrics of the permuted rows are worse, by column."""
    return {
        column: over_seeds([sign * (getattr(values, metric) - getattr(whole, metric)) for values in permuted])
        for column, (metric, sign) in COLUMNS.items()
    }


def report(found: Mapping[str, Mapping[str, Statistic]], path: Path) -> None:
    """Print the importance of the features, the largest increase of NE first, and write the CSV and the plot."""
    features = sorted(found.items(), key=lambda item: -item[1]["ne_increase"].mean)
    shown = [[name, *map(_shown, values.values())] for name, values in features]
    print_table(["feature", *(column.replace("_", " ") for column in COLUMNS)], shown, left=["feature"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["feature", *(name for column in COLUMNS for name in (column, f"{column}_std"))])
        writer.writerows(
            [name, *(part for value in values.values() for part in value[:2])] for name, values in features
        )
    bars = features[:MOST_BARS]
    figure = Figure(figsize=(7, 1.2 + 0.25 * len(bars)), layout="constrained")
    axis = figure.add_subplot()
    means, spreads = zip(*(values["ne_increase"][:2] for _, values in bars), strict=True)
    axis.barh([name for name, _ in bars], means, xerr=[spread or 0 for spread in spreads], color="#c4502f")
    axis.invert_yaxis()
    axis.set_xlabel("increase of NE")
    figure.savefig(path.with_suffix(".png"), dpi=130)
    print(f"written to {path} and {path.with_suffix('.png')}")


def _shown(value: Statistic) -> str:
    return f"{value.mean:+.5f}" if value.spread is None else f"{value.mean:+.5f} ± {value.spread:.5f}"


if __name__ == "__main__":
    main()
