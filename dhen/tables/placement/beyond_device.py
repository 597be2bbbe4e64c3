"""Chooses the shards that move to host memory, with a cache on the GPU, when a GPU's memory is too small."""

from collections.abc import Sequence

from dhen.tables.placement.plan import TableShard

MEMORY_SHARE = 0.8
"""Share of a rank's memory that tables may use. Their lookups and exchanges need memory, too."""
ALLOCATOR_SHARE = 0.95
"""Share of a GPU's memory that fragmentation leaves usable."""


def beyond_device(shards: Sequence[TableShard], device_bytes: float) -> frozenset[int]:
    """Indices of the shards to move to host memory, so that the rest and the caches fit into `device_bytes`.

    The largest shards move first, so that as few tables as possible are read over the bus.
    """
    left: set[int] = set()
    by_size = sorted(range(len(shards)), key=lambda index: (-shards[index].num_bytes, index))
    needed = sum(shard.num_bytes for shard in shards)
    for index in by_size:
        if needed <= device_bytes:
            break
        saved = shards[index].num_bytes - shards[index].cached_bytes
        if saved > 0:  # if a shard has few columns, its cache can be larger than the shard
            needed -= saved
            left.add(index)
    return frozenset(left)
