"""Compares the planner's predictions with training runs: memory and seconds by depth and technique (paper 3.1).

    python tools/bench/plan.py --depths 1 4 12
    python tools/bench/plan.py --depths 1 4 12 32 --rounds 0 --link_mbit 0 --local_mbit 0
    python tools/bench/plan.py --cap_mib 500 --embedding_dim 32 --num_embeddings_out 12

The first command builds a cluster on this machine (tools/cluster.py) and trains every technique at every depth. It
measures the peak bytes of live tensors on the fullest rank, and the seconds per step. A pause stands for the
accelerator: it lasts as long as the layer's operations take at the machine's rates, in all techniques, and again when a
layer is recomputed. Before that, the ranks measure what an all-reduce and an all-gather get of the links' rates. The
command prints measurements beside predictions, with the median and worst error of memory, and with Kendall's tau of the
order by speed. Links and accelerator are slow, so that the ranks' shortage of CPU cores hardly matters.

The second command measures memory only, on unlimited links.

With --cap_mib, a rank may allocate that much beyond what its libraries hold (RLIMIT_DATA). The third command prints for
each technique the deepest model that the planner says will train, and the deepest that does.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that a call by path finds tools.bench

import argparse
import os
import statistics
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from dhen.planner.minimum_set import Planner
from tools.bench import launch
from tools.bench.plan_ranks import POINTS_FILE, TECHNIQUES, TRAINED_FILE, Point, job_of, measure_points, techniques
from tools.bench.report import print_table
from tools.cluster import Cluster, add_arguments

_CAPPED = ("dp", "zero2", "hsdp", "zero3", "zero3+recompute", "zero3+recompute+offload")


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Pairs in the same order in both minus pairs in opposite orders, as a share of all pairs; a tie counts as 0."""
    agreement = np.sign(np.subtract.outer(first, first)) * np.sign(np.subtract.outer(second, second))
    return float(agreement.sum()) / (len(first) * (len(first) - 1))


def show(points: Sequence[Point]) -> None:
    """Print a row per point, beside what the first technique needs at that depth; then errors and agreement."""
    by_depth = {depth: [p for p in points if p.depth == depth] for depth in dict.fromkeys(p.depth for p in points)}
    rows = []
    for plain, point in ((of_depth[0], point) for of_depth in by_depth.values() for point in of_depth):
        row = [str(point.depth), point.technique, f"{point.peak / 2**20:.1f}", f"{point.predicted_peak / 2**20:.1f}"]
        row += [f"{point.error:+.1%}", f"{point.peak / plain.peak:.0%}"]
        row.append(f"{point.predicted_peak / plain.predicted_peak:.0%}")
        if point.seconds:
            row += [f"{point.seconds:.2f}", f"{point.predicted_seconds:.2f}", f"{point.seconds / plain.seconds:.2f}x"]
            row.append(f"{point.predicted_seconds / plain.predicted_seconds:.2f}x")
        rows.append(row)
    beside = f"of {points[0].technique}"
    memory = ("MiB", "predicted", "off by", beside, "predicted")
    print_table(("layers", "technique", *memory, "seconds", "predicted", beside, "predicted"), rows, ["technique"])
    errors = [abs(point.error) for point in points]
    print(f"memory, {len(points)} points: median error {statistics.median(errors):.1%}, worst {max(errors):.1%}")
    for depth, of_depth in by_depth.items():
        if len(of_depth) > 1 and all(point.seconds for point in of_depth):
            tau = kendall_tau([p.seconds for p in of_depth], [p.predicted_seconds for p in of_depth])
            print(f"order by speed at {depth} layers: Kendall's tau {tau:.2f}")


def deepest(trains: Callable[[int], bool], most: int) -> int:
    """The largest depth up to `most` that trains, or 0 if none does."""
    return bisect_left(range(1, most + 1), True, key=lambda depth: not trains(depth))


def measure_under_a_cap(arguments: argparse.Namespace) -> None:
    """Find and print the deepest models, predicted and trained. Raises ClusterError and JobError."""
    os.environ |= launch.RETURN_FREED_MEMORY
    found = []
    with Cluster.of(arguments, is_limited=False) as cluster:

        def is_predicted(name: str, depth: int) -> bool:
            (technique,) = techniques(depth, [name])
            return Planner(job_of(depth, arguments)).predict(technique).fits

        def trains(name: str, depth: int) -> bool:
            command = [*sys.argv, "--techniques", name, "--depths", str(depth)]
            file = arguments.output / TRAINED_FILE
            return bool(launch.results_of_cluster(cluster, command, bool | None, file, may_fail=True))

        for name in arguments.techniques:
            predicted, trained = (deepest(partial(fits, name), arguments.deepest) for fits in (is_predicted, trains))
            found.append({"technique": name, "predicted": predicted, "trained": trained})
            print(f"{name}: predicted {predicted}, trained {trained}", file=sys.stderr, flush=True)
    launch.write_json(arguments.output / "depths.json", found)
    columns = ("technique", "deepest predicted", "deepest trained")
    print_table(columns, [[str(value) for value in row.values()] for row in found], left=columns)


def measure_grid(arguments: argparse.Namespace) -> None:
    """Measure and print the grid, in a job per depth. Raises ClusterError and JobError."""
    points: list[Point] = []
    file = arguments.output / POINTS_FILE
    with Cluster.of(arguments) as cluster:
        for depth in arguments.depths:
            points += launch.results_of_cluster(cluster, [*sys.argv, "--depths", str(depth)], list[Point], file)
    launch.write_json(file, points)
    show(points)


def parse_arguments(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, which the ranks get too."""
    parser = launch.argument_parser(__doc__)
    add_arguments(parser, link_mbit=25, local_mbit=600)
    add = parser.add_argument
    add("--depths", type=int, nargs="+", default=[1, 4, 12, 32], help="DHEN layers")
    add("--techniques", nargs="+", choices=TECHNIQUES, help="techniques to train (default: all)")
    add("--embedding_dim", type=int, default=16, help="embedding dimension of the model")
    add("--num_embeddings_out", type=int, default=6, help="embeddings that each of a layer's four interactions returns")
    add("--gflops", type=float, default=1.0, help="Gflop per second of the accelerator that a pause stands for")
    add("--rounds", type=int, default=3, help="timed steps per technique; 0 measures memory only")
    add("--cap_mib", type=float, default=0, help="find the deepest models under this cap instead")
    add("--deepest", type=int, default=96, help="with --cap_mib, the most layers to try")
    add("--output", type=Path, default="runs/bench_plan", help="folder of points.json or depths.json")
    arguments = parser.parse_args(command_line)
    if arguments.techniques is None:
        arguments.techniques = list(_CAPPED if arguments.cap_mib else TECHNIQUES)
    return arguments


if __name__ == "__main__":
    arguments = parse_arguments()
    start_and_show = measure_under_a_cap if arguments.cap_mib else measure_grid
    sys.exit(launch.run(arguments, measure_points, start_and_show, POINTS_FILE))
