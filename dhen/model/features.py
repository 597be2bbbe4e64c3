"""Feature processing (paper 2.1): dense features and looked-up embeddings become x0_BMD.

Shapes: B batch, F sparse features, N dense features, M embeddings, D embedding dimension.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseIds:
    """The sparse features of a batch: F x B bags of ids, feature by feature, within a feature row by row.

    ids: int64, (sum of lengths,), each id a row of its feature's table.
    num_features: F.
    lengths_FB: int64, how many ids each bag holds; None where every bag holds exactly one, and then ids has F * B.
    weights: float32, one an id, or None for weight 1.
    """

    ids: Tensor
    num_features: int
    lengths_FB: Tensor | None = None
    weights: Tensor | None = None

    @property
    def batch_size(self) -> int:
        """B, the number of examples."""
        if self.lengths_FB is not None:
            return self.lengths_FB.shape[1]
        return self.ids.numel() // self.num_features if self.num_features else 0

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "SparseIds":
        """The same bags on `device`."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        return replace(self, ids=move(self.ids), lengths_FB=move(self.lengths_FB), weights=move(self.weights))
