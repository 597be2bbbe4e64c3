"""DhenConfig: the architecture of a DHEN model (paper section 2), as a transformers config.

M embeddings enter a layer. Each of its interactions outputs L embeddings (`num_embeddings`) of dimension D
(`embedding_dim`).
"""

import json
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_type_hints

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from dhen.model.gate import GateKind
from dhen.model.interactions import PRESETS, InteractionSpec, check_interaction
from dhen.model.mlp import Activation
from dhen.model.names import check_names, check_type, quoted, unique_keys
from dhen.model.ranges import Depth, FromOne, NotNegative, ShareBelowOne, Size, SizeFrom0
from dhen.model.sparse_feature import SparseFeature, features_of_tables, sparse_feature
from dhen.model.tasks import TaskWeights, read_task_weights

EnsembleKind = Literal["concat", "sum", "weighted_sum"]
NormKind = Literal["layer_norm", "rms_norm", "batch_norm", "none"]
NormPosition = Literal["post", "pre", "inner"]
InteractionInit = Literal["default", "zero"]
Experts = Literal["none", "interactions", "ensembles"]
Entries = list[str | dict[str, Any]] | str | None


@dataclass(frozen=True)
class LayerSpec:
    """One DHEN layer, with all defaults filled in."""

    interactions: tuple[InteractionSpec, ...]
    ensemble: EnsembleKind
    norm: NormKind
    norm_position: NormPosition
    dropout: float
    batch_norm: bool
    activation: Activation
    interaction_init: InteractionInit
    gate: GateKind
    gate_sparsity: float
    experts: Experts
    num_experts: int
    experts_per_example: int
    capacity_factor: float | None
    balance_loss: float
    z_loss: float

    @property
    def interactions_by_expert(self) -> tuple[tuple[InteractionSpec, ...], ...]:
        """The interactions of each expert. Without experts, all interactions, once."""
        if self.experts == "interactions":
            return tuple((interaction,) for interaction in self.interactions)
        return (self.interactions,) * (self.num_experts if self.experts == "ensembles" else 1)


def option(default: Any, meaning: str) -> Any:
    """A field with its default and its line of --help. Lists are copied for each config."""
    metadata = {"help": meaning}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DhenArchitecture:
    """The architecture without the data's features: a plain dataclass, from which a command line can be built."""

    embedding_dim: Size = option(16, "D, the dimension of every embedding.")
    num_layers: Depth = option(3, "Number of layers, unless `layers` is given.")
    interactions: Entries = option(
        ["advanced_dlrm", "linear"],
        "Interactions of each layer: kinds, or objects {kind, num_embeddings, …options}. As text: JSON, or kinds "
        "separated by commas.",
    )
    layers: Entries = option(
        None,
        "One object per layer, {interactions, …}. Replaces num_layers. An object may override interactions, ensemble, "
        "norm, norm_position, dropout, batch_norm, activation, interaction_init, num_embeddings_out and what concerns "
        "gates and experts for its layer. As text: JSON.",
    )
    num_embeddings_out: Size = option(
        16, "L, the number of embeddings that an interaction outputs, unless its entry sets it."
    )
    ensemble: EnsembleKind = option("concat", "How a layer joins the outputs of its interactions (eq. 1).")
    norm: NormKind = option("layer_norm", "Norm of eq. 1: layer_norm and rms_norm over D, batch_norm over M*D.")
    norm_position: NormPosition = option(
        "post",
        "Where the norm is applied: post = Norm(Ensemble + ShortCut), as in eq. 1; pre = before the interactions, and "
        "once more after the last layer; inner = Norm(Ensemble) + ShortCut.",
    )
    dropout: ShareBelowOne = option(0.0, "Dropout rate on the output of each layer's ensemble.")
    dense_mlp: list[Size] = option([64], "Hidden sizes of the dense features' MLP.")
    num_dense_embeddings: SizeFrom0 = option(1, "Number of embeddings that the dense features' MLP outputs.")
    head_mlp: list[Size] = option([64], "Hidden sizes of the head's MLP.")
    batch_norm: bool = option(False, "Use batch norm in the MLPs of the interactions and the head.")
    activation: Activation = option("relu", "Activation of all MLPs.")
    interaction_init: InteractionInit = option(
        "default",
        "zero: the last linear map of each interaction starts at 0, so that each layer starts as its shortcut.",
    )
    gate: GateKind = option(
        "none",
        "A gate that scales each layer's ensemble, example by example: soft by a number between 0 and 1; hard by 0 or "
        "1, and an evaluation does not compute the interactions for 0.",
    )
    gate_sparsity: NotNegative = option(
        0.01, "Factor of the hard gates' mean openness in the training loss. The larger, the fewer layers are computed."
    )
    experts: Experts = option(
        "none",
        "Make each layer a mixture of experts, of which a router chooses some for each example: interactions = each "
        "interaction is an expert; ensembles = num_experts copies of the layer's ensemble.",
    )
    num_experts: Size = option(4, "Number of ensembles in a layer, if these are its experts.")
    experts_per_example: Size = option(2, "Number of a layer's experts that compute an example.")
    capacity_factor: FromOne | None = option(
        None,
        "In training, an expert computes at most this many times its even share of a batch. To other examples it adds "
        "nothing, so that the shortcut remains. None: no limit.",
    )
    balance_loss: NotNegative = option(0.01, "Factor of the loss that keeps the experts equally busy.")
    z_loss: NotNegative = option(0.001, "Factor of the loss that keeps the router's logits small.")
    head_inputs: Literal["last", "all"] = option(
        "last", "What the head reads: the output of the last layer, or the first layer's input and all layers' outputs."
    )
    task_layers: SizeFrom0 = option(
        0,
        "Number of further layers that each task has of its own, between the shared layers and its head. Each is like "
        "a layer without an entry in `layers`.",
    )
    task_weights: TaskWeights = option(
        None,
        "Weights of the tasks in the loss, and in the metric that chooses the best weights: a number for label and for "
        "each of the schema's tasks, by default 1; or uncertainty, to train them. As text: JSON, or uncertainty.",
    )
    embedding_init_std: NotNegative | None = option(
        None, "Standard deviation of the tables' normal initialization. None: uniform within +-1/sqrt(rows)."
    )


_HAS_EXPERTS = ("experts", ("interactions", "ensembles"))
NEEDS = {
    "gate_sparsity": ("gate", ("hard",)),
    "num_experts": ("experts", ("ensembles",)),
    **dict.fromkeys(("experts_per_example", "capacity_factor", "balance_loss", "z_loss"), _HAS_EXPERTS),
}
"""Options of a layer that only have an effect with these values of another option."""
_LAYER_KEYS = ("num_embeddings_out", *(item.name for item in fields(LayerSpec)))
DATA_FIELDS = {"num_dense_features": SizeFrom0, "sparse_features": list[dict[str, Any]], "tasks": list[str]}

# Keys that PreTrainedConfig accepts besides its fields. It drops the generation parameters in older files.
_TRANSFORMERS_KEYS = {
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "torch_dtype",
}


class DhenConfig(DhenArchitecture, PreTrainedConfig):
    """Everything needed to build a model: the architecture and the features of the data.

    Raises ValueError naming the field, its value and what is allowed. An unknown field is an error.

    >>> config = DhenConfig(num_dense_features=13, sparse_features=[{"name": "site", "num_embeddings": 100}])
    >>> config.tables[0].pooling
    'sum'
    """

    model_type = "dhen"

    num_dense_features: int = 0
    sparse_features: list[dict[str, Any]] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)

    def __post_init__(self, **kwargs: Any) -> None:
        """Check keys and values. transformers silently keeps unknown keys, so they are rejected here."""
        extra = [key for key in kwargs if not key.startswith("_") and key not in _TRANSFORMERS_KEYS]
        own = [*(item.name for item in fields(DhenArchitecture)), *DATA_FIELDS]
        generation = GenerationConfig().to_dict()
        if unknown := [key for key in extra if key not in generation]:
            check_names("DhenConfig field", unknown, own)
        # transformers' @strict does not raise ValueError, rejects ints for float fields, and reads the types from the
        # parent's Field objects, which HfArgumentParser(DhenArchitecture) rewrites.
        for name, annotation in (get_type_hints(DhenArchitecture, include_extras=True) | DATA_FIELDS).items():
            check_type(name, getattr(self, name), annotation)
        self.interactions = _entries("interactions", self.interactions)
        self.layers = None if self.layers is None else _entries("layers", self.layers)
        self.task_weights = read_task_weights(self.task_weights, self.tasks)
        PreTrainedConfig.__post_init__(self, **kwargs)
        self._check_values()

    @property
    def architecture(self) -> DhenArchitecture:
        """The architecture without the features of the data."""
        return DhenArchitecture(**{item.name: getattr(self, item.name) for item in fields(DhenArchitecture)})

    @property
    def features(self) -> tuple[SparseFeature, ...]:
        """The sparse features, in the order of the data."""
        return tuple(sparse_feature(entry) for entry in self.sparse_features)

    @property
    def lookups(self) -> tuple[SparseFeature, ...]:
        """What is looked up: the features, but one with attention once per position, each a bag of at most one id."""
        lookups = []
        for feature in self.features:
            one = replace(feature, pooling="sum", target=None, max_length=None) if feature.target else feature
            lookups += [one] * feature.num_lookups
        return tuple(lookups)

    @property
    def tables(self) -> tuple[SparseFeature, ...]:
        """The tables, each as its first feature, with the table's name."""
        firsts = {feature.table: feature for feature in reversed(self.lookups)}
        return tuple(replace(firsts[name], name=name) for name in features_of_tables(self.features))

    @property
    def num_input_embeddings(self) -> int:
        """M of x0: the number of sparse features, plus num_dense_embeddings if there are dense features."""
        return len(self.sparse_features) + (self.num_dense_embeddings if self.num_dense_features else 0)

    @property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """All layers, from the input up, with defaults filled in. Raises ValueError naming the layer."""
        if self.layers is None:
            return (self._layer_spec({}, "interactions"),) * self.num_layers
        return tuple(self._layer_spec(entry, f"layers[{i}]") for i, entry in enumerate(self.layers))

    @property
    def task_layer_spec(self) -> LayerSpec:
        """Each layer of a task's own."""
        return self._layer_spec({}, "task_layers")

    def _layer_spec(self, entry: str | dict[str, Any], where: str) -> LayerSpec:
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: expected an object like {{'interactions': ['linear']}}, got {quoted(entry)}.")
        try:
            check_names("layer key", entry, _LAYER_KEYS)
            settings = {key: entry.get(key, getattr(self, key)) for key in _LAYER_KEYS}
            _check_layer_settings(settings)
            entries = _entries("interactions", settings.pop("interactions"))
            default_size = settings.pop("num_embeddings_out")
            specs = tuple(spec for item in entries for spec in _interaction_specs(item, default_size))
            if not specs:
                raise ValueError("a layer needs at least one interaction.")
            for name, (key, values) in NEEDS.items():
                if name in entry and settings[key] not in values:
                    needed = " or ".join(map(repr, values))
                    raise ValueError(f"{name} needs {key} {needed}, but {key} is {settings[key]!r}. Remove it.")
            if settings["experts"] == "interactions" and settings["ensemble"] == "concat":
                raise ValueError(
                    "experts 'interactions' adds the outputs of the chosen interactions, but ensemble is 'concat'. Use "
                    "ensemble 'sum' or 'weighted_sum'."
                )
            sizes = {spec.num_embeddings for spec in specs}
            if settings["ensemble"] != "concat" and len(sizes) > 1:
                raise ValueError(
                    f"ensemble {settings['ensemble']!r} adds the outputs of the interactions, but their num_embeddings "
                    f"are {[spec.num_embeddings for spec in specs]}. Make them equal, or use 'concat'."
                )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        return LayerSpec(interactions=specs, **settings)

    def _check_values(self) -> None:
        names = [feature.name for feature in self.features]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"sparse_features: {sorted(repeated)} appear more than once. Use each name once.")
        tables = {table.name: table for table in self.tables}
        singles = [feature.name for feature in self.features if not feature.target]
        for feature in self.features:
            if feature.target and feature.target not in singles:
                raise ValueError(
                    f"sparse_features: {quoted(feature.name)} has the target {quoted(feature.target)}, which is no "
                    f"feature without attention. Use one of {', '.join(singles) or 'none'}."
                )
            of_table = tables[feature.table]
            if (feature.num_embeddings, feature.dtype) != (of_table.num_embeddings, of_table.dtype):
                raise ValueError(
                    f"sparse_features: {quoted(feature.name)} shares the table {quoted(feature.table)}, but not its "
                    f"num_embeddings and dtype. Make them equal."
                )
        if self.layers is not None and not self.layers:
            raise ValueError("layers is empty. Give at least one layer, or None to use num_layers and interactions.")
        specs = self.layer_specs
        options = [interaction.options for spec in specs for interaction in spec.interactions]
        uses_dense = any(of.get("use_dense") or of.get("dense_output") for of in options)
        if self.num_dense_features and not self.num_dense_embeddings and not uses_dense:
            raise ValueError(
                f"num_dense_embeddings is 0 and no interaction has use_dense, so the {self.num_dense_features} dense "
                f"features would be ignored. Set either one, or set num_dense_features to 0."
            )


def _entries(name: str, value: Entries) -> list[str | dict[str, Any]]:
    """Return a list, given a list, JSON text, or kinds separated by commas."""
    if isinstance(value, str):
        text = value.strip()
        if not text.startswith(("[", "{")):
            return [word.strip() for word in text.split(",") if word.strip()]
        try:
            value = json.loads(text, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} is not valid JSON: {error}. The text is {quoted(text)}.") from error
        value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise ValueError(f"{name} is {quoted(value)}. Use a list.")
    return value


def _interaction_specs(entry: str | dict[str, Any], default_size: int) -> list[InteractionSpec]:
    """Return the specs for an interaction's entry or a preset's name. Raises ValueError naming the kind or option."""
    if isinstance(entry, str):
        entry = {"kind": entry}
    if not isinstance(entry, dict) or not isinstance(entry.get("kind"), str):
        raise ValueError(f"an interaction must be a kind or an object with 'kind', got {quoted(entry)}.")
    options = {key: value for key, value in entry.items() if key not in ("kind", "num_embeddings")}
    size = entry.get("num_embeddings", default_size)
    check_type(f"interaction {quoted(entry['kind'])}: num_embeddings", size, Size)
    kinds = PRESETS.get(entry["kind"])
    if kinds and options:
        raise ValueError(
            f"preset {entry['kind']!r} takes no options. To set options, list its interactions instead: {list(kinds)}."
        )
    specs = [InteractionSpec(kind, size, options) for kind in kinds or (entry["kind"],)]
    for spec in specs:
        check_interaction(spec)
    return specs


def _check_layer_settings(settings: dict[str, Any]) -> None:
    """Raise ValueError naming the first layer setting with a wrong value."""
    for key, annotation in get_type_hints(DhenArchitecture, include_extras=True).items():
        if key in settings:
            check_type(key, settings[key], annotation)


AutoConfig.register("dhen", DhenConfig)
