"""Saves and loads table shards by table and column, so that a checkpoint loads under any placement.

Each rank writes its own shards to `tables-<rank>.safetensors`, under the keys `<table>/<first>:<last>/<tensor>`: first
and last are columns, and tensor is "weight", an optimizer's state, or the weight's "average". To load, the ranks share
out the files to find what is in them; then each opens those that have columns of its shards. Row-wise Adagrad's state
has one number per row *and shard*, so it loads only if the table is cut as it was when saved. Any shard of a table has
"uses", how often training used each row, "is_new" if new rows have a learning rate of their own, Adam's "steps", and
how far the average is behind.

A rank's tables may fill its GPU, and the host's memory may have no room for them. So files are written in pieces.
"""

import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dhen.runtime.collectives import rank_zeros, shared_out
from dhen.runtime.topology import Topology
from dhen.tables.placement.plan import TableShard
from dhen.tables.sharded_tables import STATES, ShardedTables

_KEY = re.compile(r"(?P<table>.+)/(?P<first>\d+):(?P<last>\d+)/(?P<tensor>\w+)")
_KINDS = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.float16: "F16",
    torch.bool: "BOOL", torch.uint8: "U8",
}  # fmt: skip
"""Names of dtypes in safetensors files, in the order of their tensors there."""
PIECE_BYTES = 64 * 2**20
"""Size of the pieces of a table that are in host memory while it is written."""


class TableStorageError(ValueError):
    """Saved tables do not fit this model. The message names the folder and the table."""


@dataclass(frozen=True)
class InPieces:
    """A tensor as `pieces` of its rows, on any device: the next one is made when the one before is written."""

    dtype: torch.dtype
    shape: Sequence[int]
    pieces: Iterable[Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> "InPieces":
        """The pieces of a tensor that exists: views. One piece for a number, such as batch norm's count of batches."""
        whole = tensor.detach()
        pieces = whole.split(rows_at_once(whole.shape, whole.itemsize)) if whole.dim() else (whole,)
        return cls(tensor.dtype, tensor.shape, pieces)

    def on_host(self) -> "InPieces":
        """A copy in host memory, which later steps do not change."""
        whole = torch.empty(self.shape, dtype=self.dtype)
        first = 0
        for piece in self.pieces:
            whole[first : first + len(piece)] = piece
            first += len(piece)
        return InPieces.of(whole)


def rows_at_once(shape: Sequence[int], itemsize: int = 4) -> int:
    """Number of rows of a piece of a tensor."""
    return max(1, PIECE_BYTES // max(1, itemsize * math.prod(shape[1:])))


def write_in_pieces(path: Path, tensors: Mapping[str, InPieces], metadata: Mapping[str, str]) -> None:
    """Write what `safetensors.torch.save_file` would, which needs all tensors in host memory at once."""
    head, names = head_of_file(tensors, metadata)
    path.unlink(missing_ok=True)
    write_part(path, 0, head, chain.from_iterable(tensors[name].pieces for name in names))


def write_part(path: Path, first_byte: int, head: bytes, pieces: Iterable[Tensor]) -> None:
    """Write a part of a file, of which other processes may write other parts: `head`, then the pieces."""
    with open(path, "wb", opener=lambda name, _: os.open(name, os.O_WRONLY | os.O_CREAT, 0o666)) as file:
        file.seek(first_byte)
        file.write(head)
        for piece in pieces:
            file.write(piece.cpu().contiguous().numpy())


def head_of_file(tensors: Mapping[str, InPieces], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """What a safetensors file with these tensors begins with, and their names in the order in which they follow."""
    kinds = list(_KINDS)
    names = sorted(tensors, key=lambda name: (kinds.index(tensors[name].dtype), name))
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name in names:
        tensor, first = tensors[name], end
        end += tensor.nbytes
        header[name] = {"dtype": _KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [first, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, names


@dataclass(frozen=True)
class _Stored:
    path: Path
    key: str
    first: int
    last: int


_Index = dict[tuple[str, str], list[_Stored]]
"""By table and kind of tensor."""


def tables_in_pieces(tables: ShardedTables) -> tuple[dict[str, InPieces], dict[str, str]]:
    """This rank's shards and their optimizer state, and the metadata of their file. Does not communicate."""
    tensors = {
        f"{shard.name}/{shard.first_column}:{shard.last_column}/{kind}": InPieces.of(tensor)
        for shard, of_shard in tables.shard_tensors()
        for kind, tensor in of_shard.items()
    }
    return tensors, _kind(tables)


def load_tables(tables: ShardedTables, folder: Path, topology: Topology) -> None:
    """Load this rank's shards and their optimizer state from `folder`, whatever placement they were saved under.

    Communicates; all ranks call it. Raises TableStorageError for a missing table, other sizes or another optimizer.
    """
    stored = _index(folder, _kind(tables), topology)
    for shard, of_shard in tables.shard_tensors():
        for kind, tensor in of_shard.items():
            pieces = stored.get((shard.name, kind), [])
            if kind in ("uses", "steps", "is_new"):
                if pieces:  # the run that saved may have had no new rows
                    tensor.copy_(_read(_overlapping(pieces, shard)[0], ...))
                continue
            if kind in ("average", "settled_at", "log_decay"):
                continue
            tensor.copy_(_columns(pieces, shard, tuple(tensor.shape), f"{folder}: table {shard.name!r}, {kind}"))
        if "average" in of_shard:
            _load_average(tables, shard, of_shard, stored, f"{folder}: table {shard.name!r}, average")
    tables.reloaded()


def load_states(
    tables: ShardedTables,
    folder: Path,
    topology: Topology,
    old_rows: Mapping[str, int],
    kept_rows: Callable[[str], Iterable[tuple[Tensor, Tensor]]],
) -> None:
    """Load the optimizer states of the rows that are kept from `folder`, where they may be other rows of their tables.

    old_rows: number of rows there, of the tables with rows that are kept. kept_rows: which they are there, and here.
    Communicates; all ranks call it. Raises what `load_tables` raises.
    """
    stored = _index(folder, _kind(tables), topology)
    steps = [pieces[0] for (_, kind), pieces in stored.items() if kind == "steps"]
    for shard, of_shard in tables.shard_tensors():
        for kind in STATES[tables.optimizer] if shard.name in old_rows else ():
            pieces, where = stored.get((shard.name, kind), []), f"{folder}: table {shard.name!r}, {kind}"
            state = _columns(pieces, shard, (old_rows[shard.name], *of_shard[kind].shape[1:]), where)
            for old, new in kept_rows(shard.name):
                of_shard[kind][new.to(of_shard[kind].device)] = state[old].to(of_shard[kind])
        if "steps" in of_shard and steps:
            of_shard["steps"].copy_(_read(steps[0], ...))
    tables.reloaded()


def _load_average(
    tables: ShardedTables, shard: TableShard, of_shard: dict[str, Tensor], stored: _Index, where: str
) -> None:
    """As saved, with how far its rows are behind, if the table is cut as it was. Otherwise, brought up to date.

    A run that saves without an average leaves the weights to begin with.
    """
    average, settled_at, log_decay = (of_shard[kind] for kind in ("average", "settled_at", "log_decay"))
    pieces = stored.get((shard.name, "average")) or stored.get((shard.name, "weight"), [])
    logs = stored.get((shard.name, "log_decay"), [])
    is_behind = bool(logs) and not tables.average.all_rows_change
    log_decay.copy_(_read(_overlapping(logs, shard)[0], ...) if is_behind else torch.zeros(1))
    settled_at.fill_(log_decay.item())
    cut = (shard.first_column, shard.last_column)
    exact = [piece for piece in stored.get((shard.name, "settled_at"), []) if (piece.first, piece.last) == cut]
    if exact and not tables.average.all_rows_change:
        settled_at.copy_(_read(exact[0], ...))
        average.copy_(_columns(pieces, shard, tuple(average.shape), where))
    else:
        average.copy_(_columns(pieces, shard, tuple(average.shape), where, _read_settled))


def _kind(tables: ShardedTables) -> dict[str, str]:
    """What must be the same in the saving and the loading run, by key of the dhen section."""
    return {"table_optimizer": tables.optimizer, "table_dtype": tables.table_dtype}


def _index(folder: Path, kind: dict[str, str], topology: Topology) -> _Index:
    """What the files have. Communicates: rank r looks into file number r."""
    names = rank_zeros(topology, lambda: sorted(path.name for path in folder.glob("tables-*.safetensors")))
    if not names:
        raise TableStorageError(
            f"{folder} has no tables-*.safetensors files, so it is not a checkpoint of tables. Use another checkpoint."
        )
    index: _Index = {}
    for name, keys in zip(names, shared_out(names, partial(_keys_of, folder, kind), topology), strict=True):
        for key in keys:
            match = _KEY.fullmatch(key)
            assert match, f"{folder / name}: key {key!r}"
            piece = _Stored(folder / name, key, int(match["first"]), int(match["last"]))
            index.setdefault((match["table"], match["tensor"]), []).append(piece)
    return index


def _keys_of(folder: Path, kind: dict[str, str], name: str) -> list[str]:
    try:
        with safe_open(folder / name, framework="pt") as file:
            saved_with, keys = file.metadata() or {}, list(file.keys())
    except SafetensorError as error:
        raise TableStorageError(f"{folder / name} is damaged ({error}). Use another checkpoint.") from error
    for option, value in kind.items():
        if saved_with.get(option) != value:
            raise TableStorageError(
                f"{folder / name} was saved with {option} {saved_with.get(option)!r}, but this run has {value!r}. "
                f"Change dhen.{option} back, or start from the exported model with --model_name_or_path, without its "
                "optimizer states."
            )
    return keys


def _overlapping(pieces: list[_Stored], shard: TableShard) -> list[_Stored]:
    """Those with columns of the shard, in the order of the columns."""
    found = [piece for piece in pieces if piece.first < shard.last_column and piece.last > shard.first_column]
    return sorted(found, key=lambda piece: piece.first)


def _columns(
    pieces: list[_Stored],
    shard: TableShard,
    shape: tuple[int, ...],
    where: str,
    read: Callable[[_Stored, Any], Tensor] | None = None,
) -> Tensor:
    read = read or _read
    first, last = shard.first_column, shard.last_column
    if len(shape) == 1:
        exact = [piece for piece in pieces if (piece.first, piece.last) == (first, last)]
        if not exact:
            cuts = ", ".join(f"{piece.first}:{piece.last}" for piece in pieces) or "none"
            raise TableStorageError(
                f"{where}: row-wise Adagrad's state needs columns {first}:{last}, but the checkpoint has {cuts}. This "
                "state cannot be cut differently. Resume with the placement of the checkpoint, or start from the "
                "exported model with --model_name_or_path."
            )
        found = [_read(exact[0], ...)]
    else:
        found = [
            read(piece, (slice(None), slice(max(first - piece.first, 0), min(last, piece.last) - piece.first)))
            for piece in _overlapping(pieces, shard)
        ]
    tensor = torch.cat(found, dim=-1) if found else torch.empty(0)
    if tuple(tensor.shape) != shape:
        raise TableStorageError(
            f"{where}: the saved shape is {tuple(tensor.shape)}, but the model needs {shape}. Use the model and data "
            "schema of the checkpoint."
        )
    return tensor


def _read_settled(piece: _Stored, part: Any) -> Tensor:
    """The average of all rows of a piece at the step that was saved."""
    of_piece = piece.key.rpartition("/")[0]
    with safe_open(piece.path, framework="pt") as file:
        average = file.get_slice(piece.key)[part].float()
        if f"{of_piece}/settled_at" not in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
            return average
        weight = file.get_slice(f"{of_piece}/weight")[part].float()
        behind = file.get_tensor(f"{of_piece}/log_decay") - file.get_tensor(f"{of_piece}/settled_at")
    return torch.lerp(weight, average, behind.exp().float().unsqueeze(1))


def _read(piece: _Stored, part: Any) -> Tensor:
    with safe_open(piece.path, framework="pt") as file:
        return file.get_slice(piece.key)[part]
