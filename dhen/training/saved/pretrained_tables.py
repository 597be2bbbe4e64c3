"""Tables whose rows start from pretrained vectors, as `pretrained` says in the schema file.

A Parquet file has a column of keys, and one column of lists or a column for each number. An .npz file has the arrays
`keys` (N,) and `vectors` (N, D), and is in memory while it is read.

Shapes: N rows of a piece of the file, D embedding dimension.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
import torch
from torch import Tensor

from dhen.config.dhen_section import TableDtype
from dhen.data.formats.canonical import canonical_keys
from dhen.data.formats.column_role import PretrainedRole
from dhen.data.formats.columns import is_list, list_lengths, plain
from dhen.data.formats.raw_files import is_url, open_file
from dhen.data.formats.raw_rows import DataError
from dhen.data.formats.roles import COLUMNS_FILE, load_roles
from dhen.data.preparation.encoding.vocabulary import key_ids, vocabulary_path
from dhen.data.schema import MISSING_ID
from dhen.model.names import listed, quoted
from dhen.paths import find, looked_in
from dhen.runtime.collectives import shared_out
from dhen.runtime.topology import Topology

_PIECE_ROWS = 1 << 14
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainedTables:
    """The tables of a prepared folder that have vectors, by name. largest: absolute value of a number in them.

    Reading a file raises FileNotFoundError, or DataError that names the file and the row.
    """

    prepared: Path
    roles: dict[str, PretrainedRole]
    dim: int
    largest: float

    @classmethod
    def open(cls, prepared: Path, embedding_dim: int, dtype: TableDtype, topology: Topology) -> "PretrainedTables":
        """Check the files, which the ranks share out, and log how many keys have a vector. All ranks call it."""
        largest = torch.finfo(torch.float16 if dtype == "fp16" else torch.float32).max
        found = cls(prepared, _roles(prepared), embedding_dim, largest)
        counts = shared_out(list(found.roles), found.counts, topology)
        for (table, role), (keys, known, vectors) in zip(found.roles.items(), counts, strict=True):
            logger.log(
                logging.INFO if known or topology.rank else logging.WARNING,
                f"{table}: {known:,} of {keys:,} keys have a vector in {role.file}, and {keys - known:,} keep their "
                f"initial values; {vectors - known:,} of its {vectors:,} vectors have no key in the data",
            )
        return found

    def fill_table(
        self, name: str, weight: Tensor | None = None, uses: Tensor | None = None, columns: slice = slice(None)
    ) -> None:
        """Write these columns of the vectors into the rows of a table, which then count as used once."""
        for _, ids, vectors_ND in self._pieces(name) if name in self.roles else ():
            is_known = ids != MISSING_ID
            rows = torch.from_numpy(ids[is_known])
            if weight is not None:
                weight[rows.to(weight.device)] = torch.from_numpy(vectors_ND[is_known, columns]).to(weight)
            if uses is not None:
                uses[rows.to(uses.device)] = 1

    def counts(self, table: str) -> tuple[int, int, int]:
        """The numbers of keys in the vocabulary, of those with a vector, and of vectors. Checks the whole file."""
        keys, known = pl.Series(dtype=pl.String), 0
        for of_piece, ids, _ in self._pieces(table):
            keys.append(pl.Series(pl.from_arrow(of_piece)))
            known += np.count_nonzero(ids)
        if (is_twice := keys.is_duplicated()).any():
            key, file = keys.filter(is_twice)[0], self.roles[table].file
            rows = " and ".join(str(row + 1) for row in (keys == key).arg_true().head(2))
            raise DataError(f"{file}: the rows {rows} have the same key, {quoted(key)}. Give each key one vector.")
        return pyarrow.parquet.read_metadata(vocabulary_path(self.prepared, table)).num_rows, known, len(keys)

    def _pieces(self, table: str) -> Iterator[tuple[pa.Array, np.ndarray, np.ndarray]]:
        """Yield the canonical text of keys, their ids_N, and vectors_ND in float32."""
        file, key, row, known = self.roles[table].file, self.roles[table].key, 1, key_ids(self.prepared, table)
        for batch in _batches(find(file), key):
            kind = batch.schema.field(key).type if key in batch.schema.names else pa.null()
            if pa.types.is_null(kind) or pa.types.is_floating(kind) or pa.types.is_nested(kind):
                raise DataError(
                    f"{file}: there is no column {quoted(key)} of texts or whole numbers. The columns are "
                    f"{listed(batch.schema.names)}. Name that of the keys as `key` under `pretrained` in the schema."
                )
            keys = canonical_keys(plain(batch[key]).cast(pa.string()))
            if keys.null_count:
                raise DataError(f"{file}: row {row + pc.index(keys.is_null(), True).as_py()} has no key. Leave it out.")
            given_ND = self._numbers(batch.drop_columns([key]), file, row)
            with np.errstate(over="ignore"):
                vectors_ND = given_ND.astype(np.float32)
            for at, place in np.argwhere(~(np.abs(vectors_ND) <= self.largest)):
                raise DataError(
                    f"{file}: row {row + at}: number {place + 1} of the vector of {quoted(keys[int(at)].as_py())} is "
                    f"{given_ND[at, place]}. Use finite numbers up to {self.largest:.3g}, or leave out the row."
                )
            yield keys, known.ids(keys), vectors_ND
            row += len(batch)

    def _numbers(self, columns: pa.RecordBatch, file: str, row: int) -> np.ndarray:
        """The numbers in one column of lists, or in D columns: (N, D). row: number of the first row."""
        kinds, dim = columns.schema.types, self.dim
        if is_lists := len(kinds) == 1 and is_list(kinds[0]):
            kinds = [kinds[0].value_type] * dim
        if len(kinds) != dim or not all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in kinds):
            raise DataError(
                f"{file}: beside the key, use one column with lists of {dim} numbers, the embedding_dim, or {dim} "
                f"columns of numbers, not {listed([f'{field.name} ({field.type})' for field in columns.schema])!r}."
            )
        if not is_lists:
            return np.stack([column.to_numpy(zero_copy_only=False) for column in columns], axis=1)
        lengths_N = list_lengths(columns[0])
        for at in np.flatnonzero(lengths_N != dim):
            raise DataError(
                f"{file}: row {row + at}: the vector has {lengths_N[at]} numbers, but embedding_dim is {dim}. Use "
                "vectors of this length, or change embedding_dim."
            )
        return pc.list_flatten(columns[0]).to_numpy(zero_copy_only=False).reshape(-1, dim)


def frozen_tables(prepared: Path) -> list[str]:
    """The tables of a prepared folder that are not trained."""
    return [table for table, role in _roles(prepared).items() if role.frozen]


def _roles(prepared: Path) -> dict[str, PretrainedRole]:
    columns = prepared / COLUMNS_FILE
    tables = load_roles(columns).tables if columns.is_file() else {}
    return {table: role.pretrained for table, role in tables.items() if role.pretrained}


def _batches(file: str, key: str) -> Iterator[pa.RecordBatch]:
    if not is_url(file) and not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such file of pretrained vectors. Correct the schema.{looked_in(file)}")
    try:
        with open_file(file) as content:
            if file.endswith(".npz"):
                arrays = np.load(content)
                keys, vectors = arrays["keys"], arrays["vectors"]
                lists = pa.FixedSizeListArray.from_arrays(vectors.ravel(), vectors.shape[1])
                yield from pa.table({key: keys, "vectors": lists}).to_batches(_PIECE_ROWS)
            else:
                yield from pyarrow.parquet.ParquetFile(content).iter_batches(_PIECE_ROWS, use_threads=False)
    except (pa.ArrowException, LookupError, TypeError, ValueError, OSError, BadZipFile) as error:
        raise DataError(
            f"{file}: cannot be read ({' '.join(str(error).split())}). Use a Parquet file, or an .npz file with the "
            "arrays keys, (N,), and vectors, (N, D)."
        ) from error
