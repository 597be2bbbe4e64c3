"""Compares changes of a ds_config: seconds per training step and losses, step by step in turns.

    python tools/bench/set_ups.py --ds_config ds_configs/zero2.json --change '{"dhen": {"compile": "layers"}}'

The same random batches train one model per set-up, without embedding tables that are larger than a cache.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dhen.config.ds_config import Recipe, check_ds_config, merged, read_json
from dhen.model.configuration_dhen import DhenConfig, SparseFeature
from dhen.runtime import topology as job
from dhen.runtime.topology import Topology
from dhen.training.parallelize import lay_out, parallelize
from tools.bench.clock import largest, now
from tools.bench.launch import argument_parser, write_json
from tools.bench.report import print_table, ratios
from tools.bench.small_work import NUM_DENSE, TABLE_LEARNING_RATE, random_batch, take_step

TABLES = [SparseFeature(f"C{index}", 1000) for index in range(26)]


@dataclass(frozen=True)
class Measured:
    """A set-up. first_seconds: of its first step, which compiles. seconds, losses: of the steps after it."""

    change: str
    first_seconds: float
    seconds: list[float]
    losses: list[float]


def measure(topology: Topology, arguments: argparse.Namespace) -> list[Measured]:
    """Train each set-up. Communicates; all ranks call it."""
    config = DhenConfig(
        num_dense_features=NUM_DENSE,
        interactions=arguments.interactions.split(","),
        num_layers=arguments.num_layers,
        num_embeddings_out=16,
        sparse_features=[{"name": table.name, "num_embeddings": table.num_embeddings} for table in TABLES],
    )
    recipe = Recipe(arguments.batch_size, 1, topology.world_size, 0.0, 1e-3, 0.0, 0.9, 0.999, 1e-8)
    changes, models = ["{}", *arguments.change], []
    for change in changes:
        raw = merged(read_json(arguments.ds_config), json.loads(change))
        ds_config = check_ds_config(str(arguments.ds_config), raw, recipe, config.num_layers)
        models.append(parallelize(lay_out(config, topology, ds_config)))
        models[-1].set_learning_rates(1e-3, TABLE_LEARNING_RATE)
    steps: list[list[tuple[float, float]]] = [[] for _ in models]
    for step in range(1 + arguments.steps):
        batch = random_batch(TABLES, arguments.batch_size, step * topology.world_size + topology.rank)
        for model, taken in zip(models, steps, strict=True):
            topology.barrier()
            start = now(topology.device)
            loss = take_step(model, batch)
            taken.append((largest(topology, now(topology.device) - start), loss.item()))
    return [
        Measured(change, taken[0][0], [seconds for seconds, _ in taken[1:]], [loss for _, loss in taken[1:]])
        for change, taken in zip(changes, steps, strict=True)
    ]


def show(results: list[Measured]) -> None:
    """Print each set-up beside the first, which is the ds_config as it is."""
    base, rows = results[0], []
    for each in results:
        differences = [abs(own / other - 1) for own, other in zip(each.losses, base.losses, strict=True)]
        times = ratios(each.seconds, base.seconds)
        rows.append((each.change, *times, f"{each.first_seconds:.1f}", f"{max(differences):.1e}"))
    columns = ("change", "time of a step", "from-to", "first step, s", "largest difference of a loss")
    print_table(columns, rows, left=("change",))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--ds_config", type=Path, default=Path("ds_configs/zero2.json"), help="the set-up to change")
    add("--change", action="append", required=True, metavar="JSON", help="keys that change it; may be repeated")
    add("--interactions", default="linear,advanced_dlrm", help="of each layer")
    add("--num_layers", type=int, default=4, help="number of DHEN layers")
    add("--batch_size", type=int, default=512, help="examples per rank")
    add("--steps", type=int, default=50, help="timed steps of each set-up")
    add("--output", type=Path, help="JSON file to write, too")
    return parser.parse_args()


def main() -> None:
    """Measure and show. Also works under a launcher, on several ranks."""
    arguments = parse_arguments()
    topology = job.start()
    results = measure(topology, arguments)
    if topology.is_main:
        show(results)
        if arguments.output:
            write_json(arguments.output, results)
    job.stop()


if __name__ == "__main__":
    main()
