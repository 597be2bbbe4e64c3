"""Measure what the placement of embedding tables needs to know of a machine: lookups, updates, the all-to-all.

    python tools/calibrate_costs.py --output costs.json
    deepspeed --hostfile hosts tools/calibrate_costs.py --output costs.json

Then name the file in a ds_config: {"dhen": {"placement": {"costs": "costs.json"}}}. Lookups and updates are FBGEMM's
own, of tables of several sizes, widths and bag sizes, on all ranks at once; the seconds are linear in ids,
rows and bytes. The all-to-all is that of the job: inside its nodes, and between them where it has several.
Started by itself it makes a job of two ranks. What the job can't measure keeps the rate that ships with the project.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from dhen.parallel import topology as job
from dhen.parallel.sharded_tables import make_lookup
from dhen.parallel.table_costs import (
    WEIGHT_BYTES,
    Costs,
    StepSetting,
    Work,
    WorkRate,
    lookup_work,
    read_costs,
    update_work,
)
from dhen.parallel.topology import Topology

BATCH = 4096
TABLES = 4
"""In one lookup, as a rank's tables are, so that what a call costs by itself counts little."""
GRID = tuple(itertools.product((1_000, 300_000), (4, 16, 64), (1, 10)))
"""Rows, columns and ids a bag of the tables that are timed."""
OPTIMIZERS = ("rowwise_adagrad", "adagrad", "sgd")
EXCHANGE_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Sample:
    """One timed table, and the work that its seconds are linear in."""

    rows: int
    columns: int
    work: Work
    seconds: float


def main() -> int:
    """Measure, print, write."""
    arguments = parse_arguments()
    if "RANK" not in os.environ:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | os.environ
        return subprocess.run([*launcher, __file__, *sys.argv[1:]], env=environment).returncode
    topology = job.start()
    default = read_costs("gpu" if topology.device.type == "cuda" else "cpu")
    lookup, update = {}, {}
    for dtype in WEIGHT_BYTES:
        for optimizer in OPTIMIZERS:
            lookups, updates = time_tables(topology, dtype, optimizer, arguments.rounds)
            update[f"{optimizer}/{dtype}"] = shown(f"update, {optimizer}, {dtype}", updates, topology)
        lookup[dtype] = shown(f"lookup, {dtype}", lookups, topology)
    intra, inter = time_links(topology, arguments.rounds)
    costs = Costs(
        machine=arguments.machine or f"{platform.machine()}, {topology.device.type}",
        source=f"tools/calibrate_costs.py, {topology.world_size} ranks, {topology.local_size} on a node",
        lookup=lookup,
        update=update,
        intra_node_bytes_per_second=intra or default.intra_node_bytes_per_second,
        inter_node_bytes_per_second=inter or default.inter_node_bytes_per_second,
    )
    if topology.is_main:
        costs.save(Path(arguments.output))
        print(json.dumps(asdict(costs), indent=2))
        print(f"written to {arguments.output}", file=sys.stderr)
    job.stop()
    return 0


def time_tables(topology: Topology, dtype: str, optimizer: str, rounds: int) -> tuple[list[Sample], list[Sample]]:
    """Lookups and updates over the grid, the slowest rank's medians. Communicates; all ranks call it."""
    setting = StepSetting(1, 1, BATCH, optimizer=optimizer, table_dtype=dtype)
    lookups, updates = [], []
    for rows, columns, ids_per_bag in GRID:
        ids = BATCH * ids_per_bag
        forward, backward = time_table(topology, rows, columns, ids_per_bag, optimizer, dtype, rounds)
        lookups.append(Sample(rows, columns, lookup_work(ids, BATCH, rows, columns, setting), forward))
        updates.append(Sample(rows, columns, update_work(ids, BATCH, rows, columns, setting), backward))
    return lookups, updates


def time_table(
    topology: Topology, rows: int, columns: int, ids_per_bag: int, optimizer: str, dtype: str, rounds: int
) -> tuple[float, float]:
    """Seconds of one table's lookup, and of its backward with the update. Communicates; all ranks call it."""
    lookup = make_lookup([(rows, columns)] * TABLES, topology.device, optimizer, dtype)
    lookup.set_learning_rate(0.01)
    states = [state for of_table in lookup.split_optimizer_states() for state in of_table] if optimizer != "sgd" else []
    for tensor in [*lookup.split_embedding_weights(), *states]:
        tensor.fill_(0.01)  # memory that was never written isn't there yet
    offsets = torch.arange(0, TABLES * BATCH * ids_per_bag + 1, ids_per_bag, device=topology.device)
    forward, backward = [], []
    for _ in range(rounds + 1):  # the first is for warming up
        ids = torch.randint(0, rows, (TABLES * BATCH * ids_per_bag,), device=topology.device)
        topology.barrier()
        start = clock(topology)
        pooled = lookup(ids, offsets)
        middle = clock(topology)
        pooled.backward(pooled.detach())
        backward.append(clock(topology) - middle)
        forward.append(middle - start)
    seconds = torch.tensor([statistics.median(forward[1:]), statistics.median(backward[1:])], device=topology.device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX, group=topology.world)
    return float(seconds[0]) / TABLES, float(seconds[1]) / TABLES


def fit(samples: Sequence[Sample]) -> WorkRate:
    """The rates with the least relative errors, none below 0: least squares over every choice of those above 0."""
    works = torch.tensor([(1.0, *astuple(sample.work)) for sample in samples], dtype=torch.float64)
    works /= torch.tensor([sample.seconds for sample in samples], dtype=torch.float64)[:, None]
    scale = works.amax(0)
    best, least = torch.zeros(len(scale), dtype=torch.float64), float("inf")
    for count in range(1, len(scale) + 1):
        for chosen in map(list, itertools.combinations(range(len(scale)), count)):
            found = torch.linalg.lstsq(works[:, chosen] / scale[chosen], works.new_ones(len(samples))).solution
            found /= scale[chosen]
            error = float((works[:, chosen] @ found - 1).square().sum())
            if found.min() >= 0 and error < least:
                best, least = torch.zeros_like(scale), error
                best[chosen] = found
    return WorkRate(*best.tolist())


def shown(title: str, samples: Sequence[Sample], topology: Topology) -> WorkRate:
    """The samples' rates; rank 0 prints how well they fit."""
    rate = fit(samples)
    if topology.is_main:
        table = Table(title=title, box=None, title_justify="left")
        for column in ("rows", "columns", "ids", "ms", "by the rates", "off by"):
            table.add_column(column, justify="right")
        for sample in samples:
            expected = rate.seconds(sample.work)
            off = expected / sample.seconds - 1
            cells = (f"{sample.rows:,}", str(sample.columns), f"{sample.work.ids:,}", f"{1e3 * sample.seconds:.3f}")
            table.add_row(*cells, f"{1e3 * expected:.3f}", f"{off:+.0%}")
        Console(stderr=True).print(table)
    return rate


def time_links(topology: Topology, rounds: int) -> tuple[float | None, float | None]:
    """Bytes a second that a rank sends inside its node and to others; None where there is nobody. Communicates."""
    if topology.local_size in (1, topology.world_size):
        rate = time_all_to_all(topology, topology.world, topology.world_size, rounds)
        return (None, rate) if topology.local_size == 1 else (rate, None)
    groups = topology.shard_groups(topology.local_size)
    inside = time_all_to_all(topology, groups.shard, groups.shard_size, rounds)
    return inside, time_all_to_all(topology, groups.replica, groups.num_replicas, rounds)


def time_all_to_all(topology: Topology, group: dist.ProcessGroup, size: int, rounds: int) -> float | None:
    """Bytes a second that each rank of the group sends to its others; the slowest counts. Communicates."""
    if size == 1:
        return None
    sent = torch.zeros(EXCHANGE_BYTES // 4 // size * size, device=topology.device)
    received = torch.empty_like(sent)
    seconds = []
    for _ in range(rounds + 1):
        topology.barrier()
        start = clock(topology)
        dist.all_to_all_single(received, sent, group=group)
        seconds.append(clock(topology) - start)
    slowest = torch.tensor(statistics.median(seconds[1:]), device=topology.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=topology.world)
    return sent.numel() * 4 * (size - 1) / size / float(slowest)


def clock(topology: Topology) -> float:
    """Seconds, when all that was started on the device is done."""
    if topology.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def parse_arguments() -> argparse.Namespace:
    """The arguments; the ranks get the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="costs.json", help="the file to write (default: %(default)s)")
    parser.add_argument("--machine", help="what to call the machine in it")
    parser.add_argument("--rounds", type=int, default=5, help="timed repetitions of each table (default: %(default)s)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
