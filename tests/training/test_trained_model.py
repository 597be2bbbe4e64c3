"""Exported models of earlier versions score as they did."""

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dhen.model.configuration_dhen import DhenConfig
from dhen.model.interactions import Interaction, InteractionContext, register_interaction
from dhen.model.modeling_dhen import DhenForClickPrediction
from dhen.training.saved.trained_model import TrainedModel
from tests.plain import CONFIG


def test_a_bias_before_batch_norm_moves_into_the_mean(tmp_path):
    model = DhenForClickPrediction(DhenConfig(**CONFIG, batch_norm=True))
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    saved = load_file(path)
    norms = [name for name in saved if name.endswith(".1.running_mean")]
    assert len(norms) == 3  # two over arches and the head
    for name in norms:
        bias = torch.randn_like(saved[name])
        saved[name] = saved[name] + bias
        saved[name.replace("1.running_mean", "0.bias")] = bias
    save_file(saved, path, metadata={"format": "pt"})
    weights = TrainedModel.open(tmp_path).dense_weights()
    expected = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("tables.")}
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-6, rtol=0)


def test_a_users_interaction_keeps_its_bias_before_batch_norm(tmp_path):
    @register_interaction("normalized")
    class Normalized(Interaction):
        def __init__(self, context: InteractionContext) -> None:
            super().__init__(context)
            size = context.embedding_dim
            self.layers = nn.Sequential(nn.Linear(context.num_inputs * size, size), nn.BatchNorm1d(size))

        def forward(self, x_BMD: Tensor, dense_BN: Tensor) -> Tensor:
            return self.layers(x_BMD.flatten(1)).unsqueeze(1).expand(-1, self.context.num_outputs, -1)

    model = DhenForClickPrediction(DhenConfig(**CONFIG | {"interactions": ["normalized"]}))
    model.save_pretrained(tmp_path)
    weights = TrainedModel.open(tmp_path).dense_weights()
    loaded = DhenForClickPrediction(model.config, with_tables=False)
    loaded.load_state_dict(weights)
    biases = [name for name in weights if name.endswith("interactions.0.layers.0.bias")]
    assert len(biases) == 2
    for name in biases:
        assert torch.equal(loaded.state_dict()[name], model.state_dict()[name])
