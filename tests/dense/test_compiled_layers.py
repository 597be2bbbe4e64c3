"""Compiled layers train like layers as written, under every ZeRO stage, HSDP, recomputation and offload."""

import functools
from typing import Any

import pytest
import torch

from dhen.dense.activation_offload import ActivationOffload
from dhen.dense.compiled_layers import compile_layers
from dhen.model.configuration_dhen import DhenConfig
from dhen.model.modeling_dhen import DhenForClickPrediction
from dhen.runtime.topology import Topology
from tests.plain import CONFIG
from tests.ranks import run_ranks
from tests.tiny_training import difference, train

STEPS, TOLERANCE = 50, 1e-4
ON_ONE_NODE = {
    **{name: (name, {}) for name in ("zero0", "zero1", "zero2", "zero3")},
    "zero2, first layer recomputed": ("zero2", {"activation_checkpointing": 1}),
    "zero3, recomputed": ("zero3", {"activation_checkpointing": "all"}),
    "zero3, one kind recomputed": ("zero3", {"activation_checkpointing": ["linear"]}),
}
ON_TWO_NODES = {"hsdp": ("hsdp", {}), "hsdp, recomputed": ("hsdp_ckpt", {})}
CPU = torch.device("cpu")


def differences(topology: Topology, set_ups: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, float]:
    """Largest relative difference of a step's loss, compiled and as written."""
    found = {}
    for key, (name, dhen) in set_ups.items():
        # The same examples per rank on any number of ranks, so that the kernels are compiled once.
        options = {"steps": STEPS, "global_batch": 16 * topology.world_size}
        as_written, compiled = (
            train(topology, name, dhen=dhen | {"compile": what}, **options)[0] for what in ("none", "layers")
        )
        assert as_written != compiled, "nothing was compiled: fused kernels round differently"
        found[key] = difference(compiled, as_written)
    return found


def test_losses_are_those_of_layers_as_written():
    of_ranks = run_ranks(2, differences, ON_ONE_NODE) + run_ranks(4, differences, ON_TWO_NODES, local_size=2)
    for found in of_ranks:
        assert max(found.values()) < TOLERANCE, found


def model_of(
    *, is_compiled: bool, is_offloaded: bool = False, interaction: Any = "linear", **layer: str
) -> DhenForClickPrediction:
    torch.manual_seed(0)
    config = DhenConfig(**CONFIG | {"num_layers": 1, "interactions": [interaction], "norm": "batch_norm"} | layer)
    model = DhenForClickPrediction(config, with_tables=False)
    compile_layers(model, "layers" if is_compiled else "none", CPU)
    if is_offloaded:
        offload = ActivationOffload(None)
        for layer in model.model.layers:
            layer.forward = functools.partial(offload.run, layer.forward)
    return model


@pytest.mark.parametrize(
    ("interaction", "layer", "sizes"),
    [
        ("linear", {}, (64, 32, 1, 0, 64)),
        ({"kind": "advanced_dlrm", "num_experts": 4}, {}, (64, 32)),
        ("linear", {"gate": "hard"}, (64, 32)),
        ("linear", {"experts": "ensembles", "capacity_factor": 1.0}, (64, 33, 32, 1, 0, 31)),
    ],
    ids=str,
)
def test_batch_norm_offload_and_batches_of_other_sizes(interaction, layer, sizes):
    models = [model_of(is_compiled=it, is_offloaded=it, interaction=interaction, **layer) for it in (False, True)]
    for size in sizes:
        x_BFD, dense_BN = torch.randn(size, 5, 8), torch.randn(size, 3)
        outputs = [model(inputs_embeds=x_BFD, dense=dense_BN, labels=torch.ones(size)) for model in models]
        for each in outputs:
            (each.loss + each.logits.sum()).backward()
        torch.testing.assert_close(*(each.logits for each in outputs))
        torch.testing.assert_close(*(each.auxiliary_loss for each in outputs))
        assert (outputs[0].auxiliary_loss is None) == (interaction == "linear" and not layer)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)
    for one, other in zip(*(model.buffers() for model in models), strict=True):
        torch.testing.assert_close(one, other)
    x_BFD, dense_BN = torch.randn(9, 5, 8), torch.randn(9, 3)
    with torch.no_grad():  # an evaluation runs the layers as written, with the buffers of training
        scores = [model.eval()(inputs_embeds=x_BFD, dense=dense_BN).logits for model in models]
    torch.testing.assert_close(*scores)


def test_a_missing_compiler_is_said_at_the_start(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match=r"no C\+\+ compiler \(g\+\+ or clang\+\+\)"):
        model_of(is_compiled=True)
