"""The same model trained by torch alone, on one process: what the parallel one is compared with."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from dhen.config.ds_config import Recipe
from dhen.config.training_arguments import TrainingArguments
from dhen.model.configuration_dhen import DhenConfig
from dhen.model.features import SparseIds
from dhen.model.modeling_dhen import DhenForClickPrediction

SEED = 3
LEARNING_RATE, TABLE_LEARNING_RATE = 1e-2, 0.5
ROWS = (50, 20, 7, 31, 4)
CONFIG = {
    "num_dense_features": 3,
    "embedding_dim": 8,
    "num_layers": 2,
    "interactions": ["linear", "advanced_dlrm"],
    "num_embeddings_out": 4,
    "sparse_features": [{"name": f"C{index}", "num_embeddings": rows} for index, rows in enumerate(ROWS)],
}


@dataclass(frozen=True)
class GlobalBatch:
    """One step's examples: ids_FB, dense_BN and labels_B."""

    ids_FB: Tensor
    dense_BN: Tensor
    labels_B: Tensor

    def rows(self, first: int, last: int) -> tuple[SparseIds, Tensor, Tensor]:
        """Examples [first, last)."""
        sparse = SparseIds(self.ids_FB[:, first:last].reshape(-1), len(ROWS))
        return sparse, self.dense_BN[first:last], self.labels_B[first:last]


def task_labels(dense_BN: Tensor) -> Tensor:
    """Labels of two further tasks, which depend on the dense features; NaN, no label, in about a third of the rows."""
    labels_BT = (dense_BN[:, :2] > 0.2).float()
    labels_BT[dense_BN[:, 2] > 0.4] = torch.nan
    return labels_BT


def global_batches(steps: int, size: int) -> list[GlobalBatch]:
    """Seeded batches."""
    generator = torch.Generator().manual_seed(7)
    return [
        GlobalBatch(
            torch.stack([torch.randint(0, rows, (size,), generator=generator) for rows in ROWS]),
            torch.randn(size, 3, generator=generator),
            (torch.rand(size, generator=generator) < 0.3).float(),
        )
        for _ in range(steps)
    ]


def recipe(world_size: int, per_rank: int, accumulation: int = 1, max_grad_norm: float = 0.0) -> Recipe:
    """A recipe with the learning rates above."""
    training = TrainingArguments(
        per_device_train_batch_size=per_rank,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=max_grad_norm,
        learning_rate=LEARNING_RATE,
        table_epsilon=1e-8,
    )
    return Recipe(training, world_size)


def plain_losses(
    batches: Sequence[GlobalBatch],
    accumulation: int = 1,
    max_grad_norm: float = 0.0,
    optimizer: str = "AdamW",
    replicated: Collection[str] = (),
    architecture: dict[str, Any] | None = None,
    num_ranks: int = 1,
    auxiliary: float = 1.0,
    **params: Any,
) -> tuple[list[float], dict[str, Tensor]]:
    """Mean loss of each step and the final weights: the dense part and replicated tables by `optimizer`, others by SGD.

    params: further arguments of the optimizer. architecture: keys that change the model's config. num_ranks: that share
    a micro batch, each with an auxiliary loss of its own, which is trained with the weight `auxiliary`.

    With accumulation the tables step after every micro batch, on gradients divided by the number of micro batches, as
    FBGEMM does.
    """
    torch.manual_seed(SEED)
    model = DhenForClickPrediction(DhenConfig(**CONFIG | (architecture or {})), table_seed=SEED)
    sharded = [
        parameter
        for name, table in model.tables.named_children()
        if name not in replicated
        for parameter in table.parameters()
    ]
    dense = [parameter for parameter in model.parameters() if all(parameter is not other for other in sharded)]
    dense_optimizer = getattr(torch.optim, optimizer)(dense, lr=LEARNING_RATE, weight_decay=0.0, **params)
    sgd = torch.optim.SGD([{"params": sharded}], lr=TABLE_LEARNING_RATE)
    losses = []
    for batch in batches:
        micro = len(batch.labels_B) // accumulation
        total = 0.0
        for first in range(0, len(batch.labels_B), micro):
            sgd.zero_grad()
            for start in range(first, first + micro, micro // num_ranks):
                sparse, dense_BN, labels_B = batch.rows(start, start + micro // num_ranks)
                output = model(sparse, dense_BN)
                loss = binary_cross_entropy_with_logits(output.logits, labels_B) / accumulation / num_ranks
                total += loss.item()
                if output.task_logits is not None:
                    for place, labels_B in enumerate(task_labels(dense_BN).unbind(1), start=1):
                        has_label_B = ~labels_B.isnan()
                        logits_B = output.task_logits[has_label_B, place - 1]
                        of_task = binary_cross_entropy_with_logits(logits_B, labels_B[has_label_B], reduction="sum")
                        share = output.task_weights[place] / len(labels_B) / accumulation / num_ranks
                        loss = loss * (output.task_weights[0] if place == 1 else 1) + of_task * share
                if output.auxiliary_loss is not None:
                    loss = loss + auxiliary * output.auxiliary_loss / accumulation / num_ranks
                loss.backward()
            sgd.step()
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(dense, max_grad_norm)
        dense_optimizer.step()
        dense_optimizer.zero_grad()
        losses.append(total)
    return losses, model.state_dict()
