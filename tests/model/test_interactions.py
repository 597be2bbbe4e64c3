"""Each interaction equals its formula, written here in plain torch in float64."""

import pytest
import torch
from torch.nn import functional as F

from dhen.model.interactions import InteractionContext, InteractionSpec, build_interaction, interaction_kinds

B, M, L, D, N = 4, 5, 3, 6, 2
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}

# One row per option that changes the arithmetic. Every kind must appear.
CASES = [
    ("linear", {}),
    ("linear", {"bias": True}),
    ("linear", {"use_dense": True}),
    ("deep_cross", {}),
    ("deep_cross", {"use_dense": True}),
    ("deep_cross_flattened", {}),
    ("deep_cross_flattened", {"num_cross_layers": 2, "cross_width": 3, "use_dense": True}),
    ("self_attention", {}),
    ("self_attention", {"num_heads": 3, "feedforward_dim": 5, "norm_first": True, "activation": "gelu"}),
    ("self_attention", {"num_heads": 2, "use_dense": True}),
    ("convolution", {}),
    ("convolution", {"num_channels": 2, "kernel_size": [1, 5], "activation": "relu", "use_dense": True}),
    ("advanced_dlrm", {}),
    ("advanced_dlrm", {"use_dense": True, "over_arch": [7, 4], "normalize": True, "activation": "tanh"}),
    ("advanced_dlrm", {"compress_to": 2, "example_weights": True, "use_dense": True}),
    ("advanced_dlrm", {"compress_to": 2, "normalize": True, "num_cross_layers": 2, "cross_width": 3}),
    ("advanced_dlrm", {"compress_to": 2, "weights_mlp": [7], "example_weights": True, "swish_layer_norm": True}),
    ("advanced_dlrm", {"compress_to": 2, "weights_mlp": [], "normalize": True, "swish_layer_norm": True}),
    ("advanced_dlrm", {"use_dense": True, "dense_output": True}),
    ("factorization_machine", {"compress_to": 3}),
    ("multiplicative", {}),
    ("multiplicative", {"num_rows": 3, "num_layers": 2, "activation": "tanh", "use_dense": True}),
]


def make(kind, options, **context):
    """Build the interaction in float64. No parameter stays at 0 or 1, where it might not affect the result."""
    shapes = {"num_inputs": M, "num_outputs": L, "embedding_dim": D, "num_dense_features": N} | context
    module = build_interaction(InteractionSpec(kind, L, options), InteractionContext(**shapes)).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) / 2)
    return module


def inputs(batch_size=B):
    return torch.randn(batch_size, M, D, dtype=torch.float64), torch.randn(batch_size, N, dtype=torch.float64)


def state(module):
    return {key.replace("-", "_"): value for key, value in module.state_dict().items()}


def run_mlp(state, prefix, x, act):
    """Linear, act, Linear, act, …, Linear, from the weights under `prefix`."""
    indices = sorted({int(key[len(prefix) :].split(".")[0]) for key in state if key.startswith(prefix)})
    for index in indices:
        x = x @ state[f"{prefix}{index}.weight"].T + state[f"{prefix}{index}.bias"]
        x = act(x) if index != indices[-1] else x
    return x


def with_row(state, x, dense):
    """X with the linear map of the dense vector as its last row."""
    row = dense @ state["dense_row.weight"].T + state["dense_row.bias"]
    return torch.stack([torch.cat([x[b], row[b : b + 1]]) for b in range(len(x))])


def cross(state, prefix, x0, count):
    """DCN-V2: x <- x0 * (W x + b) + x."""
    x = x0
    for i in range(count):
        if f"{prefix}{i}.weight" in state:
            weight, bias = state[f"{prefix}{i}.weight"], state[f"{prefix}{i}.bias"]
        else:
            weight = state[f"{prefix}{i}.1.weight"] @ state[f"{prefix}{i}.0.weight"]
            bias = state[f"{prefix}{i}.1.bias"]
        x = x0 * (x @ weight.T + bias) + x
    return x


def linear(s, x, dense, options):
    u = torch.einsum("lm,bmd->bld", s["mix.weight"], x)
    return u + s["mix.bias"] if options.get("bias") else u


def deep_cross(s, x, dense, options):
    """As printed: for one example the paper's X is D x M, u = (X X^T) W + b is D x L."""
    columns = []
    for example in x:
        paper_x = example.T
        columns.append((paper_x @ paper_x.T @ s["weight"] + s["bias"]).T)
    return torch.stack(columns)


def deep_cross_flattened(s, x, dense, options):
    crossed = cross(s, "cross.layers.", x.reshape(len(x), -1), options.get("num_cross_layers", 1))
    return torch.einsum("lm,bmd->bld", s["mix.weight"], crossed.reshape(x.shape))


def self_attention(s, x, dense, options):
    """torch's own encoder layer with the same weights, then W."""
    heads, inner = options.get("num_heads", 1), options.get("feedforward_dim", 4 * D)
    layer = torch.nn.TransformerEncoderLayer(
        D, heads, inner, dropout=0.0, activation=options.get("activation", "relu"),
        norm_first=options.get("norm_first", False), batch_first=True, dtype=torch.float64,
    )  # fmt: skip
    names = {
        "self_attn.in_proj_": "attention.query_key_value.",
        "self_attn.out_proj.": "attention.output.",
        "linear1.": "feedforward.0.",
        "linear2.": "feedforward.3.",
        "norm1.": "attention_norm.",
        "norm2.": "feedforward_norm.",
    }
    layer.load_state_dict({a + end: s[b + end] for a, b in names.items() for end in ("weight", "bias")})
    return torch.einsum("lm,bmd->bld", s["mix.weight"], layer(x))


def convolution(s, x, dense, options):
    """Each pixel by the definition of a convolution with zero padding. Channels are stacked along the rows."""
    kernel, bias = s["convolution.weight"], s["convolution.bias"]
    channels, _, height, width = kernel.shape
    top, left = (height - 1) // 2, (width - 1) // 2
    rows = x.shape[1]
    image = torch.zeros(len(x), channels, rows, D, dtype=torch.float64)
    for c in range(channels):
        for i in range(rows):
            for j in range(D):
                for p in range(height):
                    for q in range(width):
                        if 0 <= i + p - top < rows and 0 <= j + q - left < D:
                            image[:, c, i, j] += kernel[c, 0, p, q] * x[:, i + p - top, j + q - left]
        image[:, c] += bias[c]
    image = image.relu() if options.get("activation") == "relu" else image
    return torch.einsum("lm,bmd->bld", s["mix.weight"], image.reshape(len(x), channels * rows, D))


def layer_norm(x, weight, bias):
    centred = x - x.mean(1, keepdim=True)
    return centred / (centred.pow(2).mean(1, keepdim=True) + 1e-5).sqrt() * weight + bias


def advanced_dlrm(s, x, dense, options):
    if "compress_to" in options:
        a = torch.ones(len(x), M, dtype=torch.float64)
        if options.get("example_weights"):
            a = 2 * torch.sigmoid(torch.einsum("bmd,md->bm", x, s["dots.gate"]) + s["dots.gate_bias"])
        weights = s["dots.weight"].expand(len(x), -1, -1)
        if "weights_mlp" in options:
            weights = weights + run_mlp(s, "dots.mlp.", x.reshape(len(x), -1), F.relu).reshape(weights.shape)
        dots = torch.einsum("bmd,bnd,bn,bnk->bmk", x, x, a, weights).reshape(len(x), -1)
    else:
        dots = torch.stack([(x[:, i] * x[:, j]).sum(1) for i in range(M) for j in range(i + 1, M)], dim=1)
    if options.get("normalize"):
        dots = layer_norm(dots, s["norm.weight"], s["norm.bias"])
    if options.get("swish_layer_norm"):
        dots = dots * torch.sigmoid(layer_norm(dots, s["swish.0.weight"], s["swish.0.bias"]))
    v = torch.cat([dots, dense], dim=1) if options.get("use_dense") else dots
    v = cross(s, "cross.layers.", v, options.get("num_cross_layers", 0))
    act = torch.tanh if options.get("activation") == "tanh" else F.relu
    u = run_mlp(s, "over_arch.", v, act)
    if options.get("dense_output"):
        u = torch.cat([dense @ s["dense_output.0.weight"].T + s["dense_output.0.bias"], u], dim=1)
    return u.reshape(len(x), L, D)


def factorization_machine(s, x, dense, options):
    return advanced_dlrm(s, x, dense, options | {"normalize": True})


def multiplicative(s, x, dense, options):
    """x <- x * sum over r of act(W_r x + b_r) + x, one row r and one layer at a time."""
    act, v = torch.tanh if options.get("activation") == "tanh" else F.relu, x.reshape(len(x), -1)
    for i in range(options.get("num_layers", 1)):
        weights = s[f"layers.{i}.linear.weight"].split(v.shape[1])
        biases = s[f"layers.{i}.linear.bias"].split(v.shape[1])
        assert len(weights) == options.get("num_rows", 2)
        v = v * sum(act(v @ w.T + b) for w, b in zip(weights, biases, strict=True)) + v
    return torch.einsum("lm,bmd->bld", s["mix.weight"], v.reshape(x.shape))


FORMULAS = {
    f.__name__: f
    for f in (
        linear, deep_cross, deep_cross_flattened, self_attention, convolution, advanced_dlrm, factorization_machine,
        multiplicative,
    )
}  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_interaction_equals_its_formula(kind, options):
    torch.manual_seed(len(kind) + len(options))
    module = make(kind, options)
    x, dense = inputs()
    s = state(module)
    rows = with_row(s, x, dense) if "dense_row.weight" in s else x
    torch.testing.assert_close(module(x, dense), FORMULAS[kind](s, rows, dense, options), **TOLERANCE)


def test_every_registered_kind_has_a_formula_here():
    ours = {kind for kind in interaction_kinds() if not kind.startswith("users_")}
    assert ours == set(FORMULAS) == {kind for kind, _ in CASES}


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_gradients_are_those_of_finite_differences(kind, options):
    torch.manual_seed(1)
    module = make(kind, options, num_inputs=3, num_outputs=2, embedding_dim=6)
    parameters = tuple(module.parameters())
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    dense = torch.randn(2, N, dtype=torch.float64, requires_grad=True)
    keys = [key for key, _ in module.named_parameters()]

    def call(x, dense, *values):
        return torch.func.functional_call(module, dict(zip(keys, values, strict=True)), (x, dense))

    # fast_mode: one random projection of the Jacobian instead of one column per parameter.
    assert torch.autograd.gradcheck(call, (x, dense, *parameters), fast_mode=True)


@pytest.mark.parametrize(("kind", "options"), CASES)
@pytest.mark.parametrize("batch_size", [0, 1])
def test_empty_and_single_batches_have_shapes_and_gradients(kind, options, batch_size):
    module = make(kind, options, batch_norm=True).train()
    x, dense = inputs(batch_size)
    u = module(x.requires_grad_(), dense)
    u.sum().backward()
    assert u.shape == (batch_size, L, D)
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_rows_of_a_batch_do_not_meet(kind, options):
    module = make(kind, options)
    x, dense = inputs()
    torch.testing.assert_close(module(x, dense)[1:2], module(x[1:2], dense[1:2]), **TOLERANCE)


# Negative controls: the tests above would catch these mistakes.


def test_a_transposed_weight_is_caught():
    torch.manual_seed(0)
    module = make("deep_cross", {}, num_outputs=D)  # L = D, so that the shapes fit either way
    x, dense = inputs()
    s = state(module)
    right = deep_cross(s, x, dense, {})
    wrong = deep_cross(s | {"weight": s["weight"].T}, x, dense, {})
    torch.testing.assert_close(module(x, dense), right, **TOLERANCE)
    assert (module(x, dense) - wrong).abs().max() > 1e-3


def test_the_lower_triangle_in_another_order_is_caught():
    torch.manual_seed(0)
    module = make("advanced_dlrm", {})
    x, dense = inputs()
    shuffled = x.flip(1)
    assert (module(x, dense) - advanced_dlrm(state(module), shuffled, dense, {})).abs().max() > 1e-3


def test_each_row_of_a_quadratic_layer_is_normalized_before_its_activation():
    torch.manual_seed(0)
    module = make("multiplicative", {"num_rows": 3, "batch_norm": True}).train()
    x, dense = inputs()
    s, v = state(module), x.reshape(B, -1)
    h = v @ s["layers.0.linear.weight"].T
    h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt()
    h = (h * s["layers.0.norm.weight"] + s["layers.0.norm.bias"]).relu().reshape(B, 3, -1)
    expected = torch.einsum("lm,bmd->bld", s["mix.weight"], (v * h.sum(1) + v).reshape(x.shape))
    torch.testing.assert_close(module(x, dense), expected, **TOLERANCE)


def test_the_weights_of_each_example_start_as_the_compression_weight():
    torch.manual_seed(0)
    options = {"compress_to": 2, "weights_mlp": [4]}
    dots = build_interaction(InteractionSpec("advanced_dlrm", L, options), InteractionContext(M, L, D)).double().dots
    x, _ = inputs()
    expected = torch.einsum("bmd,bnd,nk->bmk", x, x, dots.weight).reshape(B, -1)
    torch.testing.assert_close(dots(x), expected, **TOLERANCE)
    torch.nn.init.ones_(dots.mlp[-1].bias)
    assert (dots(x) - expected).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["self_attention", "multiplicative"])
def test_dropout_acts_in_training_only(kind):
    torch.manual_seed(0)
    module = make(kind, {"dropout": 0.5})
    x, dense = inputs()
    assert torch.equal(module.eval()(x, dense), module(x, dense))
    assert not torch.equal(module.train()(x, dense), module(x, dense))


@pytest.mark.parametrize("kind", sorted(FORMULAS))
def test_bfloat16_is_near_float32(kind):
    torch.manual_seed(0)
    context = InteractionContext(M, L, D, N)
    module = build_interaction(InteractionSpec(kind, L), context)
    x, dense = (tensor.float() for tensor in inputs())
    exact = module(x, dense)
    rough = module.to(torch.bfloat16)(x.bfloat16(), dense.bfloat16())
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, rtol=0.1, atol=0.1)
