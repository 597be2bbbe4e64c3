"""Interactions by name: their base class, and a registry to which users can add their own.

Shapes: B batch, M embeddings in, L embeddings out, D embedding dimension, N dense features.
"""

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from dhen.model.mlp import Activation
from dhen.model.names import check_names, check_type, shown, unknown_name
from dhen.model.ranges import Size
from dhen.paths import find, looked_in


@dataclass(frozen=True)
class InteractionContext:
    """What a layer tells its interactions: shapes, and defaults for their MLPs.

    num_inputs: M. num_outputs: L. num_dense_features: N. zero_init: the last linear map starts at 0, so that u does.
    """

    num_inputs: int
    num_outputs: int
    embedding_dim: int
    num_dense_features: int = 0
    batch_norm: bool = False
    activation: Activation = "relu"
    zero_init: bool = False


@dataclass(frozen=True)
class InteractionSpec:
    """One entry in a layer's list of interactions: the kind, its number of output embeddings (L), and its options."""

    kind: str
    num_embeddings: int
    options: dict[str, Any] = field(default_factory=dict)


Axes = dict[str, dict[int, Sequence[Hashable]]]
"""What each entry of a weight belongs to: weight name -> axis -> one label per entry. Fine-tuning matches weights by
it, so that a feature keeps its own when others come, go or move."""


def with_prefix(prefix: str, axes: Axes) -> Axes:
    """The axes of a module's child: `prefix` is the child's name."""
    return {f"{prefix}.{name}": of_weight for name, of_weight in axes.items()}


class Interaction(nn.Module):
    """u_BLD = Interaction(x_BMD). Examples in a batch do not affect each other, except through batch norm.

    With `use_dense`, `rows` appends one more embedding to x_BMD, a linear map of dense_BN, and `num_rows` counts it. An
    interaction that uses the dense vector in another way sets `append_dense` to False. One that follows
    `context.zero_init` sets `can_start_at_zero` to True.
    """

    append_dense = True
    can_start_at_zero = False

    def __init__(self, context: InteractionContext, *, use_dense: bool = False) -> None:
        """Raises ValueError if `use_dense` is set but the data has no dense features."""
        super().__init__()
        if use_dense and context.num_dense_features == 0:
            raise ValueError("use_dense is true, but num_dense_features is 0. Remove use_dense from the interaction.")
        self.context = context
        self.use_dense = use_dense
        appends = use_dense and self.append_dense
        self.num_rows = context.num_inputs + appends
        self.dense_row = nn.Linear(context.num_dense_features, context.embedding_dim) if appends else None

    def rows(self, x_BMD: Tensor, dense_BN: Tensor) -> Tensor:
        """Return x_BMD followed by the dense embedding, if there is one: (B, num_rows, D)."""
        if self.dense_row is None:
            return x_BMD
        return torch.cat([x_BMD, self.dense_row(dense_BN).unsqueeze(1)], dim=1)

    def input_axes(self, inputs: Sequence[Hashable], dense: Sequence[Hashable]) -> Axes:
        """Which weights belong to which input. inputs: labels of the M embeddings. dense: of the N dense features.

        Covers `dense_row`. An interaction adds its own weights; fine-tuning on other features starts those that are
        not listed anew.
        """
        return {} if self.dense_row is None else {"dense_row.weight": {1: dense}}

    def row_labels(self, inputs: Sequence[Hashable]) -> list[Hashable]:
        """Labels of `rows`."""
        return [*inputs, *(["dense row"] if self.dense_row is not None else [])]

    def forward(self, x_BMD: Tensor, dense_BN: Tensor) -> Tensor:
        """Return u_BLD, or (u_BLD, a scalar to add to the training loss)."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(x_BMD, dense_BN) -> u_BLD.")


_INTERACTIONS: dict[str, type[Interaction]] = {}

PRESETS: dict[str, tuple[str, ...]] = {"wukong": ("factorization_machine", "linear")}
"""Names that stand for several interactions in one layer. `wukong` is the layer of Wukong (Meta, 2024): the outputs of
a factorization machine block and a linear compression block are concatenated, added to the shortcut and normalized."""


def register_interaction(kind: str) -> Callable[[type[Interaction]], type[Interaction]]:
    """Class decorator that makes an Interaction available to configs as `kind`.

    Its options are the keyword-only arguments of its __init__, annotated with JSON types. Import the file before
    creating a config that uses the kind. Raises ValueError if the name is taken.

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
            raise ValueError(
                f"interaction kind {kind!r} is already taken by {known or 'a preset'}. Choose another name."
            )
        _INTERACTIONS[kind] = interaction
        return interaction

    return register


def import_interactions(path: str | Path) -> None:
    """Run a user's Python file to register its interactions. Raises ValueError naming the file."""
    path = Path(find(str(path)))
    if not os.path.isfile(path) or path.suffix != ".py":
        raise ValueError(
            f"{shown(path)}: no such Python file. Give a file that registers classes with @register_interaction."
            f"{looked_in(path)}"
        )
    known = dict(_INTERACTIONS)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    if known == _INTERACTIONS:
        raise ValueError(f"{path}: registers no interaction. Decorate its classes with @register_interaction.")


def interaction_kinds() -> tuple[str, ...]:
    """Return all registered kinds, sorted."""
    return tuple(sorted(_INTERACTIONS))


@dataclass(frozen=True)
class InteractionOption:
    """A keyword-only argument of an interaction's __init__."""

    default: Any
    annotation: Any


def interaction_options(kind: str) -> dict[str, InteractionOption]:
    """Return the options of a kind by name. Raises ValueError with the nearest known kind."""
    if kind not in _INTERACTIONS:
        message = unknown_name("interaction kind", kind, [*_INTERACTIONS, *PRESETS])
        raise ValueError(f"{message} To use your own interaction, import its file with --interaction_files.")
    options: dict[str, InteractionOption] = {}
    # A class without an __init__ uses its parent's. If its __init__ takes **options, it also has its parent's options.
    for cls in _INTERACTIONS[kind].__mro__:
        if "__init__" not in cls.__dict__:
            continue
        parameters = inspect.signature(cls.__init__).parameters.values()
        hints = get_type_hints(cls.__init__, include_extras=True)
        for parameter in parameters:
            if parameter.kind is parameter.KEYWORD_ONLY:
                option = InteractionOption(parameter.default, hints.get(parameter.name, Any))
                options.setdefault(parameter.name, option)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return options


def check_interaction(spec: InteractionSpec) -> None:
    """Raise ValueError if the kind or an option is unknown, or an option or L has a wrong type or is out of range."""
    known = interaction_options(spec.kind)
    check_names(f"option for interaction {spec.kind!r}:", spec.options, known)
    for name, value in spec.options.items():
        check_type(f"interaction {spec.kind!r}: {name}", value, known[name].annotation)
    check_type(f"interaction {spec.kind!r}: num_embeddings", spec.num_embeddings, Size)


def build_interaction(spec: InteractionSpec, context: InteractionContext) -> Interaction:
    """Build the module that `spec` describes. Raises ValueError naming the kind and the wrong option."""
    check_interaction(spec)
    kind = _INTERACTIONS[spec.kind]
    if context.zero_init and not kind.can_start_at_zero:
        raise ValueError(
            f"interaction {spec.kind!r}: interaction_init is 'zero', but the class does not say that it can. Pass "
            f"zero_init=context.zero_init to its MixEmbeddings and set can_start_at_zero to True, or use 'default'."
        )
    try:
        return kind(context, **spec.options)
    except ValueError as error:
        raise ValueError(f"interaction {spec.kind!r}: {error}") from error
