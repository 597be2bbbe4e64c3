"""Tables are written in pieces: the files are those of the safetensors library, and the host needs room for a piece."""

import os
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dhen.model.features import init_table
from dhen.model.sparse_feature import SparseFeature
from dhen.planner.live_memory import LiveMemory
from dhen.runtime.topology import Topology
from dhen.tables import row_uses, storage
from dhen.tables.placement.costs import StepSetting, read_costs
from dhen.tables.placement.plan import Placement, PlacementOptions, TableShard, place_tables
from dhen.tables.sharded_tables import ShardedTables
from dhen.tables.storage import InPieces, write_in_pieces
from dhen.training.saved import trained_model
from tests.ranks import run_ranks
from tests.tables.saving import save_tables

ROWS, DIM, PIECE = 5000, 16, 1 << 14
TABLES = tuple(SparseFeature(f"t{number}", ROWS) for number in range(4))


def test_a_file_in_pieces_is_that_of_the_library(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "PIECE_BYTES", 100)
    tensors = {
        'uses/ü "': torch.arange(30, dtype=torch.int32),
        "steps": torch.tensor([2**40]),
        "none": torch.empty(0, 4),
    }
    tensors |= {"b": torch.randn(13, 8), "a": torch.randn(40), "half": torch.randn(7, 3).half().t().contiguous()}
    tensors |= {"is_new": torch.arange(9) % 2 == 0}
    for metadata in ({"format": "pt"}, {}):
        save_file(tensors, tmp_path / "theirs", metadata or None)
        write_in_pieces(tmp_path / "ours", {name: InPieces.of(tensor) for name, tensor in tensors.items()}, metadata)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


class ByColumns(ShardedTables):
    """Tables that are stored by columns, so that they are copied on their way to a file, as from a GPU."""

    def shard_tensors(self):
        return self.by_columns

    def store_by_columns(self):
        self.by_columns = [
            (shard, {kind: tensor.t().contiguous().t() if tensor.dim() > 1 else tensor for kind, tensor in of.items()})
            for shard, of in super().shard_tensors()
        ]


def peaks_of_writing(topology: Topology, folder: Path, max_column_shards: int) -> dict[str, int]:
    """The most bytes of new tensors while the tables are saved and exported, on this rank, and bytes of its tables."""
    storage.PIECE_BYTES = PIECE
    row_uses._BLOCK_ROWS = 100  # of the mean row, which is computed on the device
    setting = StepSetting(topology.world_size, topology.world_size, 64, optimizer="adagrad")
    cuts = {table.name: max_column_shards for table in TABLES}
    placement = place_tables(TABLES, DIM, setting, read_costs("cpu"), options=PlacementOptions(cuts=cuts))
    tables = ByColumns(TABLES, DIM, placement, topology)
    tables.store_by_columns()
    existing = [tensor for _, tensors in tables.by_columns for tensor in tensors.values()]
    peaks = {"tables": sum(tensor.nbytes for tensor in existing)}
    with LiveMemory(existing) as memory:
        save_tables(tables, folder, topology.rank)
        peaks["saved"] = memory.peak
    topology.barrier()
    with LiveMemory([*existing, *tables._weights(), tables.uses.counts]) as memory:
        trained_model._write_tables(tables, folder, topology)
        peaks["exported"] = memory.peak
    topology.barrier()
    return peaks


def read(folder: Path, pattern: str) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob(pattern):
        with safe_open(path, framework="pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return found


def test_the_host_needs_memory_for_a_piece_and_not_for_the_tables(tmp_path):
    """Whole tables on one rank, and tables cut by columns on two, which one of them joins."""
    exported = []
    for ranks, shards in ((1, 1), (2, 2)):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        for peaks in run_ranks(ranks, peaks_of_writing, folder, shards):
            assert PIECE / 2 < peaks["saved"] < 2 * PIECE < peaks["tables"] / 10
            # The piece before, and this one: for a cut table, the joined one and its parts.
            assert PIECE / 4 < peaks["exported"] < 4 * PIECE
        saved = read(folder, "tables-*.safetensors")
        exported.append(read(folder, "model-table*.safetensors"))
        for table in TABLES:
            parts = [saved[key] for key in sorted(saved) if key.startswith(f"{table.name}/") and "weight" in key]
            assert torch.cat(sorted(parts, key=len), dim=1).shape == (ROWS, DIM)
    assert exported[0].keys() == exported[1].keys() == {f"tables.{table.name}.weight" for table in TABLES}
    assert all(torch.equal(weight, exported[1][key]) for key, weight in exported[0].items())


CUTS = {"whole": [(0, 16, 1)], "halves": [(0, 8, 1), (8, 16, 0)], "thirds": [(0, 4, 0), (4, 12, 1), (12, 16, 0)]}
"""First and last column and rank of each shard."""


def bytes_of_export(topology: Topology, folder: Path, dtype: str) -> dict[str, tuple[int, int]]:
    """By table: the bytes that this rank writes and sends."""
    storage.PIECE_BYTES = PIECE
    cuts = CUTS | ({"four": [(4 * rank, 4 * rank + 4, rank) for rank in range(4)]} if topology.world_size == 4 else {})
    sent, written, found = [], [], {}
    exchange, write_part = dist.batch_isend_irecv, storage.write_part

    def counted_exchange(transfers: list[dist.P2POp]) -> list[dist.Work]:
        sent.extend(of.tensor.nbytes for of in transfers if of.op is dist.isend)
        return exchange(transfers)

    def counted_write(path: Path, at: int, head: bytes, pieces: Iterable[torch.Tensor]) -> None:
        kept = list(pieces)
        written.extend([len(head), *(piece.nbytes for piece in kept)])
        write_part(path, at, head, kept)

    dist.batch_isend_irecv, storage.write_part, trained_model.write_part = counted_exchange, *[counted_write] * 2
    for name, shards in cuts.items():
        placed = (TableShard(0, name, ROWS + 1, *shard) for shard in sorted(shards, key=lambda shard: shard[2]))
        placement = Placement(tuple(placed), topology.world_size)
        feature = SparseFeature(name, ROWS + 1)
        tables = ShardedTables([feature], DIM, placement, topology, table_dtype=dtype, init_std=1.0)
        tables.uses.counts.fill_(1)
        (folder / name).mkdir(exist_ok=True)
        topology.barrier()
        trained_model._write_tables(tables, folder / name, topology)
        found[name] = sum(written), sum(sent)
        written.clear()
        sent.clear()
    return found


@pytest.mark.parametrize(("ranks", "dtype"), [(2, "fp32"), (4, "fp16")])
def test_the_ranks_of_a_table_write_and_send_equal_parts_of_it(tmp_path, ranks, dtype):
    by_rank = run_ranks(ranks, bytes_of_export, tmp_path, dtype)
    of_row = DIM * (4 if dtype == "fp32" else 2)
    for name in by_rank[0]:
        (path,) = (tmp_path / name).iterdir()
        assert path.name == ("model-tables-00001.safetensors" if name == "whole" else "model-table-00000.safetensors")
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask()
        weight = init_table(name, ROWS + 1, DIM, range(DIM), 0, 1.0).to(torch.float16 if dtype == "fp16" else None)
        save_file({f"tables.{name}.weight": weight}, tmp_path / "expected", {"format": "pt"})
        assert path.read_bytes() == (tmp_path / "expected").read_bytes(), "the file is that of one process"
        written, sent = zip(*(of_rank[name] for of_rank in by_rank), strict=True)
        assert sum(written) == path.stat().st_size, "no byte is written twice"
        owners = [rank for rank in range(ranks) if written[rank]]
        assert owners == {"whole": [1], "four": [0, 1, 2, 3]}.get(name, [0, 1])
        assert max(written) - min(written[rank] for rank in owners) < of_row + 200, "the rows, and one of them the head"
        # A rank keeps its own columns of the rows that it writes.
        columns = {"whole": [0, 16], "halves": [8, 8], "thirds": [8, 8], "four": [4, 4, 4, 4]}[name]
        for rank, width in enumerate(columns):
            share = (len(owners) - 1) / len(owners)
            assert abs(sent[rank] - (ROWS + 1) * of_row * width / DIM * share) <= of_row, (name, rank)


def umask() -> int:
    now = os.umask(0o77)
    os.umask(now)
    return now


def test_a_tensor_without_dimensions_is_one_piece(tmp_path):
    write_in_pieces(tmp_path / "file", {"count": InPieces.of(torch.tensor(7))}, {})
    assert load_file(tmp_path / "file")["count"].item() == 7
