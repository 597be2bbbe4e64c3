"""Measures what half precision and a quantized wire save and cost: bytes between nodes, memory, NE (paper 3.2.1).

    python tools/bench/precision.py --config recipes/configs/frappe_quick.yaml --epochs 1

The benchmark trains the recipe once per variant and seed, on two nodes of this machine (tools/cluster.py). It prints
for each variant:
- what node 0 sends per training step, without evaluation and test;
- milliseconds of a step, the median;
- MiB of the tables of all ranks;
- the test split's NE over the seeds, and how far it is from that of fp32.

results.jsonl has a line per run. A run that has its line is skipped. The benchmark passes arguments that it does not
know to recipes/train.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that a call by path finds tools.bench

import argparse
import json
import runpy
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

from dhen.training.loop import Trainer
from tools.bench.launch import JobError, argument_parser, is_rank, results_of_cluster, run_here, write_json
from tools.bench.precision_results import Result, add, read
from tools.bench.report import print_table
from tools.cluster import Cluster, bytes_sent
from tools.experiments import code

ROOT = Path(__file__).resolve().parents[2]
MEASURED_FILE = "measured.json"
BF16_OPTIMIZER = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("zero2", {}),
    "all-to-all fp16": ("zero2", {"dhen": {"all_to_all_dtype": "fp16"}}),
    "all-to-all bf16": ("zero2", {"dhen": {"all_to_all_dtype": "bf16"}}),
    "all-to-all int8": ("zero2", {"dhen": {"all_to_all_dtype": "int8"}}),
    "all-reduce bf16": ("zero2", {"communication_data_type": "bf16"}),
    "tables fp16, to nearest": ("zero2", {"dhen": {"table_dtype": "fp16", "table_rounding": "nearest"}}),
    "tables fp16, stochastic": ("zero2", {"dhen": {"table_dtype": "fp16"}}),
    "autocast bf16": ("zero0_bf16", {}),
    "bf16, fp32 masters": ("zero2_bf16", {}),
    "bf16 optimizer": ("zero2_bf16", {"bf16": BF16_OPTIMIZER}),
    "paper": ("paper", {}),
    "dp": ("zero0", {}),
    "dp, fp16 tables": ("zero0", {"dhen": {"table_dtype": "fp16"}}),
    "dp, bf16 autocast": ("zero0_bf16", {}),
    "dp, bf16 all-reduce": ("zero0", {"communication_data_type": "bf16"}),
    "dp, bf16 all-to-all": ("zero0", {"dhen": {"all_to_all_dtype": "bf16"}}),
    "paper_dp": ("paper_dp", {}),
}
"""The ds_config of each variant, and the changes to it."""


def train(variant: str, seed: int, arguments: argparse.Namespace, cluster: Cluster, folder: Path) -> Result:
    """Train one variant on the cluster. Raises JobError if that fails."""
    name, changes = VARIANTS[variant]
    config = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text(encoding="utf-8"))
    for key, value in changes.items():
        config[key] = config.get(key, {}) | value if isinstance(value, dict) else value
    output = folder / f"{variant.replace(' ', '_').replace(',', '')}-{seed}"
    ds_config = folder / f"{output.name}.json"
    ds_config.write_text(json.dumps(config), encoding="utf-8")
    flags = [f"--ds_config={ds_config}", f"--output_dir={output}", f"--seed={seed}", "--overwrite_output_dir"]
    command = [__file__, *flags, *flags_of(arguments)]
    measured = results_of_cluster(cluster, command, dict[str, Any], output / MEASURED_FILE)
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    placement = json.loads((output / "placement.json").read_text(encoding="utf-8"))
    return Result(
        variant=variant,
        seed=seed,
        bytes_per_step=measured["bytes_per_step"],
        table_bytes=sum(shard["num_bytes"] for shard in placement["shards"]),
        ne=summary["test"]["ne"],
        auc=summary["test"]["auc"],
        seconds_per_step=measured["seconds_per_step"],
        flags=flags_of(arguments),
        commit=code()["commit"],
    )


def flags_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    """What all runs pass to recipes/train.py."""
    recipe = (f"--config={arguments.config}", f"--num_train_epochs={arguments.epochs}", "--lr_scheduler_type=constant")
    return (*recipe, *arguments.more)


def train_here() -> None:
    """One rank's part: recipes/train.py with measured steps; rank 0 writes the result. Communicates; all call it."""
    train = Trainer.train

    def train_and_measure(trainer: Trainer, *arguments: Any) -> bool:
        trainer.validation_loader = None  # the bytes are those of training steps
        engine, topology = trainer.model.engine, trainer.model.topology
        step = engine.step
        ends: list[float] = []

        def measure_and_step() -> None:
            step()
            ends.append(time.perf_counter())

        engine.step = measure_and_step
        topology.barrier()
        before = bytes_sent()
        is_stopped = train(trainer, *arguments)
        topology.barrier()
        if topology.is_main:
            values = {"bytes_per_step": (bytes_sent() - before) / trainer.state.step}
            values["seconds_per_step"] = statistics.median(b - a for a, b in pairwise(ends))
            write_json(trainer.output_dir / MEASURED_FILE, values)
        return is_stopped

    Trainer.train = train_and_measure
    runpy.run_path(str(ROOT / "recipes" / "train.py"), run_name="__main__")


def show(results: Sequence[Result]) -> None:
    """Print one row per variant, over its seeds."""
    by_variant: dict[str, list[Result]] = {}
    for result in results:
        by_variant.setdefault(result.variant, []).append(result)
    first_variant = next(iter(by_variant))
    base = statistics.mean(result.ne for result in by_variant[first_variant])
    rows = []
    for variant, of_variant in by_variant.items():
        first, ne = of_variant[0], [result.ne for result in of_variant]
        milliseconds = 1e3 * statistics.median(result.seconds_per_step for result in of_variant)
        row = [variant, f"{first.bytes_per_step / 2**10:.1f}", f"{milliseconds:.0f}"]
        row.append(f"{first.table_bytes / 2**20:.3f}")
        row += [f"{value:.5f}" for value in (statistics.mean(ne), min(ne), max(ne))]
        row.append(f"{statistics.mean(ne) / base - 1:+.2%}")
        rows.append([*row, f"{statistics.mean(result.auc for result in of_variant):.5f}"])
    columns = ("variant", "KiB per step", "ms", "tables", "NE", "from", "to", "to the first", "AUC")
    print_table(columns, rows, left=["variant"])
    print("tables: MiB on all ranks, with their optimizer's states.")
    print("NE over the seeds: mean, from lowest to highest, and the mean's distance from that of the first variant.")


def parse_arguments() -> argparse.Namespace:
    """The command line. `more` has the arguments for train.py."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--config", default="recipes/configs/frappe_quick.yaml", help="recipe to train")
    add("--epochs", type=int, default=1, help="epochs per run")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds; each variant has a run per seed")
    defaults = [name for name in VARIANTS if not name.startswith("dp") and name != "paper_dp"]
    add("--variants", nargs="+", default=defaults, choices=VARIANTS, help="variants to compare, with the first one")
    add("--output", type=Path, default="runs/precision", help="folder of the runs")
    add("--results", type=Path, help="file of the results (default: results.jsonl in --output)")
    arguments, arguments.more = parser.parse_known_args()
    return arguments


def train_and_show(arguments: argparse.Namespace) -> None:
    """Train and show all variants. Raises ClusterError without a cluster, and JobError in the end if a run fails."""
    folder = arguments.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    file = arguments.results or folder / "results.jsonl"
    done = {(each.variant, each.seed): each for each in read(file) if each.flags == flags_of(arguments)}
    runs, failures = list(product(arguments.seeds, arguments.variants)), []
    with Cluster(2, link_mbit=0, local_mbit=0) as cluster:
        for seed, variant in runs:
            if (variant, seed) in done:
                print(f"skipped: {variant}, seed {seed}, has its line in {file}")
                continue
            try:
                done[variant, seed] = train(variant, seed, arguments, cluster, folder)
            except JobError as error:
                failures.append(str(error))
            else:
                add(file, done[variant, seed])
    if results := [done[variant, seed] for seed, variant in runs if (variant, seed) in done]:
        show(results)
    if failures:
        raise JobError(" ".join(failures))


if __name__ == "__main__":
    if is_rank():
        train_here()
    else:
        sys.exit(run_here(parse_arguments(), train_and_show))
