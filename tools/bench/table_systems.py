"""The systems of tools/bench/tables.py. Each looks up a batch's ids, and updates its tables in the backward."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from dhen.model.configuration_dhen import SparseFeature
from dhen.model.features import SparseIds
from dhen.runtime.topology import Topology
from dhen.tables.id_exchange import lengths_of
from dhen.tables.placement.costs import StepSetting, read_costs
from dhen.tables.placement.packing import longest_first
from dhen.tables.placement.plan import Placement, PlacementOptions, place_tables
from dhen.tables.pooled_exchange import Wires
from dhen.tables.sharded_tables import ShardedTables
from dhen.tables.wire import Wire
from tools.bench.small_work import TABLE_LEARNING_RATE

CRITEO = (
    1460, 583, 10_131_227, 2_202_608, 305, 24, 12_517, 633, 3, 93_145, 5_683, 8_351_593, 3_194, 27, 14_992, 5_461_306,
    10, 5_652, 2_173, 4, 7_046_547, 18, 15, 286_181, 105, 142_572,
)  # fmt: skip
"""Rows of the 26 tables of the Criteo Kaggle data."""
OURS = {
    "ours": {},
    "ours fp16": {"table_dtype": "fp16", "table_rounding": "nearest"},
    "ours fp16 rounded": {"table_dtype": "fp16", "table_rounding": "stochastic"},
    "ours fp16 wire": {"all_to_all_dtype": "fp16"},
    "ours cut": {"placed": "cut"},
    "ours by size": {"placed": "by size"},
    "ours round-robin": {"placed": "round-robin"},
}
"""This project's tables: placed by cost, and none cut, if it is not said otherwise."""
TORCHREC, EMBEDDING_BAG = "torchrec", "embedding bag"


@dataclass(frozen=True)
class Case:
    """The lookups that are timed. ids_per_bag: of all tables, or several that the tables take in turn. batch_size:
    examples per rank.
    """

    ranks: int
    dim: int
    ids_per_bag: int | tuple[int, ...]
    batch_size: int
    max_rows: int

    @property
    def tables(self) -> tuple[SparseFeature, ...]:
        """Criteo's tables, with at most max_rows rows."""
        return tuple(SparseFeature(f"C{i}", min(rows, self.max_rows)) for i, rows in enumerate(CRITEO))

    @property
    def ids_in_turn(self) -> tuple[int, ...]:
        """Ids per bag that the tables take in turn."""
        return (self.ids_per_bag,) if isinstance(self.ids_per_bag, int) else self.ids_per_bag

    @property
    def bag_sizes(self) -> list[int]:
        """Ids per bag of each table."""
        return [size for size, _ in zip(cycle(self.ids_in_turn), CRITEO, strict=False)]


Step = tuple[Callable[[SparseIds], Tensor], Callable[[Tensor], None]]
"""A forward, from ids to embeddings, and a backward that also updates the tables."""


def build(system: str, case: Case, topology: Topology) -> Step:
    """The step of a system. Communicates; all ranks call it."""
    if system in OURS:
        return build_ours(case, topology, **OURS[system])
    return {TORCHREC: build_torchrec, EMBEDDING_BAG: build_embedding_bag}[system](case, topology)


def placement(
    case: Case, local_size: int, costs: str, *, placed: str = "by cost", table_dtype: str = "fp32"
) -> Placement:
    """Which rank holds which table. placed: how that is decided, as in OURS. costs: as `read_costs` takes them."""
    names = [table.name for table in case.tables]
    ranks = {
        "by size": longest_first([table.num_embeddings for table in case.tables], case.ranks),
        "round-robin": [index % case.ranks for index in range(len(names))],
    }
    options = PlacementOptions(max_column_shards=1)
    if placed == "cut":
        options = PlacementOptions()
    elif placed in ranks:
        options = PlacementOptions(by_hand={name: [rank] for name, rank in zip(names, ranks[placed], strict=True)})
    setting = StepSetting(case.ranks, local_size, case.batch_size, table_dtype=table_dtype)
    ids = dict(zip(names, map(float, case.bag_sizes), strict=True))
    return place_tables(case.tables, case.dim, setting, read_costs(costs), ids, options)


def build_ours(
    case: Case, topology: Topology, *, placed: str = "by cost", all_to_all_dtype: str = "fp32", **options: Any
) -> Step:
    """This project's tables."""
    costs, wire = "gpu" if topology.device.type == "cuda" else "cpu", Wire(all_to_all_dtype)
    dtype = options.get("table_dtype", "fp32")
    plan = placement(case, topology.local_size, costs, placed=placed, table_dtype=dtype)
    tables = ShardedTables(case.tables, case.dim, plan, topology, wires=Wires(wire, wire), **options)
    tables.set_learning_rate(TABLE_LEARNING_RATE)
    return tables, lambda embeddings: embeddings.backward(torch.ones_like(embeddings))


def build_torchrec(case: Case, topology: Topology) -> Step:
    """TorchRec's DistributedModelParallel with table-wise sharding; its planner chooses the ranks."""
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
    fused = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": TABLE_LEARNING_RATE, "eps": 1e-8}
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
        return model(KeyedJaggedTensor(names, sparse.ids, lengths=lengths_of(sparse).reshape(-1))).values()

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
    optimizer = torch.optim.Adagrad(model.parameters(), lr=TABLE_LEARNING_RATE, eps=1e-8)

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
