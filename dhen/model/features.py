"""Feature processing (paper 2.1): turns dense features and looked-up embeddings into x0_BMD.

Shapes: B batch, F sparse features, N dense features, M embeddings, D embedding dimension.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import torch
from torch import Tensor, nn

from dhen.model.configuration_dhen import DhenConfig, SparseFeature
from dhen.model.mlp import MLP


@dataclass(frozen=True)
class SparseIds:
    """The sparse features of a batch: F x B bags of ids, ordered by feature, then by example.

    ids: int64, (sum of lengths,). Each id is a row of its feature's table.
    num_features: F.
    lengths_FB: int64, number of ids in each bag. None: every bag holds exactly one id, so there are F * B ids.
    weights: float32, one per id. None: every weight is 1.
    counts: number of ids of each feature. None: the host reads them from lengths_FB, for which it waits for a GPU.
    """

    ids: Tensor
    num_features: int
    lengths_FB: Tensor | None = None
    weights: Tensor | None = None
    counts: Sequence[int] | None = None

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
        bags = _bags_by_feature(self)
        ids, lengths, weights = ([bags[feature][part] for feature in features] for part in range(3))

        def joined(whole: Tensor | None, parts: Sequence[Tensor]) -> Tensor | None:
            # Not whole[features]: for an index of the host's numbers the host waits for a GPU.
            return None if whole is None else torch.cat([whole[:0], *parts])

        lengths_FB = joined(self.lengths_FB, [each[None] for each in lengths if each is not None])
        counts = [len(each) for each in ids]
        return SparseIds(joined(self.ids, ids), len(features), lengths_FB, joined(self.weights, weights), counts)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "SparseIds":
        """Return the same bags on `device`."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        return replace(self, ids=move(self.ids), lengths_FB=move(self.lengths_FB), weights=move(self.weights))


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
    values = torch.empty(num_embeddings, dtype=torch.float32, device="cpu")
    bound = num_embeddings**-0.5
    for position, column in enumerate(columns):
        digest = blake2b(f"{seed}/{column}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "little"))
        if std is None:
            values.uniform_(-bound, bound, generator=generator)
        else:
            values.normal_(0.0, std, generator=generator)
        table[:, position] = values
    return table


class PlainTable(nn.Module):
    """One unsharded table. It maps each bag of ids to one embedding.

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
        self.weight = nn.Parameter(torch.empty(feature.num_embeddings, embedding_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Restore the initial values."""
        if self.weight.is_meta:
            return
        rows, dim = self.weight.shape
        with torch.no_grad():
            self.weight.copy_(init_table(self.feature.name, rows, dim, range(dim), self.seed, self.std))

    def forward(self, ids: Tensor, lengths_B: Tensor | None, weights: Tensor | None) -> Tensor:
        """Pool each bag and return (B, D). lengths_B None: one id per bag."""
        if lengths_B is None:
            pooled_BD = nn.functional.embedding(ids, self.weight)
            return pooled_BD if weights is None else pooled_BD * weights.to(pooled_BD.dtype).unsqueeze(1)
        pooled_BD = nn.functional.embedding_bag(
            ids,
            self.weight,
            lengths_B.cumsum(0) - lengths_B,
            mode="sum",
            per_sample_weights=None if weights is None else weights.to(self.weight.dtype),
        )
        if self.feature.pooling == "mean":
            pooled_BD = pooled_BD / lengths_B.clamp(min=1).to(pooled_BD.dtype).unsqueeze(1)
        return pooled_BD


class PlainTables(nn.Module):
    """All tables on one device: the unsharded reference. State-dict keys are `<feature name>.weight`.

    >>> config = DhenConfig(embedding_dim=4, sparse_features=[{"name": "site", "num_embeddings": 10}])
    >>> PlainTables(config, seed=0)(SparseIds(torch.tensor([3, 4]), num_features=1)).shape
    torch.Size([2, 1, 4])
    """

    def __init__(self, config: DhenConfig, seed: int, names: Collection[str] | None = None) -> None:
        """One table per sparse feature of `config`. Initial values depend on `seed`, not on torch's random state.

        names: create only the tables of these features.
        """
        super().__init__()
        self.embedding_dim = config.embedding_dim
        for feature in config.tables:
            if names is not None and feature.name not in names:
                continue
            self.add_module(
                feature.name, PlainTable(feature, config.embedding_dim, seed, std=config.embedding_init_std)
            )

    def forward(self, sparse: SparseIds) -> Tensor:
        """Look up and pool. Returns embeddings_BFD, float32 (float64 for float64 tables).

        Raises ValueError if `sparse` does not have one feature per table.
        """
        tables = list(self.children())
        if sparse.num_features != len(tables):
            raise ValueError(
                f"sparse has ids for {sparse.num_features} features, but the model has {len(tables)} tables."
            )
        if not tables:
            return torch.empty(sparse.batch_size, 0, self.embedding_dim, device=sparse.ids.device)
        pooled = [table(*bags) for table, bags in zip(tables, _bags_by_feature(sparse), strict=True)]
        embeddings_BFD = torch.stack(pooled, dim=1)
        return embeddings_BFD.to(torch.promote_types(embeddings_BFD.dtype, torch.float32))


def _bags_by_feature(sparse: SparseIds) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
    """Return (ids, lengths_B, weights) of each feature."""
    count = sparse.num_features
    if sparse.lengths_FB is None:
        sizes, lengths = [sparse.batch_size] * count, [None] * count
    else:
        counts, lengths = sparse.counts, list(sparse.lengths_FB)
        sizes = sparse.lengths_FB.sum(dim=1).tolist() if counts is None else list(counts)
    ids = sparse.ids.split(sizes)
    weights = [None] * count if sparse.weights is None else sparse.weights.split(sizes)
    return list(zip(ids, lengths, weights, strict=True))


class FeatureProcessing(nn.Module):
    """Computes x0_BMD: the sparse features' embeddings, then those of the dense features, which an MLP computes.

    M is F + num_dense_embeddings, or F if there are no dense features.

    >>> features = FeatureProcessing(DhenConfig(embedding_dim=4, num_dense_features=13, num_dense_embeddings=2))
    >>> features(torch.empty(5, 0, 4), torch.ones(5, 13)).shape
    torch.Size([5, 2, 4])
    """

    def __init__(self, config: DhenConfig) -> None:
        """The dense MLP has the hidden sizes `config.dense_mlp`."""
        super().__init__()
        self.shape = (config.num_dense_embeddings, config.embedding_dim)
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
        return embeddings_BFD if dense_BMD is None else torch.cat([embeddings_BFD, dense_BMD], dim=1)
