"""Mixtures of experts in layers train like plain torch on every path: what the router chooses stops no rank."""

import pytest

from tests.plain import global_batches, plain_losses
from tests.ranks import run_ranks
from tests.tiny_training import GLOBAL_BATCH, OF_LAYERS, difference, losses_of_set_ups

STEPS, RANKS = 5, 4
SET_UPS = OF_LAYERS | {
    "zero3, one kind recomputed": {"dhen": {"activation_checkpointing": ["advanced_dlrm"]}},
    "hsdp": {},
}
LOSSES = {"balance_loss": 1.0, "z_loss": 0.3}
ARCHITECTURES = {  # 4 or 8 rows per rank and micro step: many experts have none
    "interactions": LOSSES
    | {
        "experts": "interactions",
        "ensemble": "weighted_sum",
        "interactions": ["linear", "advanced_dlrm", "self_attention", "deep_cross_flattened", "convolution"],
        "experts_per_example": 1,
    },
    "ensembles": LOSSES | {"experts": "ensembles", "num_experts": 6, "capacity_factor": 1.0},
}


@pytest.mark.parametrize("kind", ["interactions", "ensembles"])
def test_every_path_trains_like_plain_torch_with_the_losses_once(kind):
    """4 ranks on 2 nodes, tolerance 1e-5; with the losses twice or never, it differs by 1e-3 and more."""
    architecture = ARCHITECTURES[kind]
    of_ranks = run_ranks(RANKS, losses_of_set_ups, SET_UPS, architecture, STEPS, local_size=2)
    batches = global_batches(STEPS, GLOBAL_BATCH)
    for name, more in SET_UPS.items():
        settings = {"architecture": architecture, "num_ranks": RANKS}
        order = more.get("accumulation", 1), 0.0, more.get("optimizer", "AdamW")
        expected, _ = plain_losses(batches, *order, **settings)
        assert difference(of_ranks[0][name], expected) < 1e-5, name
        for wrong in (0.0, 2.0):
            assert difference(plain_losses(batches, *order, auxiliary=wrong, **settings)[0], expected) > 1e-3, name
