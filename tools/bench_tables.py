"""Embedding tables by themselves: this project's, TorchRec's, and nn.EmbeddingBag under DDP, interleaved in one run.

    pip install -e '.[bench]' && pip install --no-deps torchrec==1.8.0
    python tools/bench_tables.py --ranks 1 2 4 --dims 16 64 128

Twenty-six tables of Criteo's sizes, capped at --max_rows so that EmbeddingBag's copies on every rank fit; a step looks
ids up and sends back a gradient of ones, and the optimizer (row-wise Adagrad; Adagrad for EmbeddingBag, which has no
row-wise) updates the tables. The dense model is left out, so nothing is there to overlap with. Ratios are of medians
over rounds; CPU time is that of all threads of all ranks. The bandwidth is that of the tables' own traffic over a plain
copy's on all ranks at once.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dhen.model.configuration_dhen import SparseFeature
from dhen.model.features import SparseIds
from dhen.parallel import topology as job
from dhen.parallel.collectives import Wires
from dhen.parallel.placement import PlacementOptions, place_tables
from dhen.parallel.sharded_tables import ShardedTables
from dhen.parallel.table_costs import StepSetting, lookup_work, read_costs, update_work
from dhen.parallel.topology import Topology
from dhen.parallel.wire import Wire

CRITEO = (
    1460, 583, 10_131_227, 2_202_608, 305, 24, 12_517, 633, 3, 93_145, 5_683, 8_351_593, 3_194, 27, 14_992, 5_461_306,
    10, 5_652, 2_173, 4, 7_046_547, 18, 15, 286_181, 105, 142_572,
)  # fmt: skip
"""Rows of the Criteo Kaggle data's tables."""
LEARNING_RATE = 0.01
OURS = {
    "ours": {},
    "ours fp16": {"table_dtype": "fp16", "table_rounding": "nearest"},
    "ours fp16 rounded": {"table_dtype": "fp16", "table_rounding": "stochastic"},
    "ours fp16 wire": {"wires": Wires(Wire("fp16"), Wire("fp16"))},
}


@dataclass(frozen=True)
class Case:
    """What is looked up. batch_size: of a rank."""

    ranks: int
    dim: int
    ids_per_bag: int
    batch_size: int
    max_rows: int

    @property
    def tables(self) -> tuple[SparseFeature, ...]:
        """Criteo's, capped."""
        return tuple(SparseFeature(f"C{i}", min(rows, self.max_rows)) for i, rows in enumerate(CRITEO))


@dataclass(frozen=True)
class Measured:
    """One system in one case; seconds of each round, the slowest rank's. cpu_seconds: of all ranks together."""

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


Step = tuple[Callable[[SparseIds], Tensor], Callable[[Tensor], None]]
"""Forward: ids to embeddings; backward with the update: from their gradient."""


def build_ours(case: Case, topology: Topology, **options: Any) -> Step:
    """This project's tables."""
    dtype = options.get("table_dtype", "fp32")
    setting = StepSetting(topology.world_size, topology.local_size, case.batch_size, table_dtype=dtype)
    ids = dict.fromkeys((table.name for table in case.tables), float(case.ids_per_bag))
    costs = read_costs("gpu" if topology.device.type == "cuda" else "cpu")
    placement = place_tables(case.tables, case.dim, setting, costs, ids, PlacementOptions(max_column_shards=1))
    tables = ShardedTables(case.tables, case.dim, placement, topology, **options)
    tables.set_learning_rate(LEARNING_RATE)
    return tables, lambda embeddings: embeddings.backward(torch.ones_like(embeddings))


def build_torchrec(case: Case, topology: Topology) -> Step:
    """TorchRec's DistributedModelParallel, table-wise, its planner's own choice of ranks."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
    from torchrec.distributed import DistributedModelParallel
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.planner import EmbeddingShardingPlanner
    from torchrec.distributed.planner import Topology as PlannerTopology
    from torchrec.distributed.planner.types import ParameterConstraints

    device = topology.device
    collection = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=table.name, embedding_dim=case.dim, num_embeddings=table.num_embeddings, feature_names=[table.name]
            )
            for table in case.tables
        ],
        device=torch.device("meta"),
    )
    fused = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": LEARNING_RATE, "eps": 1e-8}
    sharder = EmbeddingBagCollectionSharder(fused_params=fused)
    planner = EmbeddingShardingPlanner(
        topology=PlannerTopology(
            world_size=topology.world_size, local_world_size=topology.local_size, compute_device=device.type
        ),
        batch_size=case.batch_size,
        constraints={table.name: ParameterConstraints(sharding_types=["table_wise"]) for table in case.tables},
    )
    plan = planner.collective_plan(collection, [sharder], topology.world)
    model = DistributedModelParallel(collection, device=device, plan=plan, sharders=[sharder])
    names = [table.name for table in case.tables]

    def forward(sparse: SparseIds) -> Tensor:
        lengths = sparse.lengths_FB
        if lengths is None:
            lengths = torch.ones(len(names), sparse.batch_size, dtype=torch.int64, device=device)
        return model(KeyedJaggedTensor(names, sparse.ids, lengths=lengths.reshape(-1))).values()

    return forward, lambda embeddings: embeddings.backward(torch.ones_like(embeddings))


def build_embedding_bag(case: Case, topology: Topology) -> Step:
    """nn.EmbeddingBag with sparse gradients under DistributedDataParallel: every rank has all tables."""

    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            bags = (nn.EmbeddingBag(table.num_embeddings, case.dim, mode="sum", sparse=True) for table in case.tables)
            self.bags = nn.ModuleList(bags)

        def forward(self, ids: tuple[Tensor, ...], offsets: tuple[Tensor, ...]) -> Tensor:
            return torch.stack([bag(*of_bag) for bag, *of_bag in zip(self.bags, ids, offsets, strict=True)], dim=1)

    model: nn.Module = Bags().to(topology.device)
    if topology.world_size > 1:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=LEARNING_RATE, eps=1e-8)

    def forward(sparse: SparseIds) -> Tensor:
        lengths = sparse.lengths_FB
        if lengths is None:
            offsets = (torch.arange(sparse.batch_size, device=topology.device),) * sparse.num_features
            return model(sparse.ids.view(sparse.num_features, -1).unbind(), offsets)
        return model(sparse.ids.split(lengths.sum(1).tolist()), (lengths.cumsum(1) - lengths).unbind())

    def backward(embeddings: Tensor) -> None:
        embeddings.backward(torch.ones_like(embeddings))
        optimizer.step()
        optimizer.zero_grad()

    return forward, backward


def measure(case: Case, systems: Sequence[str], rounds: int, topology: Topology) -> list[Measured]:
    """All systems, a step of each a round. Communicates; all ranks call it."""
    steps: dict[str, Step] = {}
    for system in systems:
        if system in OURS:
            steps[system] = build_ours(case, topology, **OURS[system])
        else:
            build = {"torchrec": build_torchrec, "embedding bag": build_embedding_bag}[system]
            steps[system] = build(case, topology)
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
        dtype = OURS.get(system, {}).get("table_dtype", "fp32")
        share = table_bytes(case, dtype) / statistics.median(result.seconds) / copied
        results.append(replace(result, bandwidth_share=share))
    return results


def table_bytes(case: Case, table_dtype: str) -> float:
    """Memory traffic of a step's lookups and updates on all ranks."""
    setting = StepSetting(case.ranks, case.ranks, case.batch_size, table_dtype=table_dtype)
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
    """One row a system and case; ratios over TorchRec where it ran."""
    table = Table(box=None, pad_edge=False)
    for column in ("ranks", "dim", "ids", "system", "x base", "from", "to", "forward", "backward", "CPU", "bandwidth"):
        table.add_column(column, justify="left" if column == "system" else "right")
    for result in results:
        case = result.case
        of_case = {other.system: other for other in results if other.case == case}
        base = of_case.get("torchrec") or of_case[min(of_case)]
        pairs = [
            (statistics.median(getattr(base, part)) / statistics.median(getattr(result, part)))
            for part in ("seconds", "forward", "backward", "cpu_seconds")
        ]
        by_round = sorted(b / own for b, own in zip(base.seconds, result.seconds, strict=True))
        whole, forward, backward, cpu = (f"{ratio:.2f}" for ratio in pairs)
        spread = (f"{by_round[0]:.2f}", f"{by_round[-1]:.2f}")
        cells = (str(case.ranks), str(case.dim), str(case.ids_per_bag), result.system, whole, *spread)
        table.add_row(*cells, forward, backward, cpu, f"{result.bandwidth_share:.0%}")
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    print("x base: speed over TorchRec's (median step), from-to over rounds; forward, backward, CPU time likewise")


def parse_arguments() -> argparse.Namespace:
    """The arguments; the ranks get the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    systems = [*OURS, "torchrec", "embedding bag"]
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks")
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 64, 128], help="embedding dimensions")
    parser.add_argument("--ids_per_bag", type=int, nargs="+", default=[1, 20], help="ids of each bag")
    parser.add_argument("--batch_size", type=int, default=4096, help="examples of a rank")
    parser.add_argument("--max_rows", type=int, default=100_000, help="cap of a table's rows")
    parser.add_argument("--rounds", type=int, default=9, help="measured steps of each system")
    parser.add_argument("--systems", nargs="+", default=systems, choices=systems, help="what is compared")
    parser.add_argument("--output", default="runs/bench_tables.json", help="the file to write")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def work(arguments: argparse.Namespace) -> None:
    """One rank's part, for its number of ranks."""
    topology = job.start()
    results = []
    for dim in arguments.dims:
        for ids_per_bag in arguments.ids_per_bag:
            case = Case(topology.world_size, dim, ids_per_bag, arguments.batch_size, arguments.max_rows)
            results += measure(case, arguments.systems, arguments.rounds, topology)
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
