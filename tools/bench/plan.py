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
from collections.abc import Callable, Sequence

from dhen.planner.minimum_set import Planner
from tools.bench import launch
from tools.bench.plan_grid import POINTS_FILE, TECHNIQUES, TRAINED_FILE, Point, job_of, techniques
from tools.bench.report import print_table
from tools.cluster import Cluster, ClusterError, add_arguments

_CAPPED = ("dp", "zero2", "hsdp", "zero3", "zero3+recompute", "zero3+recompute+offload")


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Pairs in the same order in both minus pairs in opposite orders, as a share of all pairs; a tie counts as 0."""
    pairs = [(i, j) for i in range(len(first)) for j in range(i)]
    score = sum(_sign(first[i] - first[j]) * _sign(second[i] - second[j]) for i, j in pairs)
    return score / len(pairs)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def show(points: Sequence[Point]) -> None:
    """Print a row per point, then the errors and the agreement of the orders."""
    rows = [
        [
            *(str(point.depth), point.technique, f"{point.peak / 2**20:.1f}", f"{point.predicted_peak / 2**20:.1f}"),
            f"{point.error:+.1%}",
            *((f"{point.seconds:.2f}", f"{point.predicted_seconds:.2f}") if point.seconds else ("-", "-")),
        ]
        for point in points
    ]
    print_table(("layers", "technique", "MiB", "predicted", "off by", "seconds", "predicted"), rows, ["technique"])
    errors = [abs(point.error) for point in points]
    print(f"memory, {len(points)} points: median error {statistics.median(errors):.1%}, worst {max(errors):.1%}")
    for depth in dict.fromkeys(point.depth for point in points):
        of_depth = [point for point in points if point.depth == depth]
        if len(of_depth) > 1 and all(point.seconds for point in of_depth):
            tau = kendall_tau([p.seconds for p in of_depth], [p.predicted_seconds for p in of_depth])
            print(f"order by speed at {depth} layers: Kendall's tau {tau:.2f}")


def show_savings(points: Sequence[Point]) -> None:
    """Print what each technique saves and costs beside the first one, at the deepest model of the grid."""
    depth = max(point.depth for point in points)
    of_depth = [point for point in points if point.depth == depth]
    plain = of_depth[0]
    rows = [
        [
            point.technique,
            f"{point.peak / plain.peak:.0%}",
            f"{point.predicted_peak / plain.predicted_peak:.0%}",
            f"{point.seconds / plain.seconds:.2f}x" if plain.seconds else "-",
            f"{point.predicted_seconds / plain.predicted_seconds:.2f}x" if plain.seconds else "-",
        ]
        for point in of_depth
    ]
    columns = (f"{depth} layers", "memory", "predicted", "step", "predicted")
    print_table(columns, rows, left=columns)


def deepest_predicted(name: str, arguments: argparse.Namespace) -> int:
    """The deepest model that trains under the cap with this technique, as the planner says."""

    def fits(depth: int) -> bool:
        (technique,) = techniques(depth, [name])
        return Planner(job_of(depth, arguments)).predict(technique).fits

    return _deepest(fits, arguments.deepest, guess=1)


def deepest_trained(name: str, guess: int, cluster: Cluster, arguments: argparse.Namespace) -> int:
    """The deepest model that trains. Each depth is a job of its own; the search starts at `guess`. Raises JobError."""

    def trains(depth: int) -> bool:
        return launch.results_of_cluster(
            cluster,
            [__file__, *sys.argv[1:], "--techniques", name, "--depths", str(depth)],
            file=arguments.output / TRAINED_FILE,
            job=f"the job of {name} at {depth} layers",
            may_fail=True,
        )

    return _deepest(trains, arguments.deepest, guess)


def _deepest(holds: Callable[[int], bool], most: int, guess: int) -> int:
    """The largest number up to `most` for which `holds` is true, or 0 if there is none.

    From the guess on, steps double until the number is enclosed. Then the search is a bisection.
    """
    good, bad, step = 0, most + 1, 1
    at = min(max(guess, 1), most)
    while bad - good > 1:
        if holds(at):
            good = at
        else:
            bad = at
        if good and bad <= most:
            at = (good + bad) // 2
        else:
            at = min(good + step, most) if good else max(bad - step, 1)
            step *= 2
    return good


def measure_under_a_cap(arguments: argparse.Namespace) -> None:
    """Find and print the deepest models. Raises ClusterError and JobError."""
    os.environ |= launch.RETURN_FREED_MEMORY
    found = []
    with Cluster.of(arguments, is_limited=False) as cluster:
        for name in arguments.techniques:
            predicted = deepest_predicted(name, arguments)
            trained = deepest_trained(name, predicted, cluster, arguments)
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
            command = [__file__, *sys.argv[1:], "--depths", str(depth)]
            measured = launch.results_of_cluster(cluster, command, file=file, job=f"the job of {depth} layers")
            points += [Point(**values) for values in measured]
    launch.write_json(file, [vars(point) for point in points])
    show(points)
    show_savings(points)


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


def main() -> int:
    """Measure and show. Exit status: 0, or 2 if the cluster or a job on it fails."""
    arguments = parse_arguments()
    if launch.is_rank():
        from tools.bench.plan_ranks import measure_points

        launch.measure_as_a_rank(measure_points, arguments, arguments.output / POINTS_FILE)
        return 0
    try:
        (measure_under_a_cap if arguments.cap_mib else measure_grid)(arguments)
    except (ClusterError, launch.JobError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
