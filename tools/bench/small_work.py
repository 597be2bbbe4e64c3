"""Work for benchmarks: random batches, and a training step."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from dhen.data.loading.batches import Batch
from dhen.model.configuration_dhen import SparseFeature
from dhen.model.features import SparseIds
from dhen.training.parallel_model import ParallelDhen

NUM_DENSE = 13
TABLE_LEARNING_RATE = 0.01
OPTIMIZER = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True, "fused": True}}
"""Of the dense part, in a ds_config."""


def random_ids(tables: Sequence[SparseFeature], ids_per_bag: Sequence[int], batch_size: int, seed: int) -> SparseIds:
    """Uniform ids of a batch; every bag of a table has the table's number of ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = [
        torch.randint(0, table.num_embeddings, (count * batch_size,), generator=generator)
        for table, count in zip(tables, ids_per_bag, strict=True)
    ]
    lengths_FB = torch.tensor(ids_per_bag)[:, None].expand(-1, batch_size).contiguous()
    return SparseIds(torch.cat(ids), len(tables), lengths_FB if max(ids_per_bag) > 1 else None)


def random_batch(tables: Sequence[SparseFeature], batch_size: int, seed: int) -> Batch:
    """Random examples with one id per bag."""
    generator = torch.Generator().manual_seed(seed)
    dense_BN = torch.randn(batch_size, NUM_DENSE, generator=generator)
    labels_B = torch.rand(batch_size, generator=generator).round()
    sparse = random_ids(tables, [1] * len(tables), batch_size, seed)
    return Batch(labels_B, dense_BN, sparse, torch.arange(batch_size), batch_size)


def take_step(model: ParallelDhen, batch: Batch) -> Tensor:
    """Lookup, forward, backward and update. Returns this rank's loss. Communicates; all ranks call it."""
    batch = batch.to(model.topology.device)
    logits_B = model.score(model.look_up(batch.sparse), batch.dense_BN, batch.sparse)
    loss = binary_cross_entropy_with_logits(logits_B, batch.labels_B)
    model.step(loss)
    return loss.detach()
