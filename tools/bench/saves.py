"""Compares how long a save stops training: written at once, and in the background from a copy.

    python tools/bench/saves.py --gib 1 --ranks 2 --rounds 5

Each rank has so many GiB of tables, and a small dense part under ZeRO stage 2. The two ways take turns. After a save in
the background, steps go on until it is written; how much slower they are is printed, too.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that a call by path finds tools.bench

import shutil
import statistics
import tempfile
from argparse import Namespace

from dhen.config.ds_config import Recipe, check_ds_config
from dhen.model.configuration_dhen import DhenConfig, SparseFeature
from dhen.runtime.topology import Topology
from dhen.training.parallelize import lay_out, parallelize
from dhen.training.saved.checkpoint import TrainerState, start_save
from tools.bench.clock import largest, now
from tools.bench.launch import argument_parser, results_of_ranks, run
from tools.bench.report import print_table
from tools.bench.small_work import NUM_DENSE, OPTIMIZER, TABLE_LEARNING_RATE, random_batch, take_step

DIM, BATCH, STEPS = 64, 512, 20
AT_ONCE, IN_BACKGROUND = "at once", "in the background"
Seconds = dict[str, list[float]]
"""By way: how long each save stopped training. "steps" and "steps while it is written": of each round, the median."""


def measure(topology: Topology, options: Namespace) -> Seconds:
    """Save in turns. The slowest rank counts. Communicates; all ranks call it."""
    rows = int(options.gib * 2**30) // (4 * DIM) // 4
    tables = [SparseFeature(f"C{n}", rows) for n in range(4 * topology.world_size)]
    features = [{"name": table.name, "num_embeddings": table.num_embeddings} for table in tables]
    config = DhenConfig(num_dense_features=NUM_DENSE, sparse_features=features, embedding_dim=DIM, num_layers=1)
    raw = {"zero_optimization": {"stage": 2}, "optimizer": OPTIMIZER, "dhen": {"table_optimizer": "sgd"}}
    recipe = Recipe(BATCH, 1, topology.world_size, 0.0, 1e-3, 0.0, 0.9, 0.999, 1e-8)
    model = parallelize(lay_out(config, topology, check_ds_config("saves", raw, recipe)))
    model.set_learning_rates(1e-3, TABLE_LEARNING_RATE)
    batch = random_batch(tables, BATCH, topology.rank)
    seconds: Seconds = {name: [] for name in (AT_ONCE, IN_BACKGROUND, "steps", "steps while it is written")}

    def steps(name: str) -> None:
        each = []
        for _ in range(STEPS):
            began = now(topology.device)
            take_step(model, batch)
            each.append(now(topology.device) - began)
        seconds[name].append(statistics.median(each))

    for number in range(options.rounds + 1):  # the first warms up
        for way in (AT_ONCE, IN_BACKGROUND):
            steps("steps")
            topology.barrier()
            began = now(topology.device)
            save = start_save(model, options.folder, TrainerState(step=number + 1), in_background=way == IN_BACKGROUND)
            if way == AT_ONCE:
                save.finish(topology)
            seconds[way].append(now(topology.device) - began)
            if way == IN_BACKGROUND:
                steps("steps while it is written")
                save.finish(topology)
            if topology.is_main:
                shutil.rmtree(save.folder)
            topology.barrier()
    return {name: largest(topology, values[1:]) for name, values in seconds.items()}


def start_and_show(options: Namespace) -> None:
    """Measure on ranks, and print."""
    with tempfile.TemporaryDirectory(dir=options.folder.parent) as folder:
        options.folder = folder
        seconds = results_of_ranks(options.ranks, Seconds, f"--folder={folder}")
    rows = [
        [name, f"{statistics.median(each):.3f}", f"{min(each):.3f} to {max(each):.3f}"]
        for name, each in seconds.items()
    ]  # fmt: skip
    print_table(["what", "seconds", "range"], rows, left=["what"])
    at_once, in_background = (statistics.median(seconds[name]) for name in (AT_ONCE, IN_BACKGROUND))
    print(f"a save in the background stops training for {in_background / at_once:.0%} of the time of one at once")


def parse_arguments() -> Namespace:
    """The command line, which the ranks get too."""
    parser = argument_parser(__doc__)
    parser.add_argument("--gib", type=float, default=1.0, help="GiB of tables per rank")
    parser.add_argument("--ranks", type=int, default=2, help="number of ranks")
    parser.add_argument("--rounds", type=int, default=5, help="saves of each way")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="a folder on the disk to save to")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run(parse_arguments(), measure, start_and_show))
