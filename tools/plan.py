"""Plans which memory techniques a model needs at each depth on a machine: the minimum set (paper 3.1).

    python tools/plan.py --config recipes/configs/criteo.yaml --nodes 32 --gpus_per_node 8 --gpu a100-40gb
    python tools/plan.py --config recipes/configs/criteo.yaml --gpu my_machine.yaml --depths 4 8 --write plans \\
        --embedding_dim 128 --num_embeddings_out 100

For each depth and set of techniques, the tool predicts a rank's peak memory and the job's samples/s. The plan is the
fastest set that fits. A second table says what its steps spend their time on. The tool builds and runs nothing.

You can also give arguments of recipes/train.py, which override the recipe: --per_device_train_batch_size 4096. The
features are those of the recipe's data if it is prepared already, and otherwise as many as Criteo has.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a call by path finds tools.bench

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dhen.config.arguments import Arguments, parse_arguments
from dhen.config.dhen_section import DhenSection
from dhen.config.ds_config import read_section
from dhen.config.left_out import MOST_BATCH
from dhen.data.loading.prepared_rows import mean_bag_sizes
from dhen.data.preparation.encoding.encoder import HASH_SIZE
from dhen.data.schema import Schema
from dhen.model.configuration_dhen import DhenConfig
from dhen.planner.job import Job
from dhen.planner.limits import Limits, most_samples_per_second
from dhen.planner.machine import read_machine, shipped_machines
from dhen.planner.minimum_set import NothingFitsError, Planner, Prediction, gib
from dhen.planner.rungs import by_depth
from dhen.planner.technique import Scheme, Technique
from dhen.training.dataset import is_prepared
from dhen.training.reporting.run_folder import write_json
from dhen.training.saved.fine_tuning import config_for
from tools.bench.report import plot_over_depth, print_table

BY_DEPTH_FILE = "by_depth.json"
_CRITEO = (13, 26)
_LABELS: dict[Scheme, str] = {"dp": "DP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "hsdp": "HSDP", "zero3": "FSDP"}


@dataclass(frozen=True)
class PlannedDepth:
    """The predictions at a depth. chosen: the minimum set; None if nothing fits, and `reason` says why. limits: its."""

    depth: int
    plain: dict[Scheme, Prediction]
    chosen: Prediction | None
    reason: str
    ds_config: dict[str, Any] | None = None
    limits: Limits | None = None

    def as_dict(self) -> dict[str, Any]:
        """The content for --json."""
        plain = {scheme: _as_dict(prediction) for scheme, prediction in self.plain.items()}
        chosen = _as_dict(self.chosen) | {"limits": asdict(self.limits)} if self.chosen else None
        return {"depth": self.depth, "plain": plain, "minimum_set": chosen, "reason": self.reason}


def main(command_line: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 with a message if the arguments are wrong or nothing fits at any depth."""
    arguments, of_recipe = parse_command_line(command_line)
    try:
        job = job_of(arguments, of_recipe)
        planned = [plan_depth(job, depth) for depth in arguments.depths or default_depths(job)]
        show(planned, job)
        if arguments.json:
            write_json(arguments.json, as_json(planned, job))
        if arguments.write:
            write_ds_configs(planned, arguments.write)
        if arguments.plot:
            plot(planned, job, arguments.plot)
    except (ValueError, OSError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return 1
    return 0 if any(each.chosen for each in planned) else 1


def parse_command_line(command_line: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The tool's arguments, and those for the recipe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--config", required=True, metavar="YAML", help="recipe: architecture, batch size, data")
    machines = ", ".join(shipped_machines())
    add("--gpu", "--machine", required=True, dest="machine", help=f"{machines}, or a YAML file with the same keys")
    add("--nodes", type=_positive, default=1, help="machines in the job (default: 1)")
    add("--gpus_per_node", type=_positive, metavar="N", help="ranks on each machine (default: the machine's)")
    add("--memory_gib", type=float, help="memory per rank (default: the machine's)")
    add("--depths", type=_positive, nargs="+", metavar="N", help="numbers of DHEN layers (default: 1 2 4 8 16 32)")
    add("--precision", choices=("fp32", "tf32", "bf16"), default="fp32", help="default: fp32; tf32: dhen.allow_tf32")
    add("--ds_config", metavar="JSON", help='take the tables and wires of its "dhen" section')
    add("--table_group", type=_table_group, metavar="GROUP", help="dhen.table_group: world, node, auto or N ranks")
    add("--num_dense_features", type=_count, metavar="N", help="default: the prepared data's, or 13")
    add("--num_sparse_features", type=_count, metavar="N", help="default: the prepared data's, or 26")
    add("--rows_per_table", type=_positive, metavar="N", help="default: the prepared data's, or hash_size")
    add("--write", type=Path, metavar="FOLDER", help=f"write a ds_config per depth, and {BY_DEPTH_FILE} for all")
    add("--plot", type=Path, metavar="FILE", help="draw samples/s over depth, as in the paper's figure 6")
    add("--json", type=Path, metavar="FILE", help="write all predictions as JSON")
    return parser.parse_known_args(command_line)


def _positive(text: str) -> int:
    return _count(text, 1)


def _count(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not {'' if least else '0 or '}a whole number above 0")
    return int(text)


def _table_group(text: str) -> str | int:
    return text if text in ("world", "node", "auto") else _positive(text)


def job_of(arguments: argparse.Namespace, of_recipe: Sequence[str]) -> Job:
    """The job to plan. Raises ValueError if an argument or file is wrong."""
    recipe = parse_arguments(["--config", arguments.config, *of_recipe])
    changes = {"ranks_per_node": arguments.gpus_per_node, "memory_gib": arguments.memory_gib}
    machine = read_machine(arguments.machine, **{name: value for name, value in changes.items() if value is not None})
    section = read_section(arguments.ds_config) if arguments.ds_config else DhenSection()
    if arguments.precision == "tf32":
        section = section.model_copy(update={"allow_tf32": True})
    if arguments.table_group:
        section = section.model_copy(update={"table_group": arguments.table_group})
    config = config_of(arguments, recipe)
    training = recipe.training
    if training.table_optimizer:
        section = section.model_copy(update={"table_optimizer": training.table_optimizer})
    return Job(
        config,
        training.per_device_train_batch_size or MOST_BATCH,
        machine,
        nodes=arguments.nodes,
        precision="bf16" if arguments.precision == "bf16" else "fp32",
        section=section,
        ids_per_bag=ids_per_bag_of(arguments, recipe),
        eval_batch_size=training.per_device_eval_batch_size,
        accumulation_steps=training.gradient_accumulation_steps,
        num_passes=training.num_passes,
        averages=training.ema_decay > 0,
    )


def config_of(arguments: argparse.Namespace, recipe: Arguments) -> DhenConfig:
    """The model, with the features of the prepared data or of Criteo, unless arguments change them."""
    if is_prepared(recipe.data.dataset_name):
        prepared = config_for(recipe.architecture, Schema.load(Path(recipe.data.dataset_name)))
        dense, features = prepared.num_dense_features, [dict(feature) for feature in prepared.sparse_features]
    else:
        dense, features = _CRITEO[0], _features(_CRITEO[1], _rows_per_table(arguments, recipe))
    if arguments.num_dense_features is not None:
        dense = arguments.num_dense_features
    if arguments.num_sparse_features is not None:
        features = _features(arguments.num_sparse_features, _rows_per_table(arguments, recipe))
    if arguments.rows_per_table is not None:
        features = [feature | {"num_embeddings": arguments.rows_per_table} for feature in features]
    return DhenConfig(**vars(recipe.architecture), num_dense_features=dense, sparse_features=features)


def _rows_per_table(arguments: argparse.Namespace, recipe: Arguments) -> int:
    rows = arguments.rows_per_table or recipe.data.hash_size or HASH_SIZE
    if rows == "auto":
        raise ValueError("hash_size auto needs the data. Give --rows_per_table N, or a prepared --dataset_name.")
    return rows


def ids_per_bag_of(arguments: argparse.Namespace, recipe: Arguments) -> dict[str, float] | None:
    """Mean bag sizes of the prepared data; None if the features are not its own, and bags hold one id each."""
    if arguments.num_sparse_features is not None or not is_prepared(recipe.data.dataset_name):
        return None
    prepared = Path(recipe.data.dataset_name)
    return mean_bag_sizes(prepared, Schema.load(prepared))


def _features(count: int, rows: int) -> list[dict[str, Any]]:
    return [{"name": f"C{number}", "num_embeddings": rows} for number in range(1, count + 1)]


def default_depths(job: Job) -> list[int]:
    """Powers of two. A recipe that lists its layers has only its own depth."""
    return [job.depth] if job.config.layers is not None else [1, 2, 4, 8, 16, 32]


def plan_depth(job: Job, depth: int) -> PlannedDepth:
    """All predictions for a depth. Raises ValueError if the recipe has only another depth."""
    planner = Planner(job if depth == job.depth else job.at_depth(depth))
    plain = {scheme: planner.predict(Technique(scheme)) for scheme in planner.job.schemes()}
    try:
        chosen = planner.plan()
    except NothingFitsError as error:
        return PlannedDepth(depth, plain, None, str(error))
    ds_config, limits = planner.whole_ds_config(chosen.technique), Limits.of(planner, chosen.technique)
    return PlannedDepth(depth, plain, chosen, planner.reason(chosen), ds_config, limits)


def show(planned: Sequence[PlannedDepth], job: Job) -> None:
    """Print the predictions, the reasons, and what limits the minimum sets."""
    machine = job.machine
    print(
        f"{job.nodes} x {machine.ranks_per_node} ranks on {machine.name}; {machine.memory_gib:g} GiB per rank; "
        f"{job.batch_size:,} examples per rank, products in {job.product_dtype}, D = {job.config.embedding_dim}. "
        "Cells: GiB per rank and samples/s of the job; x: does not fit."
    )
    columns = ("depth", *job.schemes(), "minimum set", "GiB", "host GiB", "samples/s")
    rows = [(str(each.depth), *map(_cell, each.plain.values()), *_chosen_cells(each.chosen)) for each in planned]
    print_table(columns, rows, left=["minimum set"])
    for each in planned:
        print(f"{each.depth} layers: {each.reason}" if each.chosen else each.reason)
    if limited := [each for each in planned if each.limits]:
        show_limits(limited, job)


def show_limits(planned: Sequence[PlannedDepth], job: Job) -> None:
    """Print the samples/s that the hosts allow, and what a step of each minimum set spends its time on."""
    most = [f"{name} {value:,.0f}" for name, value in most_samples_per_second(job).items()]
    print(f"\nMost samples/s that the hosts allow: {'; '.join(most) or 'the machine does not say'}")
    print("\nMilliseconds of a step of the minimum set, and of its tables if they were over other groups of ranks:")
    first = planned[0].limits
    groups = [f"tables over {group}" for group in first.table_seconds]
    rows = [
        (
            str(each.depth),
            *map(_milliseconds, (*each.limits.parts.values(), each.chosen.seconds.total)),
            each.limits.limited_by,
            each.limits.table_group,
            *map(_milliseconds, each.limits.table_seconds.values()),
        )
        for each in planned
    ]
    columns = ("depth", *first.parts, "step", "limited by", "table group", *groups)
    print_table(columns, rows, left=["limited by", "table group"])


def _milliseconds(seconds: float | None) -> str:
    return "x" if seconds is None else f"{1e3 * seconds:,.2f}"


def plot(planned: Sequence[PlannedDepth], job: Job, path: Path) -> None:
    """Draw samples/s over depth, of each scheme and of the minimum set: the paper's figure 6."""
    below = {"color": "silver", "linewidth": 8}
    lines = {"minimum set": ([_point(each.depth, each.chosen) for each in planned], below)}
    for scheme in job.schemes():
        lines[_LABELS[scheme]] = [_point(each.depth, each.plain[scheme]) for each in planned], {"linewidth": 2}
    title = f"{job.nodes} x {job.machine.ranks_per_node} ranks, {job.machine.name}\nx: the next depth does not fit"
    plot_over_depth(lines, title, path)


def _point(depth: int, prediction: Prediction | None) -> tuple[int, float | None]:
    return depth, prediction.samples_per_second if prediction and prediction.fits else None


def _cell(prediction: Prediction) -> str:
    size = gib(prediction.memory.peak)
    return f"{size} {prediction.samples_per_second:>11,.0f}" if prediction.fits else f"{size} {'x':>11}"


def _chosen_cells(chosen: Prediction | None) -> tuple[str, ...]:
    if chosen is None:
        return "nothing fits", "-", "-", "-"
    memory = chosen.memory
    host = gib(memory.host) if memory.host else "-"
    return str(chosen.technique), gib(memory.peak), host, f"{chosen.samples_per_second:,.0f}"


def as_json(planned: Sequence[PlannedDepth], job: Job) -> dict[str, Any]:
    """The job and all predictions."""
    return {
        "machine": asdict(job.machine),
        "nodes": job.nodes,
        "per_device_train_batch_size": job.batch_size,
        "precision": job.product_dtype,
        "table_group": job.section.table_group,
        "most_samples_per_second": most_samples_per_second(job),
        "model": json.loads(job.config.to_json_string(use_diff=False)),
        "depths": [each.as_dict() for each in planned],
    }


def _as_dict(prediction: Prediction) -> dict[str, Any]:
    memory = prediction.memory
    return {
        "technique": asdict(prediction.technique),
        "fits": prediction.fits,
        "peak_bytes": memory.peak,
        "host_bytes": memory.host,
        "parts": memory.parts,
        "moment": memory.moment,
        "samples_per_second": prediction.samples_per_second,
        "seconds": asdict(prediction.seconds),
    }


def write_ds_configs(planned: Sequence[PlannedDepth], folder: Path) -> None:
    """Write depth_<n>.json for each depth at which something fits, and by_depth.json with a rung for each of them."""
    ds_configs = {each.depth: each.ds_config for each in planned if each.ds_config}
    if not ds_configs:
        raise NothingFitsError("nothing fits at any depth, so --write has nothing to write.")
    files = {depth: f"depth_{depth}.json" for depth in sorted(ds_configs)}
    for depth, file in files.items():
        write_json(folder / file, ds_configs[depth])
    write_json(folder / BY_DEPTH_FILE, by_depth(ds_configs))
    print(f"{folder} has {BY_DEPTH_FILE} for all depths, {', '.join(files.values())}")


if __name__ == "__main__":
    sys.exit(main())
