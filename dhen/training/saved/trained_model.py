"""A trained model on disk, in the format of `save_pretrained`, with the files that turn raw click logs into its inputs.

The folder holds config.json, safetensors files with an index, the data's schema.json and vocabulary/, and a model card.
row-uses-<rank>.safetensors say how often training used each row of the tables; a row that it never used is the mean of
the others, weighted by these counts.
Each rank writes its own tables. The ranks of a table that is sharded by columns exchange columns, and each writes a
stretch of its rows into one file. This is done a few rows at a time, so no rank needs memory for all tables. A table
keeps its dtype. Transformers can load the folder: `AutoModel.from_pretrained(folder)`.
"""

import copy
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dhen.data.format_version import VERSION_KEY
from dhen.data.formats.roles import COLUMNS_FILE
from dhen.data.schema import Schema
from dhen.exported_index import INDEX_FILE, read_index, version_of
from dhen.model.configuration_dhen import DhenConfig
from dhen.model.quantization import SCALE_DTYPES, Quantized, dequantize
from dhen.paths import find, looked_in
from dhen.runtime.collectives import from_all
from dhen.runtime.topology import Topology
from dhen.tables.placement.plan import TableShard
from dhen.tables.row_uses import fill_unused
from dhen.tables.sharded_tables import ShardedTables
from dhen.tables.storage import InPieces, head_of_file, rows_at_once, write_in_pieces, write_part
from dhen.training.parallel_model import ParallelDhen

MODEL_FOLDER = "model"
VOCABULARY_FOLDER = "vocabulary"
TABLES, _USES = "tables.", "row-uses"
METADATA = {"format": "pt"}


class _Written(NamedTuple):
    file: str
    dtype: torch.dtype
    nbytes: int


class _OwnShard(NamedTuple):
    weight: Tensor
    uses: Tensor
    mean: Tensor

    def exported(self, rows: range) -> Tensor:
        """Rows as they are exported: those that training never used are the mean of the others."""
        here = slice(rows.start, rows.stop)
        copy_of_rows = self.weight[here].detach().clone(memory_format=torch.contiguous_format)
        return fill_unused(copy_of_rows, self.uses[here], self.mean)

    def pieces(self) -> Iterator[Tensor]:
        """All rows, a few at a time."""
        rows, step = range(len(self.weight)), rows_at_once(self.weight.shape, self.weight.itemsize)
        return (self.exported(rows[first : first + step]) for first in rows[::step])


@dataclass(frozen=True)
class TrainedModel:
    """An exported model, which can be read one tensor at a time."""

    folder: Path

    @classmethod
    def open(cls, path: str | Path) -> "TrainedModel":
        """Open the exported model at `path`, which is its folder or a run folder. Raises FileNotFoundError, or
        ValueError if it is damaged or of another format.
        """
        place = Path(find(str(path)))
        for folder in (place, place / MODEL_FOLDER):
            if (folder / "config.json").is_file() and (folder / INDEX_FILE).is_file():
                read_index(folder)
                return cls(folder)
        raise FileNotFoundError(
            f"{path}: no trained model here. Use the folder of a finished run (it contains {MODEL_FOLDER}/) or of an "
            f"exported model (it contains config.json and {INDEX_FILE}).{looked_in(path)}"
        )

    @cached_property
    def exported_config(self) -> DhenConfig:
        """As it stands in the folder."""
        return DhenConfig.from_pretrained(self.folder)

    @cached_property
    def config(self) -> DhenConfig:
        """With the tables as `table` reads them: in float32 where the folder has int8 or int4."""
        return with_table_dtypes(self.exported_config, dict.fromkeys(self._quantized, "float32"))

    @cached_property
    def _quantized(self) -> dict[str, str]:
        """Table -> int8 or int4."""
        return {table.name: table.dtype for table in self.exported_config.tables if table.dtype in SCALE_DTYPES}

    @cached_property
    def schema(self) -> Schema:
        """The schema of the training data. Its vocabularies are in `folder` too."""
        return Schema.load(self.folder)

    @cached_property
    def _index(self) -> dict[str, Any]:
        return json.loads((self.folder / INDEX_FILE).read_text(encoding="utf-8"))

    @property
    def weight_map(self) -> dict[str, str]:
        """Tensor -> file."""
        return self._index["weight_map"]

    def dense_weights(self) -> dict[str, Tensor]:
        """All weights of the dense part, by name."""
        return {name: self._read(name) for name in self.weight_map if not name.startswith(TABLES)}

    def table(self, feature: str, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """Some rows and columns of a feature's table, by default all."""
        name = f"{TABLES}{feature}."
        if feature not in self._quantized:
            return self._read(f"{name}weight", (rows, columns))
        stored = Quantized(self._read(f"{name}weight", rows), self._read(f"{name}scale_bias", rows))
        return dequantize(stored, self._quantized[feature])[:, columns]

    def _read(self, name: str, part: Any = ...) -> Tensor:
        path = self.folder / self.weight_map[name]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_slice(name)[part]
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}). Copy the model again.") from error

    def load_tables(self, tables: ShardedTables) -> None:
        """Load this rank's shards. Does not communicate."""
        for shard, tensors in tables.shard_tensors():
            tensors["weight"].copy_(self.table(shard.name, columns=slice(shard.first_column, shard.last_column)))
            tensors["uses"].copy_(self.uses(shard.name))

    @cached_property
    def uses_files(self) -> dict[str, Path]:
        """Table -> file that says how often its rows were used."""
        files = {}
        for path in sorted(self.folder.glob(f"{_USES}-*.safetensors")):
            with safe_open(path, framework="pt") as file:
                files |= dict.fromkeys(file.keys(), path)
        return files

    def uses(self, feature: str, rows: slice = slice(None)) -> Tensor:
        """How often training used each of these rows of a feature's table, int32. Raises FileNotFoundError."""
        if feature not in self.uses_files:
            raise FileNotFoundError(
                f"{self.folder}: no file {_USES}-*.safetensors says which rows of {feature!r} training used. Copy it "
                "from the model that this one was made of, or train the model again."
            )
        with safe_open(self.uses_files[feature], framework="pt") as file:
            return file.get_slice(feature)[rows]


def export_model(
    model: ParallelDhen, folder: Path, schema: Schema, prepared: Path, card: str, scales: Mapping[str, float]
) -> None:
    """Write the trained model to `folder`, which appears only when it is complete. Communicates; all ranks call it.

    schema: the schema of the data, in the model's feature order. prepared: the prepared folder, for its vocabularies.
    card: the text of the model card. scales: by head, such as "head", what multiplies its logits, by way of its last
    layer.
    """
    topology = model.topology
    draft = folder.with_name(f".{folder.name}.draft")
    if topology.is_main:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    topology.barrier()
    if strangers := [rank for rank, sees in enumerate(from_all(draft.is_dir(), topology)) if not sees]:
        raise FileNotFoundError(
            f"{draft}: rank 0 made this folder, but the ranks {strangers} do not see it. Set output_dir to a folder "
            "that all nodes share."
        )
    written = _write_tables(model.tables, draft, topology) if model.tables is not None else {}
    dense = model.dense_state_dict()
    _write_uses(model, draft)
    if topology.is_main:
        for head, scale in scales.items():
            last = len(model.engine.module.get_submodule(head)) - 1
            for name in ("weight", "bias"):
                dense[f"{head}.{last}.{name}"] *= scale
        save_file(dense, draft / "model-dense.safetensors", metadata=METADATA)
        written |= {name: _Written("model-dense.safetensors", of.dtype, of.nbytes) for name, of in dense.items()}
    by_rank = from_all(written, topology)
    if topology.is_main:
        written = {name: tensor for of_rank in by_rank for name, tensor in of_rank.items()}
        index = {
            "metadata": {"total_size": sum(of.nbytes for of in written.values()), VERSION_KEY: version_of(written)},
            "weight_map": {name: of.file for name, of in sorted(written.items())},
        }
        (draft / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        _exported_config(model.config, written).save_pretrained(draft)
        schema.save(draft)
        if (prepared / VOCABULARY_FOLDER).is_dir():
            shutil.copytree(prepared / VOCABULARY_FOLDER, draft / VOCABULARY_FOLDER)
        if (prepared / COLUMNS_FILE).is_file():
            shutil.copy(prepared / COLUMNS_FILE, draft)
        (draft / "README.md").write_text(card, encoding="utf-8")
        aside = folder.with_name(f".{folder.name}.replaced")
        shutil.rmtree(aside, ignore_errors=True)
        if folder.exists():
            folder.replace(aside)
        draft.replace(folder)
        shutil.rmtree(aside, ignore_errors=True)
    topology.barrier()


def _exported_config(config: DhenConfig, written: Mapping[str, _Written]) -> DhenConfig:
    """The config, with the dtypes of the tables that are not float32."""
    tables = [table.name for table in config.tables]
    is_half = [name for name in tables if written[f"{TABLES}{name}.weight"].dtype == torch.float16]
    config = with_table_dtypes(config, dict.fromkeys(is_half, "float16"))
    config.architectures = ["DhenForClickPrediction"]
    return config


def with_table_dtypes(config: DhenConfig, dtypes: Mapping[str, str]) -> DhenConfig:
    """A copy of the config in which these tables have these dtypes."""
    config = copy.copy(config)
    config.sparse_features = [
        entry | ({"dtype": dtypes[feature.table]} if feature.table in dtypes else {})
        for entry, feature in zip(config.sparse_features, config.features, strict=True)
    ]
    return config


def _write_tables(tables: ShardedTables, folder: Path, topology: Topology) -> dict[str, _Written]:
    """Write the tables: those that are cut by columns together with other ranks. Of replicas, the first one is written.
    Communicates; all ranks call it.

    Returns the tensors of the files that this rank began, by name.
    """
    if tables.replica_index:
        return {}
    of_shards = zip(tables.shard_tensors(), tables.means(), strict=True)
    own = {shard: _OwnShard(tensors["weight"], tensors["uses"], mean) for (shard, tensors), mean in of_shards}
    written = {}
    for shards in _cut_tables(tables):
        if any(shard in own for shard in shards):
            written |= _write_together(own, shards, folder / f"model-table-{shards[0].table:05d}.safetensors", topology)
    whole = {}
    for shard, of_shard in own.items():
        if not _is_cut(shard, tables):
            weight = of_shard.weight
            whole[f"{TABLES}{shard.name}.weight"] = InPieces(weight.dtype, weight.shape, of_shard.pieces())
    if whole:
        name = f"model-tables-{topology.rank:05d}.safetensors"
        write_in_pieces(folder / name, whole, METADATA)
        written |= {key: _Written(name, table.dtype, table.nbytes) for key, table in whole.items()}
    return written


def _write_together(
    own: Mapping[TableShard, _OwnShard], shards: list[TableShard], path: Path, topology: Topology
) -> dict[str, _Written]:
    """Write a table that is cut by columns: each of its ranks as many of its rows, which lie side by side in the file.

    A rank's own columns would be a few bytes of each row. Communicates among the table's ranks, which all call it.
    """
    ranks, rows = list(dict.fromkeys(shard.rank for shard in shards)), range(shards[0].num_embeddings)
    bounds = [len(rows) * index // len(ranks) for index in range(len(ranks) + 1)]
    stretches = {rank: rows[slice(*ends)] for rank, ends in zip(ranks, itertools.pairwise(bounds), strict=True)}
    dtype = next(own[shard].weight.dtype for shard in shards if shard in own)
    name = f"{TABLES}{shards[0].name}.weight"
    table = InPieces(dtype, (len(rows), shards[-1].last_column), _exchanged_rows(own, shards, stretches, topology))
    head, _ = head_of_file({name: table}, METADATA)
    if topology.rank == ranks[0]:
        write_part(path, 0, head, table.pieces)
        return {name: _Written(path.name, dtype, table.nbytes)}
    bytes_before = table.nbytes // len(rows) * stretches[topology.rank].start
    write_part(path, len(head) + bytes_before, b"", table.pieces)
    return {}


def _exchanged_rows(
    own: Mapping[TableShard, _OwnShard],
    shards: list[TableShard],
    stretches: Mapping[int, range],
    topology: Topology,
) -> Iterator[Tensor]:
    """This rank's stretch of the rows, as they are exported, piece by piece, while the other ranks make theirs.

    stretches: by rank. Communicates among these ranks, which all iterate.
    """
    dtype = next(own[shard].weight.dtype for shard in shards if shard in own)
    step = rows_at_once((1, shards[-1].last_column), dtype.itemsize)
    for first in range(0, max(map(len, stretches.values())), step):
        columns, transfers = [], []
        for shard, (rank, stretch) in itertools.product(shards, stretches.items()):
            rows, is_here = stretch[first : first + step], rank == topology.rank
            if shard in own:
                part = own[shard].exported(rows)
                if not is_here:
                    transfers.append(dist.P2POp(dist.isend, part, rank, topology.world))
            elif is_here:
                part = torch.empty(len(rows), shard.num_columns, dtype=dtype, device=topology.device)
                transfers.append(dist.P2POp(dist.irecv, part, shard.rank, topology.world))
            if is_here:
                columns.append(part)
        for transfer in dist.batch_isend_irecv(transfers) if transfers else ():
            transfer.wait()
        yield torch.cat(columns, dim=1)


def _write_uses(model: ParallelDhen, folder: Path) -> None:
    """Write how often training used each row: each rank for its tables, rank 0 for the replicated ones."""
    uses = {}
    if model.tables is not None and model.tables.replica_index == 0:
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
