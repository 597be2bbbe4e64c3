"""The self-ensemble loss is its formula, and two passes through the layers train as they should, in parallel too."""

import doctest
import math

import pytest
import torch

import dhen.training.self_ensemble
from dhen.model.configuration_dhen import DhenConfig
from dhen.model.features import SparseIds
from dhen.model.modeling_dhen import DhenForClickPrediction
from dhen.runtime.topology import Topology
from dhen.training.self_ensemble import self_ensemble_loss
from tests.plain import CONFIG, ROWS, global_batches, plain_losses
from tests.ranks import run_ranks
from tests.tiny_training import GLOBAL_BATCH, difference, train

STEPS = 8
SET_UPS = {
    "zero0": {},
    "zero0, tables replicated": {"replicated": ["C1", "C4"]},
    "zero2, 2 micro steps": {"accumulation": 2, "optimizer": "SGD"},
    "zero3": {},
    "zero3, recomputed and offloaded": {"dhen": {"activation_checkpointing": "all", "activation_offload": "all"}},
    "hsdp": {},
}


def cross_entropy(p: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return -(target * p.log() + (1 - target) * (1 - p).log()).sum()


def test_loss_and_gradient_are_those_of_the_formula():
    """In float64, relative tolerance 1e-12."""
    generator = torch.Generator().manual_seed(1)
    logits_PB = (3 * torch.randn(2, 50, generator=generator, dtype=torch.float64)).requires_grad_()
    labels_B = (torch.rand(50, generator=generator) < 0.3).double()
    p_1, p_2 = torch.sigmoid(logits_PB)
    p = (p_1 + p_2) / 2
    expected = cross_entropy(p, labels_B) + cross_entropy(p_1, p.detach()) + cross_entropy(p_2, p.detach())
    loss, logits_B = self_ensemble_loss(logits_PB, labels_B)
    gradients = [torch.autograd.grad(each, logits_PB, retain_graph=True)[0] for each in (loss, expected)]
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(logits_B.sigmoid(), p, rtol=1e-12, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    # Negative control: with a gradient through the targets it would be another.
    whole = cross_entropy(p, labels_B) + cross_entropy(p_1, p) + cross_entropy(p_2, p)
    assert (torch.autograd.grad(whole, logits_PB)[0] - gradients[0]).abs().max() > 0.01


def test_confident_predictions_keep_their_digits():
    logits_PB = torch.tensor([[200.0, -200.0, 30.0], [200.0, -200.0, 20.0]], requires_grad=True)
    loss, logits_B = self_ensemble_loss(logits_PB, torch.tensor([0.0, 1.0, 0.0]))
    last = -math.log((math.exp(-30) + math.exp(-20)) / 2)
    assert logits_B.tolist() == pytest.approx([200, -200, last], rel=1e-6)
    assert loss.item() == pytest.approx(400 + last, rel=1e-6)
    loss.backward()
    assert logits_PB.grad[:, :2].flatten().tolist() == pytest.approx([0.5, -0.5] * 2, rel=1e-5)


def test_an_empty_batch_has_a_loss_of_0_with_a_gradient():
    logits_PB = torch.empty(2, 0, requires_grad=True)
    loss, _ = self_ensemble_loss(logits_PB, torch.empty(0))
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_passes_differ_by_dropout_alone(dropout):
    torch.manual_seed(0)
    interactions = [{"kind": "linear", "use_dense": True}, "advanced_dlrm"]
    model = DhenForClickPrediction(DhenConfig(**CONFIG | {"dropout": dropout, "interactions": interactions}))
    (batch,) = global_batches(1, 16)
    inputs = {"sparse": SparseIds(batch.ids_FB.flatten(), len(ROWS)), "dense": batch.dense_BN}
    first_B, second_B = model.train()(**inputs, num_passes=2).logits.view(2, 16)
    assert torch.equal(first_B, second_B) == (dropout == 0)
    first_B, second_B = model.eval()(**inputs, num_passes=2).logits.view(2, 16)
    torch.testing.assert_close(first_B, model(**inputs).logits)
    torch.testing.assert_close(second_B, first_B)
    labels = {"labels": batch.labels_B}
    torch.testing.assert_close(model(**inputs, **labels, num_passes=2).loss, model(**inputs, **labels).loss)


def two_passes(topology: Topology) -> dict[str, list[float]]:
    settings = {"steps": STEPS, "num_passes": 2}
    losses = {name: train(topology, name.split(",")[0], **settings, **more)[0] for name, more in SET_UPS.items()}
    losses["dropout"] = train(topology, "zero0", **settings, architecture={"dropout": 0.3})[0]
    return losses


def test_without_dropout_two_passes_train_like_one():
    """4 ranks on 2 nodes against torch alone with one pass. BCE(p, p.detach()) has no gradient. Tolerance 1e-5."""
    losses = run_ranks(4, two_passes, local_size=2)[0]
    batches = global_batches(STEPS, GLOBAL_BATCH)
    for name, more in SET_UPS.items():
        plain = plain_losses(batches, more.get("accumulation", 1), 0.0, more.get("optimizer", "AdamW"),
                             more.get("replicated", ()))[0]  # fmt: skip
        assert difference(losses[name], plain) < 1e-5, name
    assert difference(losses["dropout"], plain_losses(batches)[0]) > 1e-3


def test_examples_of_the_docstrings():
    assert doctest.testmod(dhen.training.self_ensemble).failed == 0
