"""An interaction as a user would write it in their own file."""

import torch
from torch import Tensor, nn

from dhen.model.interactions import Interaction, InteractionContext, register_interaction


@register_interaction("users_product")
class UsersProduct(Interaction):
    """u = scale * W (x * x)."""

    def __init__(self, context: InteractionContext, *, scale: float = 1.0, use_dense: bool = False) -> None:
        super().__init__(context, use_dense=use_dense)
        self.scale = scale
        self.weight = nn.Parameter(torch.ones(context.num_outputs, self.num_rows))

    def forward(self, x_BMD: Tensor, dense_BN: Tensor) -> Tensor:
        """Return u_BLD."""
        return self.scale * torch.matmul(self.weight, self.rows(x_BMD, dense_BN).square())
