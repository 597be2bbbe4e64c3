"""The complete model: outputs, loss, saving, loading, and edge cases (no rows, no dense or sparse features)."""

import json
import re

import pytest
import torch
from transformers import AutoModel

from dhen.model.configuration_dhen import DhenConfig
from dhen.model.features import PlainTables, SparseIds
from dhen.model.modeling_dhen import DhenForClickPrediction, DhenModel, DhenOutput

FEATURES = [{"name": "site", "num_embeddings": 10}, {"name": "words", "num_embeddings": 7, "pooling": "mean"}]
ALL_KINDS = [
    "linear",
    "deep_cross",
    {"kind": "deep_cross_flattened", "cross_width": 3},
    "self_attention",
    "convolution",
    "advanced_dlrm",
    {"kind": "advanced_dlrm", "compress_to": 2, "example_weights": True, "num_cross_layers": 1},
    {"kind": "advanced_dlrm", "compress_to": 2, "weights_mlp": [4], "swish_layer_norm": True},
    {"kind": "advanced_dlrm", "num_experts": 3, "balance_loss": 0.0, "batch_norm": False},
    "multiplicative",
    "wukong",
]
B, N, D = 5, 3, 8


def make_config(**settings):
    defaults = {
        "num_dense_features": N,
        "sparse_features": FEATURES,
        "embedding_dim": D,
        "num_layers": 2,
        "interactions": ALL_KINDS,
        "num_embeddings_out": 3,
        "batch_norm": True,
    }
    return DhenConfig(**defaults | settings)


def make_model(seed=0, **settings):
    torch.manual_seed(seed)
    return DhenForClickPrediction(make_config(**settings))


def make_batch(batch_size=B):
    lengths_FB = torch.stack([torch.ones(batch_size, dtype=torch.int64), torch.arange(batch_size) % 3])
    ids = torch.randint(0, 7, (int(lengths_FB.sum()),))
    return SparseIds(ids, 2, lengths_FB), torch.randn(batch_size, N), torch.arange(batch_size).remainder(2).float()


def trained(model, steps=3):
    """Train a few steps, so that no weight or running statistic keeps its initial value."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        sparse, dense, labels = make_batch()
        optimizer.zero_grad()
        model(sparse, dense, labels).loss.backward()
        optimizer.step()
    return model.eval()


def test_loss_is_the_mean_binary_cross_entropy_of_the_logits():
    model, (sparse, dense, labels) = make_model(), make_batch()
    out = model(sparse, dense, labels)
    assert isinstance(out, DhenOutput)
    p = out.logits.double().sigmoid()
    by_hand = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    torch.testing.assert_close(out.loss.double(), by_hand, rtol=1e-6, atol=0)
    assert model(sparse, dense).loss is None


def test_every_parameter_gets_a_gradient():
    model, (sparse, dense, labels) = make_model(), make_batch()
    model(sparse, dense, labels).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []


def test_a_model_learns_a_batch_by_heart():
    model, (sparse, dense, labels) = make_model(batch_norm=False), make_batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(sparse, dense, labels).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.05


def test_the_same_seed_gives_the_same_weights():
    first, second, other = (make_model(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["head.0.weight"], other["head.0.weight"])
    assert not torch.equal(first["tables.site.weight"], other["tables.site.weight"])


def test_tables_start_by_the_seed_alone_and_dense_weights_do_not_hang_on_them():
    model = make_model(seed=7)
    assert torch.equal(model.tables.site.weight, PlainTables(model.config, seed=7).site.weight)
    torch.manual_seed(7)
    without = DhenForClickPrediction(model.config, with_tables=False)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in without.state_dict().items())
    explicit = DhenForClickPrediction(model.config, table_seed=9)
    assert torch.equal(explicit.tables.site.weight, PlainTables(model.config, seed=9).site.weight)


def test_looked_up_embeddings_may_be_passed_instead_of_ids():
    model, (sparse, dense, _) = make_model().eval(), make_batch()
    embeddings = model.tables(sparse)
    assert torch.equal(model(inputs_embeds=embeddings, dense=dense).logits, model(sparse, dense).logits)


@pytest.mark.parametrize("max_shard_size", ["5GB", "2KB"])
def test_a_saved_model_gives_the_same_logits_to_the_bit(tmp_path, max_shard_size):
    model, (sparse, dense, _) = trained(make_model()), make_batch()
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "2KB")
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, DhenForClickPrediction)
    assert not loaded.training
    assert torch.equal(loaded(sparse, dense).logits, model(sparse, dense).logits)
    buffers = dict(loaded.named_buffers())
    assert all(torch.equal(buffers[key], value) for key, value in model.named_buffers())


def test_a_model_without_tables_loads_from_a_whole_one_in_silence(tmp_path):
    model, (sparse, dense, _) = trained(make_model()), make_batch()
    model.save_pretrained(tmp_path)
    loaded, report = DhenForClickPrediction.from_pretrained(tmp_path, with_tables=False, output_loading_info=True)
    assert loaded.tables is None
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    embeddings = model.tables(sparse)
    assert torch.equal(loaded(inputs_embeds=embeddings, dense=dense).logits, model(sparse, dense).logits)


def test_weights_missing_from_a_file_are_initialised_and_the_rest_is_kept(tmp_path):
    """The sizes of the head and of one table differ. Everything else comes from the file."""
    model = trained(make_model())
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["head_mlp"] = [5]
    config["sparse_features"].append({"name": "new", "num_embeddings": 4})
    config["sparse_features"][0]["num_embeddings"] = 12
    path.write_text(json.dumps(config))
    torch.manual_seed(3)
    loaded, report = DhenForClickPrediction.from_pretrained(
        tmp_path, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert report["missing_keys"] == {"tables.new.weight"}
    fresh = PlainTables(loaded.config, seed=3)
    assert torch.equal(loaded.tables.new.weight, fresh.new.weight)
    assert torch.equal(loaded.tables.site.weight, fresh.site.weight)
    assert torch.equal(loaded.tables.words.weight, model.tables.words.weight)
    assert torch.equal(loaded.head[1].running_var, torch.ones(5))
    kept, old = dict(loaded.named_buffers()), dict(model.named_buffers())
    statistics = [key for key in old if key.endswith("running_mean") and key.startswith("model.layers.1")]
    assert statistics
    assert all(torch.equal(kept[key], old[key]) for key in statistics)
    embeddings = torch.randn(B, 3, D)
    assert torch.isfinite(loaded(inputs_embeds=embeddings, dense=torch.randn(B, N)).logits).all()


def test_building_on_the_meta_device_makes_no_numbers():
    with torch.device("meta"):
        model = make_model()
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("batch_size", [0, 1])
def test_batches_of_no_row_and_of_one_train(batch_size):
    model, (sparse, dense, labels) = make_model().train(), make_batch(batch_size)
    out = model(sparse, dense, labels)
    out.loss.backward()
    assert out.logits.shape == (batch_size,)
    assert batch_size or out.loss == 0
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_without_dense_features():
    model, (sparse, _, labels) = make_model(num_dense_features=0), make_batch()
    loss = model(sparse, labels=labels).loss
    assert torch.equal(model(sparse, torch.empty(B, 0), labels).loss, loss)
    loss.backward()


def test_without_sparse_features():
    model, (_, dense, labels) = make_model(sparse_features=[], num_dense_embeddings=2), make_batch()
    model(dense=dense, labels=labels).loss.backward()
    empty = SparseIds(torch.empty(0, dtype=torch.int64), 0)
    assert torch.equal(model.eval()(empty, dense).logits, model(dense=dense).logits)
    assert torch.equal(model(inputs_embeds=torch.empty(B, 0, D), dense=dense).logits, model(dense=dense).logits)


@pytest.mark.parametrize(
    "entry", [{"kind": "linear", "use_dense": True}, {"kind": "advanced_dlrm", "dense_output": True}]
)
def test_dense_features_may_enter_by_the_interactions_alone(entry):
    model, (sparse, dense, _) = make_model(interactions=[entry], num_dense_embeddings=0).eval(), make_batch()
    assert model.model.features.dense_mlp is None
    assert not torch.equal(model(sparse, dense).logits, model(sparse, dense + 1).logits)


@pytest.mark.parametrize("norm_position", ["post", "pre"])
def test_the_head_may_read_the_input_and_the_outputs_of_all_layers(norm_position):
    model = make_model(head_inputs="all", num_layers=3, norm_position=norm_position).eval()
    sparse, dense, _ = make_batch()
    x_BMD = model.model.features(model.tables(sparse), dense)
    states = [x_BMD]
    for layer in model.model.layers:
        states.append(layer(states[-1], dense))
    if norm_position == "pre":  # the norm after the last layer is for its output alone
        states[-1] = model.model.norm(states[-1])
    expected = model.head(torch.cat([state.flatten(1) for state in states], dim=1)).squeeze(1)
    torch.testing.assert_close(model(sparse, dense).logits, expected)


@pytest.mark.parametrize("kind", [*ALL_KINDS, {"kind": "advanced_dlrm", "dense_output": True}], ids=str)
def test_zero_init_starts_each_layer_as_its_shortcut(kind):
    settings = {"interactions": [kind], "norm": "none", "batch_norm": False}
    model = make_model(interaction_init="zero", **settings).model
    x, dense = torch.randn(B, 3, D), torch.randn(B, N)
    layer = model.layers[0]
    assert torch.equal(layer(x, dense), layer.shortcut(x))
    layer(x, dense).square().sum().backward()
    assert any(weight.grad.any() for weight in layer.interactions.parameters()), "it learns"
    assert not torch.equal(make_model(**settings).model.layers[0](x, dense), layer(x, dense))


def test_layers_may_differ():
    layers = [
        {"interactions": ["linear"], "num_embeddings_out": 5},
        {"interactions": ["self_attention", "deep_cross"], "ensemble": "sum", "norm": "rms_norm"},
        {"interactions": ["wukong"], "norm": "batch_norm", "norm_position": "inner"},
    ]
    model, (sparse, dense, labels) = make_model(layers=layers), make_batch()
    assert [layer.num_outputs for layer in model.model.layers] == [5, 3, 6]
    model(sparse, dense, labels).loss.backward()


def test_bfloat16_takes_float32_inputs_and_gives_float32_logits():
    model, (sparse, dense, labels) = make_model().eval(), make_batch()
    exact = model(sparse, dense).logits
    out = model.to(torch.bfloat16)(sparse, dense, labels)
    assert out.logits.dtype == out.loss.dtype == torch.float32
    torch.testing.assert_close(out.logits, exact, rtol=0.1, atol=0.1)


def test_float64_stays_float64():
    model, (sparse, dense, labels) = make_model().double(), make_batch()
    assert model(sparse, dense, labels).loss.dtype == torch.float64


def test_the_graph_compiles_whole():
    """aot_eager traces forward and backward like a compiled run, but does not generate machine code."""
    model, (sparse, dense, labels) = make_model(interactions=[*ALL_KINDS], batch_norm=False), make_batch()
    embeddings = model.tables(sparse).detach()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = model(inputs_embeds=embeddings, dense=dense, labels=labels)
    got = compiled(inputs_embeds=embeddings, dense=dense, labels=labels)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-6)
    got.loss.backward()
    assert model.head[0].weight.grad is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "pass sparse or inputs_embeds"),
        (
            {"inputs_embeds": torch.ones(B, 3, D), "dense": torch.ones(B, N)},
            "(5, 3, 8), but the model expects (batch, 2, 8)",
        ),
        (
            {"inputs_embeds": torch.ones(B, 2, D), "dense": torch.ones(B, 4)},
            "dense has shape (5, 4), but the model expects (batch, 3)",
        ),
        ({"inputs_embeds": torch.ones(B, 2, D)}, "dense has shape (5, 0)"),
    ],
)
def test_wrong_inputs_are_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_model()(**arguments)


def test_ids_without_tables_are_refused():
    sparse, dense, _ = make_batch()
    with pytest.raises(ValueError, match="without tables"):
        DhenForClickPrediction(make_config(), with_tables=False)(sparse, dense)
    with pytest.raises(ValueError, match="not both"):
        make_model()(sparse, dense, inputs_embeds=torch.ones(B, 2, D))


def test_a_model_of_no_features_is_refused():
    with pytest.raises(ValueError, match="the model has no input"):
        DhenModel(DhenConfig(interactions=["linear"]))
