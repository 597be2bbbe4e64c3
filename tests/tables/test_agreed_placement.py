"""Rank 0 plans the placement of the tables for all ranks, whatever the others have; its error is everyone's."""

from dataclasses import replace

import pytest

from dhen.config.dhen_section import PlacementSection
from dhen.config.ds_config import DsConfig, DsConfigError, read_ds_config
from dhen.model.configuration_dhen import DhenConfig
from dhen.runtime.topology import Topology
from dhen.tables.placement.plan import Placement
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
