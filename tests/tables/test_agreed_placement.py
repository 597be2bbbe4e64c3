"""Rank 0 plans the placement of the tables for all ranks, whatever the others have; its error is everyone's.

On GPUs, the tables get what the dense part leaves.
"""

from dataclasses import replace

import pytest

from dhen.config.dhen_section import DhenSection, PlacementSection
from dhen.config.ds_config import DsConfig, DsConfigError, read_ds_config
from dhen.model.configuration_dhen import DhenConfig
from dhen.runtime.topology import Topology
from dhen.tables.placement import agreed
from dhen.tables.placement.agreed import RankMemory, place_as_asked, setting_of, table_memory
from dhen.tables.placement.costs import read_costs
from dhen.tables.placement.plan import Placement, PlacementError
from dhen.training.memory_plan import MemoryPlan
from dhen.training.parallelize import lay_out
from tests import ROOT
from tests.plain import CONFIG, recipe
from tests.ranks import run_ranks


def plan(topology: Topology, costs_by_rank: list[str]) -> Placement | str:
    """The placement of a rank whose costs are named so, and whose node holds rank + 1 ranks; or its error."""
    config = read_ds_config(ROOT / "ds_configs/zero0.json", recipe(topology.world_size, 8))
    placement = PlacementSection(costs=costs_by_rank[topology.rank])
    config = DsConfig(config.path, config.deepspeed, config.dhen.model_copy(update={"placement": placement}))
    uneven = replace(topology, local_size=topology.rank + 1)
    try:
        return lay_out(DhenConfig(**CONFIG), uneven, config).placement
    except DsConfigError as error:
        return str(error)


@pytest.fixture(scope="module")
def of_rank_zero() -> Placement:
    return run_ranks(2, plan, ["gpu", "gpu"])[0]


def test_other_costs_and_nodes_elsewhere_change_nothing(of_rank_zero):
    assert run_ranks(2, plan, ["gpu", "none.json"]) == [of_rank_zero, of_rank_zero]


def test_an_error_of_rank_zero_is_raised_on_all_ranks():
    ours, theirs = run_ranks(2, plan, ["none.json", "gpu"])
    assert ours == theirs
    assert "zero0.json: none.json: no such cost file" in ours


def group_size(topology: Topology, costs: str) -> int:
    config = read_ds_config(ROOT / "ds_configs/zero0.json", recipe(topology.world_size, 8))
    section = DhenSection(table_group="auto", table_sync_steps=16, placement=PlacementSection(costs=costs))
    layout = lay_out(DhenConfig(**CONFIG), topology, DsConfig(config.path, config.deepspeed, section))
    assert (layout.table_groups is None) == (layout.placement.world_size == topology.world_size)
    return layout.placement.world_size


@pytest.mark.parametrize(("within", "between", "size"), [(1e10, 1e5, 2), (1e5, 1e10, 4)])
def test_auto_takes_the_faster_table_group(tmp_path, within, between, size):
    costs = replace(read_costs("cpu"), intra_node_bytes_per_second=within, inter_node_bytes_per_second=between)
    costs.save(tmp_path / "costs.json")
    assert run_ranks(4, group_size, str(tmp_path / "costs.json"), local_size=2) == [size] * 4


def hops(topology: Topology, asked: int | str, costs: str) -> tuple[int, float]:
    config = read_ds_config(ROOT / "ds_configs/zero0.json", recipe(topology.world_size, 8))
    section = DhenSection(all_to_all_hops=asked, placement=PlacementSection(costs=costs))
    placement = lay_out(DhenConfig(**CONFIG), topology, DsConfig(config.path, config.deepspeed, section)).placement
    return placement.hops, placement.hop_seconds


@pytest.mark.parametrize(
    ("asked", "seconds_per_message", "local_size", "taken"),
    [("auto", 1.0, 2, 2), ("auto", 0.0, 2, 1), (2, 0.0, 2, 2), (1, 1.0, 2, 1), (2, 1.0, 4, 1), ("auto", 1.0, 1, 1)],
)
def test_two_hops_where_asked_or_where_the_costs_say_so_and_never_without_neighbors_on_other_nodes(
    tmp_path, asked, seconds_per_message, local_size, taken
):
    replace(read_costs("cpu"), seconds_per_message=seconds_per_message).save(tmp_path / "costs.json")
    by_rank = run_ranks(4, hops, asked, str(tmp_path / "costs.json"), local_size=local_size)
    assert {of for of, _ in by_rank} == {taken}
    messages = 2 * (3 if taken == 1 else 2)
    assert by_rank[0][1] == pytest.approx(messages * seconds_per_message, abs=1e-3)


def two_hops_on_unequal_nodes(topology: Topology) -> str:
    config = read_ds_config(ROOT / "ds_configs/zero0.json", recipe(topology.world_size, 8))
    uneven = replace(topology, local_size=1 if topology.rank == 2 else 2)
    with pytest.raises(DsConfigError) as caught:
        lay_out(DhenConfig(**CONFIG), uneven, DsConfig(config.path, config.deepspeed, DhenSection(all_to_all_hops=2)))
    auto = lay_out(
        DhenConfig(**CONFIG), uneven, DsConfig(config.path, config.deepspeed, DhenSection(all_to_all_hops="auto"))
    )
    assert (auto.placement.hops, auto.ds_config.dhen.all_to_all_hops) == (1, 1)
    return str(caught.value)


def test_two_hops_need_equal_nodes():
    (message,) = set(run_ranks(3, two_hops_on_unequal_nodes))
    assert "dhen.all_to_all_hops is 2, but the nodes have unequal numbers of ranks" in message


def no_group(topology: Topology) -> str:
    config = read_ds_config(ROOT / "ds_configs/zero0.json", recipe(topology.world_size, 8))
    section = DhenSection(table_group=3)
    with pytest.raises(DsConfigError) as caught:
        lay_out(DhenConfig(**CONFIG), topology, DsConfig(config.path, config.deepspeed, section))
    return str(caught.value)


def test_a_group_that_does_not_divide_the_ranks_is_refused():
    message, *_ = run_ranks(4, no_group, local_size=2)
    assert "dhen.table_group is 3 (3 ranks per group), but this job has 4 ranks" in message
    assert "Use one of 2, 4" in message


GIB = 2**30
LARGE = DhenConfig(embedding_dim=16, sparse_features=[{"name": f"C{i}", "num_embeddings": 2**22} for i in range(12)])
"""3.2 GiB with row-wise Adagrad's state and the uses."""


def placed(dense: float, device: float = 4.0, host: float = 16.0) -> Placement:
    """On one rank with a GPU of `device` GiB, of which the dense part needs `dense` GiB."""
    memory = RankMemory(int(host * GIB), int(device * GIB), int(dense * GIB))
    return place_as_asked(LARGE, DhenSection(), setting_of(DhenSection(), 1, 1, 64), "gpu", memory)


def test_tables_use_what_the_dense_part_leaves_of_a_gpu():
    for dense, room in ((0.0, 0.8 * 4), (0.6, 0.8 * 4), (1.8, 0.95 * 4 - 1.8), (2.2, 0.95 * 4 - 2.2)):
        placement = placed(dense)
        assert placement.device_bytes == pytest.approx(room * GIB, abs=2)
        on_device, on_host = table_memory(LARGE, placement)
        assert on_device <= placement.device_bytes
        assert (on_host > 0) == (room * GIB < placement.bytes_of_rank(0))
    assert placed(5.0).device_bytes == 0


def test_an_error_says_what_the_dense_part_needs():
    with pytest.raises(PlacementError) as caught:
        placed(1.8, host=0.5)
    words = "Tables may use 2.000 GiB of a GPU's 4.000 GiB, because the dense part needs 1.800 GiB. Possible solutions"
    assert words in str(caught.value)


def test_without_a_gpu_the_dense_part_changes_nothing():
    assert RankMemory(1000, 0, 900).limits == [800]


def lay_out_beside_a_gpu(topology: Topology) -> tuple[float, int]:
    """The tables' room on a GPU of 1 MiB, and what the dense part needs of it, which rank 0 alone predicts."""
    agreed._memory = lambda topology: RankMemory(GIB, 2**20)
    config, ds_config = DhenConfig(**CONFIG), read_ds_config(ROOT / "ds_configs/zero3.json", recipe(2, 8))
    memory_plan = MemoryPlan.of(config, ds_config, 2**20, 8)
    layout = lay_out(config, topology, ds_config, memory_plan.use if topology.is_main else None)
    use = memory_plan.use(layout)
    return layout.placement.device_bytes, use.peak - use.parts["tables"]


def test_a_run_leaves_the_dense_part_what_its_memory_plan_says():
    (room, dense), (theirs, _) = run_ranks(2, lay_out_beside_a_gpu)
    assert dense > 0.15 * 2**20, "else 0.8 is the limit, and this shows nothing"
    assert theirs == room == int(0.95 * 2**20) - dense
