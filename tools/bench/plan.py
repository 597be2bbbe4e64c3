"""The planner's predictions beside what runs need: memory and seconds over depth and technique (paper 3.1).

    python tools/bench/plan.py --depths 1 4 12
    python tools/bench/plan.py --depths 1 4 12 32 --rounds 0 --link_mbit 0 --local_mbit 0
    python tools/bench/plan.py --cap_mib 500 --embedding_dim 32 --num_embeddings_out 12

The first line builds a cluster on this machine (tools/cluster.py) and trains every technique at every depth: bytes of
tensors alive at the worst moment of the fullest rank, and seconds of a step. A pause stands for the accelerator, as
long as the machine's rates make the layer's operations, in every technique alike, also where a layer is recomputed.
What the links give an all-reduce and an all-gather, and what a hop takes, the ranks measure before. It prints both
beside the predictions, with the median and worst error of memory, and Kendall's tau of the order by speed. Links and
accelerator are so slow that what the ranks' own CPU does, of which they have too little, hardly counts.

The second line measures memory alone, on links without a limit.

With --cap_mib no rank may take more than that beyond what its libraries hold (RLIMIT_DATA). It prints, for each
technique, the deepest model that the planner says will train, and the deepest that does.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that a call by path finds tools.bench

import argparse
import json
import os
import statistics
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from dhen.planner.minimum_set import Planner
from tools.bench.plan_grid import TECHNIQUES, Point, job_of, techniques
from tools.cluster import Cluster, ClusterError, signals_end_it, wait

_CAPPED = ("dp", "zero2", "hsdp", "zero3", "zero3+recompute", "zero3+recompute+offload")


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Pairs in the same order in both, less those in the other, as a share of all; ties count for neither."""
    pairs = [(i, j) for i in range(len(first)) for j in range(i)]
    score = sum(_sign(first[i] - first[j]) * _sign(second[i] - second[j]) for i, j in pairs)
    return score / len(pairs)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def show(points: Sequence[Point], console: Console) -> None:
    """A row a point, then how good the predictions are."""
    table = Table(box=None, pad_edge=False)
    for column in ("layers", "technique", "MiB", "predicted", "off by", "seconds", "predicted"):
        table.add_column(column, justify="left" if column == "technique" else "right")
    for point in points:
        table.add_row(
            str(point.depth),
            point.technique,
            f"{point.peak / 2**20:.1f}",
            f"{point.predicted_peak / 2**20:.1f}",
            f"{point.error:+.1%}",
            *((f"{point.seconds:.2f}", f"{point.predicted_seconds:.2f}") if point.seconds else ("-", "-")),
        )
    console.print(table)
    errors = [abs(point.error) for point in points]
    console.print(
        f"memory, {len(points)} points: median error {statistics.median(errors):.1%}, worst {max(errors):.1%}"
    )
    for depth in dict.fromkeys(point.depth for point in points):
        of_depth = [point for point in points if point.depth == depth]
        if len(of_depth) > 1 and all(point.seconds for point in of_depth):
            tau = kendall_tau([p.seconds for p in of_depth], [p.predicted_seconds for p in of_depth])
            console.print(f"order by speed at {depth} layers: Kendall's tau {tau:.2f}")


def show_savings(points: Sequence[Point], console: Console) -> None:
    """What each technique saves and costs beside plain data parallel, at the deepest model of the grid."""
    depth = max(point.depth for point in points)
    of_depth = [point for point in points if point.depth == depth]
    plain = of_depth[0]
    table = Table(f"{depth} layers", "memory", "predicted", "step", "predicted", box=None, pad_edge=False)
    for point in of_depth:
        table.add_row(
            point.technique,
            f"{point.peak / plain.peak:.0%}",
            f"{point.predicted_peak / plain.predicted_peak:.0%}",
            f"{point.seconds / plain.seconds:.2f}x" if plain.seconds else "-",
            f"{point.predicted_seconds / plain.predicted_seconds:.2f}x" if plain.seconds else "-",
        )
    console.print(table)


def deepest_predicted(name: str, arguments: argparse.Namespace) -> int:
    """The deepest model that the planner lets this technique train under the cap."""

    def fits(depth: int) -> bool:
        (technique,) = techniques(depth, [name])
        return Planner(job_of(depth, arguments)).predict(technique).fits

    return _deepest(fits, arguments.deepest)


def deepest_trained(name: str, guess: int, cluster: Cluster, arguments: argparse.Namespace) -> int:
    """The deepest that trains, each depth in a job of its own, looked for around a guess."""
    file = Path(arguments.output) / "trained.json"

    def trains(depth: int) -> bool:
        file.unlink(missing_ok=True)
        what = [*sys.argv[1:], "--techniques", name, "--depths", str(depth)]
        wait(cluster.start(arguments.ranks_per_node, [__file__, *what]))
        if not file.is_file():
            raise ClusterError(f"the job of {name} at {depth} layers failed; see above.")
        return json.loads(file.read_text())

    return _deepest(trains, arguments.deepest, guess)


def _deepest(holds: Callable[[int], bool], most: int, guess: int | None = None) -> int:
    """The largest number up to `most` for which it holds, 0 where it holds for none: by bisection, from a guess on in
    steps that double until it is between two.
    """
    good, bad, step = 0, most + 1, 1
    at = (good + bad) // 2 if guess is None else min(max(guess, 1), most)
    while bad - good > 1:
        if holds(at):
            good = at
        else:
            bad = at
        between = (good + bad) // 2
        if guess is None or (good and bad <= most):
            at = between
        else:
            at = min(good + step, most) if good else max(bad - step, 1)
            step *= 2
    return good


def measure_under_a_cap(arguments: argparse.Namespace, console: Console) -> None:
    """The table of depths. Raises ClusterError."""
    # One arena and small mmaps, so that what is freed is given back at once and counts no more.
    os.environ |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    table = Table("technique", "deepest predicted", "deepest trained", box=None, pad_edge=False)
    found = []
    with signals_end_it(), Cluster(arguments.nodes, link_mbit=0, local_mbit=0) as cluster:
        for name in arguments.techniques:
            predicted = deepest_predicted(name, arguments)
            depths = predicted, deepest_trained(name, predicted, cluster, arguments)
            table.add_row(name, *map(str, depths))
            found.append({"technique": name, "predicted": depths[0], "trained": depths[1]})
            print(f"{name}: predicted {depths[0]}, trained {depths[1]}", file=sys.stderr, flush=True)
    (Path(arguments.output) / "depths.json").write_text(json.dumps(found, indent=2) + "\n")
    console.print(table)


def measure_grid(arguments: argparse.Namespace, console: Console) -> None:
    """The grid, a depth a job. Raises ClusterError."""
    points: list[Point] = []
    file = Path(arguments.output) / "points.json"
    rates = {"link_mbit": arguments.link_mbit, "local_mbit": arguments.local_mbit}
    with signals_end_it(), Cluster(arguments.nodes, **rates) as cluster:
        for depth in arguments.depths:
            file.unlink(missing_ok=True)
            wait(cluster.start(arguments.ranks_per_node, [__file__, *sys.argv[1:], "--depths", str(depth)]))
            if not file.is_file():
                raise ClusterError(f"the job of {depth} layers failed; see above.")
            points += [Point(**values) for values in json.loads(file.read_text())]
    file.write_text(json.dumps([vars(point) for point in points], indent=2) + "\n")
    show(points, console)
    show_savings(points, console)


def parse_arguments(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments; the ranks get the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2, help="nodes of the cluster on this machine")
    parser.add_argument("--ranks_per_node", type=int, default=2, help="ranks on each")
    parser.add_argument("--link_mbit", type=float, default=25, help="a node's link, Mbit/s")
    parser.add_argument("--local_mbit", type=float, default=600, help="inside a node, Mbit/s")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 4, 12, 32], help="DHEN layers")
    parser.add_argument("--techniques", nargs="+", choices=TECHNIQUES, help="what is trained; all by default")
    parser.add_argument("--embedding_dim", type=int, default=16, help="of the model")
    parser.add_argument("--num_embeddings_out", type=int, default=6, help="of each of a layer's four interactions")
    parser.add_argument("--gflops", type=float, default=1.0, help="of the accelerator that a pause stands for")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each technique; 0 times none")
    parser.add_argument("--cap_mib", type=float, default=0, help="find the deepest models under this cap instead")
    parser.add_argument("--deepest", type=int, default=96, help="with --cap_mib, the most layers to try")
    parser.add_argument("--output", default="runs/bench_plan", help="folder of points.json, depths.json")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(command_line)
    if arguments.techniques is None:
        arguments.techniques = list(_CAPPED if arguments.cap_mib else TECHNIQUES)
    return arguments


def main() -> int:
    """Measure and show."""
    arguments = parse_arguments()
    if "RANK" in os.environ:
        from tools.bench.plan_ranks import work

        work(arguments)
        return 0
    Path(arguments.output).mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 110)
    try:
        (measure_under_a_cap if arguments.cap_mib else measure_grid)(arguments, console)
    except ClusterError as error:
        print(f"bench_plan: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
