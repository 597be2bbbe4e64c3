"""Compares the rows per second of the batch loader with those that one rank trains on.

    python tools/bench/loader.py --config recipes/configs/quickstart.yaml --rounds 5 --json loader.json

Loader and training each run on one core, with all their threads. They take turns in each round, so that other work on
the machine slows both; the ratio is that of the medians. The loader reads a whole shuffled epoch from files. Training
repeats batches in memory, so it never waits for the loader.

With --world_size W the loader is that of one rank of W. All ranks share one order of rows, so each rank decodes all
rows of the epoch, and keeps its own share. The rows per second of a rank fall as W grows, and so does the ratio. On a
busy CPU it was 64 for 1 rank, 13 for 4, 7 for 16, and 1.6 for 64. If the ratio is below 1, the ranks wait for data.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that a call by path finds tools.bench

import argparse
import itertools
import os
import statistics
from dataclasses import replace

import pyarrow
import torch

from dhen.config.arguments import Arguments, parse_arguments
from dhen.config.ds_config import read_ds_config
from dhen.config.left_out import MOST_BATCH
from dhen.data.loading.batches import BatchLoader
from dhen.runtime import topology as job
from dhen.runtime.messages import log_to_stderr, user_errors
from dhen.runtime.topology import Topology
from dhen.training.dataset import prepare_dataset
from dhen.training.parallelize import lay_out, parallelize
from dhen.training.saved.fine_tuning import config_for
from tools.bench.clock import in_turns
from tools.bench.launch import argument_parser, write_json
from tools.bench.report import print_table
from tools.bench.small_work import take_step

Rates = dict[str, list[float]]
"""Rows per second in each round, of the "loader" and of "training"."""


def main() -> int:
    """Measure and show."""
    options = parse_options()
    log_to_stderr()
    if hasattr(os, "sched_setaffinity"):  # Linux
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    topology = job.start()
    torch.set_num_threads(1)
    pyarrow.set_cpu_count(1)
    with user_errors():
        arguments = parse_arguments(["--config", options.config, "--ds_config", "ds_configs/zero2.json"])
        rates = measure(arguments, options, topology)
    job.stop()
    ranks = "" if options.world_size == 1 else f", the loader of one rank of {options.world_size}"
    batch_size = arguments.training.per_device_train_batch_size
    print(f"{options.config}, batches of {batch_size:,} rows, one core{ranks}")
    show(rates)
    if options.json:
        write_json(options.json, rates)
    return 0


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--config", default="recipes/configs/quickstart.yaml", help="recipe")
    add("--world_size", type=int, default=1, help="ranks that share the loader's rows")
    add("--rounds", type=int, default=5, help="measured epochs of the loader, and turns of training")
    add("--steps", type=int, default=60, help="updates of training in each round")
    add("--json", type=Path, metavar="FILE", help="write the rows per second of each round as JSON")
    options = parser.parse_args()
    for name in ("rounds", "steps", "world_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}. Use 1 or more.")
    return options


def measure(arguments: Arguments, options: argparse.Namespace, topology: Topology) -> Rates:
    """Measure the loader and training in turns."""
    training = arguments.training
    prepared = prepare_dataset(arguments.data, Path("runs/prepared"), topology)
    size, seed = training.per_device_train_batch_size or MOST_BATCH, training.seed
    loader = BatchLoader(prepared, "train", batch_size=size, world_size=options.world_size, shuffle=True, seed=seed)
    ds_config = read_ds_config(arguments.ds_config, replace(arguments.recipe(1), gradient_accumulation_steps=1))
    model = parallelize(lay_out(config_for(arguments.architecture, loader.schema), topology, ds_config), seed=seed)
    model.set_learning_rates(training.learning_rate, training.table_learning_rate)
    batches, epochs = list(itertools.islice(loader.epoch(0), options.steps)), itertools.count(1)
    rows = {"training": sum(len(batch.labels_B) for batch in batches)}

    def load() -> None:
        rows["loader"] = sum(len(batch.labels_B) for batch in loader.epoch(next(epochs)))

    def train() -> None:
        for batch in batches:
            take_step(model, batch)

    seconds = in_turns({"loader": load, "training": train}, topology, 1 + options.rounds)  # the first warms up
    return {name: [rows[name] / each for each in of_name[1:]] for name, of_name in seconds.items()}


def show(rates: Rates) -> None:
    """Print the rounds; the last row has the medians."""
    rounds = [(str(number), *both) for number, both in enumerate(zip(*rates.values(), strict=True), start=1)]
    rounds.append(("median", *map(statistics.median, rates.values())))
    rows = [
        (name, f"{loader:,.0f}", f"{training:,.0f}", f"{loader / training:.1f}") for name, loader, training in rounds
    ]
    print_table(("round", "loader rows/s", "training rows/s", "ratio"), rows)


if __name__ == "__main__":
    sys.exit(main())
