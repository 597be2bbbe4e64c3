"""Sharded tables equal plain ones: any bags, uneven batches, more ranks than tables; in forward and after updates."""

import functools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dhen.config.dhen_section import TableDtype
from dhen.model.features import SparseIds, init_table
from dhen.model.sparse_feature import SparseFeature
from dhen.runtime.topology import Topology
from dhen.tables.placement.costs import StepSetting, read_costs
from dhen.tables.placement.plan import PlacementOptions, place_tables
from dhen.tables.pooled_exchange import Wires
from dhen.tables.sharded_tables import ShardedTables
from dhen.tables.storage import TableStorageError, load_tables
from dhen.tables.updated_tables import TableUpdate
from dhen.tables.wire import Wire
from tests.ranks import run_ranks
from tests.tables.saving import save_tables

DIM, SEED, LEARNING_RATE, STEPS = 8, 5, 0.3, 4
EPSILON, BETA1, BETA2, L2 = 1e-8, 0.9, 0.999, 0.05
UPDATES = {name: TableUpdate(name) for name in ("sgd", "adagrad", "rowwise_adagrad", "adam")}
UPDATES["adam with l2"] = TableUpdate("adam", l2=L2)
TABLES = (SparseFeature("sums", 40), SparseFeature("means", 9, "mean"), SparseFeature("more", 25))
WORLD_SIZES = (1, 2, 4)  # 4 is more than there are tables
KINDS = ("single", "bags", "weighted")
WHOLE: dict[str, int] = {}
CUT = {"sums": 2, "more": 2}
"""Column shards by table."""
CASES = (
    *((kind, "sgd", "whole") for kind in KINDS),
    *(("bags", optimizer, "whole") for optimizer in UPDATES if optimizer != "sgd"),
    *((kind, "sgd", "cut") for kind in KINDS),
    *(("bags", optimizer, "cut") for optimizer in UPDATES if optimizer != "sgd"),
    ("weighted", "adam with l2", "cut"),
)


class Reference:
    """All tables as plain tensors; bags by a loop over rows; each optimizer by its formula."""

    def __init__(self, cuts: dict[str, int]) -> None:
        columns = range(DIM)
        self.cuts = [cuts.get(table.name, 1) for table in TABLES]
        self.weights = [init_table(t.name, t.num_embeddings, DIM, columns, SEED).requires_grad_(True) for t in TABLES]
        self.sums = [torch.zeros_like(weight) for weight in self.weights]
        self.means = [torch.zeros_like(weight) for weight in self.weights]
        self.steps = 0

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
        self.steps += 1
        for weight, total, mean, cut in zip(self.weights, self.sums, self.means, self.cuts, strict=True):
            grad = weight.grad
            if optimizer == "sgd":
                weight -= LEARNING_RATE * grad
            elif optimizer.startswith("adam"):
                # With L2 every row is updated, without it only the rows that were looked up.
                rows = torch.ones(len(weight), dtype=torch.bool) if "l2" in optimizer else grad.abs().sum(1) > 0
                grad = grad + L2 * weight if "l2" in optimizer else grad
                mean[rows] = BETA1 * mean[rows] + (1 - BETA1) * grad[rows]
                total[rows] = BETA2 * total[rows] + (1 - BETA2) * grad[rows].square()
                scale = (total[rows] / (1 - BETA2**self.steps)).sqrt() + EPSILON
                weight[rows] -= LEARNING_RATE * mean[rows] / (1 - BETA1**self.steps) / scale
            else:
                # Row-wise Adagrad keeps the mean square of a row's gradient, shard by shard; Adagrad each square.
                of_shards = grad.square().unflatten(1, (cut, -1)).mean(2, keepdim=True).expand(-1, -1, DIM // cut)
                total += grad.square() if optimizer == "adagrad" else of_shards.flatten(1)
                weight -= LEARNING_RATE * grad / (total.sqrt() + EPSILON)
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


def make_tables(
    topology: Topology, optimizer: str, cuts: dict[str, int] = WHOLE, table_dtype: TableDtype = "fp32"
) -> ShardedTables:
    update = UPDATES[optimizer]
    setting = StepSetting(topology.world_size, topology.world_size, 6, update.optimizer)
    options = PlacementOptions(cuts={table.name: cuts.get(table.name, 1) for table in TABLES})
    placement = place_tables(TABLES, DIM, setting, read_costs("cpu"), options=options)
    tables = ShardedTables(TABLES, DIM, placement, topology, update=update, table_dtype=table_dtype, seed=SEED)
    tables.set_learning_rate(LEARNING_RATE)
    return tables


def columns_of(tables: ShardedTables) -> dict[tuple[str, int], dict[str, Tensor]]:
    """This rank's tensors by table and first column."""
    return {
        (shard.name, shard.first_column): {kind: tensor.cpu().clone() for kind, tensor in tensors.items()}
        for shard, tensors in tables.shard_tensors()
    }


def joined(by_rank: list[dict[tuple[str, int], dict[str, Tensor]]]) -> dict[str, Tensor]:
    """All tables' weights, whole."""
    shards = {key: tensors["weight"] for of_rank in by_rank for key, tensors in of_rank.items()}
    return {t.name: torch.cat([shards[key] for key in sorted(shards) if key[0] == t.name], dim=1) for t in TABLES}


def train_sharded(topology: Topology, kind: str, optimizer: str, cut: str) -> tuple[list[Tensor], dict]:
    """This rank's looked-up embeddings of each step, and its tables in the end. Loss: sum of embeddings * target."""
    tables = make_tables(topology, optimizer, CUT if cut == "cut" else WHOLE)
    outputs = []
    for step in range(STEPS):
        size = rank_sizes(step, topology.world_size)[topology.rank]
        embeddings_BFD = tables(batch_of(kind, step, topology.rank, size).to(topology.device))
        outputs.append(embeddings_BFD.detach().cpu().clone())
        (embeddings_BFD * target_of(step, topology.rank, size).to(topology.device)).sum().backward()
    return outputs, columns_of(tables)


def train_all(
    topology: Topology, cases: Sequence[tuple[str, str, str]] = CASES
) -> dict[tuple[str, str, str], tuple[list[Tensor], dict]]:
    return {case: train_sharded(topology, *case) for case in cases}


@functools.cache
def sharded(world_size: int) -> list[dict[tuple[str, str, str], tuple[list[Tensor], dict]]]:
    return run_ranks(world_size, train_all)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_lookups_and_updates_equal_the_formula(world_size, case):
    assert_equal_to_formula(world_size, case, [of_rank[case] for of_rank in sharded(world_size)])


def assert_equal_to_formula(world_size: int, case: tuple[str, str, str], by_rank: list[tuple[list[Tensor], dict]]):
    kind, optimizer, cut = case
    reference = Reference(CUT if cut == "cut" else WHOLE)
    for step in range(STEPS):
        losses = []
        for rank, size in enumerate(rank_sizes(step, world_size)):
            expected = reference.look_up(batch_of(kind, step, rank, size)) if size else torch.empty(0, len(TABLES), DIM)
            torch.testing.assert_close(by_rank[rank][0][step], expected, atol=1e-5, rtol=1e-5)
            losses.append((expected * target_of(step, rank, size)).sum())
        # The bridge averages over ranks, as DeepSpeed does the dense gradients.
        (sum(losses) / world_size).backward()
        reference.update(optimizer)
    final = joined([tables for _, tables in by_rank])
    for table, weight in zip(TABLES, reference.weights, strict=True):
        torch.testing.assert_close(final[table.name], weight.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam", "adam with l2"])
def test_cut_tables_train_as_whole_ones_do(world_size, optimizer):
    whole, cut = ([of_rank["bags", optimizer, how] for of_rank in sharded(world_size)] for how in ("whole", "cut"))
    assert max(len(tables) for _, tables in cut) > 0
    for (ours, _), (theirs, _) in zip(cut, whole, strict=True):
        for step in range(STEPS):
            torch.testing.assert_close(ours[step], theirs[step], atol=1e-6, rtol=1e-6)
    ours, theirs = joined([tables for _, tables in cut]), joined([tables for _, tables in whole])
    for name, weight in theirs.items():
        tolerance = 0 if optimizer.startswith("adam") else 1e-6
        torch.testing.assert_close(ours[name], weight, atol=tolerance, rtol=tolerance)


def test_row_wise_adagrad_keeps_a_state_a_row_and_shard():
    """So cut by columns it is another algorithm, which the docs say and a checkpoint's cuts take care of."""
    whole, cut = (
        joined([sharded(2)[rank]["bags", "rowwise_adagrad", how][1] for rank in range(2)]) for how in ("whole", "cut")
    )
    assert (whole["sums"] - cut["sums"]).abs().max() > 1e-3
    assert torch.equal(whole["means"], cut["means"]), "this one wasn't cut"


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
    assert "2 sparse features, but the model has 3" in messages[3]


def save_after_training(topology: Topology, folder, optimizer: str, cuts: dict[str, int] = WHOLE) -> None:
    tables = make_tables(topology, optimizer, cuts)
    for step in range(2):
        sparse = batch_of("bags", step, topology.rank, 6).to(topology.device)
        (tables(sparse) * target_of(step, topology.rank, 6).to(topology.device)).sum().backward()
    save_tables(tables, folder, topology.rank)
    dist.barrier()


def load_and_read(topology: Topology, folder, optimizer: str, cuts: dict[str, int] = WHOLE) -> dict:
    tables = make_tables(topology, optimizer, cuts)
    load_tables(tables, folder, topology)
    return columns_of(tables)


def merged(by_rank: list[dict]) -> dict:
    return {name: tensors for of_rank in by_rank for name, tensors in of_rank.items()}


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "sgd"])
def test_saved_tables_load_at_any_number_of_ranks(tmp_path, optimizer):
    run_ranks(2, save_after_training, tmp_path, optimizer)
    same = merged(run_ranks(2, load_and_read, tmp_path, optimizer))
    initial = init_table("sums", 40, DIM, range(DIM), SEED)
    assert not torch.equal(same["sums", 0]["weight"], initial), "nothing was trained, so this shows nothing"
    for world_size in (1, 3):
        other = merged(run_ranks(world_size, load_and_read, tmp_path, optimizer))
        assert other.keys() == same.keys()
        for name, tensors in same.items():
            for kind, tensor in tensors.items():
                assert torch.equal(other[name][kind], tensor), (name, kind)


@pytest.mark.parametrize(
    ("saved", "loaded", "optimizer", "states"),
    [(CUT, WHOLE, "adagrad", ["sum"]), (WHOLE, CUT, "adam with l2", ["exp_avg", "exp_avg_sq"])],
    ids=["cut to whole", "whole to cut"],
)
def test_saved_tables_load_under_any_cut(tmp_path, saved, loaded, optimizer, states):
    """With optimizers whose states are cut as the weights are."""
    run_ranks(2, save_after_training, tmp_path, optimizer, saved)
    before = merged(run_ranks(2, load_and_read, tmp_path, optimizer, saved))
    after = merged(run_ranks(3, load_and_read, tmp_path, optimizer, loaded))
    for name in ("sums", "means", "more"):
        if optimizer == "adam with l2":
            assert [int(of_side[name, 0]["steps"]) for of_side in (before, after)] == [2, 2]
        for kind in ("weight", *states):
            pieces = [[s[key][kind] for key in sorted(s) if key[0] == name] for s in (before, after)]
            assert torch.equal(*(torch.cat(of_side, dim=1) for of_side in pieces)), (name, kind)


def test_row_wise_state_is_not_moved_to_another_cut(tmp_path):
    run_ranks(1, save_after_training, tmp_path, "rowwise_adagrad", CUT)
    (message,) = run_ranks(1, load_fails, tmp_path, "rowwise_adagrad")
    assert "needs columns 0:8, but the checkpoint has 0:4, 4:8" in message


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


def train_with_hops(topology: Topology, hops: int) -> list:
    """Embeddings of each step and the tables in the end, for cases with int8, with bf16, and with exact numbers."""
    results = []
    for kind, dtype in (("single", "fp32"), ("bags", "bf16"), ("weighted", "int8")):
        update, options = UPDATES["rowwise_adagrad"], PlacementOptions(cuts=CUT)
        setting = StepSetting(topology.world_size, topology.local_size, 6)
        placement = place_tables(TABLES, DIM, setting, read_costs("cpu"), options=options)
        wires = Wires(Wire(dtype), Wire(dtype))
        tables = ShardedTables(
            TABLES, DIM, replace(placement, hops=hops), topology, update=update, wires=wires, seed=SEED
        )
        tables.set_learning_rate(LEARNING_RATE)
        for step in range(STEPS):
            size = rank_sizes(step, topology.world_size)[topology.rank]
            embeddings_BFD = tables(batch_of(kind, step, topology.rank, size))
            results.append(embeddings_BFD.detach().clone())
            (embeddings_BFD * target_of(step, topology.rank, size)).sum().backward()
        results += [tensors["weight"].clone() for _, tensors in tables.shard_tensors()]
    return results


def test_two_hops_train_as_one_does_to_the_bit():
    one, two = (run_ranks(4, train_with_hops, hops, local_size=2) for hops in (1, 2))
    for of_rank, other in zip(one, two, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(of_rank, other, strict=True))


def train_on_one_owner(topology: Topology) -> list[Tensor]:
    """Embeddings of two steps of a sum, whose gradient is one number, repeated without memory of its own."""
    options = PlacementOptions(by_hand={table.name: [0] for table in TABLES})
    setting = StepSetting(topology.world_size, topology.local_size, 6)
    placement = place_tables(TABLES, DIM, setting, read_costs("cpu"), options=options)
    tables = ShardedTables(TABLES, DIM, placement, topology, update=UPDATES["sgd"], seed=SEED)
    tables.set_learning_rate(LEARNING_RATE)
    results = []
    for _ in range(2):
        embeddings_BFD = tables(batch_of("single", 0, topology.rank, 6))
        results.append(embeddings_BFD.detach().clone())
        embeddings_BFD.sum().backward()
    return results


def test_one_rank_may_hold_all_tables():
    for first, second in run_ranks(2, train_on_one_owner):
        assert first.shape == second.shape
        assert (second < first).all(), "each row goes down by its gradient, which is positive"
