"""DhenModel, the stack of layers, and DhenForClickPrediction, which adds tables, head and loss (paper figure 1).

Shapes: B batch, F sparse features, N dense features, M embeddings, D embedding dimension.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from dhen.model.configuration_dhen import DhenConfig
from dhen.model.features import FeatureProcessing, PlainTables, QuantizedTable, SparseIds
from dhen.model.interactions import Axes, with_prefix
from dhen.model.layer import DhenLayer, make_norm
from dhen.model.mixture_of_experts import parted
from dhen.model.mlp import MLP
from dhen.model.task_layers import TaskLayers
from dhen.model.tasks import LABEL_TASK, TaskHeads, loss_of_tasks, named_modules


@dataclass
class DhenModelOutput(ModelOutput):
    """last_hidden_state: x_BMD, the output of the last layer. head_inputs: the embeddings that the head reads. dense:
    (B, N), as the layers read them.

    auxiliary_loss: sum of the losses of the layers' gates, in a forward that trains; None if there are none.
    """

    last_hidden_state: Tensor | None = None
    head_inputs: Tensor | None = None
    dense: Tensor | None = None
    auxiliary_loss: Tensor | None = None


@dataclass
class DhenOutput(ModelOutput):
    """loss: mean binary cross entropy over the batch, plus auxiliary_loss; None without labels. logits: (B,).

    auxiliary_loss: as in `DhenModelOutput`, plus that of trained task weights. It is a mean over the rows, to add to a
    mean loss. task_logits: (B, T), of the T further tasks. task_weights: (1 + T,), the label's first. Both are None
    without further tasks.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    auxiliary_loss: Tensor | None = None
    task_logits: Tensor | None = None
    task_weights: Tensor | None = None

    @property
    def probabilities(self) -> Tensor:
        """(B, 1 + T), the label's first."""
        logits = self.logits.unsqueeze(1)
        return (logits if self.task_logits is None else torch.cat([logits, self.task_logits], dim=1)).sigmoid()


class DhenPreTrainedModel(PreTrainedModel):
    """Initializes, saves and loads DHEN's weights.

    Every module initializes its own weights when it is built, from torch's global random state. Nothing is left to
    initialize afterwards, when ZeRO-3 may already have partitioned the parameters. from_pretrained builds the model on
    the meta device, and `_init_weights` then initializes the weights that the file does not contain.
    """

    config_class = DhenConfig
    base_model_prefix = "model"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the layers. Tables may have another one."""
        return next(weight.dtype for name, weight in self.named_parameters() if "tables." not in name)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self | tuple[Self, dict[str, Any]]:
        """Load with transformers' from_pretrained, then align the weights in memory like those of a new model."""
        result = super().from_pretrained(*args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        summed = [module for module in model.modules() if not isinstance(module, QuantizedTable)]
        for tensor in (each for of in summed for each in (*of.parameters(recurse=False), *of.buffers(recurse=False))):
            # On CPU the weights are views into the memory-mapped file, at arbitrary addresses. Some kernels sum
            # unaligned data in a different order, so the same weights would give logits that differ in the last bit.
            # Quantized tables are not summed as they are, so they stay in the file.
            if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
                tensor.data = tensor.data.clone()
        return result

    def init_weights(self) -> None:
        """Do nothing. transformers calls this at the end of construction."""

    def _init_weights(self, module: nn.Module) -> None:
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if hasattr(module, "reset_parameters") and not all(getattr(t, "_is_hf_initialized", False) for t in own):
            module.reset_parameters()


class DhenModel(DhenPreTrainedModel):
    """The dense trunk: feature processing and the stack of layers.

    >>> model = DhenModel(DhenConfig(num_dense_features=13, interactions=["linear"], num_embeddings_out=8))
    >>> model(torch.empty(2, 0, 16), torch.ones(2, 13)).last_hidden_state.shape
    torch.Size([2, 8, 16])
    """

    def __init__(self, config: DhenConfig) -> None:
        """Raises ValueError if there are no features, or if a layer's options do not fit its shapes."""
        super().__init__(config)
        num_embeddings = config.num_input_embeddings
        if num_embeddings == 0:
            raise ValueError(
                f"the model has no input: sparse_features is empty, num_dense_features is {config.num_dense_features} "
                f"and num_dense_embeddings is {config.num_dense_embeddings}. Add sparse features or dense features."
            )
        self.num_inputs, self.num_lookups = num_embeddings, len(config.lookups)
        self.features = FeatureProcessing(config)
        self.layers = nn.ModuleList()
        specs = config.layer_specs
        for index, spec in enumerate(specs):
            try:
                layer = DhenLayer(spec, num_embeddings, config.embedding_dim, config.num_dense_features)
            except ValueError as error:
                raise ValueError(f"layer {index}: {error}") from error
            self.layers.append(layer)
            num_embeddings = layer.num_outputs
        sizes = [self.num_inputs, *(layer.num_outputs for layer in self.layers)]
        self.num_outputs = num_embeddings
        self.num_head_inputs = sum(sizes) if config.head_inputs == "all" else num_embeddings
        # With the norm before each layer, the last layer's output has not been normalized.
        is_pre = specs[-1].norm_position == "pre"
        self.norm = make_norm(specs[-1].norm, num_embeddings, config.embedding_dim) if is_pre else None
        self.post_init()

    def forward(
        self, inputs_embeds: Tensor | Callable[[], Tensor], dense: Tensor | None = None, num_passes: int = 1
    ) -> DhenModelOutput:
        """inputs_embeds: of `config.lookups`, (B, F, D), or a function that waits for them and returns them.
        dense: (B, N), or None if N is 0. num_passes: how often the examples go through the layers, as in
        `DhenForClickPrediction`.

        Raises ValueError naming the argument whose shape does not match the config.
        """
        shape = (self.num_lookups, self.config.embedding_dim)
        if dense is None:
            inputs_embeds = inputs_embeds() if callable(inputs_embeds) else inputs_embeds
            dense = inputs_embeds.new_empty(inputs_embeds.shape[0], 0)
        if not callable(inputs_embeds):
            _check_shape("inputs_embeds", inputs_embeds, shape)
        _check_shape("dense", dense, (self.config.num_dense_features,))
        dense_BN = dense.to(self.dtype)
        x_BMD = self.features(inputs_embeds, dense_BN)
        if num_passes > 1:
            x_BMD, dense_BN = x_BMD.repeat(num_passes, 1, 1), dense_BN.repeat(num_passes, 1)
        earlier: list[Tensor] = []  # only what the head reads, so that nothing else is kept in memory
        loss: Tensor | float = 0.0
        for layer in self.layers:
            if self.config.head_inputs == "all":
                earlier.append(x_BMD)
            (x_BMD,), losses = parted([layer(x_BMD, dense_BN)])
            loss = sum(losses, loss)
        if self.norm is not None:
            x_BMD = self.norm(x_BMD)
        head_inputs = torch.cat([*earlier, x_BMD], dim=1) if earlier else x_BMD
        auxiliary_loss = loss if isinstance(loss, Tensor) else None
        return DhenModelOutput(x_BMD, head_inputs, dense_BN, auxiliary_loss)


class DhenForClickPrediction(DhenPreTrainedModel):
    """The complete model: tables, trunk, and a head that maps the last layer's embeddings to one logit.

    With `head_inputs` "all", the head reads x0 and the outputs of all layers, flattened and concatenated.

    >>> config = DhenConfig(sparse_features=[{"name": "site", "num_embeddings": 10}], interactions=["linear"])
    >>> model = DhenForClickPrediction(config)
    >>> model(SparseIds(torch.tensor([3, 4]), num_features=1)).logits.shape
    torch.Size([2])
    """

    def __init__(
        self, config: DhenConfig, with_tables: bool | Collection[str] = True, table_seed: int | None = None
    ) -> None:
        """with_tables: True to hold all tables, False if the tables live elsewhere and forward gets their embeddings,
        or the names of the tables that this model holds.

        table_seed: seed for `init_table`. None: the seed last passed to torch.manual_seed.
        """
        super().__init__(config)
        chosen = {table.name for table in config.tables}
        chosen = (chosen if with_tables else ()) if isinstance(with_tables, bool) else with_tables
        is_own = [feature.table in chosen for feature in config.lookups]
        own, others = ([place for place, here in enumerate(is_own) if here == each] for each in (True, False))
        self.tables: PlainTables | None = None
        if own or with_tables is True:
            self.tables = PlainTables(config, torch.initial_seed() if table_seed is None else table_seed, chosen)
        places = torch.tensor([*others, *own]).argsort() if own and others else None
        self.register_buffer("_order", places, persistent=False)
        if not own and with_tables is not True:
            self._keys_to_ignore_on_load_unexpected = [r"^tables\."]
        self.model = DhenModel(config)
        tasks, num_read, own = [LABEL_TASK, *config.tasks], self.model.num_head_inputs, []
        if config.task_layers:
            own = [TaskLayers(config, self.model.num_outputs, num_read) for _ in tasks]
            num_read = own[0].num_outputs
        self.task_layers = named_modules(dict(zip(tasks, own, strict=False)))
        width = num_read * config.embedding_dim
        heads = [MLP(width, config.head_mlp, 1, config.activation, config.batch_norm) for _ in tasks]
        self.head, further = heads[0], dict(zip(config.tasks, heads[1:], strict=True))
        self.tasks = TaskHeads(further, config.task_weights) if further else None
        self.post_init()

    def forward(
        self,
        sparse: SparseIds | None = None,
        dense: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | Callable[[], Tensor] | None = None,
        num_passes: int = 1,
    ) -> DhenOutput:
        """Predict clicks. Inputs are cast to the weights' dtype. Logits are float32 (float64 for float64 weights).

        Pass the sparse features as `sparse` or, already looked up, as `inputs_embeds`: (B, F, D), or a function that
        waits for them and returns them. Pass both if this model holds only some of the tables, neither if there are
        no sparse features. dense: (B, N). labels: (B,), 0 or 1, used for the loss; an empty batch has loss 0. With T
        further tasks: (B, 1 + T), where NaN in a further column means that the example has no label of this task.

        num_passes P: repeat the examples after the look-up, so that each gets P predictions, with dropout of their own.
        Logits are then (P * B,): all examples of the first pass, then those of the second. Batch norm's statistics are
        over these P * B rows. Raises ValueError naming the argument.
        """
        if inputs_embeds is None:
            inputs_embeds = self._look_up(sparse, dense)
        elif self._order is not None:
            inputs_embeds = self._join(inputs_embeds, sparse)
        elif sparse is not None:
            raise ValueError("pass sparse or inputs_embeds, not both.")
        trunk = self.model(inputs_embeds, dense, num_passes)
        read, losses = parted(layers(trunk.head_inputs, trunk.dense) for layers in self.task_layers.children())
        of_label, *of_tasks = (each.flatten(1) for each in read or [trunk.head_inputs] * (1 + len(self.config.tasks)))
        logits_B = self.head(of_label).squeeze(1)
        logits_B = logits_B.to(torch.promote_types(logits_B.dtype, torch.float32))
        output = DhenOutput(logits=logits_B)
        losses += [] if trunk.auxiliary_loss is None else [trunk.auxiliary_loss]
        if self.tasks is not None:
            output.task_logits, output.task_weights, penalty = self.tasks(of_tasks)
            losses += [penalty] if penalty is not None and self.training else []
        output.auxiliary_loss = sum(losses[1:], losses[0]) if losses else None
        if labels is not None:
            output.loss = self._loss(output, labels.to(logits_B.dtype).repeat(num_passes, *[1] * (labels.dim() - 1)))
        return output

    def _loss(self, output: DhenOutput, labels: Tensor) -> Tensor:
        """labels: (P * B,), or (P * B, 1 + T)."""
        loss_of = partial(nn.functional.binary_cross_entropy_with_logits, reduction="sum")
        tasks = [] if self.tasks is None else self.config.tasks
        expected = (len(output.logits), 1 + len(tasks)) if tasks else (len(output.logits),)
        if labels.shape != expected:
            raise ValueError(f"labels have shape {tuple(labels.shape)}, but the model expects {expected}.")
        loss = loss_of(output.logits, labels[:, 0] if tasks else labels)
        if tasks:
            weights = output.task_logits, labels[:, 1:], output.task_weights
            loss = loss_of_tasks(loss, *weights, None, loss_of)
        # The mean, but 0 instead of NaN for an empty batch: every batch must produce a gradient.
        loss = loss / max(labels.shape[0], 1)
        return loss if output.auxiliary_loss is None else loss + output.auxiliary_loss

    def input_axes(self, sparse: Sequence[str], dense: Sequence[str]) -> Axes:
        """Which weights belong to which feature. sparse, dense: names of the features, in the data's order."""
        inputs = [("sparse", name) for name in sparse]
        inputs += [("dense embedding", index) for index in range(self.model.num_inputs - len(inputs))]
        axes: Axes = {}
        states = [(0, *label) for label in inputs]
        if self.model.features.dense_mlp is not None:
            axes["features.dense_mlp.0.weight"] = {1: dense}
        for index, layer in enumerate(self.model.layers):
            axes |= with_prefix(f"layers.{index}", layer.input_axes(inputs, dense))
            inputs = [("output", place) for place in range(layer.num_outputs)]
            states += [(index + 1, *label) for label in inputs]
        for index, layer in enumerate(layer for of in [*self.task_layers.children()][:1] for layer in of.layers):
            states += [("task", index, place) for place in range(layer.num_outputs)]
        axes = with_prefix("model", axes)
        for task, layers in self.task_layers.named_children():
            axes |= with_prefix(f"task_layers.{task}", layers.input_axes(dense))
        if self.config.head_inputs == "all":
            values = [(state, column) for state in states for column in range(self.config.embedding_dim)]
            heads = ["head", *(f"tasks.heads.{name}" for name in self.config.tasks)]
            axes |= {f"{head}.0.weight": {1: values} for head in heads}
        if self.tasks is not None and self.tasks.log_variance is not None:
            axes["tasks.log_variance"] = {0: [LABEL_TASK, *self.config.tasks]}
        return axes

    def _join(self, inputs_embeds: Tensor | Callable[[], Tensor], sparse: SparseIds | None) -> Callable[[], Tensor]:
        """Return a function that waits for `inputs_embeds` and returns the embeddings_BFD of all features in order."""
        if sparse is None:
            raise ValueError(
                "this model holds some of the tables, so forward needs sparse in addition to inputs_embeds. Pass both."
            )
        own_BFD = self.tables(sparse)

        def join() -> Tensor:
            others_BFD = inputs_embeds() if callable(inputs_embeds) else inputs_embeds
            return torch.cat([others_BFD, own_BFD], dim=1).index_select(1, self._order)

        return join

    def _look_up(self, sparse: SparseIds | None, dense: Tensor | None) -> Tensor:
        """Return embeddings_BFD of `sparse`, or (B, 0, D) if the config has no sparse features."""
        if not self.config.sparse_features and dense is not None:
            return dense.new_empty(dense.shape[0], 0, self.config.embedding_dim)
        if self.tables is None:
            raise ValueError("this model was built without tables (with_tables=False): pass inputs_embeds.")
        if sparse is None:
            raise ValueError("pass sparse or inputs_embeds.")
        return self.tables(sparse)


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape[1:]) != shape:
        expected = ", ".join(["batch", *map(str, shape)])
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but the model expects ({expected}).")


AutoModel.register(DhenConfig, DhenForClickPrediction)
