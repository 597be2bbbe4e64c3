"""The moving average of tables is brought up to date row by row, and equals the average of every step."""

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dhen.model.features import SparseIds
from dhen.model.sparse_feature import SparseFeature
from dhen.runtime.topology import Topology
from dhen.tables.averaged_tables import AveragedTables
from dhen.tables.lookup import make_lookup
from dhen.tables.placement.costs import StepSetting, read_costs
from dhen.tables.placement.plan import PlacementOptions, place_tables
from dhen.tables.sharded_tables import ShardedTables
from dhen.tables.storage import load_tables
from dhen.tables.updated_tables import TableUpdate
from tests.ranks import run_ranks
from tests.tables.saving import save_tables

SIZES = [(7, 4), (5, 4), (9, 8)]
STEPS = 60


@pytest.mark.parametrize("changes_all", [False, True])
@pytest.mark.parametrize("sizes", [SIZES, SIZES[:2]], ids=["two widths", "one width"])
def test_it_equals_the_average_of_every_step(sizes, changes_all):
    generator = torch.Generator().manual_seed(1)
    weights = make_lookup(sizes, torch.device("cpu"), "sgd").split_embedding_weights()
    for weight in weights:
        weight.normal_(generator=generator)
    averages = AveragedTables(weights, all_rows_change=changes_all)
    expected = [weight.double() for weight in weights]
    starts = torch.tensor([0, *(rows for rows, _ in sizes)]).cumsum(0)
    untouched = int(starts[-1]) - 1
    for step in range(1, STEPS + 1):
        changed = torch.randint(0, untouched, (4,), generator=generator)  # some twice; the last row never
        averages.before_update(changed)
        for weight, first, last in zip(weights, starts[:-1], starts[1:], strict=True):
            inside = changed[(changed >= first) & (changed < last)] - first
            weight[slice(None) if changes_all else inside] += 0.1
        decay = min(0.9, (1 + step) / (10 + step))
        averages.after_step(decay)
        expected = [decay * e + (1 - decay) * w.double() for e, w in zip(expected, weights, strict=True)]
        if step % 25 == 0:
            averages.settle()  # an evaluation in between
    averages.settle()
    for average, wanted, weight in zip(averages.weights, expected, weights, strict=True):
        torch.testing.assert_close(average.double(), wanted, atol=1e-6, rtol=1e-6)
        assert not torch.allclose(average, weight), "the average is the weight itself, so this shows nothing"
    if not changes_all:
        assert torch.equal(averages.weights[-1][-1], weights[-1][-1]), "a row that never changes is its own average"


def test_it_starts_again_at_the_present_weights():
    weights = make_lookup(SIZES, torch.device("cpu"), "sgd").split_embedding_weights()
    averages = AveragedTables(weights, all_rows_change=False)
    averages.before_update(torch.tensor([0]))
    weights[0][0] = 5.0
    averages.after_step(0.5)
    averages.restart()
    averages.settle()
    for average, weight in zip(averages.weights, weights, strict=True):
        assert torch.equal(average, weight)


TABLES, COLUMNS = (SparseFeature("a", 30), SparseFeature("b", 20)), 16


def average_of_cut_tables(
    topology: Topology, folder: Path, cuts: dict[str, int], *, trains: bool
) -> dict[tuple[str, int], Tensor]:
    """The averages by table and first column: trained and saved, or loaded."""
    options = PlacementOptions(cuts=cuts)
    setting = StepSetting(topology.world_size, topology.world_size, 8)
    placement = place_tables(TABLES, COLUMNS, setting, read_costs("cpu"), options=options)
    tables = ShardedTables(TABLES, COLUMNS, placement, topology, update=TableUpdate("sgd"), seed=0 if trains else 1)
    tables.set_learning_rate(0.1)
    tables.start_average()
    if trains:
        for step in range(5):
            ids = torch.randint(0, 20, (16,), generator=torch.Generator().manual_seed(step))
            tables(SparseIds(ids, len(TABLES))).sum().backward()
            tables.end_step(1, 0.9)
        save_tables(tables, folder, topology.rank)
    else:
        load_tables(tables, folder, topology)
    with tables.averaged():
        return {(shard.name, shard.first_column): of["weight"].clone() for shard, of in tables.shard_tensors()}


def test_an_average_is_loaded_under_any_cut(tmp_path):
    by_rank = run_ranks(2, functools.partial(average_of_cut_tables, trains=True), tmp_path, {"a": 2, "b": 4})
    saved = {key: average for of_rank in by_rank for key, average in of_rank.items()}
    assert sorted(average.shape[1] for average in saved.values()) == [4, 4, 4, 4, 8, 8]
    for ranks, cuts in ((1, {"a": 1, "b": 1}), (2, {"a": 2, "b": 4}), (2, {"a": 4, "b": 1})):
        by_rank = run_ranks(ranks, functools.partial(average_of_cut_tables, trains=False), tmp_path, cuts)
        loaded = {key: average for of_rank in by_rank for key, average in of_rank.items()}
        assert len(loaded) == sum(cuts.values())
        for table in TABLES:
            before, after = (
                torch.cat([found[key] for key in sorted(found) if key[0] == table.name], 1) for found in (saved, loaded)
            )
            torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-7)
