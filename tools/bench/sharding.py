"""Compares sharding schemes of the dense part by depth: samples/s, bytes between nodes, memory (paper 3.2, figure 6).

    python tools/bench/sharding.py --nodes 2 --ranks_per_node 2 --depths 2 4 8

It builds a cluster on this machine (tools/cluster.py). On a real one, compare runs of recipes/train.py. All schemes of
a depth run in one process and take turns in each round; ratios are ratios of medians.

A fixed sleep stands for the accelerator's compute in every scheme, because gloo's threads need idle CPU cores to
overlap with it. So ratios depend on the rates and the sleep that you choose; bytes are exact. gloo's reduce-scatter
moves twice as many bytes as a ring. That would favor HSDP, so a ring replaces it in every scheme.

dp is ZeRO-0, zero2 ZeRO-2 and fsdp ZeRO-3. hsdp overlaps its all-reduce with the backward pass; hsdp_sync waits for it
at once. torch_fsdp and torch_hsdp are torch's FSDP2 on a flat mesh and on a mesh of nodes and ranks.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that a call by path finds tools.bench

import argparse
import contextlib
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import replace

from tools.bench import launch
from tools.bench.report import plot_over_depth, print_table
from tools.bench.sharding_ranks import SCHEMES, Measured, measure
from tools.cluster import Cluster, add_arguments

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
        faster = ratios(base.seconds, result.seconds) if base else ("-", "-")
        rows.append([
            str(result.depth),
            result.scheme,
            f"{result.samples_per_second:,.1f}",
            *faster,
            f"{sent / 2**20:.2f}",
            f"{theory / 2**20:.2f}",
            f"{sent / theory - 1:+.1%}" if theory else "-",
            "-" if result.peak_mib is None else f"{result.peak_mib:.0f}" if result.fits else "no memory",
        ])  # fmt: skip
    print_table(columns, rows, left=["scheme"])


def ratios(seconds: Sequence[float], base: Sequence[float]) -> tuple[str, str]:
    """seconds / base: the ratio of the medians, and the range over the rounds."""
    by_round = [own / other for own, other in zip(seconds, base, strict=True)]
    of_medians = statistics.median(seconds) / statistics.median(base)
    return f"{of_medians:.2f}", f"{min(by_round):.2f}-{max(by_round):.2f}"


def plot(results: Sequence[Measured], path: Path) -> None:
    """Draw throughput over depth, each scheme to the depth at which it stops: the paper's figure 6."""
    lines = {}
    for name, (label, color) in _DRAWN.items():
        points = [(r.depth, r.samples_per_second if r.fits else None) for r in results if r.scheme == name]
        style = {"linewidth": 1, "linestyle": "--"} if SCHEMES[name].stage is None else {"linewidth": 3}
        if points:
            lines[label] = points, style | {"color": color}
    first = results[0]
    title = f"{first.nodes} nodes x {first.ranks // first.nodes} ranks; x: the next depth is out of memory"
    plot_over_depth(lines, title, path)


def parse_arguments(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, which the ranks get too."""
    parser = launch.argument_parser(__doc__)
    add_arguments(parser)
    add = parser.add_argument
    add("--depths", type=int, nargs="+", default=[2, 4, 8], help="DHEN layers")
    add("--embeddings", type=int, default=46, help="embeddings in a layer; its weights grow with the square")
    add("--compute_ms", type=float, default=40, help="sleep in a layer's forward; its backward sleeps twice as long")
    add("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES), help="schemes to compare")
    add("--rounds", type=int, default=5, help="measured steps per scheme")
    add("--memory_cap_mib", type=float, default=0, help="measure peak memory too, with this cap per rank")
    add("--output", type=Path, default="runs/bench_sharding", help=f"folder of {launch.RESULTS_FILE} and figure6.png")
    add("--memory", action="store_true", help=argparse.SUPPRESS)  # set for the jobs that measure memory
    return parser.parse_args(command_line)


def present(results: Sequence[Measured], arguments: argparse.Namespace) -> None:
    """Measure memory if there is a cap; print the table and draw the figure. Raises ClusterError."""
    output = arguments.output
    if arguments.memory_cap_mib:
        results = with_peaks(results, arguments)
        launch.write_json(output / launch.RESULTS_FILE, results)
    show(results)
    plot(results, output / "figure6.png")
    print(f"{output} has {launch.RESULTS_FILE} and figure6.png")


def with_peaks(results: Sequence[Measured], arguments: argparse.Namespace) -> list[Measured]:
    """The results with peak MiB of rank 0, in a job each, on unlimited links; infinite if the cap is too low."""
    os.environ |= launch.RETURN_FREED_MEMORY
    measured = []
    with Cluster.of(arguments, is_limited=False) as cluster:
        for result in results:
            command = [*sys.argv, "--memory", "--schemes", result.scheme, "--depths", str(result.depth)]
            with contextlib.redirect_stderr(None):  # a job that reaches the cap is not a failure
                peak = launch.results_of_cluster(cluster, command, float | None, arguments.output, may_fail=True)
            measured.append(replace(result, peak_mib=math.inf if peak is None else peak))
    return measured


if __name__ == "__main__":
    sys.exit(launch.run(parse_arguments(), Measured, measure, present))
