"""Compares sharding schemes of the dense part by depth: samples/s, bytes between nodes, memory (paper 3.2, figure 6).

    python tools/bench/sharding.py --nodes 2 --ranks_per_node 2 --depths 2 4 8
    deepspeed --hostfile hosts tools/bench/sharding.py --depths 2 4 8 16 --compute_ms 0 --interface ib0

The first command builds a cluster on this machine (tools/cluster.py). The second one uses the launcher's ranks. All
schemes of a depth run in one process and take turns in each round; ratios are ratios of medians.

A fixed sleep stands for the accelerator's compute in every scheme, because gloo's threads need idle CPU cores to
overlap with it. So ratios depend on the rates and the sleep that you choose; bytes are exact. gloo's reduce-scatter
moves twice as many bytes as a ring. That would favor HSDP, so on CPUs a ring replaces it in every scheme.

dp is ZeRO-0, zero2 ZeRO-2 and fsdp ZeRO-3. hsdp overlaps its all-reduce with the backward pass; hsdp_sync waits for it
at once. torch_fsdp and torch_hsdp are torch's FSDP2 on a flat mesh and on a mesh of nodes and ranks. hpz is ZeRO-3 with
a second copy of the weights in each node. Its process groups stay in the process and would change the other schemes, so
hpz runs last, in a job per depth.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that a call by path finds tools.bench

import argparse
import contextlib
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dhen.runtime.topology import Topology
from tools.bench import launch
from tools.bench.report import print_table, ratios
from tools.bench.sharding_ranks import measure_all
from tools.bench.sharding_schemes import JOB_FILE, MEASURED_FILE, SCHEMES, Benchmark, Measured
from tools.cluster import INTERFACE, Cluster, add_arguments

_DRAWN = {
    "dp": ("DP", "C0"),
    "fsdp": ("FSDP", "C1"),
    "hsdp": ("HSDP", "C2"),
    "torch_fsdp": ("torch's FSDP2", "C1"),
    "torch_hsdp": ("torch's FSDP2, hybrid", "C2"),
}
"""What the figure shows: label, with ours in the paper's words, and color."""


def show(results: Sequence[Measured]) -> None:
    """Print a row per depth and scheme; samples/s also as a ratio to fsdp's, with its range over the rounds."""
    columns = ("depth", "scheme", "samples/s", "x fsdp", "from-to", "MiB sent", "in theory", "off by", "peak MiB")
    rows = []
    for result in results:
        base = next((r for r in results if (r.scheme, r.depth) == ("fsdp", result.depth)), None)
        sent, theory = result.bytes_sent, result.bytes_in_theory
        faster = ratios(base.seconds, result.seconds) if base and base.seconds and result.seconds else ("-", "-")
        is_apart = SCHEMES[result.scheme].is_apart
        rows.append([
            str(result.depth),
            f"{result.scheme} (own job)" if is_apart else result.scheme,
            f"{result.samples_per_second:,.1f}" if result.seconds else "no memory",
            *((faster[0], "-") if is_apart else faster),
            "-" if sent is None else f"{sent / 2**20:.2f}",
            f"{theory / 2**20:.2f}",
            f"{sent / theory - 1:+.1%}" if sent and theory else "-",
            "-" if result.peak_mib is None else f"{result.peak_mib:.0f}" if result.fits else "no memory",
        ])  # fmt: skip
    print_table(columns, rows, left=["scheme"])


def plot(results: Sequence[Measured], path: Path) -> None:
    """Draw throughput over depth, each scheme to the depth at which it stops: the paper's figure 6."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, (label, color) in _DRAWN.items():
        of_scheme = [result for result in results if result.scheme == name]
        fits = [result for result in of_scheme if result.fits]
        if not fits:
            continue
        style = {"linewidth": 1, "linestyle": "--"} if SCHEMES[name].stage is None else {"linewidth": 3}
        speeds = [result.samples_per_second for result in fits]
        axes.plot([result.depth for result in fits], speeds, marker="o", color=color, label=label, **style)
        if len(fits) < len(of_scheme):
            axes.plot(fits[-1].depth, speeds[-1], "x", markersize=16, markeredgewidth=2, color=color)
    first = results[0]
    axes.set(xlabel="DHEN layers", ylabel="samples/s", xticks=sorted({result.depth for result in results}))
    axes.set_ylim(bottom=0)
    axes.set_title(f"{first.nodes} nodes x {first.ranks // first.nodes} ranks; x: the next depth is out of memory")
    axes.legend()
    figure.savefig(path, dpi=150)


def parse_arguments(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, which the ranks get too."""
    parser = launch.argument_parser(__doc__)
    add_arguments(parser)
    add = parser.add_argument
    add("--depths", type=int, nargs="+", default=[2, 4, 8], help="DHEN layers")
    add("--embeddings", type=int, default=46, help="embeddings in a layer; its weights grow with the square")
    add("--compute_ms", type=float, default=40, help="sleep in a layer's forward; its backward sleeps twice as long")
    add("--schemes", nargs="+", choices=SCHEMES, help="schemes to compare (default: all that can run)")
    add("--rounds", type=int, default=5, help="measured steps per scheme")
    add("--memory_cap_mib", type=float, default=0, help="measure peak memory too, with this cap per rank")
    add("--trace", action="store_true", help="write a Chrome trace of an hsdp step")
    add("--interface", default=INTERFACE, help="network interface whose bytes are counted")
    add("--output", type=Path, default="runs/bench_sharding", help=f"folder of {MEASURED_FILE}, figure6.png, traces")
    add("--on_cluster", action="store_true", help=argparse.SUPPRESS)  # set for the ranks of our own cluster
    add("--memory", action="store_true", help=argparse.SUPPRESS)  # and for the jobs that measure memory
    arguments = parser.parse_args(command_line)
    is_launched = launch.is_rank() and not arguments.on_cluster
    if arguments.schemes is None:
        arguments.schemes = [name for name, scheme in SCHEMES.items() if not (is_launched and scheme.is_apart)]
    if is_launched and arguments.memory_cap_mib:
        parser.error("--memory_cap_mib needs a job per scheme and depth, but a launcher starts one job. Remove it.")
    if is_launched and "hpz" in arguments.schemes and len(arguments.schemes) * len(arguments.depths) > 1:
        parser.error("hpz changes the other runs of its process. Under a launcher, name only hpz and one depth.")
    return arguments


def measure_as_a_rank(topology: Topology, arguments: argparse.Namespace) -> Benchmark:
    """One rank's part. Without our own cluster, rank 0 also shows the results. Communicates; all ranks call it."""
    benchmark = Benchmark(None, None, arguments.compute_ms, measure_all(topology, arguments))
    if topology.is_main and not arguments.on_cluster:
        present(benchmark, arguments.output)
    return benchmark


def present(benchmark: Benchmark, output: Path) -> None:
    """Print the table, write measured.json, draw the figure."""
    launch.write_json(output / MEASURED_FILE, benchmark)
    show(benchmark.results)
    plot(benchmark.results, output / "figure6.png")
    print(f"{output} has {MEASURED_FILE} and figure6.png")


def measure_on_a_cluster(arguments: argparse.Namespace) -> None:
    """Measure the schemes that take turns, at all depths; then the others, in a job per depth; then memory.

    Writes measured.json after each job. Raises ClusterError, and JobError if a job fails.
    """
    file = arguments.output / MEASURED_FILE
    in_turns = [name for name in arguments.schemes if not SCHEMES[name].is_apart]
    jobs = [(in_turns, arguments.depths)] if in_turns else []
    jobs += [([name], [depth]) for name in arguments.schemes if SCHEMES[name].is_apart for depth in arguments.depths]
    benchmark = Benchmark(arguments.link_mbit, arguments.local_mbit, arguments.compute_ms, [])
    file.unlink(missing_ok=True)
    with Cluster.of(arguments) as cluster:
        for schemes, depths in jobs:
            measured = run_job(cluster, arguments, Benchmark, "--schemes", *schemes, "--depths", *map(str, depths))
            benchmark.results.extend(measured.results)
            benchmark.results.sort(key=lambda result: arguments.depths.index(result.depth))
            launch.write_json(file, benchmark)
    if arguments.memory_cap_mib:
        benchmark = replace(benchmark, results=with_peaks(benchmark.results, arguments))
    present(benchmark, arguments.output)


def run_job(cluster: Cluster, arguments: argparse.Namespace, kind: Any, *flags: str) -> Any:
    """Run this benchmark on the cluster with these flags too, and return what rank 0 writes. Raises JobError."""
    command, file = [*sys.argv, "--on_cluster", *flags], arguments.output / JOB_FILE
    try:
        return launch.results_of_cluster(cluster, command, kind, file, may_fail="--memory" in flags)
    except launch.JobError as error:
        earlier = arguments.output / MEASURED_FILE
        kept = f" {earlier} has the results of the earlier jobs." if earlier.is_file() else ""
        raise launch.JobError(f"{error}{kept}") from error


def with_peaks(results: Sequence[Measured], arguments: argparse.Namespace) -> list[Measured]:
    """The results with peak MiB of rank 0, in a job each, on unlimited links; infinite if the cap is too low."""
    os.environ |= launch.RETURN_FREED_MEMORY
    measured = []
    with Cluster.of(arguments, is_limited=False) as cluster:
        for result in results:
            flags = ("--memory", "--schemes", result.scheme, "--depths", str(result.depth))
            with contextlib.redirect_stderr(None):  # a job that reaches the cap is not a failure
                peak = run_job(cluster, arguments, float | None, *flags)
            measured.append(replace(result, peak_mib=math.inf if peak is None else peak))
    return measured


if __name__ == "__main__":
    arguments = parse_arguments()
    file = JOB_FILE if arguments.on_cluster else MEASURED_FILE
    sys.exit(launch.run(arguments, measure_as_a_rank, measure_on_a_cluster, file))
