"""Activation offload: the same gradients to the bit, nothing but small tensors and weights left on the device."""

import gc
import weakref

import pytest
import torch

from dhen.dense import activation_offload
from dhen.dense.activation_checkpointing import checkpoint_layers
from dhen.dense.activation_offload import ActivationOffload, offload_layers
from dhen.model.configuration_dhen import DhenConfig
from dhen.model.modeling_dhen import DhenForClickPrediction
from tests.plain import CONFIG

KINDS = ["linear", "advanced_dlrm", "self_attention", "deep_cross", "convolution"]


@pytest.fixture(autouse=True)
def _everything_is_large(monkeypatch):
    monkeypatch.setattr(activation_offload, "_LEAST_BYTES", 1)


def make_model() -> DhenForClickPrediction:
    torch.manual_seed(0)
    return DhenForClickPrediction(DhenConfig(**CONFIG | {"interactions": KINDS, "dropout": 0.3}), with_tables=False)


def offloaded(model: DhenForClickPrediction, offload: ActivationOffload) -> DhenForClickPrediction:
    for layer in model.model.layers:
        layer.forward = lambda *arguments, inner=layer.forward: offload.run(inner, *arguments)
    return model


def loss_of(model: DhenForClickPrediction) -> torch.Tensor:
    torch.manual_seed(1)
    return model(inputs_embeds=torch.randn(8, 5, 8), dense=torch.randn(8, 3)).logits.square().mean()


def gradients(model: DhenForClickPrediction) -> list[torch.Tensor]:
    for parameter in model.parameters():
        parameter.grad = None
    loss_of(model).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("recomputed", ["none", 1, "all", ["linear"]], ids=str)
def test_gradients_are_the_same_to_the_bit(recomputed):
    expected, model = gradients(make_model()), make_model()
    checkpoint_layers(model, recomputed)
    offloaded(model, ActivationOffload(None))
    for _ in range(2):  # the second step begins anew
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients(model), expected, strict=True))


def test_a_lost_tensor_is_caught(monkeypatch):
    """Negative control: copies that are wrong show."""
    expected = gradients(make_model())
    monkeypatch.setattr(ActivationOffload, "_to_host", lambda self, tensor: torch.zeros_like(tensor))
    model = offloaded(make_model(), ActivationOffload(None))
    assert not all(torch.equal(ours, theirs) for ours, theirs in zip(gradients(model), expected, strict=True))


def test_what_several_interactions_save_is_copied_once_and_weights_stay(monkeypatch):
    copied, right = [], ActivationOffload._to_host

    def to_host(self, tensor):
        copied.append((tensor.data_ptr(), tensor.shape, tensor.stride()))
        return right(self, tensor)

    monkeypatch.setattr(ActivationOffload, "_to_host", to_host)
    packed, pack = [], ActivationOffload._pack

    def count(self, layer, sources, tensor):
        packed.append(tensor.shape)
        return pack(self, layer, sources, tensor)

    monkeypatch.setattr(ActivationOffload, "_pack", count)
    model = make_model()
    del model.model.layers[1:]  # one layer: nothing that was copied is freed meanwhile, so addresses are unique
    offloaded(model, ActivationOffload(None))
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    inputs, dense = torch.randn(8, 6, 8, requires_grad=True), torch.randn(8, 3)
    result = model.model.layers[0](inputs, dense)
    addresses = {address for address, *_ in copied}
    assert weights.isdisjoint(addresses)
    assert inputs.data_ptr() in addresses
    assert 0 < len(copied) == len(set(copied)) < len(packed)
    result.sum().backward()


def test_nothing_is_kept_once_the_backward_is_done(monkeypatch):
    hosts, right = [], ActivationOffload._to_host

    def to_host(self, tensor):
        host = right(self, tensor)
        hosts.append(weakref.ref(host))
        return host

    monkeypatch.setattr(ActivationOffload, "_to_host", to_host)
    model = offloaded(make_model(), ActivationOffload(None))
    gc.disable()  # what waits for the collector would fill a GPU meanwhile
    loss_of(model).backward()
    gc.enable()
    assert hosts
    assert not any(host() is not None for host in hosts)
    loss_of(model)  # without a backward, as in a debugger
    assert not any(host() is not None for host in hosts)


def test_a_graph_can_be_walked_twice():
    model = offloaded(make_model(), ActivationOffload(None))
    loss = loss_of(model)
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_on_the_cpu_nothing_moves():
    assert offload_layers(make_model(), "all", torch.device("cpu")) == 0
    with pytest.raises(ValueError, match="9, but the model has 2 layers"):
        offload_layers(make_model(), 9, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_gradients_are_the_same_and_memory_is_less():
    def peak(layers):
        model = make_model().cuda()
        offload_layers(model, layers, torch.device("cuda"))
        torch.manual_seed(1)
        inputs, dense = torch.randn(65536, 5, 8, device="cuda"), torch.randn(65536, 3, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        model(inputs_embeds=inputs, dense=dense).logits.square().mean().backward()
        return [p.grad.clone() for p in model.parameters()], torch.cuda.max_memory_allocated()

    (plain, most), (ours, less) = peak("none"), peak("all")
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert less < most
