"""Work that the ranks share out."""

import pytest

from dhen.runtime.collectives import shared_out
from dhen.runtime.topology import Topology
from tests.ranks import run_ranks


def shares(topology: Topology) -> tuple[list[int], str, str]:
    def work(item: int) -> int:
        return {3: 10, 4: 20}[item] if topology.rank else {5: 30}[item]

    def said(items: list[int]) -> str:
        with pytest.raises(RuntimeError) as caught:
            shared_out(items, work, topology)
        return str(caught.value)

    return shared_out([5, 3], work, topology), said([5, 7]), said([5, 3, 8])


def test_what_one_rank_raises_all_ranks_raise():
    assert run_ranks(2, shares) == 2 * [([30, 10], "KeyError: 7", "KeyError: 8")]
