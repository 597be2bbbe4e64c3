"""Tables are written in pieces: the files are those of the safetensors library, and the host needs room for a piece."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dhen.model.configuration_dhen import SparseFeature
from dhen.planner.live_memory import LiveMemory
from dhen.runtime.topology import Topology
from dhen.tables import row_uses, storage
from dhen.tables.placement.costs import StepSetting, read_costs
from dhen.tables.placement.plan import PlacementOptions, place_tables
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
