"""Work for benchmarks: Criteo's tables, random batches, and a training step."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from dhen.data.loading.batches import Batch
from dhen.model.features import SparseIds
from dhen.model.sparse_feature import SparseFeature
from dhen.training.parallel_model import ParallelDhen

NUM_DENSE = 13
TABLE_LEARNING_RATE = 0.01
OPTIMIZER = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True, "fused": True}}
"""Of the dense part, in a ds_config."""
CRITEO = (
    1460, 583, 10_131_227, 2_202_608, 305, 24, 12_517, 633, 3, 93_145, 5_683, 8_351_593, 3_194, 27, 14_992, 5_461_306,
    10, 5_652, 2_173, 4, 7_046_547, 18, 15, 286_181, 105, 142_572,
)  # fmt: skip
"""Rows of the 26 tables of the Criteo Kaggle data."""


def criteo_tables(most_rows: int) -> list[SparseFeature]:
    """Criteo's tables, with at most so many rows each."""
    return [SparseFeature(f"C{index}", min(rows, most_rows)) for index, rows in enumerate(CRITEO)]


def random_batch(
    tables: Sequence[SparseFeature], batch_size: int, seed: int, ids_per_bag: Sequence[int] | None = None
) -> Batch:
    """Random examples with uniform ids; every bag of a table has the table's number of ids, or one."""
    generator = torch.Generator().manual_seed(seed)
    counts = ids_per_bag or [1] * len(tables)
    ids = [
        torch.randint(0, table.num_embeddings, (count * batch_size,), generator=generator)
        for table, count in zip(tables, counts, strict=True)
    ]
    lengths_FB = torch.tensor(counts)[:, None].expand(-1, batch_size).contiguous()
    sparse = SparseIds(torch.cat(ids), len(tables), lengths_FB if max(counts) > 1 else None)
    dense_BN = torch.randn(batch_size, NUM_DENSE, generator=generator)
    labels_B = torch.rand(batch_size, generator=generator).round()
    return Batch(labels_B, dense_BN, sparse, torch.arange(batch_size), batch_size)


def take_step(model: ParallelDhen, batch: Batch) -> Tensor:
    """Lookup, forward, backward and update. Returns this rank's loss. Communicates; all ranks call it."""
    batch = batch.to(model.topology.device)
    logits_B = model.score(model.look_up(batch.sparse), batch.dense_BN, batch.sparse)
    loss = binary_cross_entropy_with_logits(logits_B, batch.labels_B)
    model.step(loss)
    return loss.detach()
