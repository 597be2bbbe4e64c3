"""The systems of tools/bench/tables.py. Each looks up a batch's ids, and updates its tables in the backward."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from dhen.config.dhen_section import DhenSection
from dhen.model.configuration_dhen import SparseFeature
from dhen.model.features import SparseIds
from dhen.runtime.topology import Topology
from dhen.tables.id_exchange import lengths_of
from dhen.tables.placement.costs import StepSetting, read_costs
from dhen.tables.placement.plan import PlacementOptions, place_tables
from dhen.tables.pooled_exchange import Wires
from dhen.tables.sharded_tables import ShardedTables
from dhen.tables.wire import Wire
from tools.bench.small_work import NUM_DENSE, TABLE_LEARNING_RATE, small_dhen

CRITEO = (
    1460, 583, 10_131_227, 2_202_608, 305, 24, 12_517, 633, 3, 93_145, 5_683, 8_351_593, 3_194, 27, 14_992, 5_461_306,
    10, 5_652, 2_173, 4, 7_046_547, 18, 15, 286_181, 105, 142_572,
)  # fmt: skip
"""Rows of the 26 tables of the Criteo Kaggle data."""
FP16, ROUNDED = "ours fp16", "ours fp16 rounded"
OURS = {
    "ours": {},
    FP16: {"table_dtype": "fp16", "table_rounding": "nearest"},
    ROUNDED: {"table_dtype": "fp16", "table_rounding": "stochastic"},
    "ours fp16 wire": {"all_to_all_dtype": "fp16"},
}
TORCHREC, EMBEDDING_BAG = "torchrec", "embedding bag"
OPTIMIZER = {EMBEDDING_BAG: "adagrad"}
"""The other systems have row-wise Adagrad, which torch does not have."""


@dataclass(frozen=True)
class Case:
    """The lookups that are timed. batch_size: examples per rank."""

    ranks: int
    dim: int
    ids_per_bag: int
    batch_size: int
    max_rows: int

    @property
    def tables(self) -> tuple[SparseFeature, ...]:
        """Criteo's tables, with at most max_rows rows."""
        return tuple(SparseFeature(f"C{i}", min(rows, self.max_rows)) for i, rows in enumerate(CRITEO))


Step = tuple[Callable[[SparseIds], Tensor], Callable[[Tensor], None]]
"""A forward, from ids to embeddings or a loss, and a backward that also updates the tables."""


def build(system: str, case: Case, topology: Topology, *, whole_step: bool = False) -> Step:
    """The step of a system. whole_step: with a dense part on the tables. Communicates; all ranks call it."""
    if system in OURS:
        return (build_training if whole_step else build_ours)(case, topology, **OURS[system])
    return {TORCHREC: build_torchrec, EMBEDDING_BAG: build_embedding_bag}[system](case, topology)


def build_ours(case: Case, topology: Topology, **options: Any) -> Step:
    """This project's tables."""
    dtype, wire = options.get("table_dtype", "fp32"), Wire(options.pop("all_to_all_dtype", "fp32"))
    setting = StepSetting(topology.world_size, topology.local_size, case.batch_size, table_dtype=dtype)
    ids = dict.fromkeys((table.name for table in case.tables), float(case.ids_per_bag))
    costs = read_costs("gpu" if topology.device.type == "cuda" else "cpu")
    placement = place_tables(case.tables, case.dim, setting, costs, ids, PlacementOptions(max_column_shards=1))
    tables = ShardedTables(case.tables, case.dim, placement, topology, wires=Wires(wire, wire), **options)
    tables.set_learning_rate(TABLE_LEARNING_RATE)
    return tables, lambda embeddings: embeddings.backward(torch.ones_like(embeddings))


def build_training(case: Case, topology: Topology, **options: Any) -> Step:
    """This project's tables under a DHEN of two layers: whole training steps, with random labels."""
    section = DhenSection(**options)
    model = small_dhen(case.tables, case.batch_size, topology, section, embedding_dim=case.dim, num_layers=2)
    dense_BN = torch.randn(case.batch_size, NUM_DENSE, device=topology.device)
    labels_B = torch.rand(case.batch_size, device=topology.device).round()

    def forward(sparse: SparseIds) -> Tensor:
        logits_B = model.score(model.look_up(sparse), dense_BN, sparse)
        return binary_cross_entropy_with_logits(logits_B, labels_B)

    return forward, model.step


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
