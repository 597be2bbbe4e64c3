"""Activation checkpointing changes memory, never a loss: bit-equal under every ZeRO stage, with dropout too."""

import pytest
import torch

from dhen.dense.activation_checkpointing import checkpoint_layers
from dhen.model.configuration_dhen import DhenConfig
from dhen.model.modeling_dhen import DhenForClickPrediction
from dhen.runtime.topology import Topology
from tests.plain import CONFIG
from tests.ranks import run_ranks
from tests.tiny_training import train

STEPS = 6  # two runs that are equal to the bit so far stay equal
STAGES = ["zero0", "zero1", "zero2", "zero3", "zero3_offload", "zero2_bf16", "zero3_bf16"]


def train_both(topology: Topology) -> dict[str, list[list[float]]]:
    return {
        name: [
            train(topology, name, accumulation, dhen={"activation_checkpointing": layers}, steps=STEPS)[0]
            for layers in ("none", 1, "all", ["advanced_dlrm"])
        ]
        for name, accumulation in [(stage, 1) for stage in STAGES] + [("zero3", 2)]
    }


def test_checkpointing_gives_bit_equal_losses():
    for name, (none, *others) in run_ranks(2, train_both)[0].items():
        assert all(other == none for other in others), name


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


def test_more_layers_than_there_are_is_refused():
    model = DhenForClickPrediction(DhenConfig(**CONFIG), with_tables=False)
    with pytest.raises(ValueError, match="9, but the model has 2 layers"):
        checkpoint_layers(model, 9)
    with pytest.raises(ValueError, match="unknown interaction of this model: 'linea'"):
        checkpoint_layers(model, ["linea"])
