"""What an exchange costs the host at many ranks: operations, waits for the device, and the order of its collectives.

torch's own "fake" process group stands for up to 256 ranks: its collectives do nothing. The tensors are on the meta
device. They have no values, so whatever reads one back raises.
"""

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from dhen.model.configuration_dhen import DhenConfig
from dhen.model.features import PlainTables, SparseIds
from dhen.model.sparse_feature import SparseFeature
from dhen.runtime.topology import Topology
from dhen.tables.id_exchange import IdExchange, OwnIds
from dhen.tables.placement.plan import TableShard
from dhen.tables.pooled_exchange import PooledExchange, PooledLayout, Wires
from dhen.tables.replicated import ReplicatedFeatures
from dhen.tables.wire import Wire
from tests.ranks import run_ranks
from tests.tables.test_sharded_tables import CUT, batch_of, make_tables, target_of

WORLD_SIZES = (2, 8, 64, 256)
FEATURES, DIM, BATCH = 512, 16, 4
META = torch.device("meta")
MOST = {"fp32": (4, 6), "bf16": (6, 8), "fp16": (9, 13), "int8": (23, 25)}
"""Operations of the exchange of embeddings, forward and backward."""


class Operations(TorchDispatchMode):
    """Records the operations that make no view."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and function.namespace != "profiler":
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def many_ranks(world_size: int) -> Iterator[Topology]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield Topology(0, world_size, 0, world_size, META, dist.group.WORLD, timedelta(minutes=1))
    finally:
        dist.destroy_process_group()


def random_shards(world_size: int, *, cut: bool) -> list[list[TableShard]]:
    """Shards by rank. If cut, every third table is in two parts of unequal widths."""
    generator = random.Random(0)
    by_rank: list[list[TableShard]] = [[] for _ in range(world_size)]
    for table in range(FEATURES):
        for first, last in [(0, 4), (4, DIM)] if cut and table % 3 == 0 else [(0, DIM)]:
            rank = generator.randrange(world_size)
            by_rank[rank].append(TableShard(table, f"C{table}", 10, first, last, rank))
    return [sorted(shards, key=lambda shard: shard.num_columns) for shards in by_rank]


def operations_of_embeddings(world_size: int, dtype: str, *, cut: bool) -> tuple[int, int]:
    with many_ranks(world_size) as topology:
        layout = PooledLayout(
            random_shards(world_size, cut=cut), FEATURES, DIM, 0, Wires(Wire(dtype), Wire(dtype)), META
        )
        width = sum(layout.widths_by_rank[0])
        for _ in range(2):  # the first makes the indices
            exchange = PooledExchange(layout, BATCH, BATCH + 1, topology.world)
            pooled = torch.empty(world_size * (BATCH + 1), width, device=META, requires_grad=True)
            with Operations() as forward:
                embeddings_BFD = exchange.finish(exchange.start(pooled))
            with Operations() as backward:
                embeddings_BFD.backward(torch.empty_like(embeddings_BFD))
        return len(forward.names), len(backward.names)


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("dtype", MOST)
def test_operations_of_the_embeddings_exchange_do_not_grow_with_the_ranks(dtype, cut):
    counts = {operations_of_embeddings(world_size, dtype, cut=cut) for world_size in WORLD_SIZES}
    ((forward, backward),) = counts
    assert forward <= MOST[dtype][0]
    assert backward <= MOST[dtype][1]


def batch(kind: str, num_features: int) -> SparseIds:
    """On the meta device. It was on the host before, so it knows its counts."""
    if kind == "single":
        return SparseIds(torch.zeros(num_features * BATCH, dtype=torch.int64), num_features).to(META)
    lengths_FB = torch.randint(0, 4, (num_features, BATCH), generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(int(lengths_FB.sum()), dtype=torch.int64)
    return SparseIds(ids, num_features, lengths_FB, torch.ones(len(ids)) if kind == "weighted" else None).to(META)


def exchange_ids(exchange: IdExchange, sparse: SparseIds, topology: Topology) -> OwnIds:
    """Exchange as if all other ranks had sent the same."""
    sent = exchange.send(sparse)
    has_lengths = sparse.lengths_FB is not None
    sizes = torch.tensor([sparse.batch_size, has_lengths, has_lengths, sent.ids_to[0]])
    sent.sizes().view(topology.world_size, 4).copy_(sizes)
    exchange.depart()
    return exchange.receive(sent)


@pytest.mark.parametrize(("kind", "most"), [("single", 16), ("bags", 31), ("weighted", 31)])
def test_operations_of_the_ids_exchange_do_not_grow_with_the_ranks_and_read_nothing_back(kind, most):
    tables = [SparseFeature(f"C{table}", 10, pooling=("sum", "mean")[table % 2]) for table in range(FEATURES)]
    counts = set()
    for world_size in WORLD_SIZES:
        with many_ranks(world_size) as topology:
            exchange = IdExchange(tables, random_shards(world_size, cut=True), topology)
            sparse = batch(kind, FEATURES)
            with Operations() as operations:
                own = exchange_ids(exchange, sparse, topology)
            counts.add(len(operations.names))
            assert own.ids.device == META
    (count,) = counts
    assert count <= most


@pytest.mark.parametrize("kind", ["single", "bags", "weighted"])
def test_replicated_tables_read_nothing_back(kind):
    features = [{"name": f"C{table}", "num_embeddings": 10} for table in range(6)]
    config = DhenConfig(embedding_dim=DIM, sparse_features=features)
    with many_ranks(8) as topology:
        replicated = ReplicatedFeatures(config, ["C1", "C4"], topology)
        with META:
            tables = PlainTables(config, 0, ["C1", "C4"])
        sparse = batch(kind, 6)
        embeddings_BFD = tables(replicated.own(sparse))
        embeddings_BFD.sum().backward()
        assert embeddings_BFD.shape == (BATCH, 2, DIM)
        others = replicated.others(sparse)
        assert (others.num_features, sum(others.counts_F)) == (4, len(others.ids))


def test_a_value_that_is_read_back_raises():
    """The control of the tests above."""
    with pytest.raises(NotImplementedError):
        SparseIds(torch.zeros(4, dtype=torch.int64, device=META), 2, torch.ones(2, 2, dtype=torch.int64, device=META))
    order, lengths, ids = (torch.zeros(shape, dtype=torch.int32, device=META) for shape in (2, (2, 2), 4))
    with pytest.raises(RuntimeError):
        torch.ops.fbgemm.permute_2D_sparse_data(order, lengths, ids, None)


class Collectives(Operations):
    """Records this thread's collectives, with the group and the type of each."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            group = next(each for each in args if isinstance(each, torch.ScriptObject))
            group = dist.ProcessGroup.unbox(group).group_name
            self.names.append((function.__name__, group, next(t.dtype for t in args if isinstance(t, torch.Tensor))))
        return function(*args, **(kwargs or {}))


def collectives_of_steps(topology: Topology) -> list:
    """Of three steps with ids sent ahead, where one rank is late to each."""
    tables = make_tables(topology, "sgd", CUT)
    batches = [batch_of("bags", step, topology.rank, 6) for step in range(3)]
    with Collectives() as collectives:
        following = tables.send_ids(batches[0])
        for step in range(3):
            if topology.rank == step % 2:
                time.sleep(0.1)
            sent = following
            following = tables.send_ids(batches[step + 1]) if step < 2 else None
            (tables.look_up(sent)() * target_of(step, topology.rank, 6)).sum().backward()
    assert threading.active_count() == 1
    return collectives.names


def test_all_ranks_call_all_collectives_in_one_order_from_one_thread():
    first, second = run_ranks(2, collectives_of_steps)
    assert first == second
    assert len(first) == 3 * (1 + 3 + 2), "in each step: sizes; lengths, ids and weights; embeddings and gradients"
    assert len({group for _, group, _ in first}) == 2
