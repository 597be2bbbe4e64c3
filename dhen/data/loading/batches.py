"""Batches from a prepared folder: each rank's share of every step, each row once an epoch, resumable at any step.

An epoch has one global order of rows, which depends on the seed and the epoch alone. A step takes the next
`batch_size * world_size * accumulation_steps` rows of it and cuts them into near-equal pieces for ranks and micro
steps, so what a step learns from doesn't depend on the number of ranks. Each rank decodes all rows and takes its own.

Shapes: B rows of this rank and micro step, F sparse features, N dense features, S single-valued sparse features.
"""

import hashlib
import json
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dhen.data.loading.epoch_order import EpochOrder, EpochReader
from dhen.data.loading.prepared_rows import Bags, Rows, decode, find_row_groups
from dhen.data.loading.read_ahead import read_ahead
from dhen.data.schema import Schema
from dhen.model.features import SparseIds

WINDOW_ROWS = 1 << 19
READ_AHEAD_BATCHES = 4


@dataclass(frozen=True)
class Batch:
    """One rank's rows of one micro step.

    labels_B: 0, 1, or NaN where the data has no labels. rows_B: each row's number within the split, from 0; it stays on
    the CPU. global_rows: rows of the whole step, over all ranks and micro steps.
    """

    labels_B: Tensor
    dense_BN: Tensor
    sparse: SparseIds
    rows_B: Tensor
    global_rows: int

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; asynchronous from pinned memory."""
        if device.type == "cpu":
            return self
        return replace(
            self,
            labels_B=self.labels_B.to(device, non_blocking=True),
            dense_BN=self.dense_BN.to(device, non_blocking=True),
            sparse=self.sparse.to(device, non_blocking=True),
        )

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, from which a GPU copies without waiting."""

        def pin(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.pin_memory()

        sparse = replace(
            self.sparse,
            ids=pin(self.sparse.ids),
            lengths_FB=pin(self.sparse.lengths_FB),
            weights=pin(self.sparse.weights),
        )
        return replace(self, labels_B=pin(self.labels_B), dense_BN=pin(self.dense_BN), sparse=sparse)


class BatchLoader:
    """Batches of one split for one rank.

    batch_size: rows of a rank in a micro step. A step's rows are cut into accumulation_steps * world_size pieces; piece
    a * world_size + rank is this rank's micro step a. The last step of an epoch may be smaller, and some of its pieces
    empty; drop_last leaves it out.

    window_rows: rows that are shuffled together, of which memory holds twice as many (epoch_order.py).

    schema: the folder's, or the same with its features in another order. Raises FileNotFoundError or ValueError that
    name the file and column where the folder doesn't hold what its schema says.
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
        self._pieces = world_size * accumulation_steps
        self._own_pieces = [micro * world_size + rank for micro in range(accumulation_steps)]
        self._global_batch = batch_size * self._pieces
        self._groups = find_row_groups(Path(folder), split, self.schema)
        self.num_rows = sum(group.num_rows for group in self._groups)
        if not self.num_rows:
            raise ValueError(f"{folder}/{split}: it has no rows. Prepare the data with a larger share for {split}.")
        if not len(self):
            raise ValueError(
                f"{folder}/{split}: its {self.num_rows:,} rows are less than one step's {self._global_batch:,}, and "
                "drop_last leaves the last step out. Use a smaller batch."
            )

    def __len__(self) -> int:
        """Steps (updates) of an epoch."""
        full, rest = divmod(self.num_rows, self._global_batch)
        return full + (rest > 0 and not self.drop_last)

    @cached_property
    def digest(self) -> str:
        """A text that differs where the data does: of the schema, and of the labels and ids of the first rows.

        Where the files lie and how raw values were read is no part of it.
        """
        schema = {key: value for key, value in asdict(self.schema).items() if key in ("dense", "sparse", "splits")}
        digest = hashlib.blake2b(json.dumps(schema).encode(), digest_size=16)
        rows = decode(self._groups[:1], self.schema)
        bags = [values for bag in rows.bags for values in (bag.offsets, bag.ids)]
        for values in (rows.labels_R, rows.single_RS, *bags):
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """This rank's micro batches of steps first_step, first_step + 1, … of an epoch, `accumulation_steps` a step.

        They are read ahead by a thread, which ends with the iterator. first_step len(self) gives none; beyond it, and
        below 0, ValueError.
        """
        _check_at_least(0, "epoch", epoch)
        if first_step not in range(len(self) + 1):
            raise ValueError(
                f"first_step is {first_step}, but an epoch of {self.split} has {len(self)} steps. "
                "Resume with the data and batch sizes of the run that is resumed."
            )
        return read_ahead(lambda: self._batches(epoch, first_step), READ_AHEAD_BATCHES)

    def _batches(self, epoch: int, first_step: int) -> Generator[Batch, None, None]:
        order = EpochOrder(self._groups, epoch, self.seed, self.shuffle, self._window_rows)
        decoder = ThreadPoolExecutor(1, thread_name_prefix="decode")
        try:
            reader = EpochReader(order, self.schema, decoder)
            for step in range(first_step, len(self)):
                first = step * self._global_batch
                count = min(self._global_batch, self.num_rows - first)
                for piece in self._own_pieces:
                    begin, end = (first + count * edge // self._pieces for edge in (piece, piece + 1))
                    batch = _as_batch(reader.read(begin, end), self.schema, count)
                    yield batch.pin_memory() if self._pin_memory else batch
        finally:
            decoder.shutdown(cancel_futures=True)


def _check_at_least(least: int, name: str, value: int) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}. Use {least} or more.")


def _as_batch(rows: Rows, schema: Schema, global_rows: int) -> Batch:
    return Batch(
        torch.from_numpy(rows.labels_R),
        torch.from_numpy(rows.dense_RN),
        _as_sparse_ids(rows, schema),
        torch.from_numpy(rows.rows_R),
        global_rows,
    )


def _as_sparse_ids(rows: Rows, schema: Schema) -> SparseIds:
    single_SB = np.ascontiguousarray(rows.single_RS.T, dtype=np.int64)
    if not rows.bags:
        return SparseIds(torch.from_numpy(single_SB.reshape(-1)), len(schema.sparse))
    one_each = np.arange(len(rows.rows_R) + 1)
    singles, bags = iter(single_SB), iter(rows.bags)
    by_feature = [next(bags) if column.is_multi_valued else Bags(one_each, next(singles)) for column in schema.sparse]
    weights = None
    if any(column.is_weighted for column in schema.sparse):
        weights = np.concatenate(
            [np.ones(len(f.ids), np.float32) if f.weights is None else f.weights for f in by_feature]
        )
    return SparseIds(
        torch.from_numpy(np.concatenate([f.ids for f in by_feature]).astype(np.int64, copy=False)),
        len(schema.sparse),
        torch.from_numpy(np.stack([f.lengths for f in by_feature])),
        None if weights is None else torch.from_numpy(weights),
    )
