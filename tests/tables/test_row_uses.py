"""A row that training never used counts as the mean of its table's rows, weighted by their uses, however it is held."""

import functools

import pytest
import torch
from torch import Tensor

from dhen.model.features import SparseIds, init_table
from dhen.runtime.topology import Topology
from dhen.tables import row_uses
from dhen.tables.row_uses import RowUses, fill_unused, mean_row
from dhen.tables.storage import load_tables
from tests.ranks import run_ranks
from tests.tables.saving import save_tables
from tests.tables.test_sharded_tables import (
    CUT,
    DIM,
    KINDS,
    SEED,
    TABLES,
    WHOLE,
    Reference,
    batch_of,
    make_tables,
    rank_sizes,
)  # fmt: skip

CPU = torch.device("cpu")


def test_uses_are_counted_by_table_and_row():
    rows, generator = [5, 1, 40], torch.Generator().manual_seed(1)
    uses, expected = RowUses(rows, CPU), [torch.zeros(count, dtype=torch.int64) for count in rows]
    for _ in range(3):
        ids = [torch.randint(0, count, (7,), generator=generator) for count in rows]
        uses.add(torch.cat(ids).int(), torch.tensor([7, 7, 7]))
        expected = [total + of.bincount(minlength=len(total)) for total, of in zip(expected, ids, strict=True)]
    for table, counts in enumerate(expected):
        assert uses.of(table).tolist() == counts.tolist()
    is_unused = uses.is_unused(torch.arange(40), torch.tensor([0, 0, 40]))
    assert is_unused.tolist() == (expected[2] == 0).tolist()
    assert 0 < is_unused.sum() < 40


def test_counts_never_overflow_and_used_rows_stay_used(monkeypatch):
    monkeypatch.setattr(row_uses, "MOST_USES", 64)
    uses = RowUses([3], CPU)
    uses.add(torch.tensor([1]), torch.tensor([1]))
    for _ in range(100):
        uses.add(torch.tensor([0] * 8 + [2] * 4), torch.tensor([12]))
    unused, most = uses.of(0).tolist().count(0), max(uses.of(0).tolist())
    assert (unused, most <= 2 * 64) == (0, True)
    assert uses.of(0)[0] / uses.of(0)[2] == pytest.approx(2, rel=0.1)


def test_the_mean_is_weighted_by_the_uses():
    weight, uses = torch.randn(1000, 3), torch.randint(0, 4, (1000,), dtype=torch.int32)
    expected = (weight.double() * uses[:, None]).sum(0) / uses.sum()
    torch.testing.assert_close(mean_row(weight, uses), expected.float())
    filled = fill_unused(weight.clone(), uses)
    assert torch.equal(filled[uses > 0], weight[uses > 0])
    torch.testing.assert_close(filled[uses == 0], expected.float().expand(int((uses == 0).sum()), 3))
    assert not mean_row(weight, torch.zeros_like(uses)).any(), "no row was used"


def half_of(sparse: SparseIds) -> SparseIds:
    """The same bags, with even ids only, so that training leaves rows unused."""
    return SparseIds(sparse.ids // 2 * 2, sparse.num_features, sparse.lengths_FB, sparse.weights)


def evaluate(topology: Topology, kind: str, cuts: dict[str, int], folder=None) -> tuple:
    """Train on even ids, then look up all ids. Returns (embeddings, counts of unseen ids, weights afterwards)."""
    tables = make_tables(topology, "sgd", cuts)
    for step in range(2):
        size = rank_sizes(step, topology.world_size)[topology.rank]
        tables(half_of(batch_of(kind, step, topology.rank, size))).square().sum().backward()
    if folder is not None:
        save_tables(tables, folder, topology.rank)
        torch.distributed.barrier()
        tables = make_tables(topology, "sgd", cuts)
        load_tables(tables, folder, topology)
    before = [tensors["weight"].clone() for _, tensors in tables.shard_tensors()]
    batch = batch_of(kind, 3, topology.rank, rank_sizes(3, topology.world_size)[topology.rank])
    with torch.no_grad(), tables.watching_unseen(uses_means=True) as unseen:
        embeddings_BFD = tables(batch)
    with torch.no_grad():
        plain = tables(batch)
    after = [tensors["weight"] for _, tensors in tables.shard_tensors()]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True)), "an evaluation changes no weight"
    shards = [(s.name, s.first_column, s.last_column, t["weight"], t["uses"]) for s, t in tables.shard_tensors()]
    return embeddings_BFD, plain, unseen.counts_3S, shards


def evaluate_all(topology: Topology) -> dict[tuple[str, str], tuple]:
    cases = {"whole": WHOLE, "cut": CUT}
    return {(kind, name): evaluate(topology, kind, cuts) for kind in KINDS for name, cuts in cases.items()}


@functools.cache
def evaluated(world_size: int) -> list[dict[tuple[str, str], tuple]]:
    return run_ranks(world_size, evaluate_all)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", ["whole", "cut"])
def test_an_evaluation_looks_up_the_mean_for_unused_rows(world_size, kind, cut):
    assert_means(world_size, kind, [of_rank[kind, cut] for of_rank in evaluated(world_size)])


@pytest.mark.parametrize("cut", [WHOLE, CUT], ids=["whole", "cut"])
def test_saved_counts_are_loaded(tmp_path, cut):
    assert_means(2, "bags", run_ranks(2, evaluate, "bags", cut, tmp_path))


def assert_means(world_size: int, kind: str, by_rank: list[tuple]) -> None:
    reference, unused_rows = Reference(WHOLE), {}
    uses = dict.fromkeys([table.name for table in TABLES], 0)
    for step in range(2):
        for rank, size in enumerate(rank_sizes(step, world_size)):
            sparse = half_of(batch_of(kind, step, rank, size))
            counts = [size] * len(TABLES) if sparse.lengths_FB is None else sparse.lengths_FB.sum(1).tolist()
            for table, ids in zip(TABLES, sparse.ids.split(counts), strict=True):
                uses[table.name] = uses[table.name] + ids.bincount(minlength=table.num_embeddings)
    shards = [shard for of_rank in by_rank for shard in of_rank[3]]
    for index, table in enumerate(TABLES):
        pieces = sorted((s for s in shards if s[0] == table.name), key=lambda s: s[1])
        assert all(s[4].tolist() == uses[table.name].tolist() for s in pieces)
        weight, counts = torch.cat([s[3] for s in pieces], dim=1), uses[table.name]
        mean = (weight.double() * counts[:, None]).sum(0) / counts.sum()
        unused_rows[table.name] = counts == 0
        reference.weights[index] = torch.where(counts[:, None] == 0, mean.float(), weight)
        assert torch.equal(weight[counts == 0], init_table(table.name, len(counts), DIM, range(DIM), SEED)[counts == 0])
    expected_counts = torch.zeros(3, len(TABLES), dtype=torch.int64)
    for rank, size in enumerate(rank_sizes(3, world_size)):
        sparse = batch_of(kind, 3, rank, size)
        torch.testing.assert_close(by_rank[rank][0], reference.look_up(sparse), atol=1e-6, rtol=1e-5)
        counts = [size] * len(TABLES) if sparse.lengths_FB is None else sparse.lengths_FB.sum(1).tolist()
        for index, ids in enumerate(sparse.ids.split(counts)):
            is_unused = unused_rows[TABLES[index].name][ids]
            expected_counts[:, index] += torch.tensor([len(ids), is_unused.sum(), (is_unused & (ids == 0)).sum()])
    assert any((with_means - plain).abs().max() > 0.01 for with_means, plain, *_ in by_rank if len(plain))
    assert expected_counts[1].min() > 0
    for index, table in enumerate(TABLES):
        found = {tuple(of_rank[2][:, place].tolist()) for of_rank in by_rank for place in places(of_rank, table.name)}
        assert found == {tuple(expected_counts[:, index].tolist())}


def places(of_rank: tuple, name: str) -> list[int]:
    """Which of a rank's shards are of this table."""
    return [place for place, shard in enumerate(of_rank[3]) if shard[0] == name]


def evaluate_fp16(topology: Topology) -> tuple[Tensor, Tensor]:
    tables = make_tables(topology, "sgd", table_dtype="fp16")
    tables(half_of(batch_of("single", 0, 0, 6))).square().sum().backward()
    with torch.no_grad(), tables.watching_unseen(uses_means=True):
        found = tables(SparseIds(torch.tensor([39, 7, 23]), 3))
    return found[0], torch.stack(tables.means())


def test_the_mean_of_fp16_rows_is_that_of_an_exported_model():
    ((found, means),) = run_ranks(1, evaluate_fp16)
    torch.testing.assert_close(found, means, rtol=0, atol=0)
    assert torch.equal(means, means.half().float())
