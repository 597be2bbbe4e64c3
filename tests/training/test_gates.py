"""Gates of layers train like plain torch on every path: the loss of a hard gate counts once, and in training alone."""

import pytest
import torch

from dhen.model.gate import LayerGate
from dhen.runtime.topology import Topology
from tests.plain import global_batches, plain_losses
from tests.ranks import run_ranks
from tests.tiny_training import GLOBAL_BATCH, OF_LAYERS, difference, losses_of_set_ups

STEPS, RANKS = 5, 4
SET_UPS = OF_LAYERS


def use_random_gates() -> None:
    """Let gates start open for about half of the examples."""

    def reset_parameters(self: LayerGate) -> None:
        torch.nn.init.normal_(self.weight, std=70.0)
        torch.nn.init.constant_(self.bias, -512.0)

    LayerGate.reset_parameters = reset_parameters


def architecture(kind: str) -> dict[str, object]:
    return {"interactions": ["linear", "advanced_dlrm"], "gate": kind, "gate_sparsity": 2.0}


def losses_with_gates(topology: Topology, kind: str) -> dict[str, list[float]]:
    use_random_gates()
    return losses_of_set_ups(topology, SET_UPS, architecture(kind), STEPS)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_every_path_trains_like_plain_torch(kind, monkeypatch):
    """4 ranks on 2 nodes, tolerance 1e-5."""
    monkeypatch.setattr(LayerGate, "reset_parameters", LayerGate.reset_parameters)
    use_random_gates()
    of_ranks = run_ranks(RANKS, losses_with_gates, kind, local_size=2)
    for name, more in SET_UPS.items():
        accumulation, optimizer = more.get("accumulation", 1), more.get("optimizer", "AdamW")
        batches, settings = global_batches(STEPS, GLOBAL_BATCH), {"num_ranks": RANKS}
        expected, _ = plain_losses(
            batches, accumulation, 0.0, optimizer, architecture=architecture(kind), auxiliary=1.0, **settings
        )
        assert difference(of_ranks[0][name], expected) < 1e-5, name
        ungated, _ = plain_losses(batches, accumulation, 0.0, optimizer, architecture=architecture("none"), **settings)
        assert difference(ungated, expected) > 1e-3, name
