"""Feature processing (paper 2.1): turns dense features and looked-up embeddings into x0_BMD.

Shapes: B batch, F sparse features, N dense features, M embeddings, D embedding dimension.
"""

import itertools
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import blake2b

import torch
from torch import Tensor, nn

from dhen.model.attention_pooling import SequencePooling
from dhen.model.configuration_dhen import DhenConfig
from dhen.model.mlp import MLP
from dhen.model.quantization import SCALE_DTYPES, Quantized, dequantize, quantize
from dhen.model.sparse_feature import SparseFeature

_NUMBERS_AT_ONCE = 1 << 23
"""Initial values that are in memory beside their table: 32 MiB, enough work for the threads of a large machine."""
_DRAWN_TOGETHER = 16
"""torch draws normal numbers in groups of this many. Parts of at least one group are those of the whole column."""


@dataclass(frozen=True)
class SparseIds:
    """The sparse features of a batch: F x B bags of ids, ordered by feature, then by example.

    ids: int64, (sum of lengths,). Each id is a row of its feature's table.
    num_features: F.
    lengths_FB: int64, number of ids in each bag. None: every bag holds exactly one id, so there are F * B ids.
    weights: float32, one per id. None: every weight is 1.
    counts_F: number of ids of each feature, on the host: a GPU would make it wait for them. None: counted here.
    """

    ids: Tensor
    num_features: int
    lengths_FB: Tensor | None = None
    weights: Tensor | None = None
    counts_F: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.counts_F is None:
            is_single = self.lengths_FB is None
            counts_F = [self.batch_size] * self.num_features if is_single else self.lengths_FB.sum(1).tolist()
            object.__setattr__(self, "counts_F", counts_F)

    @property
    def batch_size(self) -> int:
        """B, the number of examples."""
        if self.lengths_FB is not None:
            return self.lengths_FB.shape[1]
        return self.ids.numel() // self.num_features if self.num_features else 0

    def select(self, features: Sequence[int]) -> "SparseIds":
        """Return the bags of the given features, in the given order."""
        if list(features) == list(range(self.num_features)):
            return self

        def choose(tensor: Tensor | None, sizes: Sequence[int]) -> Tensor | None:
            if tensor is None:
                return None
            of_features = tensor.split(list(sizes))  # an index would make the host wait for a GPU
            return torch.cat([tensor[:0], *(of_features[feature] for feature in features)])

        counts_F = [self.counts_F[feature] for feature in features]
        ids, weights = choose(self.ids, self.counts_F), choose(self.weights, self.counts_F)
        return SparseIds(ids, len(features), choose(self.lengths_FB, [1] * self.num_features), weights, counts_F)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "SparseIds":
        """Return the same bags on `device`."""
        return self.moved(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def moved(self, move: Callable[[Tensor], Tensor]) -> "SparseIds":
        """Return the same bags with each tensor moved."""
        tensors = {name: getattr(self, name) for name in ("ids", "lengths_FB", "weights")}
        return replace(self, **{name: move(tensor) for name, tensor in tensors.items() if tensor is not None})


def in_positions(sparse: SparseIds, max_lengths: Sequence[int | None]) -> SparseIds:
    """The same with a feature of max_length K as K features: position k has the k-th of the last K ids, or none.

    max_lengths: of each feature; None: it stays as it is. On the CPU.
    """
    ids, lengths, weights = [], [], []
    for (of_feature, lengths_B, of_ids), count in zip(_bags_by_feature(sparse), max_lengths, strict=True):
        if count is None:
            ids.append(of_feature)
            lengths.append(lengths_B[None])
            weights.append(of_ids)
            continue
        kept_B = lengths_B.clamp(max=count)
        is_filled_KB = torch.arange(count)[:, None] < kept_B
        first_B = lengths_B.cumsum(0) - kept_B
        at = (first_B + torch.arange(count)[:, None])[is_filled_KB]
        ids.append(of_feature[at])
        lengths.append(is_filled_KB.long())
        weights.append(None if of_ids is None else of_ids[at])
    lengths_FB = torch.cat(lengths)
    return SparseIds(
        torch.cat(ids), len(lengths_FB), lengths_FB, None if sparse.weights is None else torch.cat(weights)
    )


def init_table(
    name: str, num_embeddings: int, embedding_dim: int, columns: range, seed: int, std: float | None = None
) -> Tensor:
    """Return the initial values of some columns of a table: float32, (num_embeddings, len(columns)), on the CPU.

    Each column has its own generator, seeded with (seed, name, column), so the values do not depend on how the table
    is sharded or placed. std None: uniform within +-1/sqrt(num_embeddings). Otherwise: normal with mean 0 and standard
    deviation std. Raises ValueError if a column is outside the table.
    """
    if any(column not in range(embedding_dim) for column in columns):
        raise ValueError(f"table {name!r} has columns 0 to {embedding_dim - 1}, but columns is {columns}.")
    table = torch.empty(num_embeddings, len(columns), dtype=torch.float32, device="cpu")
    return draw_table(table, name, columns, seed, std)


@torch.no_grad()
def draw_table(
    table: Tensor, name: str, columns: range, seed: int, std: float | None = None, *, threads: int = 1
) -> Tensor:
    """Overwrite `table`, which is some columns of a table, by the values of `init_table`. Returns it.

    It may be float16 or on a GPU: the float32 values of a few rows at a time are drawn on the CPU. Each thread draws
    whole columns, so it continues their generators.
    """
    rows, bound = len(table), len(table) ** -0.5
    step = max(_DRAWN_TOGETHER, _NUMBERS_AT_ONCE // max(1, len(columns)) // _DRAWN_TOGETHER * _DRAWN_TOGETHER)
    shape = (len(columns), min(rows, step + _DRAWN_TOGETHER))
    values = torch.empty(*shape, dtype=torch.float32, device="cpu", pin_memory=table.is_cuda)
    digests = (blake2b(f"{seed}/{column}/{name}".encode(), digest_size=8).digest() for column in columns)
    generators = [torch.Generator(device="cpu").manual_seed(int.from_bytes(each, "little")) for each in digests]

    def draw(thread: int, count: int) -> None:
        for column, generator in zip(values[thread::threads, :count], generators[thread::threads], strict=True):
            if std is None:
                column.uniform_(-bound, bound, generator=generator)
            else:
                column.normal_(0.0, std, generator=generator)

    with ThreadPoolExecutor(threads) as pool:
        for first, last in itertools.pairwise([*range(0, max(rows - _DRAWN_TOGETHER + 1, 1), step), rows]):
            list(pool.map(draw, range(threads), [last - first] * threads))
            table[first:last].copy_(values[:, : last - first].to(table.device).t())
    return table


class PlainTable(nn.Module):
    """One unsharded table. It maps each bag of ids to one embedding: their sum.

    >>> table = PlainTable(SparseFeature("site", 10), embedding_dim=4, seed=0, std=None)
    >>> table(torch.tensor([3, 4, 4]), torch.tensor([2, 0, 1]), None).shape
    torch.Size([3, 4])
    """

    def __init__(self, feature: SparseFeature, embedding_dim: int, seed: int, std: float | None) -> None:
        """Initialize with `init_table`. On the meta device there are no values until weights are loaded."""
        super().__init__()
        self.feature = feature
        self.seed = seed
        self.std = std
        dtype = torch.float16 if feature.dtype == "float16" else None
        self.weight = nn.Parameter(torch.empty(feature.num_embeddings, embedding_dim, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Restore the initial values."""
        if self.weight.is_meta:
            return
        rows, dim = self.weight.shape
        with torch.no_grad():
            self.weight.copy_(init_table(self.feature.name, rows, dim, range(dim), self.seed, self.std))

    def rows(self, ids: Tensor) -> Tensor:
        """The rows of these ids in float32."""
        return nn.functional.embedding(ids, self.weight).float()

    def forward(self, ids: Tensor, lengths_B: Tensor | None, weights: Tensor | None) -> Tensor:
        """Pool each bag and return (B, D); narrower rows are pooled in float32. lengths_B None: one id per bag."""
        table = self.weight
        if table.dtype in (torch.float16, torch.uint8):
            table, ids = self.rows(ids), torch.arange(len(ids), device=ids.device)
        if lengths_B is None:
            pooled_BD = nn.functional.embedding(ids, table)
            return pooled_BD if weights is None else pooled_BD * weights.to(pooled_BD.dtype).unsqueeze(1)
        return nn.functional.embedding_bag(
            ids,
            table,
            lengths_B.cumsum(0) - lengths_B,
            mode="sum",
            per_sample_weights=None if weights is None else weights.to(table.dtype),
        )


class QuantizedTable(PlainTable):
    """A table in int8 or int4 that is only looked up, without values until weights are loaded.

    >>> table = QuantizedTable(SparseFeature("site", 10, dtype="int8"), embedding_dim=4)
    >>> table(torch.tensor([3, 4]), None, None).shape
    torch.Size([2, 4])
    """

    def __init__(self, feature: SparseFeature, embedding_dim: int) -> None:
        nn.Module.__init__(self)
        self.feature = feature
        empty = quantize(torch.zeros(feature.num_embeddings, embedding_dim), feature.dtype)
        self.register_buffer("weight", empty.values)
        self.register_buffer("scale_bias", empty.scale_bias)

    def reset_parameters(self) -> None:
        """Do nothing."""

    def rows(self, ids: Tensor) -> Tensor:
        """The rows of these ids in float32."""
        return dequantize(Quantized(self.weight[ids], self.scale_bias[ids]), self.feature.dtype)


def _pooled(feature: SparseFeature, sum_BD: Tensor, lengths_B: Tensor | None) -> Tensor:
    """Each bag's pooled embedding, from the sum."""
    if feature.pooling == "sum" or lengths_B is None:
        return sum_BD
    return sum_BD / lengths_B.clamp(min=1).to(sum_BD.dtype).unsqueeze(1)


class PlainTables(nn.Module):
    """All tables on one device: the unsharded reference. State-dict keys are `<table name>.weight`.

    >>> config = DhenConfig(embedding_dim=4, sparse_features=[{"name": "site", "num_embeddings": 10}])
    >>> PlainTables(config, seed=0)(SparseIds(torch.tensor([3, 4]), num_features=1)).shape
    torch.Size([2, 1, 4])
    """

    def __init__(self, config: DhenConfig, seed: int, names: Collection[str] | None = None) -> None:
        """The tables of `config`. Initial values depend on `seed`, not on torch's random state.

        names: create only these tables.
        """
        super().__init__()
        self.embedding_dim = config.embedding_dim
        # The name of no table: these begin with one underscore at most.
        self.__features__ = [feature for feature in config.lookups if names is None or feature.table in names]
        for table in config.tables:
            if names is None or table.name in names:
                if table.dtype in SCALE_DTYPES:
                    plain = QuantizedTable(table, config.embedding_dim)
                else:
                    plain = PlainTable(table, config.embedding_dim, seed, std=config.embedding_init_std)
                self.add_module(table.name, plain)

    def forward(self, sparse: SparseIds) -> Tensor:
        """Look up and pool. Returns embeddings_BFD, float32 (float64 for float64 tables).

        Raises ValueError if `sparse` does not have the features of these tables.
        """
        if sparse.num_features != len(self.__features__):
            raise ValueError(
                f"sparse has ids for {sparse.num_features} features, but the model has {len(self.__features__)}."
            )
        if not self.__features__:
            return torch.empty(sparse.batch_size, 0, self.embedding_dim, device=sparse.ids.device)
        pooled = []
        for feature, bags in zip(self.__features__, _bags_by_feature(sparse), strict=True):
            pooled.append(_pooled(feature, self.get_submodule(feature.table)(*bags), bags[1]))
        embeddings_BFD = torch.stack(pooled, dim=1)
        return embeddings_BFD.to(torch.promote_types(embeddings_BFD.dtype, torch.float32))


def _bags_by_feature(sparse: SparseIds) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
    """Return (ids, lengths_B, weights) of each feature."""
    count = sparse.num_features
    sizes, lengths = list(sparse.counts_F), [None] * count if sparse.lengths_FB is None else list(sparse.lengths_FB)
    ids = sparse.ids.split(sizes)
    weights = [None] * count if sparse.weights is None else sparse.weights.split(sizes)
    return list(zip(ids, lengths, weights, strict=True))


class FeatureProcessing(nn.Module):
    """Computes x0_BMD: the sparse features' embeddings, then those of the dense features, which an MLP computes.

    Ordered bags are pooled here, because that is part of what the dense part learns.

    M is F + num_dense_embeddings, or F if there are no dense features.

    >>> features = FeatureProcessing(DhenConfig(embedding_dim=4, num_dense_features=13, num_dense_embeddings=2))
    >>> features(torch.empty(5, 0, 4), torch.ones(5, 13)).shape
    torch.Size([5, 2, 4])
    """

    def __init__(self, config: DhenConfig) -> None:
        """The dense MLP has the hidden sizes `config.dense_mlp`."""
        super().__init__()
        self.shape = (config.num_dense_embeddings, config.embedding_dim)
        has_sequences = any(feature.target for feature in config.features)
        self.sequences = SequencePooling(config) if has_sequences else None
        width = config.num_dense_embeddings * config.embedding_dim
        has_dense = config.num_dense_features > 0 and width > 0
        self.dense_mlp = (
            MLP(config.num_dense_features, config.dense_mlp, width, config.activation) if has_dense else None
        )

    def forward(self, embeddings_BFD: Tensor | Callable[[], Tensor], dense_BN: Tensor) -> Tensor:
        """Return x0_BMD. If embeddings_BFD is a function, it is called after the dense MLP has run."""
        dense_BMD = None if self.dense_mlp is None else self.dense_mlp(dense_BN).unflatten(1, self.shape)
        if callable(embeddings_BFD):
            embeddings_BFD = embeddings_BFD()
        embeddings_BFD = embeddings_BFD.to(dense_BN.dtype)
        if self.sequences is not None:
            embeddings_BFD = self.sequences(embeddings_BFD)
        return embeddings_BFD if dense_BMD is None else torch.cat([embeddings_BFD, dense_BMD], dim=1)
