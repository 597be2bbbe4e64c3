"""Sharded tables equal plain ones: any bags, uneven batches, more ranks than tables; in forward and after updates."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dhen.model.configuration_dhen import SparseFeature
from dhen.model.features import SparseIds, init_table
from dhen.parallel.placement import place_tables
from dhen.parallel.sharded_tables import ADAGRAD_EPSILON, ShardedTables
from dhen.parallel.table_storage import TableStorageError, load_tables, save_tables
from dhen.parallel.topology import Topology
from tests.ranks import run_ranks

DIM, SEED, LEARNING_RATE, STEPS = 8, 5, 0.3, 4
TABLES = (SparseFeature("sums", 40), SparseFeature("means", 9, "mean"), SparseFeature("more", 25))
WORLD_SIZES = (1, 2, 4)  # 4 is more than there are tables
KINDS = ("single", "bags", "weighted")


class Reference:
    """All tables as plain tensors; bags by a loop over rows; each optimizer by its formula."""

    def __init__(self) -> None:
        columns = range(DIM)
        self.weights = [init_table(t.name, t.num_embeddings, DIM, columns, SEED).requires_grad_(True) for t in TABLES]
        self.sums = [torch.zeros_like(weight) for weight in self.weights]

    def look_up(self, sparse: SparseIds) -> Tensor:
        batch = sparse.batch_size
        lengths = sparse.lengths_FB if sparse.lengths_FB is not None else torch.ones(len(TABLES), batch).long()
        weights = sparse.weights if sparse.weights is not None else torch.ones(sparse.ids.numel())
        ends = lengths.flatten().cumsum(0)
        rows = []
        for bag, end in enumerate(ends.tolist()):
            first = end - int(lengths.flatten()[bag])
            feature = TABLES[bag // batch]
            table = self.weights[bag // batch]
            pooled = (table[sparse.ids[first:end]] * weights[first:end, None]).sum(0)
            rows.append(pooled / max(end - first, 1) if feature.pooling == "mean" else pooled)
        return torch.stack(rows).view(len(TABLES), batch, DIM).transpose(0, 1)

    @torch.no_grad()
    def update(self, optimizer: str) -> None:
        for weight, total in zip(self.weights, self.sums, strict=True):
            grad = weight.grad
            if optimizer == "sgd":
                weight -= LEARNING_RATE * grad
            else:
                # Row-wise Adagrad keeps the mean square of a row's gradient, Adagrad each square.
                total += grad.square() if optimizer == "adagrad" else grad.square().mean(1, keepdim=True)
                weight -= LEARNING_RATE * grad / (total.sqrt() + ADAGRAD_EPSILON)
            weight.grad = None


def rank_sizes(step: int, world_size: int) -> list[int]:
    """Rows of each rank: even in step 0, uneven later, none on the last rank in step 2."""
    if step == 0:
        return [6] * world_size
    sizes = [5 + (rank + step) % 3 for rank in range(world_size)]
    return [*sizes[:-1], 0] if step == 2 and world_size > 1 else sizes


def batch_of(kind: str, step: int, rank: int, size: int) -> SparseIds:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    if kind == "single":
        lengths_FB = None
        counts = [size] * len(TABLES)
    else:
        lengths_FB = torch.randint(0, 4, (len(TABLES), size), generator=generator)  # empty bags too
        counts = lengths_FB.sum(1).tolist()
    ids = [
        torch.randint(0, t.num_embeddings, (count,), generator=generator)
        for t, count in zip(TABLES, counts, strict=True)
    ]
    weights = torch.rand(sum(counts), generator=generator) if kind == "weighted" else None
    return SparseIds(torch.cat(ids), len(TABLES), lengths_FB, weights)


def target_of(step: int, rank: int, size: int) -> Tensor:
    return torch.randn(size, len(TABLES), DIM, generator=torch.Generator().manual_seed(99 + 1000 * step + rank))


def make_tables(topology: Topology, optimizer: str) -> ShardedTables:
    placement = place_tables(TABLES, DIM, topology.world_size)
    tables = ShardedTables(TABLES, DIM, placement, topology, optimizer=optimizer, seed=SEED)
    tables.set_learning_rate(LEARNING_RATE)
    return tables


def train_sharded(topology: Topology, kind: str, optimizer: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """This rank's looked-up embeddings of each step, and its tables in the end. Loss: sum of embeddings * target."""
    tables = make_tables(topology, optimizer)
    outputs = []
    for step in range(STEPS):
        size = rank_sizes(step, topology.world_size)[topology.rank]
        embeddings_BFD = tables(batch_of(kind, step, topology.rank, size))
        outputs.append(embeddings_BFD.detach().clone())
        (embeddings_BFD * target_of(step, topology.rank, size)).sum().backward()
    return outputs, {shard.name: tensors["weight"].clone() for shard, tensors in tables.shard_tensors()}


def train_all(topology: Topology) -> dict[tuple[str, str], tuple[list[Tensor], dict[str, Tensor]]]:
    kinds = [(kind, "sgd") for kind in KINDS] + [("bags", "adagrad"), ("bags", "rowwise_adagrad")]
    return {(kind, optimizer): train_sharded(topology, kind, optimizer) for kind, optimizer in kinds}


@functools.cache
def sharded(world_size: int) -> list[dict[tuple[str, str], tuple[list[Tensor], dict[str, Tensor]]]]:
    return run_ranks(world_size, train_all)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(
    ("kind", "optimizer"), [*((kind, "sgd") for kind in KINDS), ("bags", "adagrad"), ("bags", "rowwise_adagrad")]
)
def test_lookups_and_updates_equal_the_formula(world_size, kind, optimizer):
    reference = Reference()
    by_rank = [of_rank[kind, optimizer] for of_rank in sharded(world_size)]
    for step in range(STEPS):
        losses = []
        for rank, size in enumerate(rank_sizes(step, world_size)):
            expected = reference.look_up(batch_of(kind, step, rank, size)) if size else torch.empty(0, len(TABLES), DIM)
            torch.testing.assert_close(by_rank[rank][0][step], expected, atol=1e-5, rtol=1e-5)
            losses.append((expected * target_of(step, rank, size)).sum())
        # The bridge averages over ranks, as DeepSpeed does the dense gradients.
        (sum(losses) / world_size).backward()
        reference.update(optimizer)
    final = {name: weight for _, tables in by_rank for name, weight in tables.items()}
    for table, weight in zip(TABLES, reference.weights, strict=True):
        torch.testing.assert_close(final[table.name], weight.detach(), atol=1e-5, rtol=1e-5)


def try_bad_ids(topology: Topology) -> list[str]:
    tables = make_tables(topology, "sgd")
    messages = []
    bad = [
        SparseIds(torch.tensor([39, 1, 8, 9, 24, 0]), 3),
        SparseIds(torch.tensor([39, -1, 8, 2, 24, 0]), 3),
        SparseIds(torch.tensor([1, 2, 3, 25]), 3, torch.tensor([[2, 0], [0, 1], [0, 1]])),
        SparseIds(torch.tensor([1, 2]), 2),
    ]
    for sparse in bad:
        with pytest.raises((IndexError, ValueError)) as caught:
            tables(sparse)
        messages.append(str(caught.value))
    return messages


def test_an_id_outside_its_table_is_named_and_never_looked_up():
    (messages,) = run_ranks(1, try_bad_ids)
    assert "'means', row 1" in messages[0]
    assert "id 9" in messages[0]
    assert "ids 0 to 8" in messages[0]
    assert "'sums', row 1" in messages[1]
    assert "id -1" in messages[1]
    assert "'more', row 1" in messages[2]
    assert "2 sparse features, the model 3" in messages[3]


def save_after_training(topology: Topology, folder, optimizer: str) -> None:
    tables = make_tables(topology, optimizer)
    for step in range(2):
        (tables(batch_of("bags", step, topology.rank, 6)) * target_of(step, topology.rank, 6)).sum().backward()
    save_tables(tables, folder, topology.rank)
    dist.barrier()


def load_and_read(topology: Topology, folder, optimizer: str) -> dict[str, dict[str, Tensor]]:
    tables = make_tables(topology, optimizer)
    load_tables(tables, folder)
    return {
        shard.name: {kind: tensor.clone() for kind, tensor in tensors.items()}
        for shard, tensors in tables.shard_tensors()
    }


def merged(by_rank: list[dict]) -> dict:
    return {name: tensors for of_rank in by_rank for name, tensors in of_rank.items()}


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "sgd"])
def test_saved_tables_load_at_any_number_of_ranks(tmp_path, optimizer):
    run_ranks(2, save_after_training, tmp_path, optimizer)
    same = merged(run_ranks(2, load_and_read, tmp_path, optimizer))
    initial = init_table("sums", 40, DIM, range(DIM), SEED)
    assert not torch.equal(same["sums"]["weight"], initial), "nothing was trained, so this shows nothing"
    for world_size in (1, 3):
        other = merged(run_ranks(world_size, load_and_read, tmp_path, optimizer))
        assert other.keys() == same.keys()
        for name, tensors in same.items():
            for kind, tensor in tensors.items():
                assert torch.equal(other[name][kind], tensor), (name, kind)


def load_fails(topology: Topology, folder, optimizer: str) -> str:
    with pytest.raises(TableStorageError) as caught:
        load_and_read(topology, folder, optimizer)
    return str(caught.value)


def test_tables_of_another_optimizer_are_refused(tmp_path):
    run_ranks(1, save_after_training, tmp_path, "sgd")
    (message,) = run_ranks(1, load_fails, tmp_path, "adagrad")
    assert "'sgd'" in message
    assert "'adagrad'" in message
    assert str(tmp_path) in message
