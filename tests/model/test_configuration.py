"""DhenConfig rejects unknown keys, fills in defaults, and survives a round trip through its JSON file."""

import json
import re
from dataclasses import fields

import pytest
from transformers import AutoConfig, HfArgumentParser

from dhen.config.command_line import copy_for_parser
from dhen.model.configuration_dhen import DhenArchitecture, DhenConfig

FEATURES = [{"name": "site", "num_embeddings": 10}, {"name": "words", "num_embeddings": 7, "pooling": "mean"}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embeding_dim": 8}, "unknown DhenConfig field 'embeding_dim'. Did you mean 'embedding_dim'?"),
        ({"hidden_size": 8}, "unknown DhenConfig field 'hidden_size'"),
        ({"embedding_dim": "8"}, "embedding_dim is '8'. Use a valid integer."),
        ({"batch_norm": "false"}, "batch_norm is 'false'. Use a valid boolean."),
        ({"dense_mlp": [8.0]}, "dense_mlp.0 is 8.0. Use a valid integer."),
        ({"sparse_features": ["site"]}, "sparse_features.0 is 'site'. Use a valid dictionary"),
        ({"embedding_dim": 0}, "embedding_dim is 0. Use 1 or more."),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_dense_features": -1}, "num_dense_features is -1"),
        ({"dense_mlp": [8, 0]}, "dense_mlp.1 is 0. Use 1 or more"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"ensemble": "mean"}, "unknown ensemble 'mean'. Allowed: concat, sum, weighted_sum."),
        ({"norm": "layernorm"}, "unknown norm 'layernorm'. Did you mean 'layer_norm'?"),
        ({"activation": "relu6"}, "unknown activation 'relu6'. Did you mean 'relu'?"),
        ({"embedding_init_std": -0.1}, "embedding_init_std is -0.1"),
        ({"interactions": []}, "at least one interaction"),
        ({"interactions": '["linear"'}, "interactions is not valid JSON"),
        ({"layers": []}, "layers is empty"),
        ({"layers": ["linear"]}, "layers[0]: expected an object"),
        (
            {"layers": [{"interactions": ["linear"]}, {"ensembel": "sum"}]},
            "layers[1]: unknown layer key 'ensembel'. Did you mean",
        ),
        ({"layers": [{"dropout": "0.1"}]}, "layers[0]: dropout is '0.1'. Use a valid number."),
        ({"layers": [{"norm": "layernorm"}]}, "layers[0]: unknown norm 'layernorm'. Did you mean 'layer_norm'?"),
        (
            {"ensemble": "sum", "interactions": ["linear", {"kind": "linear", "num_embeddings": 3}]},
            "but their num_embeddings are [16, 3]",
        ),
        ({"num_dense_embeddings": 0}, "the 2 dense features would be ignored"),
        ({"sparse_features": [FEATURES[0], FEATURES[0]]}, "['site'] appear more than once"),
        ({"sparse_features": [{"name": "site"}]}, "has no 'num_embeddings'"),
        ({"sparse_features": [{"name": "site", "num_embedding": 3}]}, "Did you mean 'num_embeddings'?"),
        ({"sparse_features": [{"name": "site", "num_embeddings": 0}]}, "'site': num_embeddings is 0"),
        ({"sparse_features": [{"name": "site", "num_embeddings": 3, "pooling": "max"}]}, "pooling is 'max'"),
        ({"sparse_features": [{"name": "user.site", "num_embeddings": 3}]}, "'user.site': the name is not allowed"),
        ({"sparse_features": [{"name": "type", "num_embeddings": 3}]}, "'type': the name is not allowed"),
        ({"sparse_features": [{"name": "training", "num_embeddings": 3}]}, "'training': the name is not allowed"),
        ({"sparse_features": [{"name": "", "num_embeddings": 3}]}, "'': the name is not allowed"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DhenConfig(**({"num_dense_features": 2} | arguments))


def test_layers_override_the_defaults_one_by_one():
    config = DhenConfig(
        num_dense_features=1,
        dropout=0.1,
        layers=[
            {"interactions": ["linear"], "num_embeddings_out": 5},
            {"ensemble": "weighted_sum", "norm": "none", "dropout": 0, "batch_norm": True},
        ],
        interactions=["wukong", {"kind": "convolution", "num_embeddings": 16, "kernel_size": [3, 1]}],
    )
    first, second = config.layer_specs
    assert [(spec.kind, spec.num_embeddings) for spec in first.interactions] == [("linear", 5)]
    assert (first.ensemble, first.norm, first.dropout, first.batch_norm) == ("concat", "layer_norm", 0.1, False)
    assert [spec.kind for spec in second.interactions] == ["factorization_machine", "linear", "convolution"]
    assert second.interactions[2].options == {"kernel_size": [3, 1]}
    assert (second.ensemble, second.norm, second.dropout, second.batch_norm) == ("weighted_sum", "none", 0, True)


def test_a_whole_number_is_a_float_too():
    assert DhenConfig(num_dense_features=1, dropout=0, embedding_init_std=1).layer_specs[0].dropout == 0


def test_num_layers_repeats_the_interactions():
    assert len(set(map(repr, DhenConfig(num_dense_features=1, num_layers=4).layer_specs))) == 1
    assert len(DhenConfig(num_dense_features=1, num_layers=4).layer_specs) == 4


@pytest.mark.parametrize("text", ["linear, deep_cross", '["linear", {"kind": "deep_cross"}]'])
def test_interactions_may_be_text(text):
    config = DhenConfig(num_dense_features=1, interactions=text)
    assert [spec.kind for spec in config.layer_specs[0].interactions] == ["linear", "deep_cross"]


def test_a_config_comes_back_from_its_file(tmp_path):
    config = DhenConfig(
        num_dense_features=3,
        sparse_features=FEATURES,
        layers=[{"interactions": [{"kind": "linear", "bias": True}]}],
        embedding_init_std=0.01,
        id2label={0: "no click", 1: "click"},
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, DhenConfig)
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
    assert loaded.layer_specs == config.layer_specs
    assert loaded.tables == config.tables


def test_a_misspelled_key_in_a_file_is_refused_too(tmp_path):
    DhenConfig(num_dense_features=3).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layer": 5}))
    with pytest.raises(ValueError, match="Did you mean 'num_layers'"):
        DhenConfig.from_pretrained(tmp_path)


def test_transformers_own_arguments_pass():
    config = DhenConfig(num_dense_features=3, name_or_path="here", torch_dtype="bfloat16", num_labels=2)
    assert config.name_or_path == "here"
    assert str(config.dtype) == "torch.bfloat16"


def test_the_architecture_makes_a_command_line():
    parser = HfArgumentParser(copy_for_parser(DhenArchitecture, "model"))  # the parser overwrites the class's types
    (plain,) = parser.parse_args_into_dataclasses([])
    assert DhenArchitecture(**vars(plain)) == DhenArchitecture()
    words = [
        "--interactions",
        "linear,deep_cross",
        "--head_mlp",
        "8",
        "4",
        "--norm",
        "none",
        "--batch_norm",
        "--embedding_init_std",
        "0.1",
    ]
    (given,) = parser.parse_args_into_dataclasses([*words, "--layers", '[{"interactions": ["linear"]}]'])
    config = DhenConfig(num_dense_features=1, **vars(given))
    assert (config.head_mlp, config.norm, config.batch_norm, config.embedding_init_std) == ([8, 4], "none", True, 0.1)
    assert len(config.layer_specs) == 1
    assert all(item.metadata["help"] for item in fields(DhenArchitecture))
    # The parser rewrites the types of the dataclass it gets. The config's own must not change.
    assert DhenConfig(num_dense_features=1, interactions=["linear"]).interactions == ["linear"]


def test_configs_share_no_lists():
    first, second = DhenConfig(num_dense_features=1), DhenConfig(num_dense_features=1)
    first.head_mlp.append(3)
    first.interactions.append("linear")
    assert second.head_mlp == [64]
    assert "linear" in second.interactions
    assert len(second.interactions) == 2
