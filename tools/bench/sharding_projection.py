"""FSDP against HSDP on a cluster that isn't here: a simulation of one step, checked against what was measured.

    python tools/bench/sharding_projection.py --measured runs/bench_sharding/measured.json

A step is simulated layer by layer: compute, the fabric inside the node, and the link between nodes are three resources,
each doing one thing at a time; a layer's weights are gathered one layer ahead. Two constants are fitted to the FSDP and
the synchronous HSDP of tools/bench/sharding.py, the share of the nominal rate that a collective reaches and the seconds
that each takes besides; the other schemes and depths show how far the simulation can be trusted. Then it takes the
paper's machine: 32 nodes of 8 A100, 600 GB/s inside, 25 GB/s a node between. How much HSDP gains there depends on how
long a layer computes, which the paper doesn't say: so a band is printed, beside its 1.2x.

Rates and compute of the benchmark stand in measured.json. What is left out is printed with the projection.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that a call by path finds tools.bench

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from tools.bench.sharding_schemes import SCHEMES, Measured, read

PAPERS_GAIN = 1.2
LEFT_OUT = "congestion, stragglers, kernels that share the GPU with communication, the optimizer's time"


@dataclass(frozen=True)
class Machine:
    """Rates in bytes/s. link: of a node, both ways. fabric: inside a node, of one rank or, if shared, of all.

    efficiency: share of the rates that a collective reaches. latency: seconds that each takes besides.
    """

    nodes: int
    ranks_per_node: int
    link: float
    fabric: float
    is_fabric_shared: bool
    efficiency: float = 1.0
    latency: float = 0.0

    def flat_ring(self, size: float) -> float:
        """Seconds of an all-gather or reduce-scatter of `size` bytes over all ranks, at the pace of a node's link."""
        ranks = self.nodes * self.ranks_per_node
        return self._seconds(size * (ranks - 1) / ranks, self.link)

    def inside(self, size: float) -> float:
        """Seconds of one over the ranks of a node."""
        sharers = self.ranks_per_node if self.is_fabric_shared else 1
        return self._seconds(sharers * size * (self.ranks_per_node - 1) / self.ranks_per_node, self.fabric)

    def across(self, size: float) -> float:
        """Seconds of the all-reduces of a node's shards of `size` bytes together: they share its link."""
        return self._seconds(2 * size * (self.nodes - 1) / self.nodes, self.link)

    def _seconds(self, size: float, rate: float) -> float:
        return self.latency + size / (rate * self.efficiency)


def step_seconds(scheme: str, machine: Machine, depth: int, layer_bytes: float, forward_seconds: float) -> float:
    """One step of "fsdp", "hsdp_sync" or "hsdp": `depth` layers of equal size, backward twice as long as forward."""
    is_hybrid = SCHEMES[scheme].is_hybrid
    gather = machine.inside(layer_bytes) if is_hybrid else machine.flat_ring(layer_bytes)
    compute_free = fabric_free = link_free = 0.0
    for seconds, is_backward in [(forward_seconds, False)] * depth + [(2 * forward_seconds, True)] * depth:
        # One layer ahead: it was asked for when the layer before began to compute.
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


def fitted(machine: Machine, measured: Sequence[Measured], forward_seconds: float) -> Machine:
    """The efficiency and latency under which the measured times of "fsdp" and "hsdp_sync" come out best."""
    known = [result for result in measured if result.scheme in ("fsdp", "hsdp_sync") and result.seconds]

    def error(candidate: Machine) -> float:
        return sum(abs(deviation(candidate, result, forward_seconds)) for result in known)

    candidates = [
        Machine(**{**vars(machine), "efficiency": share / 100, "latency": milliseconds / 1e3})
        for share in range(50, 101, 2)
        for milliseconds in range(0, 41, 2)
    ]
    return min(candidates, key=error)


def deviation(machine: Machine, result: Measured, forward_seconds: float) -> float:
    """Simulated over measured seconds, less 1."""
    simulated = step_seconds(result.scheme, machine, result.depth, result.model_bytes / result.depth, forward_seconds)
    return simulated / statistics.median(result.seconds) - 1


def parse_arguments(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, required=True, help="measured.json of tools/bench/sharding.py")
    parser.add_argument("--link_mbit", type=float, help="a node's link, where measured.json doesn't have it, Mbit/s")
    parser.add_argument("--local_mbit", type=float, help="inside a node, likewise")
    parser.add_argument("--depth", type=int, default=8, help="layers of the projected model")
    parser.add_argument("--layer_mib", type=float, default=256, help="MiB of a layer's weights in the projected model")
    return parser.parse_args(command_line)


def main() -> int:
    """Fit, check, project."""
    arguments = parse_arguments()
    benchmark = read(arguments.measured)
    link_mbit, local_mbit = arguments.link_mbit or benchmark.link_mbit, arguments.local_mbit or benchmark.local_mbit
    if not (link_mbit and local_mbit):
        print(
            f"sharding_projection: {arguments.measured} was measured on links of no known rate. Say --link_mbit and "
            "--local_mbit.",
            file=sys.stderr,
        )
        return 2
    measured, forward_seconds = benchmark.results, benchmark.compute_ms / 1e3
    first = measured[0]
    here = Machine(first.nodes, first.ranks // first.nodes, link_mbit * 125e3, local_mbit * 125e3, True)
    here = fitted(here, measured, forward_seconds)
    console = Console()
    console.print(f"fitted: {here.efficiency:.0%} of the nominal rates, {here.latency * 1e3:.0f} ms a collective")
    check = Table("depth", "scheme", "measured s", "simulated s", "off by", box=None, pad_edge=False)
    for result in measured:
        if result.scheme in ("fsdp", "hsdp_sync", "hsdp") and result.seconds:
            off, seconds = deviation(here, result, forward_seconds), statistics.median(result.seconds)
            check.add_row(
                str(result.depth), result.scheme, f"{seconds:.2f}", f"{seconds * (1 + off):.2f}", f"{off:+.0%}"
            )
    console.print(check)
    papers = Machine(32, 8, 25e9, 600e9, False, here.efficiency, 0.0)
    size = arguments.layer_mib * 2**20
    flat = papers.flat_ring(size)
    console.print(
        f"\n32 x 8 A100 (paper 4.4), {arguments.depth} layers of {arguments.layer_mib:g} MiB, the efficiency above, no "
        f"latency; gathering a layer over all ranks takes {flat * 1e3:.1f} ms. Left out: {LEFT_OUT}"
    )
    band = Table("a layer's forward, ms", "hsdp / fsdp", "hsdp / hsdp_sync", box=None, pad_edge=False)
    for share in (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0):
        times = {
            scheme: step_seconds(scheme, papers, arguments.depth, size, share * flat)
            for scheme in ("fsdp", "hsdp_sync", "hsdp")
        }
        band.add_row(
            f"{share * flat * 1e3:.1f}",
            f"{times['fsdp'] / times['hsdp']:.2f}",
            f"{times['hsdp_sync'] / times['hsdp']:.2f}",
        )
    console.print(band)
    console.print(f"the paper's figure is {PAPERS_GAIN}x over FSDP; where in this band it lies, it doesn't say")
    return 0


if __name__ == "__main__":
    sys.exit(main())
