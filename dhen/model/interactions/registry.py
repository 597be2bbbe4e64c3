"""Interactions by name: what every interaction is, and how a user's own joins the paper's five.

Shapes: B batch, M embeddings in, L embeddings out, D embedding dimension, N dense features.
"""

import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from dhen.model.mlp import Activation
from dhen.model.names import check_names, check_type, unknown_name


@dataclass(frozen=True)
class InteractionContext:
    """What an interaction is told by its layer: its shapes, and the defaults of its MLPs.

    num_inputs: M. num_outputs: L. num_dense_features: N.
    """

    num_inputs: int
    num_outputs: int
    embedding_dim: int
    num_dense_features: int = 0
    batch_norm: bool = False
    activation: Activation = "relu"


@dataclass(frozen=True)
class InteractionSpec:
    """One entry of a layer's list: which interaction, how many embeddings it yields (L), and its own options."""

    kind: str
    num_embeddings: int
    options: dict[str, Any] = field(default_factory=dict)


class Interaction(nn.Module):
    """u_BLD = Interaction(x_BMD), for one example alone: rows of a batch never meet, save in batch norm.

    With `use_dense` the raw dense features enter as one more embedding, a linear map of dense_BN, that `rows` appends
    to x_BMD; `num_rows` counts it. An interaction that takes the dense vector in another way overrides `append_dense`.
    """

    append_dense = True

    def __init__(self, context: InteractionContext, *, use_dense: bool = False) -> None:
        """Raises ValueError if `use_dense` is set and the data has no dense features."""
        super().__init__()
        if use_dense and context.num_dense_features == 0:
            raise ValueError("use_dense is true, but num_dense_features is 0. Remove use_dense from the interaction.")
        self.context = context
        self.use_dense = use_dense
        appends = use_dense and self.append_dense
        self.num_rows = context.num_inputs + appends
        self.dense_row = nn.Linear(context.num_dense_features, context.embedding_dim) if appends else None

    def rows(self, x_BMD: Tensor, dense_BN: Tensor) -> Tensor:
        """x_BMD, and below it the dense row where there is one: (B, num_rows, D)."""
        if self.dense_row is None:
            return x_BMD
        return torch.cat([x_BMD, self.dense_row(dense_BN).unsqueeze(1)], dim=1)

    def forward(self, x_BMD: Tensor, dense_BN: Tensor) -> Tensor:
        """Return u_BLD."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(x_BMD, dense_BN) -> u_BLD.")


_INTERACTIONS: dict[str, type[Interaction]] = {}

PRESETS: dict[str, tuple[str, ...]] = {"wukong": ("factorization_machine", "linear")}
"""Names that stand for several interactions of one layer. `wukong`: the layer of Wukong (Meta, 2024), a factorization
machine block beside a linear compression block, concatenated, added to the shortcut and normalised."""


def register_interaction(kind: str) -> Callable[[type[Interaction]], type[Interaction]]:
    """Class decorator: makes an Interaction available to configs as `kind`.

    Its options are the keyword-only arguments of its __init__, with annotations of JSON's types. Import the file before
    the config that names it is made. Raises ValueError if the name is taken.

    >>> @register_interaction("double")
    ... class Double(Interaction):
    ...     def forward(self, x_BMD, dense_BN):
    ...         return 2 * x_BMD[:, : self.context.num_outputs]
    """

    def register(interaction: type[Interaction]) -> type[Interaction]:
        known = _INTERACTIONS.get(kind)
        is_same_class = known is not None and (known.__module__, known.__qualname__) == (
            interaction.__module__,
            interaction.__qualname__,
        )
        if kind in PRESETS or (known is not None and not is_same_class):
            raise ValueError(f"interaction kind {kind!r} is taken by {known or 'a preset'}. Choose another name.")
        _INTERACTIONS[kind] = interaction
        return interaction

    return register


def import_interactions(path: str | Path) -> None:
    """Run a user's Python file, so that what it registers is known. Raises ValueError naming the file."""
    path = Path(path)
    if not path.is_file() or path.suffix != ".py":
        raise ValueError(f"{path}: no such Python file. Give one whose classes are decorated by register_interaction.")
    known = dict(_INTERACTIONS)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    if known == _INTERACTIONS:
        raise ValueError(f"{path}: registers no interaction. Known without it: {', '.join(sorted(known))}.")


def interaction_kinds() -> tuple[str, ...]:
    """All registered kinds, sorted."""
    return tuple(sorted(_INTERACTIONS))


@dataclass(frozen=True)
class InteractionOption:
    """A keyword-only argument of an interaction's __init__."""

    default: Any
    annotation: Any


def interaction_options(kind: str) -> dict[str, InteractionOption]:
    """The options of a kind by name. Raises ValueError with the nearest right kind."""
    if kind not in _INTERACTIONS:
        message = unknown_name("interaction kind", kind, [*_INTERACTIONS, *PRESETS])
        raise ValueError(f"{message} One of your own is known once its file is imported (--interaction_files).")
    options: dict[str, InteractionOption] = {}
    # A class without an __init__ has its parent's; one whose __init__ takes **options has its parent's options too.
    for cls in _INTERACTIONS[kind].__mro__:
        if "__init__" not in cls.__dict__:
            continue
        parameters = inspect.signature(cls.__init__).parameters.values()
        hints = get_type_hints(cls.__init__)
        for parameter in parameters:
            if parameter.kind is parameter.KEYWORD_ONLY:
                option = InteractionOption(parameter.default, hints.get(parameter.name, Any))
                options.setdefault(parameter.name, option)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return options


def check_interaction(spec: InteractionSpec) -> None:
    """Raise ValueError if the kind or an option is unknown, an option's type is wrong, or L is below 1."""
    known = interaction_options(spec.kind)
    check_names(f"option of interaction {spec.kind!r}:", spec.options, known)
    for name, value in spec.options.items():
        check_type(f"interaction {spec.kind!r}: {name}", value, known[name].annotation)
    if spec.num_embeddings < 1:
        raise ValueError(f"interaction {spec.kind!r}: num_embeddings is {spec.num_embeddings}. Use 1 or more.")


def build_interaction(spec: InteractionSpec, context: InteractionContext) -> Interaction:
    """The module that `spec` describes. Raises ValueError naming the kind and what is wrong with its options."""
    check_interaction(spec)
    try:
        return _INTERACTIONS[spec.kind](context, **spec.options)
    except ValueError as error:
        raise ValueError(f"interaction {spec.kind!r}: {error}") from error
