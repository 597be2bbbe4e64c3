"""Projects what HSDP gains over FSDP on the paper's cluster, by a simulation that is checked against measurements.

    python tools/bench/sharding_projection.py --measured runs/bench_sharding/measured.json

The simulation goes through a step layer by layer. Compute, the fabric inside a node and the link between nodes each do
one thing at a time. The weights of a layer are gathered one layer ahead. Two constants are fitted to the fsdp and
hsdp_sync of tools/bench/sharding.py: the share of the nominal rate that a collective gets, and its latency. The
deviations of all three schemes show how far you can trust the simulation.

The projection is for the paper's machine: 32 nodes of 8 A100, 600 GB/s inside a node, 25 GB/s between nodes. The gain
depends on how long a layer computes, which the paper does not say. So the tool prints a range of gains beside the
paper's 1.2x, and what the simulation leaves out. It takes the benchmark's rates and compute from measured.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that a call by path finds tools.bench

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from tools.bench.launch import argument_parser, write_json
from tools.bench.report import print_table
from tools.bench.sharding_schemes import SCHEMES, Benchmark, Measured, read

PAPERS_GAIN = 1.2
SIMULATED = ("fsdp", "hsdp_sync", "hsdp")
LEFT_OUT = "congestion, stragglers, kernels that share the GPU with communication, the optimizer's time"


@dataclass(frozen=True)
class Machine:
    """A cluster. link: bytes per second of a node in each direction. fabric: bytes per second inside a node, of one
    rank or, if shared, of all its ranks. efficiency: share of these rates that a collective gets. latency: of each
    collective in seconds.
    """

    nodes: int
    ranks_per_node: int
    link: float
    fabric: float
    is_fabric_shared: bool
    efficiency: float = 1.0
    latency: float = 0.0

    def flat_ring(self, size: float) -> float:
        """Seconds of an all-gather or reduce-scatter of `size` bytes over all ranks, which the nodes' links limit."""
        ranks = self.nodes * self.ranks_per_node
        return self._seconds(size * (ranks - 1) / ranks, self.link)

    def inside(self, size: float) -> float:
        """Seconds of an all-gather or reduce-scatter of `size` bytes over the ranks of a node."""
        sharers = self.ranks_per_node if self.is_fabric_shared else 1
        return self._seconds(sharers * size * (self.ranks_per_node - 1) / self.ranks_per_node, self.fabric)

    def across(self, size: float) -> float:
        """Seconds of the all-reduces of all shards on a node, `size` bytes together, which share its link."""
        return self._seconds(2 * size * (self.nodes - 1) / self.nodes, self.link)

    def _seconds(self, size: float, rate: float) -> float:
        return self.latency + size / (rate * self.efficiency)


def step_seconds(scheme: str, machine: Machine, depth: int, layer_bytes: float, forward_seconds: float) -> float:
    """One step of "fsdp", "hsdp_sync" or "hsdp": `depth` layers of equal size, backward twice as long as forward."""
    is_hybrid = SCHEMES[scheme].is_hybrid
    gather = machine.inside(layer_bytes) if is_hybrid else machine.flat_ring(layer_bytes)
    compute_free = fabric_free = link_free = 0.0
    for seconds, is_backward in [(forward_seconds, False)] * depth + [(2 * forward_seconds, True)] * depth:
        # One layer ahead: the gather was requested when the previous layer began to compute.
        fabric_free = max(fabric_free, compute_free - seconds) + gather
        compute_free = max(compute_free, fabric_free) + seconds
        if not is_backward:
            continue
        fabric_free = max(fabric_free, compute_free) + gather  # the reduce-scatter, as long as a gather
        if is_hybrid:
            link_free = max(link_free, fabric_free) + machine.across(layer_bytes)
            if not SCHEMES[scheme].is_async:
                compute_free = fabric_free = link_free
    return max(compute_free, fabric_free, link_free)


def deviation(machine: Machine, result: Measured, forward_seconds: float) -> float:
    """Simulated over measured seconds, minus 1."""
    simulated = step_seconds(result.scheme, machine, result.depth, result.model_bytes / result.depth, forward_seconds)
    return simulated / statistics.median(result.seconds) - 1


def fitted(machine: Machine, measured: Sequence[Measured], forward_seconds: float) -> Machine:
    """`machine` with the efficiency and latency that fit the measured times of "fsdp" and "hsdp_sync" best."""
    known = [result for result in measured if result.scheme in SIMULATED[:2] and result.seconds]
    candidates = [
        replace(machine, efficiency=share / 100, latency=milliseconds / 1e3)
        for share in range(50, 101, 2)
        for milliseconds in range(0, 41, 2)
    ]
    return min(candidates, key=lambda each: sum(abs(deviation(each, result, forward_seconds)) for result in known))


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
    checks = []
    for result in benchmark.results:
        if result.scheme in SIMULATED and result.seconds:
            seconds = statistics.median(result.seconds)
            simulated = seconds * (1 + deviation(machine, result, benchmark.compute_ms / 1e3))
            checks.append(Checked(result.depth, result.scheme, seconds, simulated))
    return checks


def project(machine: Machine, depth: int, layer_bytes: float) -> list[Gain]:
    """The gains if a layer computes for an eighth of the time that gathers it, up to four times that."""
    gains = []
    for share in (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0):
        seconds = share * machine.flat_ring(layer_bytes)
        fsdp, hsdp_sync, hsdp = (step_seconds(scheme, machine, depth, layer_bytes, seconds) for scheme in SIMULATED)
        gains.append(Gain(seconds, over_fsdp=fsdp / hsdp, over_hsdp_sync=hsdp_sync / hsdp))
    return gains


def show(fit: Machine, checks: Sequence[Checked], papers: Machine, gains: Sequence[Gain], model: str) -> None:
    """Print the fitted constants, the check and the projection."""
    print(f"fitted: {fit.efficiency:.0%} of the nominal rates, {fit.latency * 1e3:.0f} ms per collective")
    rows = [
        (str(c.depth), c.scheme, f"{c.measured:.2f}", f"{c.simulated:.2f}", f"{c.simulated / c.measured - 1:+.0%}")
        for c in checks
    ]
    columns = ("depth", "scheme", "measured s", "simulated s", "off by")
    print_table(columns, rows, left=columns)
    where = f"{papers.nodes} x {papers.ranks_per_node} A100 (paper 4.4), {model}, the efficiency above and no latency"
    print(f"\n{where}. Left out: {LEFT_OUT}.")
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
    papers = Machine(32, 8, link=25e9, fabric=600e9, is_fabric_shared=False, efficiency=fit.efficiency)
    gains = project(papers, arguments.depth, arguments.layer_mib * 2**20)
    show(fit, checks, papers, gains, f"{arguments.depth} layers of {arguments.layer_mib:g} MiB")
    if arguments.json:
        content = {"fit": asdict(fit), "check": [asdict(each) for each in checks]}
        content |= {"paper": asdict(papers), "projection": [asdict(gain) for gain in gains]}
        write_json(arguments.json, content)
    return 0


def nominal_machine(benchmark: Benchmark) -> Machine:
    """The benchmark's cluster at its nominal rates. Raises ValueError if nothing limits it."""
    if not (benchmark.link_mbit and benchmark.local_mbit):
        raise ValueError("the links had no limits. Measure with --link_mbit and --local_mbit.")
    nodes, ranks = benchmark.results[0].nodes, benchmark.results[0].ranks
    link, fabric = benchmark.link_mbit * 125e3, benchmark.local_mbit * 125e3
    return Machine(nodes, ranks // nodes, link=link, fabric=fabric, is_fabric_shared=True)


if __name__ == "__main__":
    sys.exit(main())
