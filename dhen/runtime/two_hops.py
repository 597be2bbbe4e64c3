"""An all-to-all that knows the nodes: within each node, then between ranks of the same place (DMT, arXiv 2403.00877).

In one hop, a rank sends a message to every rank of every other node. In two hops it sends one to each node: first the
ranks of a node collect what they have for the ranks of one place, and then these ranks exchange it. As many bytes go
between nodes, in fewer and larger messages; what one rank passes on for another also travels within the node, and all
is copied twice more.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dhen.runtime.collectives import all_to_all
from dhen.runtime.topology import Topology


class TwoHops:
    """The all-to-all over all ranks of a topology whose nodes have equally many ranks."""

    def __init__(self, topology: Topology) -> None:
        """Communicates: all ranks of the job construct it together."""
        groups = topology.shard_groups(topology.local_size)
        self._node, self._across = groups.shard, groups.replica
        self._local_size, self._num_nodes = groups.shard_size, groups.num_replicas
        self._rank, world_size = topology.rank, topology.world_size
        self._nodes = [range(first, first + self._local_size) for first in range(0, world_size, self._local_size)]
        self._places = [range(place, world_size, self._local_size) for place in range(self._local_size)]

    def all_to_all(self, tensor: Tensor, size: Callable[[int, int], int]) -> Callable[[], Tensor]:
        """Start sending a flat tensor, whose parts are in the order of the ranks. Waits for the hop within the node.

        size(s, r): number of elements that rank s sends to rank r. Call the result to wait for the received elements,
        in rank order. Waiting for a GPU's collective blocks its current stream, not the host.
        """
        rank = self._rank
        neighbors, peers = self._nodes[rank // self._local_size], self._places[rank % self._local_size]
        parts = tensor.split([size(rank, to) for node in self._nodes for to in node])
        leaving = torch.cat([parts[to] for place in self._places for to in place])
        collected = all_to_all(
            leaving,
            [sum(size(rank, to) for to in place) for place in self._places],
            [sum(size(neighbor, to) for to in peers) for neighbor in neighbors],
            self._node,
        )()
        parts = collected.split([size(neighbor, to) for neighbor in neighbors for to in peers])
        return all_to_all(
            torch.cat([part for node in range(self._num_nodes) for part in parts[node :: self._num_nodes]]),
            [sum(size(neighbor, to) for neighbor in neighbors) for to in peers],
            [sum(size(source, rank) for source in node) for node in self._nodes],
            self._across,
        )
