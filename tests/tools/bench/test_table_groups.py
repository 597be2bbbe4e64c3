"""tools/bench/table_groups.py on ranks of one machine, which have no link to count bytes on."""

import argparse

import pytest

from dhen.runtime.topology import Topology
from tests.ranks import run_ranks
from tools.bench import table_groups
from tools.bench.table_groups import Measured, measure, parse_arguments, show

SMALL = ["--dims=16", "--batch_size=256", "--max_rows=3000", "--rounds=2"]


def measured(topology: Topology, arguments: argparse.Namespace) -> list[Measured]:
    table_groups.bytes_sent = lambda: 0
    return measure(topology, arguments)


@pytest.mark.parametrize("ids", ["log-uniform", "uniform"])
def test_groups_send_less_than_tables_over_all_ranks(ids, capsys):
    arguments = parse_arguments(SMALL + ["--uniform"] * (ids == "uniform"))
    results = run_ranks(4, measured, arguments, local_size=2)[0]
    by_way = {result.way: result for result in results}
    assert list(by_way) == ["world", "node", "node, 16"]
    # Two ranks of a node: ids and gradients of their 256 examples leave for the tables elsewhere, and embeddings of the
    # tables here for the examples there. A table is 16 columns, and an id takes 4 bytes.
    halves = {
        columns: 512 * 4 * (columns // 16 + columns) + 512 * 4 * (26 * 16 - columns) for columns in range(0, 417, 16)
    }
    assert by_way["world"].in_theory in halves.values()
    assert by_way["node, 16"].in_theory < by_way["node"].in_theory < by_way["world"].in_theory
    assert all(len(result.seconds) == 2 and min(result.seconds) > 0 for result in results)
    show(results, arguments)
    assert "node, 16" in capsys.readouterr().out
