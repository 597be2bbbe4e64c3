"""Sharding schemes of the dense part over depth: samples/s, bytes between nodes, memory (the paper's Figure 6).

    python tools/bench/sharding.py --nodes 2 --ranks_per_node 2 --depths 2 4 8
    deepspeed --hostfile hosts tools/bench/sharding.py --depths 2 4 8 16 --compute_ms 0 --interface ib0

By itself it builds a cluster on this machine (tools/cluster.py); started by a launcher it takes the ranks that it gets.
All schemes of a depth run in one process, interleaved in rounds, and ratios are of medians. On CPU a fixed sleep stands
for the accelerator's compute, in every scheme alike: with real compute gloo's threads would have no idle core to
overlap on. Ratios are a property of the rates and the compute chosen; bytes are exact. gloo's reduce-scatter moves
twice a ring's bytes, which would flatter HSDP, so a ring takes its place, in every scheme alike.

Schemes: DP (ZeRO-0), ZeRO-2, FSDP (ZeRO-3), HSDP with the all-reduce waited for at once and under the backward, torch
FSDP2 on a flat mesh and on a nodes x ranks mesh, and hpZ (ZeRO-3 with a second copy of the weights in each node). hpZ's
groups stay in the process for good, where they would change the other schemes: it comes last, in a job of its own for
each depth, not interleaved.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that a call by path finds tools.bench

import argparse
import contextlib
import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from tools.bench.sharding_schemes import SCHEMES, Benchmark, Measured, read
from tools.cluster import INTERFACE, Cluster, ClusterError, signals_end_it, wait

MEASURED_FILE, JOB_FILE = "measured.json", "job.json"


def show(results: Sequence[Measured], console: Console) -> None:
    """One row a scheme and depth; samples/s as a ratio to FSDP's, with the range over the rounds."""
    table = Table(box=None, pad_edge=False)
    columns = ("depth", "scheme", "samples/s", "of fsdp", "from", "to", "MiB sent", "in theory", "off by", "peak MiB")
    for column in columns:
        table.add_column(column, justify="left" if column == "scheme" else "right")
    for result in results:
        base = next((r for r in results if (r.scheme, r.depth) == ("fsdp", result.depth)), None)
        sent, theory = result.bytes_sent, result.bytes_in_theory
        table.add_row(
            str(result.depth),
            f"{result.scheme} (not interleaved)" if SCHEMES[result.scheme].is_apart else result.scheme,
            f"{result.samples_per_second:,.1f}" if result.seconds else "too much",
            *ratios(base, result),
            "-" if sent is None else f"{sent / 2**20:.2f}",
            f"{theory / 2**20:.2f}",
            f"{sent / theory - 1:+.1%}" if sent and theory else "-",
            "-" if result.peak_mib is None else f"{result.peak_mib:.0f}" if result.fits else "too much",
        )
    console.print(table)


def ratios(base: Measured | None, result: Measured) -> tuple[str, str, str]:
    """Speed over that of `base`: of the medians, and the least and the most of a round, where both ran in it."""
    if base is None or not (base.seconds and result.seconds):
        return "-", "-", "-"
    of_medians = f"{statistics.median(base.seconds) / statistics.median(result.seconds):.2f}"
    if SCHEMES[result.scheme].is_apart:
        return of_medians, "-", "-"
    by_round = [theirs / own for theirs, own in zip(base.seconds, result.seconds, strict=True)]
    return of_medians, f"{min(by_round):.2f}", f"{max(by_round):.2f}"


def plot(results: Sequence[Measured], path: Path) -> None:
    """Throughput over depth, a line a scheme: the paper's Figure 6."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(result.scheme for result in results):
        of_scheme = [result for result in results if result.scheme == name]
        fits = [result for result in of_scheme if result.fits]
        (line,) = axes.plot([r.depth for r in fits], [r.samples_per_second for r in fits], marker="o", label=name)
        if fits and len(fits) < len(of_scheme):
            last = fits[-1]
            axes.plot(last.depth, last.samples_per_second, "x", markersize=14, color=line.get_color())
    first = results[0]
    axes.set(xlabel="DHEN layers", ylabel="samples/s", yscale="log")
    axes.set_title(f"{first.nodes} nodes x {first.ranks // first.nodes} ranks; x: the next depth is out of memory")
    axes.legend()
    figure.savefig(path, dpi=150)


def parse_arguments(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments; the ranks get the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2, help="nodes of the cluster on this machine")
    parser.add_argument("--ranks_per_node", type=int, default=2, help="ranks on each")
    parser.add_argument("--link_mbit", type=float, default=100, help="a node's link, Mbit/s")
    parser.add_argument("--local_mbit", type=float, default=2400, help="inside a node, Mbit/s")
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8], help="DHEN layers")
    parser.add_argument(
        "--embeddings", type=int, default=46, help="embeddings of a layer; its weights grow by the square"
    )
    parser.add_argument(
        "--compute_ms", type=float, default=40, help="sleep in a layer's forward; twice in its backward"
    )
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, help="what is compared (default: all that can be)")
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each scheme")
    parser.add_argument(
        "--memory_cap_mib", type=float, default=0, help="measure peaks too, with so much a rank at most"
    )
    parser.add_argument("--trace", action="store_true", help="write a Chrome trace of an hsdp step")
    parser.add_argument(
        "--interface", default=INTERFACE, help="network interface whose bytes are counted (default: %(default)s)"
    )
    parser.add_argument("--output", default="runs/bench_sharding", help="folder of measured.json, figure6.png, traces")
    parser.add_argument("--on_cluster", action="store_true", help=argparse.SUPPRESS)  # set for the ranks of our own
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(command_line)
    is_launched = "RANK" in os.environ and not arguments.on_cluster
    if arguments.schemes is None:
        arguments.schemes = [name for name, scheme in SCHEMES.items() if not (is_launched and scheme.is_apart)]
    if is_launched and arguments.memory_cap_mib:
        parser.error("--memory_cap_mib needs a job for each scheme and depth, which a launcher can't start. Remove it.")
    if is_launched and "hpz" in arguments.schemes and len(arguments.schemes) * len(arguments.depths) > 1:
        parser.error("hpz changes what else its process runs. Under a launcher name it alone, with one depth.")
    return arguments


def main() -> int:
    """Measure and show."""
    arguments = parse_arguments()
    output = Path(arguments.output)
    if "RANK" in os.environ:
        from tools.bench.sharding_ranks import (
            work,  # torch, which the process that only builds the cluster doesn't need
        )

        results = work(arguments)
        rates = (arguments.link_mbit, arguments.local_mbit) if arguments.on_cluster else (None, None)
        benchmark = Benchmark(*rates, arguments.compute_ms, results)
        if results:
            benchmark.write(output / (JOB_FILE if arguments.on_cluster else MEASURED_FILE))
        if results and not arguments.on_cluster:
            present(benchmark, output)
        return 0
    try:
        benchmark = measure_on_a_cluster(arguments)
    except (ClusterError, JobError) as error:
        kept = (
            f" What was measured before is in {output / MEASURED_FILE}." if (output / MEASURED_FILE).is_file() else ""
        )
        print(f"bench_sharding: {error}{kept}", file=sys.stderr)
        return 2
    present(benchmark, output)
    return 0


class JobError(RuntimeError):
    """A job on the cluster failed; the message says which."""


def present(benchmark: Benchmark, output: Path) -> None:
    """Print the table, draw the figure."""
    show(benchmark.results, Console(width=None if sys.stdout.isatty() else 110))
    plot(benchmark.results, output / "figure6.png")
    print(f"{MEASURED_FILE} and figure6.png are in {output}")


def measure_on_a_cluster(arguments: argparse.Namespace) -> Benchmark:
    """All schemes: together at all depths, then each that stands apart in jobs of its own, then memory.

    After each job measured.json has what there is. Raises ClusterError, and JobError where a job fails.
    """
    together = [name for name in arguments.schemes if not SCHEMES[name].is_apart]
    jobs = [(together, arguments.depths)] if together else []
    jobs += [([name], [depth]) for name in arguments.schemes if SCHEMES[name].is_apart for depth in arguments.depths]
    rates, output = (arguments.link_mbit, arguments.local_mbit), Path(arguments.output)
    results: list[Measured] = []
    order = {depth: place for place, depth in enumerate(arguments.depths)}

    def keep() -> Benchmark:
        benchmark = Benchmark(*rates, arguments.compute_ms, sorted(results, key=lambda result: order[result.depth]))
        benchmark.write(output / MEASURED_FILE)
        return benchmark

    (output / MEASURED_FILE).unlink(missing_ok=True)
    with signals_end_it(), Cluster(arguments.nodes, link_mbit=rates[0], local_mbit=rates[1]) as cluster:
        for schemes, depths in jobs:
            run_job(cluster, arguments, schemes, depths, output / JOB_FILE)
            results += read(output / JOB_FILE).results
            (output / JOB_FILE).unlink()
            keep()
    if arguments.memory_cap_mib:
        peaks = peaks_of_all(arguments)
        results = [replace(result, peak_mib=peaks[result.scheme, result.depth]) for result in results]
    return keep()


def run_job(
    cluster: Cluster,
    arguments: argparse.Namespace,
    schemes: Sequence[str],
    depths: Sequence[int],
    file: Path,
    *more: str,
) -> None:
    """Run this file on all ranks, which write `file`. Raises JobError where they don't."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    what = ["--on_cluster", "--schemes", *schemes, "--depths", *map(str, depths), *more]
    status = wait(cluster.start(arguments.ranks_per_node, [__file__, *sys.argv[1:], *what]))
    if not file.is_file():
        at = ", ".join(map(str, depths))
        raise JobError(f"the job of {', '.join(schemes)} at {at} layers failed with status {status}; see above.")


def peaks_of_all(arguments: argparse.Namespace) -> dict[tuple[str, int], float]:
    """Peak MiB of rank 0 by scheme and depth, each in a job of its own, on unlimited links; infinite above the cap."""
    # One arena and small mmaps, so that what is freed is given back at once and counts no more.
    os.environ |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    peaks = {}
    with signals_end_it(), Cluster(arguments.nodes, link_mbit=0, local_mbit=0) as cluster:
        for name in arguments.schemes:
            for depth in arguments.depths:
                peak_file = Path(arguments.output) / f"peak-{name}-{depth}.json"
                with contextlib.redirect_stderr(None):  # a job that ends above the cap is no failure
                    run_job(cluster, arguments, [name], [depth], peak_file, "--memory")
                peak = json.loads(peak_file.read_text())
                peaks[name, depth] = math.inf if peak is None else peak
                peak_file.unlink()
    return peaks


if __name__ == "__main__":
    sys.exit(main())
