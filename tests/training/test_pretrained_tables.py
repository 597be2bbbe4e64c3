"""Tables that start from pretrained vectors train like torch's EmbeddingBag.from_pretrained, frozen or not."""

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from torch.nn import EmbeddingBag

from dhen.data.preparation.encoding.vocabulary import Vocabulary
from dhen.model.features import init_table
from dhen.runtime.topology import Topology
from dhen.training.saved.pretrained_tables import PretrainedTables, frozen_tables
from tests.ranks import run_ranks
from tests.tables.test_sharded_tables import (
    CUT,
    DIM,
    LEARNING_RATE,
    SEED,
    TABLES,
    WHOLE,
    batch_of,
    columns_of,
    joined,
    make_tables,
    target_of,
)

SIZE, STEPS = 6, 5
VECTORS = np.random.default_rng(0).normal(size=(30, DIM)).astype(np.float32)
SCHEMA = """label: label
sparse:
  - {name: sums, pretrained: {file: FOLDER/sums.parquet, frozen: IS_FROZEN}}
  - {name: means, pretrained: {file: FOLDER/means.npz}}
  - more
"""


def prepared(folder: Path, is_frozen: bool) -> Path:
    """What a prepared folder has of the tables. The keys of row r are "r"; the file of `sums` has the even ones."""
    schema = SCHEMA.replace("FOLDER", str(folder)).replace("IS_FROZEN", str(is_frozen).lower())
    (folder / "columns.yaml").write_text(schema)
    for table in TABLES:
        keys = [str(row) for row in range(1, table.num_embeddings)]
        Vocabulary(pa.array(keys), np.ones(len(keys))).save(folder, table.name)
    keys = [2 * row for row in range(1, 31)]
    pq.write_table(pa.table({"key": keys, "vector": VECTORS.tolist()}), folder / "sums.parquet")
    np.savez(folder / "means.npz", keys=np.arange(3, 11), vectors=VECTORS[:8])
    return folder


def with_vectors() -> list[Tensor]:
    """Each table as it starts."""
    tables = [init_table(table.name, table.num_embeddings, DIM, range(DIM), SEED) for table in TABLES]
    tables[0][2::2] = torch.from_numpy(VECTORS[:19])
    tables[1][3:] = torch.from_numpy(VECTORS[:6])
    return tables


def loss_of(embeddings_BFD: Tensor, step: int, rank: int) -> Tensor:
    return ((embeddings_BFD * target_of(step, rank, SIZE)).sum((1, 2)) - 1).square().sum() / 10


def train(topology: Topology, folder: Path, cuts: dict[str, int]) -> tuple[dict, dict, list[str]]:
    """This rank's tables at the start and in the end, and what it logged."""
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("dhen.training.saved.pretrained_tables")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    vectors = PretrainedTables.open(folder, DIM, "fp32", topology)
    tables = make_tables(topology, "sgd", cuts)
    for shard, tensors in tables.shard_tensors():
        columns = slice(shard.first_column, shard.last_column)
        vectors.fill_table(shard.name, tensors["weight"], tensors["uses"], columns)
    tables.freeze(frozen_tables(folder))
    start = columns_of(tables)
    for step in range(STEPS):
        loss_of(tables(batch_of("bags", step, topology.rank, SIZE)), step, topology.rank).backward()
    return start, columns_of(tables), lines


def train_torch(is_frozen: bool, num_ranks: int) -> list[Tensor]:
    bags = [
        EmbeddingBag.from_pretrained(start, freeze=is_frozen and table.name == "sums", mode="sum")
        for start, table in zip(with_vectors(), TABLES, strict=True)
    ]
    optimizer = torch.optim.SGD([bag.weight for bag in bags if bag.weight.requires_grad], lr=LEARNING_RATE)
    for step in range(STEPS):
        for rank in range(num_ranks):
            sparse = batch_of("bags", step, rank, SIZE)
            pooled = []
            ids_of_tables = sparse.ids.split(list(sparse.counts_F))
            for bag, ids, lengths_B, table in zip(bags, ids_of_tables, sparse.lengths_FB, TABLES, strict=True):
                bag.mode = table.pooling
                pooled.append(bag(ids, lengths_B.cumsum(0) - lengths_B))
            (loss_of(torch.stack(pooled, dim=1), step, rank) / num_ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [bag.weight.detach() for bag in bags]


@pytest.mark.parametrize("cuts", [WHOLE, CUT], ids=["whole", "cut"])
@pytest.mark.parametrize("is_frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_they_train_like_an_embedding_bag_from_the_same_vectors(tmp_path, num_ranks, is_frozen, cuts):
    by_rank = run_ranks(num_ranks, train, prepared(tmp_path, is_frozen), cuts)
    starts, ends = (joined([of_rank[index] for of_rank in by_rank]) for index in (0, 1))
    for table, start, end in zip(TABLES, with_vectors(), train_torch(is_frozen, num_ranks), strict=True):
        assert torch.equal(starts[table.name], start)
        torch.testing.assert_close(ends[table.name], end, atol=1e-6, rtol=1e-6)
        assert torch.equal(ends[table.name], start) == (is_frozen and table.name == "sums")
    uses = {name: of["uses"] for of_rank in by_rank for (name, _), of in of_rank[0].items()}
    assert uses["sums"].tolist() == [0, 0] + [1, 0] * 19
    assert uses["more"].sum() == 0
    assert by_rank[0][2] == [
        f"sums: 19 of 39 keys have a vector in {tmp_path}/sums.parquet, and 20 keep their initial values; 11 of its 30 "
        "vectors have no key in the data",
        f"means: 6 of 8 keys have a vector in {tmp_path}/means.npz, and 2 keep their initial values; 2 of its 8 "
        "vectors have no key in the data",
    ]
    assert all(of_rank[2] == by_rank[0][2] for of_rank in by_rank)


def test_all_ranks_refuse_a_file_that_one_of_them_read(tmp_path):
    folder = prepared(tmp_path, is_frozen=False)
    np.savez(folder / "means.npz", keys=np.arange(3, 11), vectors=np.full((8, DIM), np.inf))
    assert set(run_ranks(2, refusal, folder)) == {
        f"{tmp_path}/means.npz: row 1: number 1 of the vector of '3' is inf. Use finite numbers up to 3.4e+38, or "
        "leave out the row."
    }


def refusal(topology: Topology, folder: Path) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        PretrainedTables.open(folder, DIM, "fp32", topology)
    return str(caught.value)
