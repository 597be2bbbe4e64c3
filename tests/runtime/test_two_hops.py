"""The all-to-all in two hops: the same elements as in one, in fewer messages between nodes."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from dhen.runtime.collectives import all_to_all
from dhen.runtime.topology import Topology
from dhen.runtime.two_hops import TwoHops
from tests.ranks import run_ranks


def size(source: int, target: int) -> int:
    """Of every size, 0 too, and different in the two directions."""
    return (3 * source + 5 * target) % 4


def exchange(topology: Topology, group_size: int) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """What arrives in two hops and in one, and what this rank sends to other nodes in two hops: messages, elements."""
    if group_size < topology.world_size:
        topology = topology.within(topology.shard_groups(group_size))
    hops, ranks, own = TwoHops(topology), range(topology.world_size), topology.rank
    tensor = torch.cat([torch.full((size(own, rank),), 100.0 * own + rank) for rank in ranks])
    messages, right = [], dist.all_to_all_single

    def counted(received, flat, receive, send, *, group, **options):
        targets = dist.get_process_group_ranks(group)
        first = dist.get_rank() - topology.local_rank
        away = [to not in range(first, first + topology.local_size) for to in targets]
        messages.extend(each for each, is_away in zip(send, away, strict=True) if is_away)
        return right(received, flat, receive, send, group=group, **options)

    dist.all_to_all_single = counted
    two = hops.all_to_all(tensor, size)()
    dist.all_to_all_single = right
    of_ranks = [size(own, rank) for rank in ranks], [size(rank, own) for rank in ranks]
    return two, all_to_all(tensor, *of_ranks, topology.world)(), len(messages), sum(messages)


@pytest.mark.parametrize(("ranks", "local_size", "group_size"), [(4, 2, 4), (6, 2, 6), (6, 3, 6), (8, 2, 4)])
def test_two_hops_bring_what_one_brings_in_a_message_for_each_other_node(ranks, local_size, group_size):
    by_rank = run_ranks(ranks, exchange, group_size, local_size=local_size)
    assert sum(len(two) for two, *_ in by_rank) == ranks // group_size * sum(
        size(source, target) for source in range(group_size) for target in range(group_size)
    )
    for rank, (two, one, messages, elements) in enumerate(by_rank):
        assert torch.equal(two, one)
        assert messages == group_size // local_size - 1
        own, node = rank % group_size, rank % group_size // local_size
        neighbors = range(node * local_size, (node + 1) * local_size)
        elsewhere = [to for to in range(own % local_size, group_size, local_size) if to not in neighbors]
        assert elements == sum(size(neighbor, to) for neighbor in neighbors for to in elsewhere)


def equal_nodes(topology: Topology) -> tuple[bool, bool, bool]:
    """As started; with fewer ranks on the last node; and with local ranks in another order."""
    fewer = replace(topology, local_size=1 if topology.rank == 3 else 2)
    turned = replace(topology, local_rank=1 - topology.local_rank)
    return topology.has_equal_nodes(), fewer.has_equal_nodes(), turned.has_equal_nodes()


def test_nodes_are_equal_if_they_have_as_many_ranks_in_order():
    assert set(run_ranks(4, equal_nodes, local_size=2)) == {(True, False, False)}
