"""Finds the part of the model where a loss or gradient that is not finite began, after DeepSpeed refused the step.

Until then a step costs one flag per micro step. The refused step has not changed the dense part, but it has changed the
tables: FBGEMM updates them inside the backward. So the search uses the embeddings that the micro step looked up.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dhen.data.loading.batches import Batch
from dhen.data.schema import Schema
from dhen.model.names import quoted
from dhen.runtime.collectives import from_all
from dhen.training.parallel_model import ParallelDhen

ADVICE = "Lower learning_rate or table_learning_rate, add warmup_steps, or set max_grad_norm."
_LARGEST_INPUT = 1e6
"""A larger dense value is named as the cause if the parts that it enters are broken."""
_FIRST_PARTS = ("the dense MLP", "layer 0")
_NOTHING = (9, "the gradient, although the loss is finite", ADVICE)


class KeptMicroStep:
    """What the search needs of a micro step. Create it between the forward and the backward pass."""

    def __init__(self, batch: Batch, embeddings_BFD: Callable[[], Tensor] | None, loss: Tensor) -> None:
        self.batch, self.embeddings_BFD = batch, embeddings_BFD
        # Neither this copy nor `is_broken` stalls a GPU: that waits for the forward pass while the backward pass runs.
        self._is_finite = torch.empty((), dtype=torch.bool, pin_memory=loss.is_cuda)
        self._is_finite.copy_(loss.detach().isfinite(), non_blocking=True)
        self._copied = torch.cuda.current_stream().record_event() if loss.is_cuda else None

    def is_broken(self) -> bool:
        """Whether this rank's loss is not finite."""
        if self._copied is not None:
            self._copied.synchronize()
        return not self._is_finite


def where_it_began(model: ParallelDhen, kept: KeptMicroStep, schema: Schema) -> str:
    """A sentence that names the first broken part on any rank, and one that says what to do.

    kept: the step's first micro step whose loss is not finite on this rank; if there is none, any other. Communicates;
    all ranks call it, which is possible because they agree on a refused step.
    """
    _, where, advice = min(from_all(_search(model, kept, schema), model.topology))
    return f"It began in {where}. {advice}"


def _search(model: ParallelDhen, kept: KeptMicroStep, schema: Schema) -> tuple[int, str, str]:
    """(place in the forward pass, part, advice)."""
    batch = kept.batch
    embeddings_BFD = None if kept.embeddings_BFD is None else kept.embeddings_BFD().detach()
    broken = _broken_parts(model, batch, embeddings_BFD)  # on all ranks, because ZeRO stage 3 communicates here
    largest = _LARGEST_INPUT if broken and broken[0] in _FIRST_PARTS else torch.finfo(torch.float32).max
    for column, values_B in zip(schema.dense, batch.dense_BN.cpu().unbind(1), strict=True):
        is_wrong_B = ~(values_B.abs() <= largest)
        if is_wrong_B.any():
            row, value = batch.rows_B[is_wrong_B][0], values_B[is_wrong_B][0]
            where = f"the dense input: feature {quoted(column.name)} of row {row} of the training data is {value:g}"
            return 0, where, "Correct such values, or give the feature the transform log1p in dataset_schema."
    if not kept.is_broken():
        return _NOTHING
    if embeddings_BFD is not None and not embeddings_BFD.isfinite().all():
        sharded = [of.name for of in model.config.lookups if of.table not in model.placement.replicated]
        (first, *_) = (~embeddings_BFD.isfinite()).any(2).any(0).nonzero().flatten().tolist()
        where = f"the embeddings of feature {quoted(sharded[first])}: an earlier step made its table infinite or NaN"
        return 1, where, "Lower table_learning_rate, or add warmup_steps."
    if broken:
        return 2, f"{broken[0]}: its output is not finite, although its input is", ADVICE
    return 3, "the loss, although the logits are finite", ADVICE


def _broken_parts(model: ParallelDhen, batch: Batch, embeddings_BFD: Tensor | None) -> list[str]:
    """The parts of the dense part whose outputs are not finite, in order. Communicates under ZeRO stage 3."""
    dense, broken = model.engine.module, []
    parts = {"the replicated tables": dense.tables, "the dense MLP": dense.model.features.dense_mlp}
    parts |= {f"layer {index}": layer for index, layer in enumerate(dense.model.layers)}
    parts |= {"the last norm": dense.model.norm, "the head": dense.head}
    if dense.tasks is not None:
        parts |= {f"the head of {name}": head for name, head in dense.tasks.heads.named_children()}
    for name, part in parts.items():
        if part is not None:
            part.register_forward_hook(
                lambda _, __, output, name=name: broken.append(name) if not output.isfinite().all() else None
            )
    with torch.no_grad():
        model.score(embeddings_BFD, batch.dense_BN, batch.sparse)
    return broken
