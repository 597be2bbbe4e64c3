"""A mixture of experts trains like plain torch on every path: its balancing loss counts once, and in training alone."""

from tests.plain import global_batches, plain_losses
from tests.ranks import run_ranks
from tests.tiny_training import GLOBAL_BATCH, difference, losses_of_set_ups

STEPS, RANKS = 5, 4
MIXTURE = {
    "interactions": ["linear", {"kind": "advanced_dlrm", "num_experts": 4, "balance_loss": 1.0, "use_dense": True}]
}
SET_UPS = {
    "zero0": {},
    "zero0, recomputed, tables replicated": {"dhen": {"activation_checkpointing": "all"}, "replicated": ["C1"]},
    "zero1": {},
    "zero2, 2 micro steps": {"accumulation": 2, "optimizer": "SGD"},
    "zero3": {},
    "zero3, recomputed": {"dhen": {"activation_checkpointing": "all", "activation_offload": "all"}},
    "zero3, one kind recomputed": {"dhen": {"activation_checkpointing": ["advanced_dlrm"]}},
    "zero3, two passes": {"num_passes": 2},
    "hsdp": {},
    "hsdp_ckpt": {},
}


def plain(**more: object) -> list[float]:
    accumulation, optimizer = more.get("accumulation", 1), more.get("optimizer", "AdamW")
    settings = {"architecture": MIXTURE, "num_ranks": RANKS, "auxiliary": more.get("auxiliary", 1.0)}
    settings["replicated"] = more.get("replicated", ())
    return plain_losses(global_batches(STEPS, GLOBAL_BATCH), accumulation, 0.0, optimizer, **settings)[0]


def test_every_path_trains_like_plain_torch_with_the_balancing_loss_once():
    """4 ranks on 2 nodes, tolerance 1e-5; counted twice or never, the losses differ by 1e-3 and more."""
    of_ranks = run_ranks(RANKS, losses_of_set_ups, SET_UPS, MIXTURE, STEPS, local_size=2)
    for name, more in SET_UPS.items():
        expected = plain(**more)
        assert difference(of_ranks[0][name], expected) < 1e-5, name
        for wrong in (0.0, 2.0):
            assert difference(plain(**more, auxiliary=wrong), expected) > 1e-3, name
