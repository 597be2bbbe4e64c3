"""Embedding tables by themselves: this project's, TorchRec's, and nn.EmbeddingBag under DDP, interleaved in one run.

    pip install -e '.[bench]' && pip install --no-deps torchrec==1.8.0
    python tools/bench/tables.py --ranks 1 2 4 --dims 16 64 128

Twenty-six tables of Criteo's sizes, capped at --max_rows so that EmbeddingBag's copies on every rank fit; a step looks
ids up and sends back a gradient of ones, and the optimizer (row-wise Adagrad; Adagrad for EmbeddingBag, which has no
row-wise) updates the tables. The dense model is left out, so nothing is there to overlap with; with --whole_step
there is one, of two layers, and only this project's variants are compared: what stochastic rounding costs a training.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that a call by path finds tools.bench

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from dhen.model.features import SparseIds
from dhen.runtime import topology as job
from dhen.runtime.topology import Topology
from dhen.tables.placement.costs import StepSetting, lookup_work, update_work
from tools.bench.table_systems import EMBEDDING_BAG, FP16, OPTIMIZER, OURS, ROUNDED, TORCHREC, Case, build


@dataclass(frozen=True)
class Measured:
    """One system in one case; seconds of each round, the slowest rank's. cpu_seconds: of all ranks together.

    bandwidth_share: of the tables' traffic in memory, over that of a plain copy by all ranks at once.
    """

    system: str
    case: Case
    forward: list[float]
    backward: list[float]
    cpu_seconds: list[float]
    bandwidth_share: float

    @property
    def seconds(self) -> list[float]:
        """Of whole steps."""
        return [f + b for f, b in zip(self.forward, self.backward, strict=True)]

    @property
    def cpu_microseconds_a_sample(self) -> float:
        """Of all threads of all ranks."""
        return 1e6 * statistics.median(self.cpu_seconds) / (self.case.ranks * self.case.batch_size)


def measure(
    case: Case, systems: Sequence[str], rounds: int, topology: Topology, *, whole_step: bool = False
) -> list[Measured]:
    """All systems, a step of each a round. Communicates; all ranks call it."""
    steps = {system: build(system, case, topology, whole_step=whole_step) for system in systems}
    batches = [make_batch(case, topology, seed) for seed in range(4)]
    times: dict[str, list[list[float]]] = {system: [] for system in steps}
    for round_number in range(-2, rounds):  # the first two are for warming up
        for system, (forward, backward) in steps.items():
            topology.barrier()
            start, cpu = clock(topology), time.process_time()
            embeddings = forward(batches[round_number % len(batches)])
            middle = clock(topology)
            backward(embeddings)
            end = clock(topology)
            if round_number >= 0:
                times[system].append([middle - start, end - middle, time.process_time() - cpu])
    copied = copy_bandwidth(topology)
    results = []
    for system, of_system in times.items():
        slowest = torch.tensor(of_system, dtype=torch.float64, device=topology.device)
        total = slowest.clone()
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        dist.all_reduce(total)
        forward, backward, _ = slowest.T.tolist()
        result = Measured(system, case, forward, backward, total[:, 2].tolist(), 0.0)
        share = table_bytes(case, system) / statistics.median(result.seconds) / copied
        results.append(replace(result, bandwidth_share=share))
    return results


def table_bytes(case: Case, system: str) -> float:
    """Memory traffic of a step's lookups and updates on all ranks, with the system's own dtype and optimizer."""
    setting = StepSetting(
        case.ranks,
        case.ranks,
        case.batch_size,
        optimizer=OPTIMIZER.get(system, "rowwise_adagrad"),
        table_dtype=OURS.get(system, {}).get("table_dtype", "fp32"),
    )
    bags = setting.global_batch
    works = [
        work(bags * case.ids_per_bag, bags, table.num_embeddings, case.dim, setting)
        for table in case.tables
        for work in (lookup_work, update_work)
    ]
    return sum(work.row_bytes + work.other_bytes for work in works)


def copy_bandwidth(topology: Topology) -> float:
    """Bytes a second, read and written, of a copy by all ranks at once. Communicates; all ranks call it."""
    source = torch.ones(2**24, device=topology.device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        topology.barrier()
        start = clock(topology)
        target.copy_(source)
        seconds.append(clock(topology) - start)
    slowest = torch.tensor(statistics.median(seconds), device=topology.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return topology.world_size * 2 * source.numel() * 4 / float(slowest)


def make_batch(case: Case, topology: Topology, seed: int) -> SparseIds:
    """Uniform ids; the same for all systems."""
    generator = torch.Generator().manual_seed(1000 * seed + topology.rank)
    count = case.batch_size * case.ids_per_bag
    ids = torch.cat([torch.randint(0, t.num_embeddings, (count,), generator=generator) for t in case.tables])
    lengths = torch.full((len(case.tables), case.batch_size), case.ids_per_bag)
    return SparseIds(ids, len(case.tables), lengths if case.ids_per_bag > 1 else None).to(topology.device)


def clock(topology: Topology) -> float:
    """Seconds, when all that was started on the device is done."""
    if topology.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def show(results: Sequence[Measured]) -> None:
    """One row a system and case, with its speed over TorchRec's and over EmbeddingBag's where they ran."""
    table = Table(box=None, pad_edge=False)
    bases = {TORCHREC: "TorchRec", EMBEDDING_BAG: "Bag"}
    bases = {base: name for base, name in bases.items() if any(result.system == base for result in results)}
    columns = ["ranks", "dim", "ids", "system", "ms", "CPU us"]
    for name in bases.values():
        columns += [f"x {name}", "from-to", "forward", "backward"]
    for column in (*columns, "bandwidth"):
        table.add_column(column, justify="left" if column == "system" else "right")
    for result in results:
        case = result.case
        of_case = {other.system: other for other in results if other.case == case}
        cells = [str(case.ranks), str(case.dim), str(case.ids_per_bag), result.system]
        cells += [f"{1e3 * statistics.median(result.seconds):.1f}", f"{result.cpu_microseconds_a_sample:.1f}"]
        for base in bases:
            cells += ratios(of_case[base], result) if base in of_case else ["", "", "", ""]
        table.add_row(*cells, f"{result.bandwidth_share:.0%}")
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    print("ms: median step; CPU us: of all ranks, an example; x: speed over the other's by median steps, from-to over")
    print("rounds, then of forward and backward alone; bandwidth: the tables' memory traffic over a plain copy's")
    for case in dict.fromkeys(result.case for result in results):
        of_case = {result.system: result for result in results if result.case == case}
        if FP16 in of_case and ROUNDED in of_case:
            whole, spread, *_ = ratios(of_case[ROUNDED], of_case[FP16])
            at = f"{case.ranks} ranks, dim {case.dim}, {case.ids_per_bag} ids a bag"
            cpu = of_case[ROUNDED].cpu_microseconds_a_sample / of_case[FP16].cpu_microseconds_a_sample
            print(
                f"stochastic rounding, {at}: {whole} times ({spread}) the step to nearest, {cpu:.2f} times its CPU time"
            )


def ratios(base: Measured, result: Measured) -> list[str]:
    """How many times as fast as `base`: by medians, from-to over rounds, forward, backward."""
    whole, forward, backward = (
        statistics.median(getattr(base, part)) / statistics.median(getattr(result, part))
        for part in ("seconds", "forward", "backward")
    )
    by_round = sorted(b / own for b, own in zip(base.seconds, result.seconds, strict=True))
    return [f"{whole:.2f}", f"{by_round[0]:.2f}-{by_round[-1]:.2f}", f"{forward:.2f}", f"{backward:.2f}"]


def parse_arguments() -> argparse.Namespace:
    """The arguments; the ranks get the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    systems = [*OURS, TORCHREC, EMBEDDING_BAG]
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks")
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 64, 128], help="embedding dimensions")
    parser.add_argument("--ids_per_bag", type=int, nargs="+", default=[1, 20], help="ids of each bag")
    parser.add_argument("--batch_size", type=int, default=4096, help="examples of a rank")
    parser.add_argument("--max_rows", type=int, default=100_000, help="cap of a table's rows")
    parser.add_argument("--rounds", type=int, default=9, help="measured steps of each system")
    parser.add_argument("--systems", nargs="+", default=systems, choices=systems, help="what is compared")
    parser.add_argument("--whole_step", action="store_true", help="with a dense part, this project's variants alone")
    parser.add_argument("--output", default="runs/bench_tables.json", help="the file to write")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.systems = [system for system in arguments.systems if system in OURS or not arguments.whole_step]
    if TORCHREC in arguments.systems and importlib.util.find_spec("torchrec") is None:
        arguments.systems.remove(TORCHREC)
        if "RANK" not in os.environ:
            print("torchrec isn't installed, so it is left out; the first line of --help installs it", file=sys.stderr)
    if not arguments.systems:
        parser.error("nothing is left to compare.")
    return arguments


def work(arguments: argparse.Namespace) -> None:
    """One rank's part, for its number of ranks."""
    topology = job.start()
    results = []
    for dim in arguments.dims:
        for ids_per_bag in arguments.ids_per_bag:
            case = Case(topology.world_size, dim, ids_per_bag, arguments.batch_size, arguments.max_rows)
            results += measure(case, arguments.systems, arguments.rounds, topology, whole_step=arguments.whole_step)
    if topology.is_main:
        Path(arguments.output).write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    job.stop()


def main() -> int:
    """Measure each number of ranks in a job of its own, and show all."""
    arguments = parse_arguments()
    if "RANK" in os.environ:
        work(arguments)
        return 0
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    everything = []
    for ranks in arguments.ranks:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | os.environ
        done = subprocess.run([*launcher, __file__, *sys.argv[1:]], env=environment)
        if done.returncode:
            return done.returncode
        everything += json.loads(output.read_text())
    output.write_text(json.dumps(everything, indent=2) + "\n")
    show([Measured(**{**entry, "case": Case(**entry["case"])}) for entry in everything])
    print(f"written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
