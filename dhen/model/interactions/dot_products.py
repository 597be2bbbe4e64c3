"""AdvancedDlrm (paper 2.3, which omits its formula) and Wukong's factorization machine: dots, then an over arch.

Shapes: B batch, M embeddings in, L embeddings out, D embedding dimension, N dense features, K compressed embeddings.
"""

from collections.abc import Hashable, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from dhen.model.expert_mlps import ExpertMlps
from dhen.model.interactions.deep_cross import CrossNet
from dhen.model.interactions.linear import mix
from dhen.model.interactions.registry import Axes, Interaction, InteractionContext, register_interaction, with_prefix
from dhen.model.mixture_of_experts import Gate, MixtureOfExperts, Output, joined, parted
from dhen.model.mlp import MLP, Activation, autocast
from dhen.model.ranges import DepthFrom0, NotNegative, Size


class _Dots(torch.autograd.Function):
    """x_i . x_j of the pairs i < j, whose backward is one gather and one product.

    dX = (G + G^T) X, where G holds the pairs' gradients. autograd would add each gradient to its place in G, one by one
    on a GPU, and multiply X by G and by G^T.
    """

    @staticmethod
    def forward(ctx: Any, x_BMD: Tensor, triangle: Tensor, pairs: Tensor) -> Tensor:
        ctx.save_for_backward(x_BMD, pairs)
        return torch.bmm(x_BMD, x_BMD.transpose(1, 2)).flatten(1).index_select(1, triangle)

    @staticmethod
    def backward(ctx: Any, ddots: Tensor) -> tuple[Tensor, None, None]:
        x_BMD, pairs = ctx.saved_tensors
        both_BMM = ddots.to(x_BMD.dtype).index_select(1, pairs).view(len(x_BMD), x_BMD.shape[1], x_BMD.shape[1])
        both_BMM.diagonal(dim1=1, dim2=2).zero_()
        return torch.bmm(both_BMM, x_BMD), None, None


class PairwiseDots(nn.Module):
    """The M (M - 1) / 2 dot products x_i . x_j with i < j: the upper triangle of X X^T, row by row.

    >>> PairwiseDots(3)(torch.ones(2, 3, 4))
    tensor([[4., 4., 4.],
            [4., 4., 4.]])
    """

    def __init__(self, num_inputs: int) -> None:
        """num_inputs: M."""
        super().__init__()
        self.num_inputs = num_inputs
        self.num_dots = num_inputs * (num_inputs - 1) // 2
        self.register_buffer("triangle", torch.empty(self.num_dots, dtype=torch.int64), persistent=False)
        self.register_buffer("pairs", torch.empty(num_inputs**2, dtype=torch.int64), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the upper triangle's indices into the flattened (M, M) matrix, and for each place of that matrix the
        number of its pair; 0 on the diagonal. from_pretrained leaves them unset.
        """
        row, column = torch.triu_indices(self.num_inputs, self.num_inputs, offset=1, device=self.triangle.device)
        self.triangle.copy_(row * self.num_inputs + column)
        pairs = self.pairs.zero_().view(self.num_inputs, self.num_inputs)
        pairs[row, column] = pairs[column, row] = torch.arange(self.num_dots, device=pairs.device)

    def dot_labels(self, inputs: Sequence[Hashable]) -> list[Hashable]:
        """Each dot belongs to a pair, in no order."""
        return [frozenset(pair) for pair in combinations(inputs, 2)]

    def input_axes(self, inputs: Sequence[Hashable]) -> Axes:
        """There are no weights."""
        return {}

    def forward(self, x_BMD: Tensor) -> Tensor:
        """Return (B, num_dots)."""
        return _Dots.apply(autocast(x_BMD), self.triangle, self.pairs)


class CompressedDots(nn.Module):
    """X (X^T W) with W in R^(M x K): dots of each embedding with K mixtures of all. The cost is M K D, not M M D.

    With `example_weights`, X (X^T (a * W)) where a_m = 2 sigmoid(x_m . v_m + c_m): each example weights its own
    embeddings. V and c start at 0, so a starts at 1.

    With `weights_mlp`, X (X^T (W + reshape(MLP(flatten(X))))): an MLP makes each example's own weights. Wukong's
    factorization machine does so too, from a compressed X (Zhang et al. 2024). The MLP's last layer starts at 0.

    >>> CompressedDots(num_inputs=3, embedding_dim=4, compress_to=2)(torch.ones(5, 3, 4)).shape
    torch.Size([5, 6])
    """

    def __init__(
        self,
        num_inputs: int,
        embedding_dim: int,
        compress_to: int,
        example_weights: bool = False,
        weights_mlp: Sequence[int] | None = None,
        activation: Activation = "relu",
    ) -> None:
        """num_inputs: M. compress_to: K. weights_mlp: hidden sizes. activation: of this MLP."""
        super().__init__()
        self.num_dots = num_inputs * compress_to
        self.embedding_dim = embedding_dim
        self.mlp: nn.Module | None = None
        if weights_mlp is not None:
            self.mlp = MLP(num_inputs * embedding_dim, weights_mlp, self.num_dots, activation, zero_init=True)
        self.weight = nn.Parameter(torch.empty(num_inputs, compress_to))
        self.gate = nn.Parameter(torch.empty(num_inputs, embedding_dim)) if example_weights else None
        self.gate_bias = nn.Parameter(torch.empty(num_inputs)) if example_weights else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W again and set V and c to 0."""
        nn.init.xavier_uniform_(self.weight)
        if self.gate is not None:
            nn.init.zeros_(self.gate)
            nn.init.zeros_(self.gate_bias)

    def dot_labels(self, inputs: Sequence[Hashable]) -> list[Hashable]:
        """Each dot belongs to an embedding and a mixture."""
        return [(row, mixture) for row in inputs for mixture in range(self.weight.shape[1])]

    def input_axes(self, inputs: Sequence[Hashable]) -> Axes:
        """W, V and c have one row per embedding. The MLP reads the D values of each, and makes W's entries."""
        axes: Axes = {name: {0: inputs} for name, _ in self.named_parameters(recurse=False)}
        if self.mlp is not None:
            last, entries = f"mlp.{len(self.mlp) - 1}", {0: self.dot_labels(inputs)}
            axes |= {f"{last}.weight": entries, f"{last}.bias": entries}
            values = [(row, column) for row in inputs for column in range(self.embedding_dim)]
            axes["mlp.0.weight"] = axes.get("mlp.0.weight", {}) | {1: values}
        return axes

    def forward(self, x_BMD: Tensor) -> Tensor:
        """Return (B, M * K)."""
        weighed_BMD = inputs_BMD = autocast(x_BMD)
        if self.gate is not None:
            a_BM = 2 * torch.sigmoid((x_BMD * self.gate).sum(dim=2) + self.gate_bias)
            weighed_BMD = x_BMD * a_BM.unsqueeze(2)
        mixtures_BKD = mix(self.weight, weighed_BMD, transposed=True)
        if self.mlp is not None:
            weights_BMK = self.mlp(inputs_BMD.flatten(1)).unflatten(1, self.weight.shape)
            mixtures_BKD = mixtures_BKD + torch.bmm(weights_BMK.transpose(1, 2), weighed_BMD)
        return torch.bmm(inputs_BMD, mixtures_BKD.transpose(1, 2)).flatten(1)


@register_interaction("advanced_dlrm")
class AdvancedDlrm(Interaction):
    """v = [dots(X), dense], u = W_m MLP(v): DLRM's pairwise dots pass through the over arch, then map to L embeddings.

    dots: x_i . x_j for i < j, or X (X^T W) with `compress_to`. If the options are set, the dots are normalized, gated
    by themselves (`swish_layer_norm`), joined with the dense vector (`use_dense`) and crossed
    (v <- v0 * (U V v + b) + v), in this order, before the over arch. With `dense_output`, the first of the L embeddings
    is a linear map of the dense vector instead, so that it reaches the next layer by itself. With `num_experts`, a
    mixture of so many stands for W_m MLP (paper, table 3). W_m has a bias, which the paper does not print.

    >>> dlrm = AdvancedDlrm(InteractionContext(num_inputs=5, num_outputs=3, embedding_dim=4))
    >>> dlrm(torch.ones(2, 5, 4), torch.empty(2, 0)).shape
    torch.Size([2, 3, 4])
    """

    append_dense = False
    can_start_at_zero = True

    def __init__(
        self,
        context: InteractionContext,
        *,
        over_arch: Sequence[Size] = (64,),
        num_experts: Size = 1,
        experts_per_example: Size | None = None,
        balance_loss: NotNegative | None = None,
        noisy_gate: bool = False,
        compress_to: Size | None = None,
        example_weights: bool = False,
        weights_mlp: Sequence[Size] | None = None,
        normalize: bool = False,
        swish_layer_norm: bool = False,
        num_cross_layers: DepthFrom0 = 0,
        cross_width: Size | None = None,
        batch_norm: bool | None = None,
        activation: Activation | None = None,
        use_dense: bool = False,
        dense_output: bool = False,
    ) -> None:
        """over_arch: hidden sizes; W_m is the linear layer after them. num_experts: number of such MLPs, of which
        experts_per_example compute an example; None: 2. balance_loss: factor of the loss that keeps the experts equally
        busy; None: 0.01. noisy_gate: choose them with noise in training. compress_to: K; None: all pairs.

        example_weights: weight the embeddings per example before compression. weights_mlp: hidden sizes of an MLP that
        makes the weights of the compression per example. normalize: apply layer norm to the dots. swish_layer_norm:
        multiply them by sigmoid(LayerNorm(dots)), as in TorchRec. num_cross_layers, cross_width: number and rank of
        low-rank cross layers; rank None: 32. batch_norm, activation: the layer's if None. use_dense: append the raw
        dense features. dense_output: one of the L outputs is an embedding of them. Raises ValueError if there are no
        pairs, or if an option would have no effect.
        """
        super().__init__(context, use_dense=use_dense)
        activation = context.activation if activation is None else activation
        for name, value in {"example_weights": example_weights, "weights_mlp": weights_mlp is not None}.items():
            if value and compress_to is None:
                raise ValueError(f"{name} has no effect because compress_to is not set. Set compress_to too.")
        of_gate = {"experts_per_example": experts_per_example, "balance_loss": balance_loss, "noisy_gate": noisy_gate}
        for name, value in of_gate.items():
            if num_experts == 1 and value is not None and value is not False:
                raise ValueError(f"{name} has no effect because num_experts is 1. Set num_experts too.")
        if dense_output and (context.num_dense_features == 0 or context.num_outputs == 1):
            sizes = f"num_dense_features is {context.num_dense_features}, num_embeddings {context.num_outputs}"
            raise ValueError(f"dense_output needs dense features and another output, but {sizes}. Remove dense_output.")
        if cross_width is not None and num_cross_layers == 0:
            raise ValueError("cross_width has no effect because num_cross_layers is 0. Set num_cross_layers too.")
        if compress_to is None:
            if context.num_inputs < 2:
                raise ValueError(
                    "a single embedding has no pairs. Use another interaction, such as linear, or a larger "
                    "num_dense_embeddings."
                )
            self.dots: nn.Module = PairwiseDots(context.num_inputs)
        else:
            self.dots = CompressedDots(
                context.num_inputs, context.embedding_dim, compress_to, example_weights, weights_mlp, activation
            )
        self.norm = nn.LayerNorm(self.dots.num_dots) if normalize else None
        num_dots, num_dense = self.dots.num_dots, context.num_dense_features
        self.swish = nn.Sequential(nn.LayerNorm(num_dots), nn.Sigmoid()) if swish_layer_norm else None
        width = num_dots + (num_dense if use_dense else 0)
        self.cross = CrossNet(width, num_cross_layers, cross_width or 32) if num_cross_layers else None
        zero, dim = context.zero_init, context.embedding_dim
        norm = context.batch_norm if batch_norm is None else batch_norm
        sizes = (width, over_arch, (context.num_outputs - dense_output) * dim, activation)
        if num_experts == 1:
            self.over_arch: nn.Module = MLP(*sizes, norm, zero)
        elif norm:
            raise ValueError("batch_norm does not work with num_experts. Set the interaction's batch_norm to false.")
        else:
            balance = 0.01 if balance_loss is None else balance_loss
            gate = Gate(width, num_experts, experts_per_example or 2, balance, noisy_gate)
            self.over_arch = MixtureOfExperts(gate, ExpertMlps(num_experts, *sizes, zero))
        self.dense_output = MLP(num_dense, [], dim, zero_init=zero) if dense_output else None

    def input_axes(self, inputs: Sequence[Hashable], dense: Sequence[Hashable]) -> Axes:
        """The over arch, the norm and the cross layers work on v."""
        dots = self.dots.dot_labels(inputs)
        v = [*dots, *(dense if self.use_dense else ())]
        axes = with_prefix("dots", self.dots.input_axes(inputs))
        for name in ("0", "gate.linear", "gate.noise", "experts.layers.0"):
            axes[f"over_arch.{name}.weight"] = {1: v}
        if self.norm is not None:
            axes |= {"norm.weight": {0: dots}, "norm.bias": {0: dots}}
        if self.swish is not None:
            axes |= {"swish.0.weight": {0: dots}, "swish.0.bias": {0: dots}}
        if self.dense_output is not None:
            axes["dense_output.0.weight"] = {1: dense}
        return axes if self.cross is None else axes | with_prefix("cross", self.cross.input_axes(v))

    def forward(self, x_BMD: Tensor, dense_BN: Tensor) -> Output:
        """Return u_BLD, with the gate's loss if there is one."""
        v = self.dots(x_BMD)
        if self.norm is not None:
            v = self.norm(v)
        if self.swish is not None:
            v = v * self.swish(v)
        if self.use_dense:
            v = torch.cat([v, dense_BN], dim=1)
        if self.cross is not None:
            v = self.cross(v)
        (u,), losses = parted([self.over_arch(v)])
        if self.dense_output is not None:
            u = torch.cat([self.dense_output(dense_BN), u], dim=1)
        return joined(u.unflatten(1, (self.context.num_outputs, self.context.embedding_dim)), losses)


@register_interaction("factorization_machine")
class FactorizationMachine(AdvancedDlrm):
    """u = W_m MLP(LayerNorm(X (X^T W))): Wukong's factorization machine block, a special case of AdvancedDlrm.

    >>> machine = FactorizationMachine(InteractionContext(num_inputs=5, num_outputs=3, embedding_dim=4))
    >>> machine(torch.ones(2, 5, 4), torch.empty(2, 0)).shape
    torch.Size([2, 3, 4])
    """

    def __init__(
        self, context: InteractionContext, *, compress_to: Size = 8, normalize: bool = True, **options: Any
    ) -> None:
        """Takes the options of AdvancedDlrm, with different defaults for these two."""
        super().__init__(context, compress_to=compress_to, normalize=normalize, **options)
