"""Fine-tuning on other features: the layers keep what belongs to a feature, whatever place it has now."""

import pytest
import torch
from torch import Tensor

from dhen.model.configuration_dhen import DhenConfig
from dhen.model.interactions import Interaction, interaction_kinds, register_interaction
from dhen.model.modeling_dhen import DhenForClickPrediction
from dhen.training.saved.fine_tuning import _shaped_by_features, match_dense_weights

DIM = 4
EXACT = (
    "linear", {"kind": "linear", "use_dense": True, "bias": True}, "advanced_dlrm",
    {"kind": "advanced_dlrm", "use_dense": True, "num_cross_layers": 2, "batch_norm": True},
    {"kind": "advanced_dlrm", "compress_to": 3, "example_weights": True},
    {"kind": "advanced_dlrm", "compress_to": 3, "weights_mlp": [5], "dense_output": True, "use_dense": True},
    {"kind": "advanced_dlrm", "compress_to": 3, "weights_mlp": []},
    {"kind": "advanced_dlrm", "num_experts": 3, "noisy_gate": True, "use_dense": True},
    {"kind": "multiplicative", "num_layers": 2, "batch_norm": True, "use_dense": True},
    "deep_cross_flattened", {"kind": "deep_cross_flattened", "cross_width": 3, "num_cross_layers": 2},
)  # fmt: skip
"""Interactions in which a zero weight takes a feature's influence away entirely."""
OTHERS = (
    {"kind": "self_attention", "use_dense": True}, {"kind": "convolution", "num_channels": 2}, "deep_cross",
    {"kind": "factorization_machine", "use_dense": True}, {"kind": "convolution", "use_dense": True},
    {"kind": "advanced_dlrm", "normalize": True, "swish_layer_norm": True},
)  # fmt: skip


class Model:
    """A dense part with random weights, and its features."""

    def __init__(self, sparse: tuple[str, ...], dense: tuple[str, ...], **options: object) -> None:
        tables = [{"name": name, "num_embeddings": 2} for name in sparse]
        options = {"embedding_dim": DIM, "num_layers": 2, "num_embeddings_out": 5, "dense_mlp": [5], **options}
        self.config = DhenConfig(sparse_features=tables, num_dense_features=len(dense), **options)
        self.names = (sparse, dense)
        self.module = DhenForClickPrediction(self.config, with_tables=False).eval()
        for name, weight in self.module.state_dict().items():
            if weight.is_floating_point():
                weight.copy_(torch.rand_like(weight) + 0.5 if "running_var" in name else 0.3 * torch.randn_like(weight))

    def start_from(self, old: "Model") -> set[str]:
        """Take the old model's weights. Returns the names of those that could not be taken."""
        kept = match_dense_weights(old.module.state_dict(), old.config, old.names, self.config, self.names)
        result = self.module.load_state_dict(kept, strict=False)
        return set(result.missing_keys)

    def logits(self, embeddings: dict[str, Tensor], dense: dict[str, Tensor]) -> Tensor:
        x_BFD = torch.stack([embeddings[name] for name in self.names[0]], dim=1)
        dense_BN = torch.stack([dense[name] for name in self.names[1]], dim=1)
        with torch.no_grad():
            return self.module(inputs_embeds=x_BFD, dense=dense_BN).logits


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(3)


def values() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return {name: torch.randn(6, DIM) for name in "abcdef"}, {name: torch.randn(6) for name in "xyz"}


@pytest.mark.parametrize(
    "norm", [("post", "layer_norm", "none"), ("pre", "batch_norm", "hard"), ("inner", "rms_norm", "soft")]
)
@pytest.mark.parametrize("interaction", EXACT, ids=str)
def test_a_new_feature_changes_no_prediction_at_first(interaction, norm):
    # The old model has 4 embeddings in and 4 out, so its shortcut has no weights; the new one's has.
    options = {"interactions": [interaction], "num_embeddings_out": 4}
    options |= dict(zip(("norm_position", "norm", "gate"), norm, strict=True))
    old = Model(("a", "b", "c"), ("x", "y"), **options)
    new = Model(("c", "e", "a", "f", "b"), ("z", "y", "x"), **options)
    assert new.start_from(old) == set()
    embeddings, dense = values()
    torch.testing.assert_close(new.logits(embeddings, dense), old.logits(embeddings, dense), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("interaction", EXACT, ids=str)
def test_a_feature_that_is_gone_counts_as_zero(interaction):
    old = Model(("a", "b", "c"), ("x", "y"), interactions=[interaction])
    new = Model(("c", "a"), ("y",), interactions=[interaction])
    assert new.start_from(old) == set()
    embeddings, dense = values()
    without = embeddings | {"b": torch.zeros(6, DIM)}, dense | {"x": torch.zeros(6)}
    torch.testing.assert_close(new.logits(embeddings, dense), old.logits(*without), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("interaction", [*EXACT, *OTHERS], ids=str)
def test_another_order_of_features_changes_nothing(interaction):
    old = Model(("a", "b", "c"), ("x", "y"), interactions=[interaction])
    new = Model(("b", "c", "a"), ("y", "x"), interactions=[interaction])
    assert new.start_from(old) == set()
    embeddings, dense = values()
    if "convolution" not in str(interaction):  # its kernel sees neighbours
        torch.testing.assert_close(new.logits(embeddings, dense), old.logits(embeddings, dense), rtol=1e-4, atol=1e-4)
    assert set(interaction_kinds()) >= {str(i) if isinstance(i, str) else i["kind"] for i in [*EXACT, *OTHERS]}


@pytest.mark.parametrize("interaction", [*EXACT, *OTHERS], ids=str)
@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_every_weight_that_depends_on_the_features_says_how(interaction, norm_position):
    model = Model(
        ("a", "b", "c"),
        ("x", "y"),
        interactions=[interaction],
        norm="batch_norm",
        norm_position=norm_position,
        gate="soft",
    )
    described = model.module.input_axes(*model.names)
    assert _shaped_by_features(model.config) <= described.keys()
    state = model.module.state_dict()
    for name, axes in described.items():
        if name in state:
            assert {axis: len(labels) for axis, labels in axes.items()} == {
                axis: state[name].shape[axis] for axis in axes
            }


@pytest.mark.parametrize("features", ["ceafb", "bac"])
@pytest.mark.parametrize("experts", [{"experts": "interactions", "ensemble": "sum"}, {"experts": "ensembles"}], ids=str)
def test_the_experts_of_a_layer_and_their_router_keep_what_belongs_to_a_feature(experts, features):
    options = {"interactions": ["linear", "advanced_dlrm", "deep_cross_flattened"], "num_embeddings_out": 5} | experts
    old, new = Model(("a", "b", "c"), ("x", "y"), **options), Model(tuple(features), ("z", "y", "x"), **options)
    assert new.start_from(old) == set()
    embeddings, dense = values()
    torch.testing.assert_close(new.logits(embeddings, dense), old.logits(embeddings, dense), rtol=1e-4, atol=1e-4)
    described = new.module.input_axes(*new.names)
    assert _shaped_by_features(new.config) <= described.keys()
    del described["model.layers.0.mixture.gate.linear.weight"]
    assert not _shaped_by_features(new.config) <= described.keys()


@pytest.mark.parametrize("task_layers", [0, 2])
@pytest.mark.parametrize(("features", "size"), [("ceab", 4), ("bca", 5), ("ac", 5)])
def test_a_head_that_reads_all_layers_keeps_what_it_knows_of_a_feature(features, size, task_layers):
    interaction = {"kind": "linear", "use_dense": True}
    options = {"interactions": [interaction], "head_inputs": "all", "num_embeddings_out": size}
    options |= {"task_layers": task_layers}
    old = Model(("a", "b", "c"), ("x", "y"), **options)
    new = Model(tuple(features), ("y", "x"), **options)
    assert new.start_from(old) == set()
    embeddings, dense = values()
    if "b" not in features:
        embeddings["b"] = torch.zeros(6, DIM)
    torch.testing.assert_close(new.logits(embeddings, dense), old.logits(embeddings, dense), rtol=1e-4, atol=1e-4)


def test_the_heads_and_trained_weights_of_tasks_are_matched_by_name():
    old_config, config = (
        DhenConfig(num_dense_features=2, interactions=["linear"], tasks=tasks, task_weights="uncertainty")
        for tasks in (["buy", "stay"], ["like", "buy"])
    )
    old = DhenForClickPrediction(old_config)
    old.tasks.log_variance.data = torch.tensor([1.0, 2.0, 3.0])
    names = ((), ("x", "y"))
    kept = match_dense_weights(old.state_dict(), old_config, names, config, names)
    assert kept["tasks.log_variance"].tolist() == [1.0, 0.0, 2.0]
    assert torch.equal(kept["tasks.heads.buy.0.weight"], old.state_dict()["tasks.heads.buy.0.weight"])
    assert not any("like" in name for name in kept)


def test_a_users_interaction_that_does_not_say_how_starts_anew_on_other_features():
    @register_interaction("users_undescribed")
    class Undescribed(Interaction):
        def __init__(self, context, *, use_dense: bool = False):
            super().__init__(context, use_dense=use_dense)
            self.weight = torch.nn.Parameter(torch.zeros(context.num_outputs, context.num_inputs))

        def forward(self, x_BMD, dense_BN):
            return self.weight @ x_BMD

    old = Model(("a", "b", "c"), ("x",), interactions=["users_undescribed"])
    same = Model(("a", "b", "c"), ("x",), interactions=["users_undescribed"])
    assert same.start_from(old) == set()
    swapped = Model(("a", "b", "d"), ("x",), interactions=["users_undescribed"])
    assert swapped.start_from(old) == {"model.layers.0.interactions.0.weight"}
