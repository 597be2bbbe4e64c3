"""Table shards on disk, by table and column, so that a save made under one placement loads under any other.

Each rank writes `tables-<rank>.safetensors` with its own shards under the keys `<table>/<first>:<last>/<tensor>`,
where first and last are columns and tensor is "weight" or the optimizer's "sum". A reader takes, of all the files, the
columns that its own shards need. Row-wise Adagrad's sum is one number a row *and shard*: it loads only under the cut it
was saved with.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dhen.tables.placement.plan import TableShard
from dhen.tables.sharded_tables import ShardedTables

_KEY = re.compile(r"(?P<table>.+)/(?P<first>\d+):(?P<last>\d+)/(?P<tensor>\w+)")


class TableStorageError(ValueError):
    """Saved tables that don't fit the model's; the message names the folder and the table."""


@dataclass(frozen=True)
class _Stored:
    path: Path
    key: str
    first: int
    last: int


def save_tables(tables: ShardedTables, folder: Path, rank: int) -> None:
    """Write this rank's shards and their optimizer state into `folder`. Doesn't communicate."""
    tensors = {
        f"{shard.name}/{shard.first_column}:{shard.last_column}/{kind}": tensor.detach().cpu().contiguous()
        for shard, of_shard in tables.shard_tensors()
        for kind, tensor in of_shard.items()
    }
    save_file(tensors, folder / f"tables-{rank:05d}.safetensors", metadata=_kind(tables))


def load_tables(tables: ShardedTables, folder: Path) -> None:
    """Fill this rank's shards and their optimizer state from `folder`, whatever placement they were saved under.

    Doesn't communicate. Raises TableStorageError for a missing table, other sizes or another optimizer.
    """
    stored = _index(folder, _kind(tables))
    for shard, of_shard in tables.shard_tensors():
        for kind, tensor in of_shard.items():
            pieces = stored.get((shard.name, kind), [])
            tensor.copy_(_columns(pieces, shard, tuple(tensor.shape), f"{folder}: table {shard.name!r}, {kind}"))


def _kind(tables: ShardedTables) -> dict[str, str]:
    """What a save must share with the run that loads it, by key of the ds_config."""
    return {"table_optimizer": tables.optimizer, "table_dtype": tables.table_dtype}


def _index(folder: Path, kind: dict[str, str]) -> dict[tuple[str, str], list[_Stored]]:
    files = sorted(folder.glob("tables-*.safetensors"))
    if not files:
        raise TableStorageError(f"{folder}: no tables-*.safetensors in it, so these are not a checkpoint's tables.")
    index: dict[tuple[str, str], list[_Stored]] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            saved_with = file.metadata() or {}
            for name, value in kind.items():
                if saved_with.get(name) != value:
                    raise TableStorageError(
                        f"{path}: saved with {name} {saved_with.get(name)!r}, this run has {value!r}. Set dhen.{name} "
                        "back, or start from the exported model with --model_name_or_path."
                    )
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                match = _KEY.fullmatch(key)
                assert match, f"{path}: key {key!r}"
                piece = _Stored(path, key, int(match["first"]), int(match["last"]))
                index.setdefault((match["table"], match["tensor"]), []).append(piece)
    return index


def _columns(pieces: list[_Stored], shard: TableShard, shape: tuple[int, ...], where: str) -> Tensor:
    first, last = shard.first_column, shard.last_column
    if len(shape) == 1:
        exact = [piece for piece in pieces if (piece.first, piece.last) == (first, last)]
        if not exact:
            cuts = ", ".join(f"{piece.first}:{piece.last}" for piece in pieces) or "none"
            raise TableStorageError(
                f"{where}: row-wise Adagrad's state of columns {first}:{last} is needed, saved are {cuts}. Its cut "
                "can't be changed: resume with the placement of the save, or start from the exported model."
            )
        found = [_read(exact[0], ...)]
    else:
        overlapping = sorted(
            (piece for piece in pieces if piece.first < last and piece.last > first), key=lambda p: p.first
        )
        found = [
            _read(piece, (slice(None), slice(max(first - piece.first, 0), min(last, piece.last) - piece.first)))
            for piece in overlapping
        ]
    tensor = torch.cat(found, dim=-1) if found else torch.empty(0)
    if tuple(tensor.shape) != shape:
        raise TableStorageError(f"{where}: saved shape {tuple(tensor.shape)}, the model's is {shape}.")
    return tensor


def _read(piece: _Stored, part: Any) -> Tensor:
    with safe_open(piece.path, framework="pt") as file:
        return file.get_slice(piece.key)[part]
