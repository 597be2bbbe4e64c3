"""The DHEN layer (paper 2.2, eq. 1 and 2): Norm(Ensemble(Interactions(X)) + ShortCut(X)).

Shapes: B batch, M embeddings in, L embeddings out, D embedding dimension, N dense features.
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from dhen.model.configuration_dhen import EnsembleKind, LayerSpec, NormKind
from dhen.model.gate import LayerGate
from dhen.model.interactions import (
    Axes,
    Interaction,
    InteractionContext,
    InteractionSpec,
    MixEmbeddings,
    build_interaction,
    with_prefix,
)
from dhen.model.mixture_of_experts import Gate, MixtureOfExperts, ModuleExperts, Output, joined, parted
from dhen.model.mlp import BatchNorm


class Ensemble(nn.Module):
    """Joins the interactions' outputs (eq. 1): concatenates them along M, or sums them, optionally weighted.

    `weighted_sum` learns one weight per interaction. All weights start at 1.

    >>> Ensemble("concat", [3, 2])([torch.ones(5, 3, 4), torch.ones(5, 2, 4)]).shape
    torch.Size([5, 5, 4])
    """

    def __init__(self, kind: EnsembleKind, sizes: Sequence[int]) -> None:
        """sizes: L of each interaction. Raises ValueError if a sum gets different sizes."""
        super().__init__()
        if kind != "concat" and len(set(sizes)) > 1:
            raise ValueError(
                f"ensemble {kind!r} needs the same num_embeddings from every interaction, but got {list(sizes)}."
            )
        self.kind = kind
        self.num_outputs = sum(sizes) if kind == "concat" else sizes[0]
        self.weight = nn.Parameter(torch.empty(len(sizes))) if kind == "weighted_sum" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the learned weights, if any, to 1."""
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, u_list_BLD: Sequence[Tensor]) -> Tensor:
        """Return (B, num_outputs, D)."""
        if self.kind == "concat":
            return torch.cat(list(u_list_BLD), dim=1)
        if self.weight is not None:
            u_list_BLD = [weight * u_BLD for weight, u_BLD in zip(self.weight.unbind(), u_list_BLD, strict=True)]
        total_BLD = u_list_BLD[0]
        for u_BLD in u_list_BLD[1:]:
            total_BLD = total_BLD + u_BLD
        return total_BLD


class InteractionEnsemble(nn.Module):
    """Ensemble(Interaction_1(X), …, Interaction_k(X)), the first term of eq. 1: what an expert of a layer computes.

    >>> linear, context = InteractionSpec("linear", 3), InteractionContext(5, 3, embedding_dim=4)
    >>> InteractionEnsemble([linear], [context], "sum")(torch.ones(2, 5, 4), torch.empty(2, 0)).shape
    torch.Size([2, 3, 4])
    """

    def __init__(
        self, specs: Sequence[InteractionSpec], contexts: Sequence[InteractionContext], kind: EnsembleKind
    ) -> None:
        """specs, contexts: of the interactions. Raises ValueError as `build_interaction` does."""
        super().__init__()
        self.interactions = nn.ModuleList(map(build_interaction, specs, contexts))
        self.ensemble = Ensemble(kind, [spec.num_embeddings for spec in specs])

    def forward(self, x_BMD: Tensor, dense_BN: Tensor) -> Output:
        """Return (B, num_outputs, D), with the sum of the interactions' losses, if they have any."""
        u_BLD, losses = _ensembled(self, x_BMD, dense_BN)
        return joined(u_BLD, losses)


def _ensembled(module: nn.Module, x_BMD: Tensor, dense_BN: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The ensemble of the outputs of `module`'s interactions, and their losses."""
    u_list_BLD, losses = parted(interaction(x_BMD, dense_BN) for interaction in module.interactions)
    return module.ensemble(u_list_BLD), losses


class ShortCut(nn.Module):
    """X itself if the ensemble outputs M embeddings, otherwise W X with W in R^(L x M) (eq. 2).

    >>> ShortCut(5, 3)(torch.ones(2, 5, 4)).shape
    torch.Size([2, 3, 4])
    """

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        """num_inputs: M. num_outputs: number of embeddings that the ensemble outputs."""
        super().__init__()
        self.mix = None if num_inputs == num_outputs else MixEmbeddings(num_inputs, num_outputs)

    def forward(self, x_BMD: Tensor) -> Tensor:
        """Return x_BMD itself or (B, num_outputs, D)."""
        return x_BMD if self.mix is None else self.mix(x_BMD)


class FlatBatchNorm(nn.Module):
    """Batch norm of embeddings: each of the M * D values has its own mean and variance over the batch.

    >>> FlatBatchNorm(5, 4)(torch.ones(2, 5, 4)).shape
    torch.Size([2, 5, 4])
    """

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        """num_embeddings: M. embedding_dim: D."""
        super().__init__()
        self.norm = BatchNorm(num_embeddings * embedding_dim)

    def forward(self, x_BMD: Tensor) -> Tensor:
        """Return (B, M, D)."""
        return self.norm(x_BMD.flatten(1)).view_as(x_BMD)


def make_norm(kind: NormKind, num_embeddings: int, embedding_dim: int) -> nn.Module:
    """Return the Norm of eq. 1 for tensors of shape (B, num_embeddings, embedding_dim)."""
    if kind == "batch_norm":
        return FlatBatchNorm(num_embeddings, embedding_dim)
    return {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm, "none": nn.Identity}[kind](embedding_dim)


class DhenLayer(nn.Module):
    """Norm(Ensemble(Interactions(X)) + ShortCut(X)) (eq. 1 and 2), with dropout on the ensemble's output.

    The formula above is `norm_position` "post". "pre" is Ensemble(Interactions(Norm(X))) + ShortCut(X), and "inner" is
    Norm(Ensemble(Interactions(X))) + ShortCut(X). A gate scales the term before the shortcut (see gate.py).

    With experts, sum_e G(X)_e E_e(X) stands for Ensemble(Interactions(X)), with the top-k gate G of vec(X) (see
    mixture_of_experts.py). An expert is one of the interactions, or a copy of the whole ensemble. If all experts of an
    example drop it, the shortcut remains.

    >>> from dhen.model.configuration_dhen import DhenConfig
    >>> config = DhenConfig(num_dense_features=1, interactions=["linear"], num_embeddings_out=3)
    >>> layer = DhenLayer(config.layer_specs[0], num_inputs=5, embedding_dim=4)
    >>> layer(torch.ones(2, 5, 4), torch.empty(2, 0)).shape
    torch.Size([2, 3, 4])
    """

    def __init__(self, spec: LayerSpec, num_inputs: int, embedding_dim: int, num_dense_features: int = 0) -> None:
        """Raises ValueError naming the interaction whose options do not fit the shapes."""
        super().__init__()
        self.norm_position, self.embedding_dim = spec.norm_position, embedding_dim

        def context(interaction: InteractionSpec) -> InteractionContext:
            return InteractionContext(
                num_inputs=num_inputs,
                num_outputs=interaction.num_embeddings,
                embedding_dim=embedding_dim,
                num_dense_features=num_dense_features,
                batch_norm=spec.batch_norm,
                activation=spec.activation,
                zero_init=spec.interaction_init == "zero",
            )

        experts = [
            InteractionEnsemble(interactions, list(map(context, interactions)), spec.ensemble)
            for interactions in spec.interactions_by_expert
        ]
        self.num_outputs = experts[0].ensemble.num_outputs
        self.mixture: MixtureOfExperts | None = None
        if spec.experts == "none":
            self.interactions, self.ensemble = experts[0].interactions, experts[0].ensemble
        else:
            losses = {"balance": spec.balance_loss, "z_factor": spec.z_loss}
            router = Gate(num_inputs * embedding_dim, len(experts), spec.experts_per_example, **losses)
            self.mixture = MixtureOfExperts(router, ModuleExperts(experts), spec.capacity_factor)
        self.shortcut = ShortCut(num_inputs, self.num_outputs)
        self.dropout = nn.Dropout(spec.dropout)
        self.norm = make_norm(spec.norm, num_inputs if spec.norm_position == "pre" else self.num_outputs, embedding_dim)
        has_gate = spec.gate != "none"
        self.gate = LayerGate(spec.gate, num_inputs, embedding_dim, spec.gate_sparsity) if has_gate else None

    def named_interactions(self) -> dict[str, Interaction]:
        """The interactions of all experts, or of the layer without experts, by their names in the layer."""
        experts = {"": self}
        if self.mixture is not None:
            experts = {f"mixture.experts.{index}.": expert for index, expert in enumerate(self.mixture.experts)}
        return {
            f"{where}interactions.{index}": interaction
            for where, expert in experts.items()
            for index, interaction in enumerate(expert.interactions)
        }

    def input_axes(self, inputs: Sequence[Hashable], dense: Sequence[Hashable]) -> Axes:
        """Which weights belong to which of the M embeddings and N dense features, by their labels."""
        axes: Axes = {"shortcut.mix.weight": {1: inputs}}
        for name, interaction in self.named_interactions().items():
            axes |= with_prefix(name, interaction.input_axes(inputs, dense))
        values = [(row, column) for row in inputs for column in range(self.embedding_dim)]
        if self.norm_position == "pre" and isinstance(self.norm, FlatBatchNorm):
            names = ("weight", "bias", "running_mean", "running_var")
            axes |= {f"norm.norm.{name}": {0: values} for name in names}
        return axes | {name: {1: values} for name in ("gate.weight", "mixture.gate.linear.weight")}

    def forward(self, x_BMD: Tensor, dense_BN: Tensor) -> Output:
        """Return (B, num_outputs, D), with the sum of the losses of its parts, if they have any."""
        losses: list[Tensor] = []

        def interact(x_BMD: Tensor, dense_BN: Tensor) -> Tensor:
            inputs_BMD = self.norm(x_BMD) if self.norm_position == "pre" else x_BMD
            if self.mixture is None:
                u_BLD, of_parts = _ensembled(self, inputs_BMD, dense_BN)
            else:
                (u_BLD,), of_parts = parted([self.mixture(inputs_BMD, dense_BN)])
            losses.extend(of_parts)
            u_BLD = self.dropout(u_BLD)
            return self.norm(u_BLD) if self.norm_position == "inner" else u_BLD

        if self.gate is None:
            u_BLD = interact(x_BMD, dense_BN)
        else:
            s_B11, *losses = self.gate(x_BMD)
            u_BLD = self.gate.apply_to(interact, s_B11, x_BMD, dense_BN)
        sum_BLD = u_BLD + self.shortcut(x_BMD)
        return joined(self.norm(sum_BLD) if self.norm_position == "post" else sum_BLD, losses)
