"""Which shards stay on the GPU, and which wait in the host's memory behind a cache, where a GPU is too small."""

from collections.abc import Sequence

from dhen.tables.placement.plan import TableShard

MEMORY_SHARE = 0.8
"""Of a device's memory, for tables."""


def beyond_device(shards: Sequence[TableShard], device_bytes: float) -> frozenset[int]:
    """Which of the shards must leave the device for the rest, and the cache of those that left, to fit into it.

    The largest leave first: fewest tables pay for the way over the bus.
    """
    left: set[int] = set()
    by_size = sorted(range(len(shards)), key=lambda index: (-shards[index].num_bytes, index))
    needed = sum(shard.num_bytes for shard in shards)
    for index in by_size:
        if needed <= device_bytes:
            break
        saved = shards[index].num_bytes - shards[index].cached_bytes
        if saved > 0:  # of a few columns the cache takes more than the rows
            needed -= saved
            left.add(index)
    return frozenset(left)
