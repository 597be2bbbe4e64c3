"""New rows have a learning rate of their own: each row moves as if the whole table had its rate."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dhen.runtime.topology import Topology
from dhen.tables.placement.costs import StepSetting, read_costs
from dhen.tables.placement.plan import PlacementOptions, place_tables
from dhen.tables.sharded_tables import ShardedTables
from dhen.tables.storage import load_tables
from dhen.tables.updated_tables import TableUpdate
from tests.ranks import run_ranks
from tests.tables.saving import save_tables
from tests.tables.test_sharded_tables import CUT, DIM, SEED, TABLES, WHOLE, batch_of, columns_of, target_of

OLD, NEW, STEPS, NEW_FROM = 0.02, 0.3, 4, 7
UPDATES = [
    ("sgd", 0.0, "fp32"), ("adagrad", 0.0, "fp32"), ("adagrad", 0.1, "fp32"), ("rowwise_adagrad", 0.0, "fp32"),
    ("rowwise_adagrad", 0.1, "fp16"), ("adam", 0.0, "fp32"), ("adam", 0.1, "fp32"),
]  # fmt: skip
"""Optimizer, L2 of whole tables, dtype."""


def make_tables(
    topology: Topology, optimizer: str, l2: float, dtype: str, cuts: dict[str, int], has_new_rows: bool
) -> ShardedTables:
    """Tables whose rows from NEW_FROM on training has never used."""
    setting = StepSetting(topology.world_size, topology.world_size, 6, optimizer)
    options = PlacementOptions(cuts={table.name: cuts.get(table.name, 1) for table in TABLES})
    placement = place_tables(TABLES, DIM, setting, read_costs("cpu"), options=options)
    update = TableUpdate(optimizer, l2=l2, has_new_rows=has_new_rows)
    more = {"table_dtype": dtype, "table_rounding": "nearest", "seed": SEED}
    tables = ShardedTables(TABLES, DIM, placement, topology, update=update, **more)
    for _, tensors in tables.shard_tensors():
        tensors["uses"][:NEW_FROM] = 1
    tables.mark_new_rows()
    return tables


def trained(tables: ShardedTables, topology: Topology, rate: float, of_new_rows: float | None, steps: range) -> None:
    """Gradients do not depend on the weights, so a row shows its own rate only."""
    for step in steps:
        tables.set_learning_rate(rate, of_new_rows)
        embeddings = tables(batch_of("weighted", step, topology.rank, 6))
        (embeddings * target_of(step, topology.rank, 6)).sum().backward()
        tables.end_step(1, average_decay=0.0)


def train_all(topology: Topology, folder: Path) -> dict[tuple, list[dict]]:
    """By update and cut: this rank's columns with two rates, and with the old and the new rate for all rows."""
    found = {}
    for update in UPDATES:
        for name, cuts in (("whole", WHOLE), ("cut", CUT)):
            results = []
            for rates in ((OLD, NEW), (OLD, None), (NEW, None)):
                tables = make_tables(topology, *update, cuts, has_new_rows=rates[1] is not None)
                trained(tables, topology, *rates, range(STEPS))
                results.append(columns_of(tables))
                if rates[1] is not None and update[0] == "adagrad" and not update[1]:
                    (folder / name).mkdir(exist_ok=True)
                    topology.barrier()
                    save_tables(tables, folder / name, topology.rank)
            found[*update, name] = results
    return found


def load_and_train(topology: Topology, folder: Path) -> dict[tuple[str, int], dict[str, Tensor]]:
    tables = make_tables(topology, "adagrad", 0.0, "fp32", CUT, has_new_rows=True)
    tables.uses.counts.fill_(1)
    tables.mark_new_rows()  # so that only the checkpoint knows the new rows
    load_tables(tables, folder, topology)
    return columns_of(tables)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def by_rank(folder) -> list[dict[tuple, list[dict]]]:
    return run_ranks(2, train_all, folder)


def test_each_row_moves_as_if_the_whole_table_had_its_rate(by_rank):
    for of_rank in by_rank:
        for update, (both, old, new) in of_rank.items():
            assert both.keys() == old.keys()
            for key, tensors in both.items():
                expected = old[key]["weight"].float().clone()
                expected[NEW_FROM:] = new[key]["weight"][NEW_FROM:].float()
                tolerance = 2e-3 if "fp16" in update else 2e-6
                torch.testing.assert_close(tensors["weight"].float(), expected, rtol=tolerance, atol=tolerance)
                moved = (new[key]["weight"].float() - old[key]["weight"].float())[NEW_FROM:]
                assert moved.abs().max() > 50 * tolerance, f"{update}: {key} shows no difference"
                assert tensors["is_new"].tolist() == [row >= NEW_FROM for row in range(len(expected))]
                assert "is_new" not in old[key]


@pytest.mark.parametrize("saved", ["whole", "cut"])
def test_a_checkpoint_knows_the_new_rows_under_any_cut_and_number_of_ranks(by_rank, folder, saved):
    (loaded,) = run_ranks(1, load_and_train, folder / saved)
    assert {name for name, _ in loaded} == {table.name for table in TABLES}
    for tensors in loaded.values():
        assert tensors["is_new"].tolist() == [row >= NEW_FROM for row in range(len(tensors["weight"]))]
