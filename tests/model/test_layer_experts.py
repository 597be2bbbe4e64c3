"""Mixtures of experts in layers equal their formulas in float64, and count what is over an expert's capacity."""

import math

import pytest
import torch
from torch import Tensor

from dhen.dense.activation_checkpointing import checkpoint_layers
from dhen.model.configuration_dhen import DhenConfig
from dhen.model.interactions import interaction_kinds
from dhen.model.layer import DhenLayer
from dhen.model.mixture_of_experts import Gate, dropped_rows, z_loss
from dhen.model.modeling_dhen import DhenForClickPrediction
from tests.plain import CONFIG

M, D, N, B = 5, 6, 2, 11
EXACT = {"rtol": 1e-10, "atol": 1e-11}
KINDS = ["linear", "advanced_dlrm", "deep_cross_flattened"]
INTERACTIONS = {"experts": "interactions", "ensemble": "sum"}
ENSEMBLES = {"experts": "ensembles", "num_experts": 4}
CASES = [
    INTERACTIONS,
    INTERACTIONS | {"ensemble": "weighted_sum", "experts_per_example": 1, "norm_position": "inner"},
    INTERACTIONS | {"experts_per_example": 3, "norm_position": "pre"},
    ENSEMBLES,
    ENSEMBLES | {"ensemble": "sum", "experts_per_example": 1, "capacity_factor": 1.0},
    ENSEMBLES | {"capacity_factor": 1.25, "norm_position": "pre", "gate": "soft"},
]


def layer_of(**settings: object) -> DhenLayer:
    """A layer with random weights, in float64."""
    settings = {"interactions": KINDS, "num_embeddings_out": 3, "balance_loss": 0.3, "z_loss": 0.2} | settings
    config = DhenConfig(num_dense_features=N, embedding_dim=D, num_layers=1, **settings)
    torch.manual_seed(1)
    layer = DhenLayer(config.layer_specs[0], M, D, N).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def inputs(size: int = B) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(size, M, D, dtype=torch.float64), torch.randn(size, N, dtype=torch.float64)


def choices(layer: DhenLayer, x: Tensor) -> tuple[Tensor, list[list[int]], list[list[int]]]:
    """The router's logits; by example, the chosen experts, the best first, and those of them that drop it."""
    mixture, size = layer.mixture, len(x)
    h = x.flatten(1) @ mixture.gate.linear.weight.T
    chosen = [
        sorted(range(h.shape[1]), key=lambda e, b=b: -h[b, e].item())[: mixture.gate.num_chosen] for b in range(size)
    ]
    drop: list[list[int]] = [[] for _ in range(size)]
    if layer.training and mixture.capacity_factor is not None:
        room = [math.ceil(mixture.capacity_factor * size * mixture.gate.num_chosen / h.shape[1])] * h.shape[1]
        for place in range(mixture.gate.num_chosen):
            for b in range(size):
                expert = chosen[b][place]
                if room[expert]:
                    room[expert] -= 1
                else:
                    drop[b].append(expert)
    return h, chosen, drop


def mixed(layer: DhenLayer, x: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over the chosen experts, each of which computes all examples, and the losses of the router."""
    h, chosen, drop = choices(layer, x)
    experts, probability = list(layer.mixture.experts), h.exp() / h.exp().sum(1, keepdim=True)
    weights, counts = torch.zeros_like(h), torch.zeros(len(experts), dtype=torch.float64)
    for b, of_example in enumerate(chosen):
        total = sum(probability[b, e] for e in of_example) if len(of_example) > 1 else 1.0
        for e in of_example:
            counts[e] += 1
            if e not in drop[b]:
                weights[b, e] = probability[b, e] / total
    u = 0
    for e, expert in enumerate(experts):
        outputs = [interaction(x, dense) for interaction in expert.interactions]
        if expert.ensemble.weight is not None:
            outputs = [w * each for w, each in zip(expert.ensemble.weight, outputs, strict=True)]
        whole = torch.cat(outputs, 1) if expert.ensemble.kind == "concat" else sum(outputs)
        u = u + weights[:, e, None, None] * whole
    shares = counts / counts.sum()
    loss = 0.3 * len(experts) * (shares * probability.mean(0)).sum() + 0.2 * h.exp().sum(1).log().square().mean()
    return u, loss


def formula(layer: DhenLayer, x: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    """The layer by its formula."""
    u, loss = mixed(layer, layer.norm(x) if layer.norm_position == "pre" else x, dense)
    u = layer.norm(u) if layer.norm_position == "inner" else u
    if layer.gate is not None:
        u = u * layer.gate(x)[0]
    mix = layer.shortcut.mix
    y = u + (x if mix is None else torch.einsum("lm,bmd->bld", mix.weight, x))
    return layer.norm(y) if layer.norm_position == "post" else y, loss


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_losses_and_gradients_are_those_of_the_formula(case):
    layer, (x, dense) = layer_of(**case), inputs()
    found = []
    for function in (layer, lambda *of: formula(layer, *of)):
        of_x = x.clone().requires_grad_()
        y, loss = function(of_x, dense)
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
        found.append([y, loss, *torch.autograd.grad((y * weights).sum() + loss, [of_x, *layer.parameters()])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **EXACT)
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(layer(x, dense), formula(layer, x, dense)[0], **EXACT)


@pytest.mark.parametrize("break_it", ["dispatch", "weights"])
def test_a_wrong_dispatch_or_weight_would_show(monkeypatch, break_it):
    """Negative control."""
    layer, (x, dense) = layer_of(**ENSEMBLES), inputs()
    expected = formula(layer, x, dense)[0]
    torch.testing.assert_close(layer(x, dense)[0], expected, **EXACT)
    if break_it == "dispatch":
        monkeypatch.setattr(torch.Tensor, "argsort", lambda ids, **_: torch.arange(len(ids)))
    else:
        monkeypatch.setattr(torch.Tensor, "topk", lambda of, k: (of[:, :k], of.sort(descending=True).indices[:, :k]))
    assert (layer(x, dense)[0] - expected).abs().max() > 1e-3


def test_all_experts_chosen_are_the_dense_mixture():
    layer, (x, dense) = layer_of(**ENSEMBLES, experts_per_example=4).eval(), inputs()
    p = (x.flatten(1) @ layer.mixture.gate.linear.weight.T).softmax(1)
    u = sum(p[:, e, None, None] * expert(x, dense) for e, expert in enumerate(layer.mixture.experts))
    torch.testing.assert_close(layer.mixture(x, dense), u, **EXACT)


def test_an_example_that_all_its_experts_drop_keeps_its_shortcut_and_is_counted():
    """All choose experts 1 and 0. Each has room for 2 * 8 / 4 rows; an evaluation drops nothing."""
    layer = layer_of(**ENSEMBLES, capacity_factor=1.0, norm="none")
    x, dense = inputs(8)
    x = torch.cat([torch.ones(8, 1, D, dtype=torch.float64), x[:, 1:]], 1)
    layer.mixture.gate.linear.weight.data.zero_()[:2, 0] = torch.tensor([1.0, 2.0])
    y, _ = layer(x, dense)
    shortcut = layer.shortcut(x)
    remains = [torch.equal(y[b], shortcut[b]) for b in range(8)]
    assert remains == [False] * 4 + [True] * 4
    assert dropped_rows(layer).tolist() == [16, 8]
    with torch.no_grad():
        y = layer.eval()(x, dense)
    assert not any(torch.equal(y[b], shortcut[b]) for b in range(8))
    assert dropped_rows(layer).tolist() == [16, 8]
    assert dropped_rows(layer_of(**ENSEMBLES)) is None


def test_first_choices_have_room_before_second_ones():
    """Example 0 chooses 0, then 1; examples 1 and 2 choose 1, then 2. Each of 3 experts has room for 2 rows."""
    layer = layer_of(**INTERACTIONS, capacity_factor=1.0)
    layer.mixture.train()
    kept = layer.mixture._within_capacity(torch.tensor([[0, 1], [1, 2], [1, 2]]))
    assert kept.tolist() == [[0, 3], [1, 2], [1, 2]]


def test_the_z_loss_makes_logits_small():
    """Its gradient is 2/B logsumexp(h) softmax(h)."""
    h = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(z_loss(h), h)
    expected = 2 / 7 * h.exp().sum(1, keepdim=True).log() * h.softmax(1)
    torch.testing.assert_close(gradient, expected, **EXACT)
    assert z_loss(torch.empty(0, 4)).item() == 0
    gate, x = Gate(6, 4, 2, balance=0.0, z_factor=0.5), torch.randn(9, 6)
    _, _, loss = gate(x)
    assert loss.item() == pytest.approx(0.5 * z_loss(gate.linear(x)).item())


def model_of(**options: object) -> DhenForClickPrediction:
    torch.manual_seed(0)
    return DhenForClickPrediction(DhenConfig(**CONFIG | options), with_tables=False)


def batch_of(size: int) -> dict[str, Tensor]:
    torch.manual_seed(size)
    return {"inputs_embeds": torch.randn(size, 5, 8), "dense": torch.randn(size, 3), "labels": torch.ones(size)}


def test_without_experts_there_is_nothing():
    plain = model_of()
    assert not any("mixture" in name for name in plain.state_dict())
    assert plain(**batch_of(9)).auxiliary_loss is None
    one = model_of(experts="ensembles", num_experts=1, experts_per_example=1, balance_loss=0, z_loss=0)
    state = {name.replace("mixture.experts.0.", ""): value for name, value in one.state_dict().items()}
    plain.load_state_dict({name: value for name, value in state.items() if "mixture" not in name})
    assert torch.equal(plain(**batch_of(9)).logits, one(**batch_of(9)).logits)


@pytest.mark.parametrize("size", [0, 1, 9])
@pytest.mark.parametrize("case", [INTERACTIONS, ENSEMBLES | {"capacity_factor": 1.0}], ids=str)
def test_experts_of_all_kinds_train_without_examples(case, size):
    """Also with batch norm. All examples choose the same expert, so that the others have none."""
    interactions = [kind for kind in interaction_kinds() if "test" not in kind and kind not in ("double", "squares")]
    model = model_of(**case, interactions=interactions, batch_norm=True, experts_per_example=1)
    for layer in model.model.layers:
        layer.mixture.gate.linear.weight.data.zero_()
    model(**batch_of(size)).loss.backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
    with torch.no_grad():
        assert model.eval()(**batch_of(size)).logits.isfinite().all()


@pytest.mark.parametrize("what", ["all", ["linear"], ["advanced_dlrm"]], ids=str)
@pytest.mark.parametrize("case", [INTERACTIONS, ENSEMBLES | {"num_embeddings_out": 3}], ids=str)
def test_recomputation_changes_no_bit_and_counts_nothing_twice(case, what):
    options = {"batch_norm": True, "dropout": 0.2, "capacity_factor": 1.0, "experts_per_example": 1} | case
    models = [model_of(**options), model_of(**options)]
    copies = 2 * (4 if case["experts"] == "ensembles" else 1)
    assert checkpoint_layers(models[1], what) == (2 if what == "all" else copies)
    for model in models:
        for _ in range(2):
            torch.manual_seed(5)
            model(**batch_of(13)).loss.backward()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    for (name, one), (_, other) in zip(models[0].named_buffers(), models[1].named_buffers(), strict=True):
        assert torch.equal(one, other), name
    rows, dropped = dropped_rows(models[1]).tolist()
    assert rows == 2 * 2 * 13
    assert 0 < dropped < rows


@pytest.mark.parametrize("case", [INTERACTIONS, ENSEMBLES | {"capacity_factor": 1.5}], ids=str)
def test_a_saved_model_predicts_the_same(case, tmp_path):
    model = model_of(**case)
    model.save_pretrained(tmp_path)
    loaded, info = DhenForClickPrediction.from_pretrained(tmp_path, with_tables=False, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch_of(9)).logits, model.eval()(**batch_of(9)).logits)
    if "capacity_factor" in case:
        assert dropped_rows(loaded).tolist() == [0, 0]


def test_layers_may_differ():
    """The second layer has experts, and options of its own."""
    layers = [{"interactions": ["linear"]}, {"experts": "ensembles", "num_experts": 3, "capacity_factor": 2.0}]
    first, second = model_of(layers=layers).model.layers
    assert first.mixture is None
    assert len(second.mixture.experts) == 3
    assert second.mixture.capacity_factor == 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": "layers"}, "experts"),
        ({"experts": "interactions"}, "interactions: experts 'interactions' adds the outputs .* Use ensemble 'sum'"),
        ({"experts": "ensembles", "capacity_factor": 0.5}, "capacity_factor"),
        (
            {"layers": [{"z_loss": 1.0}]},
            r"layers\[0\]: z_loss needs experts 'interactions' or 'ensembles', but experts is",
        ),
        (
            {"layers": [INTERACTIONS | {"num_experts": 2}]},
            "num_experts needs experts 'ensembles', but experts is 'inter",
        ),
        ({"experts": "ensembles", "experts_per_example": 5}, "layer 0: experts_per_example is 5. Use a number up to"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        model_of(**options)


@pytest.mark.parametrize("case", [INTERACTIONS, ENSEMBLES | {"capacity_factor": 1.0}], ids=str)
def test_in_bf16_the_router_is_in_float32_under_autocast(case):
    kinds = ["linear", "advanced_dlrm", "self_attention", "deep_cross", "multiplicative"]
    model, batch, seen = model_of(**case, interactions=kinds), batch_of(33), []
    model.model.layers[0].mixture.gate.register_forward_hook(lambda _, __, output: seen.append(output[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    assert seen == [torch.float32]
    assert loss.item() == pytest.approx(model(**batch).loss.item(), rel=0.02)
    whole = model.bfloat16()(**{name: value.bfloat16() for name, value in batch.items()}).loss
    assert whole.item() == pytest.approx(loss.item(), rel=0.05)
