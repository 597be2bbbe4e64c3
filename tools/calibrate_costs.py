"""Measures the rates of lookups, updates and the all-to-all on this machine, for the placement of embedding tables.

    python tools/calibrate_costs.py --output costs.json
    deepspeed --hostfile hosts tools/calibrate_costs.py --output costs.json

Then name the file in a ds_config: {"dhen": {"placement": {"costs": "costs.json"}}}.

The first command starts one rank per GPU, or two ranks on a machine without GPUs. The second one measures a job on
several nodes. All ranks time FBGEMM's lookups and updates at once, for tables of several sizes, widths and bag sizes;
the seconds are linear in ids, rows and bytes. The all-to-all is timed inside the nodes, between them if there are
several, and from four ranks on also with small messages. A rate that the job cannot measure stays at the project's
default, and `source` in the file says so.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that `python tools/calibrate_costs.py` finds tools.bench

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from functools import partial

import torch
import torch.distributed as dist

from dhen.runtime import topology as job
from dhen.runtime.topology import Topology
from dhen.tables.lookup import make_lookup
from dhen.tables.placement.costs import Costs, StepSetting, Work, WorkRate, lookup_work, read_costs, update_work
from dhen.tables.updated_tables import TableUpdate, UpdatedTables
from tools.bench.clock import largest, median_seconds, now
from tools.bench.launch import argument_parser, is_rank, run_ranks
from tools.bench.report import print_table

BATCH = 4096
TABLES = 4
"""Tables per lookup. A rank has several too, so the fixed cost of a call is shared."""
GRID = tuple(itertools.product((1_000, 300_000), (4, 16, 64), (1, 10)))
"""Rows, columns and ids per bag of the timed tables."""
SECONDS_PER_TABLE = 0.3
"""No round of a table begins after this time, so that all tables together take well under a minute."""
OPTIMIZERS = ("rowwise_adagrad", "adagrad", "sgd")
PRECISIONS = (("fp32", "nearest"), ("fp16", "nearest"), ("fp16", "stochastic"))
"""Dtypes of the tables, and how updates are rounded."""
EXCHANGE_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Sample:
    """One timed table, and the work in which its seconds are linear."""

    rows: int
    columns: int
    work: Work
    seconds: float


def main() -> int:
    """Measure, print, write."""
    arguments = parse_arguments()
    if not is_rank():
        run_ranks(torch.cuda.device_count() or 2)
        return 0
    start, topology = time.perf_counter(), job.start()
    lookup, update = {}, {}
    for dtype, rounding in PRECISIONS:
        for optimizer in OPTIMIZERS:
            setting = StepSetting(1, 1, BATCH, optimizer, dtype, table_rounding=rounding)
            lookups, updates = time_tables(topology, setting, arguments.rounds)
            update[setting.update_key] = fit_and_show(f"update, {setting.update_key}", updates, topology)
        if rounding == "nearest":
            lookup[dtype] = fit_and_show(f"lookup, {dtype}", lookups, topology)
    default = read_costs("gpu" if topology.device.type == "cuda" else "cpu")
    links, not_measured = with_defaults(time_links(topology, arguments.rounds), default)
    messages = time_messages(topology, arguments.rounds)
    if messages is None:
        messages = default.seconds_per_exchange, default.seconds_per_message
        not_measured += "; not measured, with fewer than 4 ranks or an odd number: seconds_per_exchange and _message"
    nodes = topology.world_size // topology.local_size
    costs = Costs(
        machine=arguments.machine or f"{platform.machine()}, {topology.device.type}",
        source=f"tools/calibrate_costs.py; ranks on each of {nodes} nodes: {topology.local_size}{not_measured}",
        lookup=lookup,
        update=update,
        intra_node_bytes_per_second=links[0],
        inter_node_bytes_per_second=links[1],
        seconds_per_exchange=messages[0],
        seconds_per_message=messages[1],
    )
    if topology.is_main:
        costs.save(Path(arguments.output))
        print(json.dumps(asdict(costs), indent=2))
        seconds = time.perf_counter() - start
        print(f"{arguments.output} has the costs, measured in {seconds:.0f} seconds", file=sys.stderr)
    job.stop()
    return 0


def with_defaults(measured: tuple[float | None, float | None], default: Costs) -> tuple[tuple[float, float], str]:
    """Bytes per second inside a node and between nodes, and a note for `source` about rates that were not measured.

    Such a rate is the default's, but a link between nodes is never faster than one inside a node.
    """
    intra, inter = measured
    unmeasured = [name for name, rate in (("intra_node", intra), ("inter_node", inter)) if rate is None]
    note = f"; not measured: {' and '.join(unmeasured)}_bytes_per_second" if unmeasured else ""
    if intra is None:
        intra = max(default.intra_node_bytes_per_second, inter or 0.0)
    if inter is None:
        inter = min(default.inter_node_bytes_per_second, intra)
    return (intra, inter), note


def time_tables(topology: Topology, setting: StepSetting, rounds: int) -> tuple[list[Sample], list[Sample]]:
    """Lookups and updates over GRID: the slowest rank's medians. Communicates; all ranks call it."""
    lookups, updates = [], []
    for rows, columns, ids_per_bag in GRID:
        ids = BATCH * ids_per_bag
        forward, backward = time_table(topology, rows, columns, ids_per_bag, setting, rounds)
        lookups.append(Sample(rows, columns, lookup_work(ids, BATCH, rows, columns, setting), forward))
        updates.append(Sample(rows, columns, update_work(ids, BATCH, rows, columns, setting), backward))
    return lookups, updates


def time_table(
    topology: Topology, rows: int, columns: int, ids_per_bag: int, setting: StepSetting, rounds: int
) -> tuple[float, float]:
    """Seconds of one table's lookup, and of its backward with update. Communicates; all ranks call it."""
    optimizer, rounds_up_and_down = setting.optimizer, setting.update_key.endswith("rounded")
    sizes, dtype = [(rows, columns)] * TABLES, setting.table_dtype
    lookup = make_lookup(sizes, topology.device, optimizer, dtype, rounds_stochastically=rounds_up_and_down)
    lookup.set_learning_rate(0.01)
    look_up = lookup
    if rounds_up_and_down and topology.device.type == "cpu":
        look_up = UpdatedTables(lookup, TableUpdate(optimizer))
        look_up.learning_rates = (0.01, 0.01)
    states = [state for of_table in lookup.split_optimizer_states() for state in of_table] if optimizer != "sgd" else []
    for tensor in [*lookup.split_embedding_weights(), *states]:
        tensor.fill_(0.01)  # the system provides memory only when it is written
    offsets = torch.arange(0, TABLES * BATCH * ids_per_bag + 1, ids_per_bag, device=topology.device)
    forward, backward = [], []
    begin = time.perf_counter()
    for _ in range(rounds + 1):  # the first round warms up
        ids = torch.randint(0, rows, (TABLES * BATCH * ids_per_bag,), device=topology.device)
        if largest(topology, time.perf_counter() - begin) > SECONDS_PER_TABLE and forward[1:]:
            break
        start = now(topology.device)
        pooled = look_up(ids, offsets)
        middle = now(topology.device)
        pooled.backward(pooled.detach())
        backward.append(now(topology.device) - middle)
        forward.append(middle - start)
    looking_up, updating = largest(topology, [statistics.median(forward[1:]), statistics.median(backward[1:])])
    return looking_up / TABLES, updating / TABLES


def fit(samples: Sequence[Sample]) -> WorkRate:
    """The rates, none negative, with the smallest relative errors: least squares over each choice of positive rates."""
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


def fit_and_show(title: str, samples: Sequence[Sample], topology: Topology) -> WorkRate:
    """The rates that fit the samples; rank 0 prints how well they do."""
    rate = fit(samples)
    if topology.is_main:
        rows = []
        for sample in samples:
            expected = rate.seconds(sample.work)
            size = (f"{sample.rows:,}", str(sample.columns), f"{sample.work.ids:,}", f"{1e3 * sample.seconds:.3f}")
            rows.append([*size, f"{1e3 * expected:.3f}", f"{expected / sample.seconds - 1:+.0%}"])
        print(title, file=sys.stderr)
        print_table(("rows", "columns", "ids", "ms", "by the rates", "off by"), rows, file=sys.stderr)
    return rate


def time_messages(topology: Topology, rounds: int) -> tuple[float, float] | None:
    """Seconds of an all-to-all of small messages: for itself, and for each other rank. None without several of them.

    Two sizes tell them apart: all ranks, and pairs. Communicates; all ranks call it.
    """
    ranks = topology.world_size
    if ranks < 4 or ranks % 2:
        return None
    pair = topology.shard_groups(2).shard

    def seconds(group: dist.ProcessGroup, size: int) -> float:
        sent = torch.zeros(size, device=topology.device)
        received = torch.empty_like(sent)
        exchange = partial(dist.all_to_all_single, received, sent, group=group)
        return largest(topology, median_seconds(exchange, topology, rounds))

    of_two, of_all = seconds(pair, 2), seconds(topology.world, ranks)
    message = min(max(0.0, (of_all - of_two) / (ranks - 2)), of_two)
    return of_two - message, message


def time_links(topology: Topology, rounds: int) -> tuple[float | None, float | None]:
    """Bytes per second that a rank sends inside its node and to other nodes; None without a receiver. Communicates."""
    if topology.local_size in (1, topology.world_size):
        rate = time_all_to_all(topology, topology.world, topology.world_size, rounds)
        return (None, rate) if topology.local_size == 1 else (rate, None)
    groups = topology.shard_groups(topology.local_size)
    inside = time_all_to_all(topology, groups.shard, groups.shard_size, rounds)
    return inside, time_all_to_all(topology, groups.replica, groups.num_replicas, rounds)


def time_all_to_all(topology: Topology, group: dist.ProcessGroup, size: int, rounds: int) -> float | None:
    """Bytes per second that the group's slowest rank sends to the others; None for a group of one. Communicates."""
    if size == 1:
        return None
    sent = torch.zeros(EXCHANGE_BYTES // 4 // size * size, device=topology.device)
    received = torch.empty_like(sent)
    seconds = median_seconds(lambda: dist.all_to_all_single(received, sent, group=group), topology, rounds)
    return sent.numel() * 4 * (size - 1) / size / largest(topology, seconds)


def parse_arguments() -> argparse.Namespace:
    """The command line, which the ranks get too."""
    parser = argument_parser(__doc__)
    parser.add_argument("--output", default="costs.json", help="JSON file to write")
    parser.add_argument("--machine", help="name of the machine in the file")
    parser.add_argument("--rounds", type=int, default=5, help="timed repetitions per table")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
