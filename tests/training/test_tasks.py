"""Several tasks train like plain torch on every path, with fixed and with trained weights."""

import pytest

from tests.plain import global_batches, plain_losses
from tests.ranks import run_ranks
from tests.tiny_training import GLOBAL_BATCH, difference, losses_of_set_ups

STEPS, RANKS = 5, 4
SET_UPS = {
    "zero0": {},
    "zero2, 2 micro steps": {"accumulation": 2, "optimizer": "SGD"},
    "zero3, recomputed": {"dhen": {"activation_checkpointing": "all"}},
    "hsdp_ckpt": {},
}


OPTIONS = {"fixed": {"task_weights": {"buy": 3.0, "stay": 0.5}, "task_layers": 1}, "uncertainty": {}}


@pytest.mark.parametrize("weights", OPTIONS)
def test_every_path_trains_like_plain_torch(weights):
    """4 ranks on 2 nodes, tolerance 1e-5; without the tasks the losses are others."""
    architecture = {"tasks": ["buy", "stay"], "task_weights": "uncertainty"} | OPTIONS[weights]
    of_ranks = run_ranks(RANKS, losses_of_set_ups, SET_UPS, architecture, STEPS, local_size=2)
    for name, more in SET_UPS.items():
        settings = {"accumulation": more.get("accumulation", 1), "optimizer": more.get("optimizer", "AdamW")}
        batches = global_batches(STEPS, GLOBAL_BATCH)
        expected, _ = plain_losses(batches, architecture=architecture, num_ranks=RANKS, **settings)
        assert difference(of_ranks[0][name], expected) < 1e-5, name
        alone, _ = plain_losses(batches, **settings)
        assert difference(alone, expected) > 1e-3, name
