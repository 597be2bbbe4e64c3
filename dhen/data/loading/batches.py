"""Batches from a prepared folder: each rank's share of every step, each row once per epoch, resumable at any step.

An epoch has one global order of rows, which depends only on the seed, the epoch and the number of lanes (lanes.py). A
step takes `batch_size * world_size * accumulation_steps` rows and splits them into near-equal pieces for ranks and
their micro steps. The number of ranks therefore does not change which rows a step trains on.

Shuffling permutes the row groups, and the rows within each window of a lane. Row groups are therefore read as a whole,
and memory is bounded regardless of the size of the split.

Shapes: B rows of this rank and micro step, F sparse features, N dense features.
"""

import hashlib
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from dhen.data.loading.lanes import Part, choose_lanes, cut_into_lanes, overlap, share, windows_of
from dhen.data.loading.prepared_rows import NUMBER, find_row_groups, flat_values, read_row_group
from dhen.data.loading.read_ahead import read_ahead
from dhen.data.schema import LABEL, WEIGHT, Schema, task_column, weights_column, without_unused
from dhen.model.features import SparseIds, in_positions

WINDOW_ROWS = 1 << 19
READ_AHEAD_BATCHES = 4
_BLOCKS = 16
"""A rank with several lanes joins their rows block by block, so many per window."""


@dataclass(frozen=True)
class Batch:
    """One rank's rows in one micro step.

    labels_B: 0, 1, or NaN if the row has no label. rows_B: the number of each row within the split, from 0; it stays on
    the CPU. global_rows: number of rows in the whole step, over all ranks and micro steps. weights_B: float32 row
    weights over their mean in the split; None if the data has none. tasks_BT: labels of the T further tasks, NaN where
    a row has none; None without further tasks.
    """

    labels_B: Tensor
    dense_BN: Tensor
    sparse: SparseIds
    rows_B: Tensor
    global_rows: int
    weights_B: Tensor | None = None
    tasks_BT: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """Return the same batch on `device`. Copies from pinned memory are asynchronous."""
        return self if device.type == "cpu" else self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return the same batch in page-locked memory, from which copies to a GPU are asynchronous."""
        return self._moved(Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        labels_B, dense_BN = move(self.labels_B), move(self.dense_BN)
        optional = {name: getattr(self, name) for name in ("weights_B", "tasks_BT")}
        optional = {name: None if tensor is None else move(tensor) for name, tensor in optional.items()}
        return replace(self, labels_B=labels_B, dense_BN=dense_BN, sparse=self.sparse.moved(move), **optional)


class BatchLoader:
    """Loads the batches of one split for one rank.

    batch_size: rows per rank and micro step. A step's rows are split into world_size * accumulation_steps pieces. Piece
    rank * accumulation_steps + a is micro step a of this rank. The last step of an epoch may be smaller, and some of
    its pieces may be empty; drop_last skips it.

    window_rows: number of rows that are shuffled together, over all lanes; a lane has at least one row group of them.
    Memory holds this rank's rows of two windows of its lanes, and all rows of one lane's while they are chosen.

    lanes: by default `choose_lanes` if the data is shuffled, and otherwise 1, which keeps the rows in their order.

    schema: None for the folder's schema, or the same schema with features in another order.

    Raises FileNotFoundError, or ValueError naming the file and column, if the folder does not match its schema.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation_steps: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        window_rows: int = WINDOW_ROWS,
        pin_memory: bool = False,
        schema: Schema | None = None,
        lanes: int | None = None,
    ) -> None:
        _check_at_least(1, "batch_size", batch_size)
        _check_at_least(1, "world_size", world_size)
        _check_at_least(1, "accumulation_steps", accumulation_steps)
        _check_at_least(1, "window_rows", window_rows)
        _check_at_least(0, "seed", seed)
        if rank not in range(world_size):
            raise ValueError(f"rank is {rank}, but world_size is {world_size}. Use 0 to {world_size - 1}.")
        self.schema, self.folder, self.split = schema or Schema.load(Path(folder)), Path(folder), split
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self.accumulation_steps = accumulation_steps
        self._pin_memory = pin_memory
        self._window_rows = window_rows
        self._rank, self._world_size = rank, world_size
        self._pieces = world_size * accumulation_steps
        self.global_batch = batch_size * self._pieces
        self._groups = find_row_groups(Path(folder), split, self.schema)
        self.num_rows = sum(group.num_rows for group in self._groups)
        self._mean_weight = (self.schema.splits[split].weight or self.num_rows) / max(self.num_rows, 1)
        if not self.num_rows:
            raise ValueError(
                f"{folder}/{split}: the split has no rows. Prepare the data with a larger share for {split}."
            )
        if not len(self):
            raise ValueError(
                f"{folder}/{split}: the split has {self.num_rows:,} rows, but a step needs {self.global_batch:,}, and "
                "drop_last skips smaller steps. Use a smaller batch."
            )
        self.lanes = lanes or (choose_lanes(self._groups, self.global_batch) if shuffle else 1)
        if self.global_batch % self.lanes:
            raise ValueError(f"lanes is {self.lanes}. Use a divisor of the global batch, {self.global_batch}.")

    def __len__(self) -> int:
        """Number of steps (updates) per epoch."""
        return self.steps_of(self.num_rows)

    def steps_of(self, rows: int) -> int:
        """Number of steps that an epoch of so many rows would have."""
        full, rest = divmod(rows, self.global_batch)
        return full + (rest > 0 and not self.drop_last)

    @property
    def read_per_own(self) -> float:
        """How many times its own rows each rank reads, about: ranks that share a lane both read it."""
        return max(1.0, self._world_size / self.lanes)

    @property
    def digest(self) -> str:
        """A digest of the columns and of all values, wherever the files are. The preparation made it."""
        schema = asdict(self.schema, dict_factory=without_unused)
        facts = [schema[key] for key in ("dense", "sparse", "splits")]
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Iterate over this rank's batches of an epoch from step `first_step` on, `accumulation_steps` per step.

        A thread reads ahead and ends with the iterator. If first_step is len(self), there are no batches. Raises
        ValueError if first_step is negative or larger.
        """
        _check_at_least(0, "epoch", epoch)
        if first_step not in range(len(self) + 1):
            raise ValueError(
                f"first_step is {first_step}, but an epoch of {self.split} has {len(self)} steps. "
                "Resume with the data and batch sizes of the original run."
            )
        return read_ahead(lambda: self._batches(epoch, first_step), READ_AHEAD_BATCHES)

    def _batches(self, epoch: int, first_step: int) -> Generator[Batch, None, None]:
        with closing(read_ahead(lambda: self._own_rows(epoch, first_step), depth=0)) as tables:
            rows = _Rows(tables)
            for step in range(first_step, len(self)):
                count = self._rows_of_step(step)
                for micro_step in range(self.accumulation_steps):
                    size = len(share(count, self._rank * self.accumulation_steps + micro_step, self._pieces))
                    batch = _as_batch(rows.take(size), self.schema, count, self._mean_weight)
                    yield batch.pin_memory() if self._pin_memory else batch

    def _own_rows(self, epoch: int, first_step: int) -> Generator[pa.Table, None, None]:
        """Yield the rows of this rank from step `first_step` on, in their order, many at a time."""
        groups, lanes = self._groups, self._own_lanes()
        if self.shuffle:
            groups = [groups[index] for index in self._generator(epoch).permutation(len(groups))]
        parts = cut_into_lanes(groups, self.lanes)
        of_lanes = [self._rows_of_lane(parts[lane], epoch, lane, first_step) for lane in lanes]
        if len(lanes) == 1:
            yield from of_lanes[0]
            return
        streams = [_Rows(of_lane) for of_lane in of_lanes]
        at_once = -(-self._window_rows * self._world_size // (_BLOCKS * self.global_batch))
        for first in range(first_step, len(self), at_once):
            steps = range(first, min(first + at_once, len(self)))
            sizes = np.array([[len(self._own_in_lane(step, lane)) for step in steps] for lane in lanes])
            rows = pa.concat_tables(stream.take(size) for stream, size in zip(streams, sizes.sum(1), strict=True))
            # The rows come lane by lane, and are put step by step.
            step_of_row = np.repeat(np.broadcast_to(np.arange(len(steps)), sizes.shape), sizes.ravel())
            yield rows.combine_chunks().take(np.argsort(step_of_row, kind="stable"))

    def _own_lanes(self) -> list[int]:
        """The lanes that have rows for this rank; one at least, so that empty batches have columns."""
        lanes = [lane for lane in range(self.lanes) if self._own_in_lane(0, lane) or self._own_in_lane(-1, lane)]
        return lanes or [0]

    def _own_in_lane(self, step: int, lane: int) -> range:
        """Which of a lane's rows in a step are this rank's, counted from the lane's first row in that step."""
        count = self._rows_of_step(step % len(self))
        return overlap(share(count, lane, self.lanes), share(count, self._rank, self._world_size))

    def _rows_of_step(self, step: int) -> int:
        """Number of rows, over all ranks."""
        return min(self.global_batch, self.num_rows - step * self.global_batch)

    def _rows_of_lane(
        self, parts: Sequence[Part], epoch: int, lane: int, first_step: int
    ) -> Generator[pa.Table, None, None]:
        """Yield this rank's rows of a lane from step `first_step` on, in their order, window by window."""
        per_step = self.global_batch // self.lanes
        usual, last = (self._own_in_lane(step, lane) for step in (0, -1))
        begin, is_empty = 0, True
        windows = list(windows_of(parts, max(1, self._window_rows // self.lanes)))
        for number, window in enumerate(windows):
            size = sum(part.num_rows for part in window)
            step, within = np.divmod(np.arange(begin, begin + size), per_step)
            is_own = np.where(step < len(self) - 1, _is_in(within, usual), _is_in(within, last))
            is_own &= (step >= first_step) & (step < len(self))
            begin += size
            if is_own.any() or (is_empty and window is windows[-1]):  # so that empty batches have columns too
                order = self._generator(epoch, (lane << 32) + number).permutation(size) if self.shuffle else None
                own = np.flatnonzero(is_own) if order is None else order[is_own]
                is_empty = False
                yield pa.concat_tables(
                    read_row_group(part.group, self.schema).slice(part.first, part.num_rows) for part in window
                ).take(own)

    def _generator(self, *purpose: int) -> np.random.Generator:
        """Return a generator that depends only on the seed and `purpose`."""
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(self.seed, spawn_key=purpose)))


class _Rows:
    """The rows of consecutive tables, to be taken some at a time."""

    def __init__(self, tables: Iterator[pa.Table]) -> None:
        self._tables, self._rest = tables, None

    def take(self, count: int) -> pa.Table:
        """The next `count` rows."""
        rows, self._rest = next(self._tables) if self._rest is None else self._rest, None
        while rows.num_rows < count:
            rest, rows = rows.take(np.arange(rows.num_rows)), None  # a copy, without the whole window
            rows = pa.concat_tables([rest, next(self._tables)])
        self._rest = rows.slice(count)
        return rows.slice(0, count)


def _is_in(values: np.ndarray, wanted: range) -> np.ndarray:
    return (values >= wanted.start) & (values < wanted.stop)


def _check_at_least(least: int, name: str, value: int) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}. Use {least} or more.")


def _as_batch(rows: pa.Table, schema: Schema, global_rows: int, mean_weight: float) -> Batch:
    dense_BN = np.empty((rows.num_rows, len(schema.dense)), np.float32)
    for at, column in enumerate(schema.dense):
        dense_BN[:, at] = rows[column.name]
    labels_B, rows_B = (torch.from_numpy(rows[name].to_numpy().copy()) for name in (LABEL, NUMBER))
    weights_B = torch.from_numpy(rows[WEIGHT].to_numpy() / np.float32(mean_weight)) if schema.has_weights else None
    tasks_BT = None
    if schema.tasks:
        tasks_BT = torch.from_numpy(np.stack([rows[task_column(name)] for name in schema.task_names], axis=1))
    sparse = as_sparse_ids(rows, schema)
    return Batch(labels_B, torch.from_numpy(dense_BN), sparse, rows_B, global_rows, weights_B, tasks_BT)


def as_sparse_ids(rows: pa.Table, schema: Schema) -> SparseIds:
    """The ids of prepared rows, feature by feature in the schema's order."""
    bags, max_lengths = _as_bags(rows, schema), [column.max_length for column in schema.sparse]
    return in_positions(bags, max_lengths) if any(max_lengths) else bags


def _as_bags(rows: pa.Table, schema: Schema) -> SparseIds:
    ids = [flat_values(rows[column.name]) for column in schema.sparse]
    joined = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *ids]))
    if not any(column.is_multi_valued for column in schema.sparse):
        return SparseIds(joined, len(schema.sparse))
    one_each = np.ones(rows.num_rows, np.int64)
    lengths_FB = [
        pc.list_value_length(rows[column.name]) if column.is_multi_valued else one_each for column in schema.sparse
    ]
    weights = None
    if any(column.is_weighted for column in schema.sparse):
        each = [
            flat_values(rows[weights_column(column.name)]) if column.is_weighted else np.ones(len(bags), np.float32)
            for column, bags in zip(schema.sparse, ids, strict=True)
        ]
        weights = torch.from_numpy(np.concatenate(each))
    lengths_FB = torch.from_numpy(np.stack(lengths_FB).astype(np.int64))
    return SparseIds(joined, len(schema.sparse), lengths_FB, weights, list(map(len, ids)))
