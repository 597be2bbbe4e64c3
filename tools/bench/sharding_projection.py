"""Projects what HSDP gains over FSDP on the paper's cluster, by a simulation that is checked against measurements.

    python tools/bench/sharding_projection.py --measured runs/bench_sharding/measured.json

The simulation goes through a step layer by layer. Compute, the fabric inside a node and the link between nodes each do
one thing at a time. The weights of a layer are gathered one layer ahead. Two constants are fitted to the fsdp and
hsdp_sync of tools/bench/sharding.py: the share of the nominal rate that a collective gets, and the latency of a hop.
The deviations of all three schemes show how far you can trust the simulation.

The projection is for the paper's machine: 32 nodes of 8 A100, 600 GB/s inside a node, 25 GB/s between nodes. The gain
depends on how long a layer computes, which the paper does not say. So the tool prints a range of gains beside the
paper's 1.2x, and what the simulation leaves out. It takes the benchmark's rates and compute from measured.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that a call by path finds tools.bench

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dhen.planner.machine import Machine, read_machine
from tools.bench.launch import argument_parser, write_json
from tools.bench.report import print_table
from tools.bench.sharding_schemes import SCHEMES, Benchmark, Measured, read

PAPERS_NODES, PAPERS_GAIN = 32, 1.2
SIMULATED = ("fsdp", "hsdp_sync", "hsdp")
LEFT_OUT = "congestion, stragglers, kernels that share the GPU with communication, the optimizer's time"


def step_seconds(
    scheme: str, machine: Machine, nodes: int, depth: int, layer_bytes: float, forward_seconds: float
) -> float:
    """One step of "fsdp", "hsdp_sync" or "hsdp": `depth` layers of equal size, backward twice as long as forward."""
    is_hybrid = SCHEMES[scheme].is_hybrid
    spanned = 1 if is_hybrid else nodes
    gather = machine.gathered(layer_bytes, nodes=spanned, ranks=spanned * machine.ranks_per_node)
    compute_free = fabric_free = link_free = 0.0
    for seconds, is_backward in [(forward_seconds, False)] * depth + [(2 * forward_seconds, True)] * depth:
        # One layer ahead: the gather was requested when the previous layer began to compute.
        fabric_free = max(fabric_free, compute_free - seconds) + gather
        compute_free = max(compute_free, fabric_free) + seconds
        if not is_backward:
            continue
        fabric_free = max(fabric_free, compute_free) + gather  # the reduce-scatter, as long as a gather
        if is_hybrid:
            link_free = max(link_free, fabric_free) + machine.replicated(layer_bytes, nodes=nodes)
            if not SCHEMES[scheme].is_async:
                compute_free = fabric_free = link_free
    return max(compute_free, fabric_free, link_free)


def simulated(machine: Machine, result: Measured, forward_seconds: float) -> float:
    """Seconds per step of a measured scheme, as simulated."""
    layer_bytes = result.model_bytes / result.depth
    return step_seconds(result.scheme, machine, result.nodes, result.depth, layer_bytes, forward_seconds)


def fitted(machine: Machine, measured: Sequence[Measured], forward_seconds: float) -> Machine:
    """`machine` with the efficiency and latency that fit the measured times of "fsdp" and "hsdp_sync" best."""
    known = [result for result in measured if result.scheme in SIMULATED[:2] and result.seconds]
    candidates = [
        replace(machine, link_efficiency=share / 100, seconds_per_collective=milliseconds / 1e3)
        for share in range(50, 101, 2)
        for milliseconds in range(21)
    ]

    def deviation(candidate: Machine) -> float:
        return sum(abs(simulated(candidate, result, forward_seconds) / result.step_seconds - 1) for result in known)

    return min(candidates, key=deviation)


@dataclass(frozen=True)
class Checked:
    """A measured scheme beside its simulation, in seconds per step."""

    depth: int
    scheme: str
    measured: float
    simulated: float


@dataclass(frozen=True)
class Gain:
    """How many times faster hsdp is, if the forward of a layer computes for this long."""

    forward_seconds: float
    over_fsdp: float
    over_hsdp_sync: float


def check(benchmark: Benchmark, machine: Machine) -> list[Checked]:
    """Every measured scheme that the simulation knows."""
    seconds = benchmark.compute_ms / 1e3
    return [
        Checked(result.depth, result.scheme, result.step_seconds, simulated(machine, result, seconds))
        for result in benchmark.results
        if result.scheme in SIMULATED and result.seconds
    ]


def project(machine: Machine, nodes: int, depth: int, layer_bytes: float) -> list[Gain]:
    """The gains if a layer computes for an eighth of the time that gathers it, up to four times that."""
    gains = []
    for share in (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0):
        seconds = share * machine.gathered(layer_bytes, nodes=nodes, ranks=nodes * machine.ranks_per_node)
        fsdp, hsdp_sync, hsdp = (
            step_seconds(scheme, machine, nodes, depth, layer_bytes, seconds) for scheme in SIMULATED
        )
        gains.append(Gain(seconds, over_fsdp=fsdp / hsdp, over_hsdp_sync=hsdp_sync / hsdp))
    return gains


def show(fit: Machine, checks: Sequence[Checked], gains: Sequence[Gain], model: str) -> None:
    """Print the fitted constants, the check and the projection."""
    print(f"fitted: {fit.link_efficiency:.0%} of the nominal rates, {fit.seconds_per_collective * 1e3:.0f} ms per hop")
    rows = [
        (str(c.depth), c.scheme, f"{c.measured:.2f}", f"{c.simulated:.2f}", f"{c.simulated / c.measured - 1:+.0%}")
        for c in checks
    ]
    columns = ("depth", "scheme", "measured s", "simulated s", "off by")
    print_table(columns, rows, left=columns)
    print(f"\n{PAPERS_NODES} x 8 A100 (paper 4.4), {model}, the efficiency above and no latency. Left out: {LEFT_OUT}.")
    rows = [(f"{g.forward_seconds * 1e3:.1f}", f"{g.over_fsdp:.2f}", f"{g.over_hsdp_sync:.2f}") for g in gains]
    columns = ("a layer's forward, ms", "hsdp / fsdp", "hsdp / hsdp_sync")
    print_table(columns, rows, left=columns)
    print(f"The paper reports {PAPERS_GAIN}x over FSDP, and not how long a layer computes.")


def parse_arguments(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--measured", type=Path, required=True, help="measured.json of tools/bench/sharding.py")
    add("--depth", type=int, default=8, help="layers of the projected model")
    add("--layer_mib", type=float, default=256, help="MiB of weights in each layer of the projected model")
    add("--json", type=Path, metavar="FILE", help="write the fit, the check and the projection as JSON")
    return parser.parse_args(command_line)


def main() -> int:
    """Fit, check, project. Exit status: 0, or 2 if measured.json is unusable."""
    arguments = parse_arguments()
    try:
        benchmark = read(arguments.measured)
        nominal = nominal_machine(benchmark)
    except (OSError, ValueError) as error:
        print(f"sharding_projection: {arguments.measured}: {error}", file=sys.stderr)
        return 2
    fit = fitted(nominal, benchmark.results, benchmark.compute_ms / 1e3)
    checks = check(benchmark, fit)
    # The paper's 600 GB/s inside a node, as it says. The shipped file counts one direction.
    rates = {"local_bytes_per_second": 600e9, "link_efficiency": fit.link_efficiency, "seconds_per_collective": 0.0}
    papers = read_machine("a100-40gb", **rates)
    gains = project(papers, PAPERS_NODES, arguments.depth, arguments.layer_mib * 2**20)
    show(fit, checks, gains, f"{arguments.depth} layers of {arguments.layer_mib:g} MiB")
    if arguments.json:
        write_json(arguments.json, {"fit": fit, "check": checks, "paper": papers, "projection": gains})
    return 0


def nominal_machine(benchmark: Benchmark) -> Machine:
    """The benchmark's cluster at its nominal rates. Raises ValueError if nothing limits it."""
    if not (benchmark.link_mbit and benchmark.local_mbit):
        raise ValueError("the links had no limits. Measure with --link_mbit and --local_mbit.")
    first = benchmark.results[0]
    return read_machine(
        "cpu",
        ranks_per_node=first.ranks // first.nodes,
        local_bytes_per_second=benchmark.local_mbit * 125e3,
        node_bytes_per_second=benchmark.link_mbit * 125e3,
    )


if __name__ == "__main__":
    sys.exit(main())
