"""Batches from a prepared folder: each rank's share of every step, each row once an epoch, resumable at any step.

An epoch has one global order of rows, which depends on the seed and the epoch alone: row groups are permuted, consecutive
ones make a window, rows are permuted within it. A step takes the next `batch_size * world_size * accumulation_steps` rows
and cuts them into near-equal pieces for ranks and micro steps, so what a step learns from doesn't depend on the number
of ranks. A rank decodes whole windows but gathers only its own rows; memory holds two windows, whatever the split's size.

Shapes: B rows of this rank and micro step, F sparse features, N dense features, R rows of a window.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from torch import Tensor

from dhen.data.schema import LABEL, Schema, weights_column
from dhen.model.features import SparseIds

WINDOW_ROWS = 1 << 19
READ_AHEAD_BATCHES = 4


@dataclass(frozen=True)
class Batch:
    """One rank's rows of one micro step.

    labels_B: 0, 1, or NaN where the data has no labels. rows_B: each row's number within the split, from 0.
    global_rows: rows of the whole step, over all ranks and micro steps.
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


@dataclass(frozen=True)
class _RowGroup:
    path: Path
    index: int
    first_row: int
    num_rows: int


@dataclass(frozen=True)
class _Bags:
    """A multi-valued feature of a window: row r has ids[offsets[r]:offsets[r + 1]]."""

    offsets: np.ndarray
    ids: np.ndarray
    weights: np.ndarray | None


@dataclass(frozen=True)
class _Window:
    """Decoded rows. single_RF: ids of the single-valued features, row by row, so that a gather touches few cache lines."""

    rows_R: np.ndarray
    labels_R: np.ndarray
    dense_RN: np.ndarray
    single_RF: np.ndarray
    bags: tuple[_Bags | None, ...]


class BatchLoader:
    """Batches of one split for one rank.

    batch_size: rows of a rank in a micro step. A step's rows are cut into accumulation_steps * world_size pieces; piece
    a * world_size + rank is this rank's micro step a. The last step of an epoch may be smaller, and some of its pieces
    empty; drop_last leaves it out.

    schema: the folder's, or the same with its features in another order. Raises FileNotFoundError or ValueError that name
    the file and column where the folder doesn't hold what its schema says.
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
        self.schema = schema or Schema.load(Path(folder))
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self.accumulation_steps = accumulation_steps
        self._pin_memory = pin_memory
        self._window_rows = window_rows
        self._pieces = world_size * accumulation_steps
        self._own_pieces = [micro * world_size + rank for micro in range(accumulation_steps)]
        self._global_batch = batch_size * self._pieces
        self._groups = _row_groups(Path(folder), split, self.schema)
        self.num_rows = sum(group.num_rows for group in self._groups)
        if len(self) == 0:
            raise ValueError(
                f"{folder}/{split}: {self.num_rows:,} rows are less than one step's {self._global_batch:,}, and drop_last "
                "leaves the last step out. Use a smaller batch."
            )

    def __len__(self) -> int:
        """Steps (updates) of an epoch."""
        full, rest = divmod(self.num_rows, self._global_batch)
        return full + (rest > 0 and not self.drop_last)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """This rank's micro batches of steps first_step, first_step + 1, … of an epoch, `accumulation_steps` a step.

        They are read ahead by a thread, which ends with the iterator.
        """
        return _read_ahead(lambda: self._batches(epoch, first_step))

    def _batches(self, epoch: int, first_step: int) -> Iterator[Batch]:
        windows = self._windows(epoch)
        ends = np.cumsum([sum(group.num_rows for group in window) for window in windows])
        with ThreadPoolExecutor(1, thread_name_prefix="decode") as decoder:
            cache = _WindowCache(decoder, windows, self.schema)
            for step in range(first_step, len(self)):
                first = step * self._global_batch
                rows = min(self._global_batch, self.num_rows - first)
                for piece in self._own_pieces:
                    span = (first + rows * piece // self._pieces, first + rows * (piece + 1) // self._pieces)
                    parts = [
                        (cache.get(window), self._order(epoch, window, int(ends[window] - begin))[low:high])
                        for window, begin, low, high in _overlaps(ends, span)
                    ]
                    batch = _gather(parts, self.schema, rows)
                    yield batch.pin_memory() if self._pin_memory else batch

    def _windows(self, epoch: int) -> list[list[_RowGroup]]:
        """The epoch's row groups in order, put together to windows."""
        order = range(len(self._groups))
        if self.shuffle:
            order = _generator(self.seed, epoch).permutation(len(self._groups))
        windows: list[list[_RowGroup]] = []
        size = self._window_rows
        for index in order:
            group = self._groups[index]
            if size >= self._window_rows:
                windows.append([])
                size = 0
            windows[-1].append(group)
            size += group.num_rows
        return windows

    def _order(self, epoch: int, window: int, num_rows: int) -> np.ndarray:
        """Order of the rows within a window; the last one asked for is kept."""
        key = (epoch, window)
        if getattr(self, "_last_order", (None,))[0] != key:
            order = np.arange(num_rows)
            if self.shuffle:
                order = _generator(self.seed, epoch, window).permutation(num_rows)
            self._last_order = (key, order)
        return self._last_order[1]


class _WindowCache:
    """The windows in use: the current one, and the next, which is decoded meanwhile."""

    def __init__(self, decoder: ThreadPoolExecutor, windows: list[list[_RowGroup]], schema: Schema) -> None:
        self._decoder, self._windows, self._schema = decoder, windows, schema
        self._decoded: dict[int, Future[_Window]] = {}

    def get(self, index: int) -> _Window:
        for wanted in (index, index + 1):
            if wanted < len(self._windows) and wanted not in self._decoded:
                self._decoded[wanted] = self._decoder.submit(_decode, self._windows[wanted], self._schema)
        self._decoded = {at: window for at, window in self._decoded.items() if at >= index}
        return self._decoded[index].result()


def _generator(*seeds: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seeds)))


def _overlaps(ends: np.ndarray, span: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """(window, its first position, low, high) for each window that holds part of `span`; low and high lie within it."""
    first, last = span
    window = int(np.searchsorted(ends, first, side="right"))
    while first < last:
        begin = int(ends[window - 1]) if window else 0
        high = min(last, int(ends[window]))
        yield window, begin, first - begin, high - begin
        first = high
        window += 1


def _row_groups(folder: Path, split: str, schema: Schema) -> list[_RowGroup]:
    """All row groups of a split, in the order of its rows. Raises where the files aren't what the schema says."""
    if split not in schema.splits:
        raise FileNotFoundError(f"{folder}: there is no split {split!r}, it has {', '.join(schema.splits)}.")
    groups, first_row = [], 0
    for path in sorted((folder / split).glob("*.parquet")):
        file = pyarrow.parquet.ParquetFile(path)
        _check_columns(path, file.schema_arrow, schema)
        for index in range(file.num_row_groups):
            num_rows = file.metadata.row_group(index).num_rows
            if num_rows:
                groups.append(_RowGroup(path, index, first_row, num_rows))
            first_row += num_rows
    if first_row != schema.splits[split].rows:
        raise ValueError(
            f"{folder / split}: its Parquet files have {first_row:,} rows, schema.json says {schema.splits[split].rows:,}. "
            "The folder is damaged; prepare the data again."
        )
    return groups


def _check_columns(path: Path, columns: pa.Schema, schema: Schema) -> None:
    def is_list(kind: Callable[[pa.DataType], bool]) -> Callable[[pa.DataType], bool]:
        return lambda found: (pa.types.is_list(found) or pa.types.is_large_list(found)) and kind(found.value_type)

    wanted = {LABEL: ("float32", pa.types.is_float32)}
    wanted |= {column.name: ("float32", pa.types.is_float32) for column in schema.dense}
    for column in schema.sparse:
        if column.is_multi_valued:
            wanted[column.name] = ("a list of integers", is_list(pa.types.is_integer))
        else:
            wanted[column.name] = ("an integer", pa.types.is_integer)
        if column.is_weighted:
            wanted[weights_column(column.name)] = ("a list of float32", is_list(pa.types.is_float32))
    for name, (kind, fits) in wanted.items():
        if name not in columns.names or not fits(columns.field(name).type):
            found = columns.field(name).type if name in columns.names else "missing"
            raise ValueError(f"{path}: column {name!r} must be {kind}, it is {found}. Prepare the data again.")


def _decode(groups: Sequence[_RowGroup], schema: Schema) -> _Window:
    names = [LABEL, *(column.name for column in schema.dense), *(column.name for column in schema.sparse)]
    names += [weights_column(column.name) for column in schema.sparse if column.is_weighted]
    tables = [pyarrow.parquet.ParquetFile(group.path).read_row_group(group.index, columns=names) for group in groups]
    table = pa.concat_tables(tables).combine_chunks()
    single = [column.name for column in schema.sparse if not column.is_multi_valued]
    dense = [column.name for column in schema.dense]
    return _Window(
        rows_R=np.concatenate([np.arange(g.first_row, g.first_row + g.num_rows) for g in groups]),
        labels_R=table[LABEL].to_numpy(),
        dense_RN=_side_by_side(table, dense, np.dtype(np.float32)),
        single_RF=_side_by_side(table, single, _widest([table[name].type.to_pandas_dtype() for name in single])),
        bags=tuple(
            _bags(table, column.name, column.is_weighted) if column.is_multi_valued else None
            for column in schema.sparse
        ),
    )


def _widest(types: Sequence[type]) -> np.dtype:
    return np.result_type(*types) if types else np.dtype(np.int32)


def _side_by_side(table: pa.Table, names: Sequence[str], dtype: np.dtype) -> np.ndarray:
    side_by_side = np.empty((table.num_rows, len(names)), dtype)
    for index, name in enumerate(names):
        side_by_side[:, index] = table[name].to_numpy()
    return side_by_side


def _bags(table: pa.Table, name: str, is_weighted: bool) -> _Bags:
    lists = _one_array(table[name])
    offsets = lists.offsets.to_numpy()
    weights = None
    if is_weighted:
        weight_lists = _one_array(table[weights_column(name)])
        if not np.array_equal(weight_lists.offsets.to_numpy() - weight_lists.offsets[0].as_py(), offsets - offsets[0]):
            raise ValueError(
                f"column {name!r} has rows whose ids and weights differ in number. Prepare the data again."
            )
        weights = weight_lists.flatten().to_numpy()
    return _Bags(offsets - offsets[0], lists.flatten().to_numpy(), weights)


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _gather(parts: Sequence[tuple[_Window, np.ndarray]], schema: Schema, global_rows: int) -> Batch:
    """The rows `index` of each (window, index), one after another."""
    num_single = sum(not column.is_multi_valued for column in schema.sparse)
    empty_ids = np.empty((0, num_single), np.int32)
    labels = _joined([window.labels_R[index] for window, index in parts], np.empty(0, np.float32))
    dense = _joined([window.dense_RN[index] for window, index in parts], np.empty((0, len(schema.dense)), np.float32))
    rows = _joined([window.rows_R[index] for window, index in parts], np.empty(0, np.int64))
    single_BF = _joined([window.single_RF[index] for window, index in parts], empty_ids)
    single_FB = np.ascontiguousarray(single_BF.T, dtype=np.int64)
    if num_single == len(schema.sparse):
        sparse = SparseIds(torch.from_numpy(single_FB.reshape(-1)), len(schema.sparse))
    else:
        sparse = _gather_bags(parts, schema, single_FB)
    return Batch(torch.from_numpy(labels), torch.from_numpy(dense), sparse, torch.from_numpy(rows), global_rows)


def _joined(arrays: Sequence[np.ndarray], if_none: np.ndarray) -> np.ndarray:
    if len(arrays) == 1:
        return arrays[0]
    return np.concatenate(arrays) if arrays else if_none


def _gather_bags(parts: Sequence[tuple[_Window, np.ndarray]], schema: Schema, single_FB: np.ndarray) -> SparseIds:
    is_weighted = any(column.is_weighted for column in schema.sparse)
    singles = iter(single_FB)
    ids, lengths, weights = [], [], []
    for feature, column in enumerate(schema.sparse):
        if not column.is_multi_valued:
            ids.append(next(singles))
            lengths.append(np.ones(single_FB.shape[1], np.int64))
            weights.append(np.ones(single_FB.shape[1], np.float32))
            continue
        bags = [_ragged(window.bags[feature], index) for window, index in parts]
        ids += [bag_ids for bag_ids, _, _ in bags]
        lengths.append(_joined([bag_lengths for _, bag_lengths, _ in bags], np.empty(0, np.int64)))
        weights += [np.ones(len(i), np.float32) if w is None else w for i, _, w in bags]
    return SparseIds(
        torch.from_numpy(np.concatenate([np.empty(0, np.int64), *ids]).astype(np.int64)),
        len(schema.sparse),
        torch.from_numpy(np.stack(lengths)),
        torch.from_numpy(np.concatenate([np.empty(0, np.float32), *weights])) if is_weighted else None,
    )


def _ragged(bags: _Bags, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(ids, lengths, weights) of the bags of some rows."""
    starts = bags.offsets[index].astype(np.int64)
    lengths = bags.offsets[index + 1] - starts
    ends = lengths.cumsum()
    at = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)
    return bags.ids[at], lengths, None if bags.weights is None else bags.weights[at]


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


_END = object()


def _read_ahead(batches: Callable[[], Iterator[Batch]]) -> Iterator[Batch]:
    """Yield what `batches` yields, made by a thread that is a few ahead; its error is raised here."""
    ready: queue.Queue = queue.Queue(READ_AHEAD_BATCHES)
    is_dropped = threading.Event()

    def put(item: object) -> bool:
        while not is_dropped.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def produce() -> None:
        try:
            for batch in batches():
                if not put(batch):
                    return
            put(_END)
        except BaseException as error:  # handed to the consumer, whatever it is
            put(_Failure(error))

    thread = threading.Thread(target=produce, name="batches", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not _END:
            if isinstance(item, _Failure):
                raise item.error
            yield item
    finally:
        is_dropped.set()
        thread.join()
