"""Gates of layers equal their formulas, and skip in an evaluation what they close."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.flop_counter import FlopCounterMode

from dhen.model.configuration_dhen import DhenConfig
from dhen.model.gate import LayerGate
from dhen.model.layer import DhenLayer
from dhen.model.modeling_dhen import DhenForClickPrediction

M, D, N = 5, 6, 2
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def layer_of(**settings: object) -> DhenLayer:
    """A layer with random weights, whose gate is open for about half of the examples."""
    settings = {"interactions": ["linear", "deep_cross"], "num_embeddings_out": 3, "norm": "rms_norm"} | settings
    config = DhenConfig(num_dense_features=N, embedding_dim=D, num_layers=1, **settings)
    torch.manual_seed(1)
    layer = DhenLayer(config.layer_specs[0], M, D, N).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    if layer.gate is not None:
        torch.nn.init.constant_(layer.gate.bias, -512.0)
        torch.nn.init.normal_(layer.gate.weight, std=70.0)
    return layer


def inputs(size: int = 8) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(size, M, D, dtype=torch.float64), torch.randn(size, N, dtype=torch.float64)


def gated(layer: DhenLayer, x: Tensor, dense: Tensor, gate: Tensor) -> Tensor:
    """The layer by its formula, with a gate of shape (B,)."""
    first = layer.norm(x) if layer.norm_position == "pre" else x
    u = torch.cat([interaction(first, dense) for interaction in layer.interactions], 1)
    u = layer.norm(u) if layer.norm_position == "inner" else u
    y = gate[:, None, None] * u + torch.einsum("lm,bmd->bld", layer.shortcut.mix.weight, x)
    return layer.norm(y) if layer.norm_position == "post" else y


def openness(layer: DhenLayer, x: Tensor) -> Tensor:
    """s, (B,)."""
    return torch.sigmoid(2 + (x.flatten(1) @ layer.gate.weight[0] + layer.gate.bias) / 256)


@pytest.mark.parametrize("position", ["post", "pre", "inner"])
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_layer_with_a_gate_equals_the_formula(kind, position):
    layer, (x, dense) = layer_of(gate=kind, norm_position=position), inputs()
    gate = openness(layer, x)
    if kind == "hard":
        gate = (gate > 0.5).double()
        assert set(gate.tolist()) == {0.0, 1.0}
    output = layer(x, dense)
    output = output[0] if isinstance(output, tuple) else output
    torch.testing.assert_close(output, gated(layer, x, dense, gate), **EXACT)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x, dense), output, **EXACT)


def test_a_hard_gate_learns_by_the_gradient_of_the_sigmoid_and_by_its_sparsity():
    layer, (x, dense) = layer_of(gate="hard", gate_sparsity=0.3, norm="none"), inputs()
    output, loss = layer(x, dense)
    weights = [layer.gate.weight, *layer.interactions.parameters()]
    found, *of_weights = torch.autograd.grad(output.square().sum() + loss, weights)
    soft = openness(layer, x)
    torch.testing.assert_close(loss, 0.3 * soft.mean().float(), rtol=1e-6, atol=0)
    gate = (soft > 0.5).double().detach().requires_grad_()
    (of_gate,) = torch.autograd.grad(gated(layer, x, dense, gate).square().sum(), gate)
    slope = (soft * (1 - soft)).detach() / 256
    expected = (slope * (of_gate + 0.3 / len(x))) @ x.flatten(1)
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=1e-9)
    # Closed interactions learn, too.
    y = gated(layer, x, dense, gate.detach()).detach().requires_grad_()
    before_norm = gated(layer, x, dense, soft.detach())
    of_layer = torch.autograd.grad(before_norm, weights[1:], torch.autograd.grad(y.square().sum(), y)[0])
    for one, other in zip(of_weights, of_layer, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("closed", [0, 3, 8])
def test_an_evaluation_does_not_compute_closed_examples(closed):
    layer, (x, dense) = layer_of(gate="hard").eval(), inputs()
    z = openness(layer, x).logit().sort().values
    layer.gate.bias.data -= 256 * torch.cat([z[:1] - 2, z, z[-1:] + 2])[closed : closed + 2].mean()
    counted = []
    with torch.no_grad():
        for skips in (False, True):
            layer.gate.skips = skips
            with FlopCounterMode(display=False) as counter:
                output = layer(x, dense)
            counts = counter.get_flop_counts()
            counted.append((output, sum(sum(of.values()) for name, of in counts.items() if ".interactions." in name)))
    (whole, all_flops), (skipped, flops) = counted
    torch.testing.assert_close(skipped, whole, **EXACT)
    assert all_flops > 0
    assert flops == all_flops * (len(x) - closed) // len(x)


def test_without_a_gate_there_is_nothing():
    assert not any("gate" in name for name in layer_of().state_dict())
    with_gate, x = layer_of(gate="soft"), inputs()
    torch.nn.init.constant_(with_gate.gate.bias, 15360.0)  # s is 1
    plain = layer_of()
    plain.load_state_dict({name: value for name, value in with_gate.state_dict().items() if "gate" not in name})
    torch.testing.assert_close(plain(*x), with_gate(*x), rtol=0, atol=0)


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_batch_of_one_example_or_none_trains_and_is_scored(kind, size):
    model = DhenForClickPrediction(DhenConfig(num_dense_features=3, gate=kind, num_dense_embeddings=2))
    model(dense=torch.randn(size, 3), labels=torch.ones(size)).loss.backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())
    with torch.no_grad():
        assert model.eval()(dense=torch.randn(size, 3)).logits.shape == (size,)


def test_sparsity_closes_gates_that_do_not_help():
    """The label is the sign of a dense feature, which needs no second layer."""
    open_shares = []
    for sparsity in (0.0, 0.3):
        torch.manual_seed(0)
        sizes = {"num_dense_features": 3, "num_dense_embeddings": 2, "num_layers": 2, "embedding_dim": 8}
        model = DhenForClickPrediction(DhenConfig(**sizes, gate="hard", gate_sparsity=sparsity))
        shares = []
        model.model.layers[1].gate.register_forward_hook(
            lambda gate, _, output, to=shares: to.append(gate.openness(output[0]).mean().item())
        )
        gates = [layer.gate for layer in model.model.layers]
        of_gates = {weight for gate in gates for weight in gate.parameters()}
        others = [weight for weight in model.parameters() if weight not in of_gates]
        optimizer = torch.optim.Adam([{"params": list(of_gates), "lr": 2.0}, {"params": others}], lr=0.02)
        for _ in range(150):
            dense = torch.randn(256, 3)
            output = model(dense=dense, labels=(dense[:, 0] > 0).float())
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
        clicks = binary_cross_entropy_with_logits(output.logits, (dense[:, 0] > 0).float())
        assert clicks < 0.3, "the model has learned"
        open_shares.append(sum(shares[-30:]) / 30)
    assert open_shares[0] > 0.3
    assert open_shares[1] < 0.1


def test_autocast_does_not_change_the_choice():
    gate = LayerGate("hard", M, D, 0.0)
    torch.nn.init.normal_(gate.weight)
    x = torch.randn(500, M, D)
    with torch.autocast("cpu", torch.bfloat16):
        (in_bf16,) = gate(x)
    assert torch.equal(in_bf16, gate(x)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "firm"}, "firm"),
        ({"gate_sparsity": -1}, "gate_sparsity"),
        ({"layers": [{"gate": "soft", "gate_sparsity": 1.0}]}, "layers\\[0\\]: gate_sparsity needs gate 'hard'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DhenConfig(num_dense_features=1, **options)
