"""DhenLayer equals equations 1 and 2."""

import pytest
import torch

from dhen.model.configuration_dhen import DhenConfig
from dhen.model.layer import DhenLayer, Ensemble
from dhen.model.mlp import BatchNorm
from dhen.model.modeling_dhen import DhenModel

B, D = 4, 6
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


def make(num_inputs, **settings):
    settings = {"interactions": ["linear", "deep_cross"], "num_embeddings_out": 3} | settings
    config = DhenConfig(num_dense_features=1, embedding_dim=D, num_layers=1, **settings)
    layer = DhenLayer(config.layer_specs[0], num_inputs, D).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return layer


def norm(kind, layer, x):
    """The norms by definition. Batch norm is in evaluation mode, with running mean 0 and variance 1."""
    if kind == "none":
        return x
    if kind == "batch_norm":
        inner = layer.norm.norm
        return (x.flatten(1) / (1 + 1e-5) ** 0.5 * inner.weight + inner.bias).view_as(x)
    if kind == "layer_norm":
        centred = x - x.mean(2, keepdim=True)
        return centred / (centred.square().mean(2, keepdim=True) + 1e-5).sqrt() * layer.norm.weight + layer.norm.bias
    return x / (x.square().mean(2, keepdim=True) + torch.finfo(x.dtype).eps).sqrt() * layer.norm.weight


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm", "batch_norm", "none"])
@pytest.mark.parametrize("position", ["post", "pre", "inner"])
@pytest.mark.parametrize(("ensemble", "num_outputs"), [("concat", 6), ("sum", 3), ("weighted_sum", 3)])
@pytest.mark.parametrize("num_inputs", [3, 5, 6])
def test_layer_equals_equations_1_and_2(kind, position, ensemble, num_outputs, num_inputs):
    torch.manual_seed(num_inputs)
    layer = make(num_inputs, norm=kind, norm_position=position, ensemble=ensemble).eval()
    x, dense = torch.randn(B, num_inputs, D, dtype=torch.float64), torch.empty(B, 0)
    inputs = norm(kind, layer, x) if position == "pre" else x
    first, second = (interaction(inputs, dense) for interaction in layer.interactions)
    if ensemble == "concat":
        u = torch.cat([first, second], dim=1)
    elif ensemble == "sum":
        u = first + second
    else:
        u = layer.ensemble.weight[0] * first + layer.ensemble.weight[1] * second
    shortcut = x if num_inputs == num_outputs else torch.einsum("lm,bmd->bld", layer.shortcut.mix.weight, x)
    if position == "inner":
        expected = norm(kind, layer, u) + shortcut
    else:
        expected = norm(kind, layer, u + shortcut) if position == "post" else u + shortcut
    torch.testing.assert_close(layer(x, dense), expected, **TOLERANCE)
    assert layer.num_outputs == num_outputs


def test_shortcut_is_identity_only_where_the_counts_match():
    assert list(make(6).shortcut.parameters()) == []
    assert [tuple(weight.shape) for weight in make(5).shortcut.parameters()] == [(6, 5)]


def test_a_weighted_sum_starts_as_the_sum():
    u = [torch.randn(B, 3, D) for _ in range(3)]
    assert torch.equal(Ensemble("weighted_sum", [3, 3, 3])(u), Ensemble("sum", [3, 3, 3])(u))


def test_gradients_of_a_layer_are_those_of_finite_differences():
    torch.manual_seed(0)
    layer = make(4, interactions=["linear", "advanced_dlrm"], ensemble="weighted_sum", norm="rms_norm")
    x = torch.randn(2, 4, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x, x.new_empty(2, 0)), (x,))


def test_dropout_is_on_the_ensemble_and_not_on_the_shortcut():
    torch.manual_seed(0)
    layer = make(6, dropout=0.5, norm="none").train()
    x, dense = torch.randn(200, 6, D, dtype=torch.float64), torch.empty(200, 0)
    u = layer.ensemble([interaction(x, dense) for interaction in layer.interactions])
    kept = (layer(x, dense) - x) / u  # 0 where dropped, 1 / (1 - 0.5) where kept
    is_dropped = kept.abs() < 1e-9
    assert abs(is_dropped.double().mean() - 0.5) < 0.03
    torch.testing.assert_close(kept[~is_dropped], torch.full_like(kept[~is_dropped], 2.0), rtol=1e-6, atol=0)
    assert torch.equal(layer.eval()(x, dense), u + x)


@pytest.mark.parametrize("rows", [0, 1])
def test_batch_norm_of_fewer_than_two_rows_uses_and_keeps_the_running_statistics(rows):
    norm = BatchNorm(3).double().train()
    norm(torch.randn(8, 3, dtype=torch.float64))
    before = norm.running_mean.clone()
    x = torch.randn(rows, 3, dtype=torch.float64)
    out = norm(x)
    torch.testing.assert_close(out, norm.eval()(x), **TOLERANCE)
    assert torch.equal(norm.running_mean, before)


def test_batch_norm_of_more_rows_is_torchs():
    x = torch.randn(8, 3)
    torch.testing.assert_close(BatchNorm(3).train()(x), torch.nn.BatchNorm1d(3).train()(x))


def test_pre_norm_puts_one_more_norm_after_the_last_layer():
    settings = {"num_dense_features": 1, "interactions": ["linear"]}
    model = DhenModel(DhenConfig(norm_position="pre", **settings))
    out = model(torch.empty(9, 0, 16), torch.randn(9, 1)).last_hidden_state
    torch.testing.assert_close(out.mean(2), torch.zeros(9, 16), rtol=0, atol=1e-5)
    assert DhenModel(DhenConfig(**settings)).norm is None


def test_sums_of_unequal_sizes_are_refused():
    with pytest.raises(ValueError, match=r"needs the same num_embeddings from every interaction, but got \[3, 2\]"):
        Ensemble("sum", [3, 2])
