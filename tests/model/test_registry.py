"""Users add interactions as decorated classes in their own files. Mistakes raise an error that says what to do."""

import re

import pytest
import torch

from dhen.model.configuration_dhen import DhenConfig
from dhen.model.interactions import Interaction, interaction_options, register_interaction
from dhen.model.modeling_dhen import DhenModel
from tests.model import users_interaction


def test_a_users_interaction_trains_in_a_layer_of_its_own_options():
    entry = {"kind": "users_product", "scale": 2, "use_dense": True, "num_embeddings": 4}
    config = DhenConfig(num_dense_features=3, interactions=[entry, "linear"], num_layers=1, embedding_dim=8)
    model = DhenModel(config)
    interaction = model.layers[0].interactions[0]
    assert isinstance(interaction, users_interaction.UsersProduct)
    assert interaction.scale == 2
    model(torch.empty(2, 0, 8), torch.randn(2, 3)).last_hidden_state.square().sum().backward()
    assert interaction.weight.grad.abs().sum() > 0


def test_the_factorization_machine_has_the_options_of_advanced_dlrm_with_two_other_defaults():
    machine, dlrm = interaction_options("factorization_machine"), interaction_options("advanced_dlrm")
    assert set(machine) == set(dlrm)
    assert {name for name in machine if machine[name].default != dlrm[name].default} == {"compress_to", "normalize"}


def test_zero_init_asks_a_users_interaction_to_say_that_it_can():
    entry = {"kind": "users_product", "num_embeddings": 4}
    config = DhenConfig(num_dense_features=3, interactions=[entry], interaction_init="zero")
    with pytest.raises(ValueError, match=r"'users_product': interaction_init is 'zero'.*zero_init=context.zero_init"):
        DhenModel(config)


@pytest.mark.parametrize("kind", ["linear", "wukong"])
def test_a_taken_name_is_refused(kind):
    with pytest.raises(ValueError, match=f"{kind!r} is already taken"):

        @register_interaction(kind)
        class Other(Interaction):
            pass


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("liner", "unknown interaction kind 'liner'. Did you mean 'linear'?"),
        ({"kind": "advanced_dlrm", "over_arc": [4]}, "'advanced_dlrm': 'over_arc'. Did you mean 'over_arch'?"),
        ({"kind": "advanced_dlrm", "over_arch": "64"}, "over_arch is '64'. 'str' instances are not allowed"),
        ({"kind": "advanced_dlrm", "normalize": "false"}, "normalize is 'false'. Use a valid boolean"),
        ({"kind": "linear", "num_embeddings": 0}, "num_embeddings is 0"),
        ({"kind": "linear", "num_embeddings": "8"}, "num_embeddings is '8'. Use a valid integer"),
        ({"name": "linear"}, "an object with 'kind'"),
        ({"kind": "advanced_dlrm", "compress_to": 0}, "compress_to is 0"),
        ({"kind": "deep_cross_flattened", "num_cross_layers": 0}, "num_cross_layers is 0"),
        ({"kind": "wukong", "bias": True}, "preset 'wukong' takes no options"),
    ],
)
def test_a_wrong_entry_is_named_when_the_config_is_made(entry, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DhenConfig(num_dense_features=2, interactions=["linear", entry])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kind": "linear", "use_dense": True}, "use_dense is true, but num_dense_features is 0"),
        ({"kind": "self_attention", "num_heads": 3}, "num_heads is 3. Use a divisor of embedding_dim, 8"),
        (
            {"kind": "advanced_dlrm", "example_weights": True},
            "example_weights has no effect because compress_to is not set",
        ),
        ({"kind": "advanced_dlrm", "weights_mlp": [4]}, "weights_mlp has no effect because compress_to is not set"),
        ({"kind": "advanced_dlrm", "dense_output": True}, "num_dense_features is 0, num_embeddings 16"),
        ({"kind": "multiplicative", "activation": "identity"}, "num_rows has no effect with activation 'identity'"),
        ({"kind": "advanced_dlrm", "cross_width": 4}, "cross_width has no effect because num_cross_layers is 0"),
        ({"kind": "convolution", "kernel_size": [3]}, "kernel_size is [3]"),
        ({"kind": "convolution", "kernel_size": [2, 3]}, "kernel_size is [2, 3]. Use two odd numbers"),
    ],
)
def test_options_that_do_not_fit_are_named_when_the_model_is_built(entry, message):
    features = [{"name": name, "num_embeddings": 5} for name in "ab"]
    config = DhenConfig(sparse_features=features, interactions=[entry], embedding_dim=8)
    where = f"layer 0: interaction {entry['kind']!r}: "
    with pytest.raises(ValueError, match=re.escape(where) + ".*" + re.escape(message)):
        DhenModel(config)


def test_one_embedding_has_no_pairs():
    with pytest.raises(ValueError, match="no pairs"):
        DhenModel(DhenConfig(num_dense_features=2, interactions=["advanced_dlrm"]))
