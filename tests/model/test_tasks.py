"""The losses of several tasks equal their formulas; rows without a task's label have no part in it."""

import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits

from dhen.model.configuration_dhen import DhenConfig
from dhen.model.mixture_of_experts import parted
from dhen.model.modeling_dhen import DhenForClickPrediction
from dhen.training.loop import summed_loss

EXACT = {"rtol": 1e-10, "atol": 1e-12}
NAN = math.nan
LABELS = torch.tensor(
    [[1, 0, NAN], [0, 1, 1], [1, NAN, NAN], [0, 0, 0], [1, 1, NAN]], dtype=torch.float64
)  # fmt: skip


def model_of(**options: object) -> DhenForClickPrediction:
    torch.manual_seed(1)
    config = {"num_dense_features": 3, "interactions": ["linear"], "num_layers": 1, "head_mlp": [8]} | options
    return DhenForClickPrediction(DhenConfig(**config)).double()


def inputs() -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(len(LABELS), 3, dtype=torch.float64)


def by_formula(model: DhenForClickPrediction, weights: list[float]) -> torch.Tensor:
    """Sum over tasks of w_t times the cross entropy of the rows with a label, over all rows."""
    inputs_BW = model.model(torch.empty(len(LABELS), 0, 16, dtype=torch.float64), inputs()).head_inputs.flatten(1)
    heads = [model.head, *model.tasks.heads.children()]
    loss = torch.zeros((), dtype=torch.float64)
    for head, weight, labels in zip(heads, weights, LABELS.unbind(1), strict=True):
        for row in (~labels.isnan()).nonzero().flatten():
            loss = loss + weight * binary_cross_entropy(head(inputs_BW[row : row + 1])[0, 0].sigmoid(), labels[row])
    return loss / len(LABELS)


@pytest.mark.parametrize(
    ("given", "weights"), [(None, [1, 1, 1]), ({"buy": 0.5}, [1, 0.5, 1]), ('{"label": 0, "stay": 2}', [0, 1, 2])]
)
def test_the_loss_is_the_weighted_sum_over_rows_with_a_label(given, weights):
    model = model_of(tasks=["buy", "stay"], task_weights=given)
    output = model(dense=inputs(), labels=LABELS)
    expected = by_formula(model, weights)
    torch.testing.assert_close(output.loss, expected, **EXACT)
    assert output.task_logits.shape == (5, 2)
    found = torch.autograd.grad(output.loss, list(model.parameters()), allow_unused=True)
    wanted = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    for (name, _), one, other in zip(model.named_parameters(), found, wanted, strict=True):
        torch.testing.assert_close(one, other, **EXACT, msg=name)


def test_trained_weights_are_those_of_the_uncertainty():
    model = model_of(tasks=["buy", "stay"], task_weights="uncertainty")
    s = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
    model.tasks.log_variance.data = s.clone()
    model(dense=inputs(), labels=LABELS).loss.backward()
    losses = [by_formula(model, [float(task == index) for index in range(3)]).detach() for task in range(3)]
    torch.testing.assert_close(model.tasks.log_variance.grad, 0.5 - (-s).exp() * torch.stack(losses), **EXACT)
    model.eval()
    torch.testing.assert_close(
        model(dense=inputs(), labels=LABELS).loss, by_formula(model, (-s).exp().tolist()), **EXACT
    )


@pytest.mark.parametrize("passes", [1, 2])
def test_the_training_loss_is_that_of_rows_counted_one_by_one(passes):
    model, weights = model_of(tasks=["buy", "stay"]), torch.tensor([2.0, 1.0, 0.0, 3.0, 0.5], dtype=torch.float64)
    output = model(dense=inputs(), num_passes=passes)
    loss, logits = summed_loss(output, LABELS[:, 0], passes, weights, LABELS[:, 1:])
    expected = 0.0
    for row, weight in enumerate(weights.tolist()):
        for task, label in enumerate(LABELS[row]):
            if not label.isnan():
                z = torch.cat([output.logits[:, None], output.task_logits], 1)[row, task]
                own = binary_cross_entropy_with_logits(z, label)
                # equal passes agree, so that each adds the entropy of its prediction
                p = z.sigmoid().detach()
                entropy = -(p * p.log() + (1 - p) * (1 - p).log())
                expected += weight * (own + (passes * entropy if passes > 1 else 0.0))
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(logits, output.logits[:5], rtol=1e-6, atol=1e-6)


def test_one_label_keeps_its_weights_and_its_shape():
    plain, several = model_of(), model_of(tasks=["buy"])
    assert plain.tasks is None
    output = plain(dense=inputs(), labels=LABELS[:, 0])
    assert (output.task_logits, output.task_weights) == (None, None)
    own = several.state_dict()
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, own[name]), name
    assert {name for name in own if name not in plain.state_dict()} == {
        f"tasks.heads.buy.{place}.{kind}" for place in (0, 2) for kind in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["buy", "buy"]}, "tasks: 'buy' is not allowed, or appears twice"),
        ({"tasks": ["label"]}, "tasks: 'label' is not allowed"),
        ({"tasks": ["buy"], "task_weights": {"by": 1.0}}, "Did you mean 'buy'?"),
        ({"tasks": ["buy"], "task_weights": {"buy": -1.0}}, "task_weights.buy is -1.0. Use 0 or more"),
        ({"tasks": ["buy"], "task_weights": "certainty"}, "task_weights is 'certainty'. Use 'uncertainty', or JSON"),
        ({"tasks": ["buy"], "task_weights": "[1]"}, r"task_weights is \[1\]. Use 'uncertainty'"),
    ],
)
def test_wrong_tasks_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        model_of(**options)


def test_a_task_may_have_the_name_of_a_method_of_dictionaries():
    assert model_of(tasks=["items", "keys"])(dense=inputs()).task_logits.shape == (5, 2)


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"labels have shape \(5,\), but the model expects \(5, 3\)"):
        model_of(tasks=["buy", "stay"])(dense=inputs(), labels=LABELS[:, 0])


@pytest.mark.parametrize("options", [{}, {"head_inputs": "all"}, {"norm_position": "pre", "gate": "hard"}], ids=str)
def test_layers_of_its_own_are_between_a_tasks_head_and_the_shared_layers(options):
    own = {"interactions": [{"kind": "linear", "use_dense": True}], "ensemble": "sum", "num_embeddings_out": 4}
    layers = [{"interactions": ["advanced_dlrm"], "num_embeddings_out": 6}] * 2
    options = {"layers": layers, "num_dense_embeddings": 3} | options
    model = model_of(tasks=["items"], task_layers=2, **own, **options).eval()
    output, dense = model(dense=inputs(), num_passes=2), inputs().repeat(2, 1)
    x_BMD = model.model.features(dense.new_empty(10, 0, 16), dense)
    shared = [x_BMD]
    for layer in model.model.layers:
        x_BMD = parted([layer(x_BMD, dense)])[0][0]
        shared.append(x_BMD)
    is_pre, reads_all = "norm_position" in options, "head_inputs" in options
    first = model.model.norm(x_BMD) if is_pre else x_BMD
    for of_task, head, logits in zip(
        model.task_layers.children(),
        [model.head, model.tasks.heads.items],
        [output.logits, output.task_logits[:, 0]],
        strict=True,
    ):
        y_BMD, read = first, [*shared] if reads_all else []
        for layer in of_task.layers:
            (y_BMD,), _ = parted([layer(y_BMD, dense)])
            read.append(y_BMD)
        read = read if reads_all else [of_task.norm(y_BMD) if is_pre else y_BMD]
        torch.testing.assert_close(head(torch.cat(read, 1).flatten(1)).squeeze(1), logits, rtol=1e-6, atol=1e-6)
    label, task = (of.layers[0].shortcut.mix.weight for of in model.task_layers.children())
    assert not torch.equal(label, task)
