"""A trained model on disk, in the format of `save_pretrained`, with the files that turn raw click logs into its inputs.

The folder holds config.json, safetensors files with an index, the data's schema.json and vocabulary/, and a model card.
row-uses-<rank>.safetensors say how often training used each row of the tables; a row that it never used is the mean of
the others, weighted by these counts.
Each rank writes its own tables, and a table that is sharded by columns is assembled on one of its ranks. This is done a
few rows at a time, so no rank needs memory for all tables. Transformers can load the folder:
`AutoModel.from_pretrained(folder)`.
"""

import itertools
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dhen.data.format_version import VERSION_KEY, check_format_version
from dhen.data.schema import Schema
from dhen.model.configuration_dhen import DhenConfig
from dhen.paths import find, looked_in
from dhen.runtime.topology import Topology
from dhen.tables.placement.plan import TableShard
from dhen.tables.row_uses import fill_unused
from dhen.tables.sharded_tables import ShardedTables
from dhen.tables.storage import InPieces, rows_at_once, write_in_pieces
from dhen.training.parallel_model import ParallelDhen

MODEL_FOLDER = "model"
FORMAT_VERSION = 2
"""Version of the exported model. Raise it when models that were exported before can no longer be read as they are."""
VOCABULARY_FOLDER = "vocabulary"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_TABLES, _USES = "tables.", "row-uses"
_METADATA = {"format": "pt"}


@dataclass(frozen=True)
class TrainedModel:
    """An exported model, which can be read one tensor at a time."""

    folder: Path

    @classmethod
    def open(cls, path: str | Path) -> "TrainedModel":
        """Open the exported model at `path`, which is its folder or a run folder. Raises FileNotFoundError."""
        place = Path(find(str(path)))
        for folder in (place, place / MODEL_FOLDER):
            if (folder / "config.json").is_file() and ((folder / _INDEX).is_file() or (folder / _SINGLE).is_file()):
                _check_version(folder / _INDEX)
                return cls(folder)
        raise FileNotFoundError(
            f"{path}: no trained model here. Use the folder of a finished run (it contains {MODEL_FOLDER}/) or of an "
            f"exported model (it contains config.json and safetensors).{looked_in(path)}"
        )

    @cached_property
    def config(self) -> DhenConfig:
        """The model's config."""
        return DhenConfig.from_pretrained(self.folder)

    @cached_property
    def schema(self) -> Schema:
        """The schema of the training data. Its vocabularies are in `folder` too."""
        return Schema.load(self.folder)

    @cached_property
    def _files(self) -> dict[str, str]:
        """Weight name -> file name."""
        index = self.folder / _INDEX
        if index.is_file():
            return json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        with safe_open(self.folder / _SINGLE, framework="pt") as file:
            return dict.fromkeys(file.keys(), _SINGLE)

    def dense_weights(self) -> dict[str, Tensor]:
        """All weights of the dense part, by name."""
        return {name: self._read(name) for name in self._files if not name.startswith(_TABLES)}

    def table(self, feature: str, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """Some rows and columns of a feature's table, by default all."""
        return self._read(f"{_TABLES}{feature}.weight", (rows, columns))

    def _read(self, name: str, part: Any = ...) -> Tensor:
        with safe_open(self.folder / self._files[name], framework="pt") as file:
            return file.get_slice(name)[part]

    def load_tables(self, tables: ShardedTables) -> None:
        """Load this rank's shards. Does not communicate."""
        for shard, tensors in tables.shard_tensors():
            tensors["weight"].copy_(self.table(shard.name, columns=slice(shard.first_column, shard.last_column)))
            tensors["uses"].copy_(self.uses(shard.name))

    @cached_property
    def _uses_files(self) -> dict[str, Path]:
        """Feature -> file."""
        files = {}
        for path in sorted(self.folder.glob(f"{_USES}-*.safetensors")):
            with safe_open(path, framework="pt") as file:
                files |= dict.fromkeys(file.keys(), path)
        return files

    def uses(self, feature: str, rows: slice = slice(None)) -> Tensor:
        """How often training used each of these rows of a feature's table, int32. Raises FileNotFoundError."""
        if feature not in self._uses_files:
            raise FileNotFoundError(
                f"{self.folder}: no file {_USES}-*.safetensors says which rows of {feature!r} training used. Copy it "
                "from the model that this one was made of, or train the model again."
            )
        with safe_open(self._uses_files[feature], framework="pt") as file:
            return file.get_slice(feature)[rows]


def export_model(model: ParallelDhen, folder: Path, schema: Schema, prepared: Path, card: str, scale: float) -> None:
    """Write the trained model to `folder`, which appears only when it is complete. Communicates; all ranks call it.

    schema: the schema of the data, in the model's feature order. prepared: the prepared folder, for its vocabularies.
    card: the text of the model card. scale: multiplies the logits, by way of the head's last layer.
    """
    topology = model.topology
    draft = folder.with_name(f".{folder.name}.draft")
    if topology.is_main:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    topology.barrier()
    written = _write_tables(model.tables, draft, topology) if model.tables is not None else {}
    dense = model.dense_state_dict()
    _write_uses(model, draft)
    if topology.is_main:
        for name in ("weight", "bias"):
            dense[f"head.{len(model.engine.module.head) - 1}.{name}"] *= scale
        save_file(dense, draft / "model-dense.safetensors", metadata=_METADATA)
        written |= {name: ("model-dense.safetensors", tensor.nbytes) for name, tensor in dense.items()}
    everyone: list[dict[str, tuple[str, int]]] = [{} for _ in range(topology.world_size)]
    dist.all_gather_object(everyone, written, group=topology.world)
    if topology.is_main:
        _write_index({name: entry for of_rank in everyone for name, entry in of_rank.items()}, draft)
        model.config.architectures = ["DhenForClickPrediction"]
        model.config.save_pretrained(draft)
        schema.save(draft)
        if (prepared / VOCABULARY_FOLDER).is_dir():
            shutil.copytree(prepared / VOCABULARY_FOLDER, draft / VOCABULARY_FOLDER)
        (draft / "README.md").write_text(card, encoding="utf-8")
        aside = folder.with_name(f".{folder.name}.replaced")
        shutil.rmtree(aside, ignore_errors=True)
        if folder.exists():
            folder.replace(aside)
        draft.replace(folder)
        shutil.rmtree(aside, ignore_errors=True)
    topology.barrier()


def _write_tables(tables: ShardedTables, folder: Path, topology: Topology) -> dict[str, tuple[str, int]]:
    """Write each table on the rank that holds its first columns. Communicates if tables are sharded by columns.

    Returns the tensors that this rank wrote: name -> (file, bytes).
    """
    of_shards = zip(tables.shard_tensors(), tables.means(), strict=True)
    own = {shard: (tensors["weight"], tensors["uses"], mean) for (shard, tensors), mean in of_shards}
    files = {f"model-tables-{topology.rank:05d}.safetensors": [[shard] for shard in own if not _is_cut(shard, tables)]}
    files |= {f"model-table-{shards[0].table:05d}.safetensors": [shards] for shards in _cut_tables(tables)}
    written = {}
    for name, by_table in files.items():
        whole = {
            f"{_TABLES}{shards[0].name}.weight": InPieces(
                torch.float32, (shards[0].num_embeddings, tables.embedding_dim), _joined(own, shards, topology)
            )
            for shards in by_table
        }
        if by_table and topology.rank == by_table[0][0].rank:
            write_in_pieces(folder / name, whole, _METADATA)
            written |= {key: (name, 4 * math.prod(tensor.shape)) for key, tensor in whole.items()}
        for tensor in whole.values():
            list(tensor.pieces)  # sends this rank's part of a table that another rank writes
    return written


def _write_uses(model: ParallelDhen, folder: Path) -> None:
    """Write how often training used each row: each rank for its tables, rank 0 for the replicated ones."""
    uses = {}
    if model.tables is not None:
        of_shards = model.tables.shard_tensors()
        uses = {shard.name: tensors["uses"] for shard, tensors in of_shards if shard.first_column == 0}
    if model.topology.is_main:
        uses |= model.replicated.uses_by_name()
    if uses:
        path = folder / f"{_USES}-{model.topology.rank:05d}.safetensors"
        write_in_pieces(path, {name: InPieces.of(counts) for name, counts in uses.items()}, {})


def _is_cut(shard: TableShard, tables: ShardedTables) -> bool:
    return shard.num_columns < tables.embedding_dim


def _cut_tables(tables: ShardedTables) -> list[list[TableShard]]:
    """The shards of each column-sharded table, in column order; the same on all ranks."""
    cut = (shard for shard in tables.placement.shards if _is_cut(shard, tables))
    in_order = sorted(cut, key=lambda shard: (shard.table, shard.first_column))
    return [list(shards) for _, shards in itertools.groupby(in_order, key=lambda shard: shard.table)]


def _joined(
    own: Mapping[TableShard, tuple[Tensor, Tensor, Tensor]], shards: list[TableShard], topology: Topology
) -> Iterator[Tensor]:
    """A table's rows as they are exported, float32, piece by piece, on the rank that holds its first columns.

    own: weight, uses and mean row of this rank's shards. shards: of the table. Communicates among their ranks; all
    ranks may iterate, and those that do not hold the first columns get nothing.
    """
    owner, rows = shards[0].rank, shards[0].num_embeddings
    step = rows_at_once((rows, sum(shard.num_columns for shard in shards)))
    for first in range(0, rows, step):
        here = slice(first, min(first + step, rows))
        parts = []
        for shard in shards:
            if shard in own:
                weight, uses, mean = own[shard]
                part = weight[here].detach().to(torch.float32, copy=True).contiguous()
                parts.append(fill_unused(part, uses[here], mean))
                if topology.rank != owner:
                    dist.send(parts[-1], owner, group=topology.world)
            elif topology.rank == owner:
                parts.append(torch.empty(here.stop - first, shard.num_columns, device=topology.device))
                dist.recv(parts[-1], shard.rank, group=topology.world)
        if topology.rank == owner:
            yield torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _check_version(index: Path) -> None:
    """Raise ValueError for another format. A single file, which `save_pretrained` writes, says no version."""
    metadata = json.loads(index.read_text(encoding="utf-8")).get("metadata", {}) if index.is_file() else {}
    check_format_version(index, metadata, FORMAT_VERSION, "train the model again")


def _write_index(entries: dict[str, tuple[str, int]], folder: Path) -> None:
    index = {
        "metadata": {"total_size": sum(size for _, size in entries.values()), VERSION_KEY: FORMAT_VERSION},
        "weight_map": {name: file for name, (file, _) in sorted(entries.items())},
    }
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
