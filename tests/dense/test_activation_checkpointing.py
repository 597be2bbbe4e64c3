"""Activation checkpointing changes memory, no loss and no buffer: bit-equal under every ZeRO stage, with dropout."""

import functools

import pytest
import torch
from torch import nn

from dhen.dense import activation_checkpointing
from dhen.dense.activation_checkpointing import checkpoint_layers
from dhen.model.configuration_dhen import DhenConfig
from dhen.model.interactions import Interaction, InteractionContext, interaction_kinds, register_interaction
from dhen.model.modeling_dhen import DhenForClickPrediction
from dhen.runtime.topology import Topology
from tests.plain import CONFIG
from tests.ranks import run_ranks
from tests.tiny_training import train

STEPS = 6  # two runs that are equal to the bit so far stay equal
STAGES = ["zero0", "zero1", "zero2", "zero3", "zero3_offload", "zero2_bf16", "zero3_bf16"]


def train_both(topology: Topology) -> dict[str, list[tuple[list[float], dict[str, torch.Tensor]]]]:
    """Losses, and the weights and buffers that an export writes."""
    of_stages = [(stage, 1, {}) for stage in STAGES] + [("zero3", 2, {"norm": "batch_norm", "batch_norm": True})]
    return {
        f"{name}, {accumulation} micro steps": [
            (losses, model.dense_state_dict())
            for layers in ("none", 1, "all", ["advanced_dlrm"])
            for losses, model in [
                train(
                    topology,
                    name,
                    accumulation,
                    dhen={"activation_checkpointing": layers},
                    architecture=architecture,
                    steps=STEPS,
                )
            ]
        ]
        for name, accumulation, architecture in of_stages
    }


def test_checkpointing_gives_bit_equal_losses_weights_and_buffers():
    results = run_ranks(2, train_both)[0]
    assert "model.layers.0.norm.norm.running_var" in results["zero3, 2 micro steps"][0][1]
    for name, ((losses, state), *others) in results.items():
        for other_losses, other_state in others:
            assert other_losses == losses, name
            assert [key for key in state if not torch.equal(state[key], other_state[key])] == [], name


@pytest.mark.parametrize(
    ("layers", "count"),
    [("none", 0), (1, 1), (2, 2), ("all", 3), (["linear"], 3), (["linear", "advanced_dlrm"], 6)],
)
def test_so_many_layers_keep_their_inputs_alone(layers, count):
    config = DhenConfig(**CONFIG | {"num_layers": 3, "dropout": 0.5})
    torch.manual_seed(0)
    plain, model = (DhenForClickPrediction(config, with_tables=False) for _ in range(2))
    model.load_state_dict(plain.state_dict())
    assert checkpoint_layers(model, layers) == count
    gradients, saved = zip(*(run(each) for each in (plain, model)), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert (saved[1] < saved[0]) == (count > 0)


def run(model: DhenForClickPrediction) -> tuple[list[torch.Tensor], int]:
    """Gradients, and the number of elements that autograd keeps for the backward."""
    saved = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        saved += tensor.numel()
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = model(inputs_embeds=torch.randn(8, 5, 8), dense=torch.randn(8, 3)).logits.square().mean()
    loss.backward()
    return [parameter.grad for parameter in model.parameters()], saved


@register_interaction("users_running")
class Running(Interaction):
    """A user's own: torch's batch norm, and a buffer that changes the output and that torch does not save."""

    def __init__(self, context: InteractionContext) -> None:
        super().__init__(context)
        self.norm = nn.BatchNorm1d(context.num_inputs)
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def forward(self, x_BMD: torch.Tensor, dense_BN: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.scale = self.scale * 1.25
        return self.norm(x_BMD)[:, : self.context.num_outputs] * self.scale


RUNNING = {"batch_norm": True, "dropout": 0.2, "interactions": [*interaction_kinds()]}
NORMS = [("layer_norm", "post"), *(("batch_norm", position) for position in ("post", "pre", "inner"))]


def trained(config: DhenConfig, what: object, sizes: tuple[int, ...] = (8, 5, 1, 0)) -> dict[str, torch.Tensor]:
    """All that training changes, and the logits: the backward of all micro steps runs after the last, and after an
    evaluation."""
    torch.manual_seed(0)
    model = DhenForClickPrediction(config, with_tables=False)
    checkpoint_layers(model, what)
    torch.manual_seed(1)
    batches = [{"inputs_embeds": torch.randn(size, 5, 8), "dense": torch.randn(size, 3)} for size in sizes]
    losses = [model(**batch).logits.square().sum() for batch in batches]
    model.eval()
    with torch.no_grad():
        model(**batches[0])
    model.train()
    for loss in losses:
        loss.backward()
    result = {name: buffer.clone() for name, buffer in model.named_buffers()}
    result |= {f"grad {name}": parameter.grad for name, parameter in model.named_parameters()}
    return result | {"logits": model.eval()(**batches[0]).logits}


@functools.cache
def plain(norm: str, position: str) -> tuple[DhenConfig, dict[str, torch.Tensor]]:
    config = DhenConfig(**CONFIG | RUNNING | {"norm": norm, "norm_position": position})
    return config, trained(config, "none")


@pytest.mark.parametrize("what", ["all", 1, *([kind] for kind in RUNNING["interactions"])], ids=str)
@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_buffers_and_evaluations_are_bit_equal(norm, what):
    config, expected = plain(*norm)
    result = trained(config, what)
    assert result.keys() == expected.keys()
    assert [name for name in result if not torch.equal(result[name], expected[name])] == []


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_buffers_that_are_updated_again_would_show(norm, monkeypatch):
    config, expected = plain(*norm)
    monkeypatch.setattr(activation_checkpointing, "_replace", lambda *_: None)
    result = trained(config, "all")
    assert not torch.equal(result["logits"], expected["logits"])


def test_more_layers_than_there_are_is_refused():
    model = DhenForClickPrediction(DhenConfig(**CONFIG), with_tables=False)
    with pytest.raises(ValueError, match="9, but the model has 2 layers"):
        checkpoint_layers(model, 9)
    with pytest.raises(ValueError, match="unknown interaction of this model: 'linea'"):
        checkpoint_layers(model, ["linea"])
