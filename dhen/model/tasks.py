"""Further tasks: other labels of the same examples, each with a head of its own above the shared layers.

With task 0 the label itself, the loss is sum_t w_t L_t. L_t is the cross entropy of the examples that have a label of
task t, divided by the number of all examples.

fixed weights: w_t is given; 1 by default.
uncertainty (Kendall, Gal and Cipolla 2018, arXiv 1705.07115, equation 10): w_t = exp(-s_t), and s_t / 2 is added to the
loss, with a trained s_t = log variance that starts at 0.

Shapes: B batch, T further tasks, W inputs of a head.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from dhen.model.mlp import MLP
from dhen.model.names import check_names, check_type, is_valid_table_name, quoted, unique_keys
from dhen.model.ranges import NotNegative

LABEL_TASK = "label"
"""The name of task 0 in `task_weights`."""
TaskWeights = dict[str, NotNegative] | str | None
_UNCERTAINTY = "uncertainty"


class TaskHeads(nn.Module):
    """The heads of the further tasks, and the weights of all tasks.

    >>> heads = TaskHeads({"buy": MLP(8, [], 1)}, {"buy": 0.5})
    >>> logits_BT, weights, penalty = heads([torch.ones(2, 8)])
    >>> logits_BT.shape, weights.tolist(), penalty
    (torch.Size([2, 1]), [1.0, 0.5], None)
    """

    def __init__(
        self, heads: Mapping[str, MLP], task_weights: Mapping[str, float] | Literal["uncertainty"] | None
    ) -> None:
        """heads: by task, each from (B, W) to (B, 1)."""
        super().__init__()
        self.heads = named_modules(heads)
        self.log_variance: nn.Parameter | None = None
        if task_weights == _UNCERTAINTY:
            self.log_variance = nn.Parameter(torch.empty(1 + len(heads)))
            self.reset_parameters()
        else:
            self.fixed = [(task_weights or {}).get(name, 1.0) for name in (LABEL_TASK, *heads)]

    def reset_parameters(self) -> None:
        """Start with equal weights of 1."""
        if self.log_variance is not None:
            nn.init.zeros_(self.log_variance)

    def forward(self, inputs_BW: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return logits_BT, the weights (1 + T,), and sum(s) / 2 if they are trained. inputs_BW: of each head."""
        logits_BT = torch.cat([head(of) for head, of in zip(self.heads.children(), inputs_BW, strict=True)], dim=1)
        logits_BT = logits_BT.to(torch.promote_types(logits_BT.dtype, torch.float32))
        if self.log_variance is not None:
            log_variance = self.log_variance.to(logits_BT.dtype)
            return logits_BT, (-log_variance).exp(), log_variance.sum() / 2
        # One fill per number: a copy from the host would make it wait for the device.
        return logits_BT, torch.stack([logits_BT.new_full((), weight) for weight in self.fixed]), None


def named_modules(modules: Mapping[str, nn.Module]) -> nn.Module:
    """A module that holds these, by task. A ModuleDict has no room for a task called `items`."""
    holder = nn.Module()
    for name, module in modules.items():
        holder.add_module(name, module)
    return holder


def loss_of_tasks(
    loss_of_label: Tensor,
    task_logits: Tensor,
    tasks_BT: Tensor,
    task_weights: Tensor,
    weights_B: Tensor | None,
    loss_of: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """The weighted sum of the losses of all tasks.

    tasks_BT: labels, NaN where an example has none; it then has no part in the task's loss. weights_B: of the examples;
    None: 1. loss_of: (logits of a task, labels_B, weights_B) -> summed loss.
    """
    losses = [loss_of_label]
    for logits, labels_B in zip(task_logits.unbind(-1), tasks_BT.unbind(-1), strict=True):
        has_label_B = (~labels_B.isnan()).to(logits.dtype)
        counts_B = has_label_B if weights_B is None else has_label_B * weights_B
        losses.append(loss_of(logits, labels_B.nan_to_num(), counts_B))
    return torch.stack(losses) @ task_weights


def read_task_weights(value: TaskWeights, tasks: Sequence[str]) -> TaskWeights:
    """The weights by task, "uncertainty" or None, given these or JSON text. Raises ValueError.

    tasks: names of the further tasks. Without any, the names in `value` are not checked.
    """
    for name in tasks:
        if not is_valid_table_name(name) or name == LABEL_TASK or tasks.count(name) > 1:
            raise ValueError(f"tasks: {quoted(name)} is not allowed, or appears twice. Rename the task.")
    if isinstance(value, str) and value != _UNCERTAINTY:
        try:
            value = json.loads(value, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"task_weights is {quoted(value)}. Use '{_UNCERTAINTY}', or JSON such as {{\"buy\": 0.5}}."
            ) from error
    if isinstance(value, dict):
        check_type("task_weights", value, dict[str, NotNegative])
        if tasks:
            check_names("task in task_weights", value, [LABEL_TASK, *tasks])
    elif value not in (None, _UNCERTAINTY):
        raise ValueError(f"task_weights is {quoted(value)}. Use '{_UNCERTAINTY}', or a weight for each task.")
    return value
