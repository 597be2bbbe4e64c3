"""Builds one rank's FBGEMM tables: location and dtype of the weights, and the optimizer (paper 3.1, figure 4)."""

from collections.abc import Collection, Sequence

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    BoundsCheckMode,
    ComputeDevice,
    EmbeddingLocation,
    PoolingMode,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from dhen.config.dhen_section import TableDtype, TableOptimizer
from dhen.tables.placement.costs import CACHED_SHARE

_OPTIMIZERS = {
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "sgd": EmbOptimType.EXACT_SGD,
    "adam": EmbOptimType.ADAM,  # on CUDA only
}
_DTYPES = {"fp32": SparseType.FP32, "fp16": SparseType.FP16}


def make_lookup(
    sizes: Sequence[tuple[int, int]],
    device: torch.device,
    optimizer: TableOptimizer,
    table_dtype: TableDtype = "fp32",
    epsilon: float = 1e-8,
    betas: tuple[float, float] = (0.9, 0.999),
    *,
    rounds_stochastically: bool = False,
    cached: Collection[int] = (),
    table_of_lookup: Sequence[int] | None = None,
) -> SplitTableBatchedEmbeddingBagsCodegen:
    """FBGEMM tables on `device` that sum over each bag and run the optimizer in their backward.

    sizes: (rows, columns) of each table. rounds_stochastically: round fp16 updates stochastically; FBGEMM ignores this
    on CPU, see `UpdatedTables`. cached: on CUDA, indices of the tables that stay in host memory, with a cache on the
    GPU. table_of_lookup: the table of each lookup, ascending; by default, each table has one.
    """
    return SplitTableBatchedEmbeddingBagsCodegen(
        [(*size, *_location(device, index in cached)) for index, size in enumerate(sizes)],
        weights_precision=_DTYPES[table_dtype],
        output_dtype=SparseType.FP32,
        optimizer=_OPTIMIZERS[optimizer],
        learning_rate=0.0,
        eps=epsilon,
        beta1=betas[0],
        beta2=betas[1],
        stochastic_rounding=rounds_stochastically,
        cache_load_factor=CACHED_SHARE,
        pooling_mode=PoolingMode.SUM,
        bounds_check_mode=BoundsCheckMode.NONE,  # ids are checked before they are sent
        device=device,
        feature_table_map=None if table_of_lookup is None else list(table_of_lookup),
    )


def _location(device: torch.device, is_cached: bool) -> tuple[EmbeddingLocation, ComputeDevice]:
    """Where a table's weights are, and where it computes. FBGEMM rejects mixed pairs of the two."""
    if device.type == "cpu":
        return EmbeddingLocation.HOST, ComputeDevice.CPU
    return EmbeddingLocation.MANAGED_CACHING if is_cached else EmbeddingLocation.DEVICE, ComputeDevice.CUDA
