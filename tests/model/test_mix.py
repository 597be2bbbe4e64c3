"""W x over the embeddings keeps W once, and its backward makes no tensor per example and weight."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dhen.dense.activation_offload import ActivationOffload
from dhen.model.interactions import InteractionContext, MixEmbeddings, deep_cross, dot_products, linear
from dhen.model.interactions.deep_cross import DeepCross
from dhen.model.interactions.dot_products import CompressedDots, PairwiseDots
from dhen.model.interactions.linear import mix
from dhen.planner.live_memory import LiveMemory

B, M, L, D, K = 2048, 400, 200, 16, 8
NO_DENSE = torch.empty(0, 0)
# Each user of a mix, or of one cast for several products, and the elements of the tensors that it may leave behind:
# its input in autocast's dtype, what it multiplies next, and its output.
USERS = {
    "linear": (lambda: MixEmbeddings(M, L), B * M * D + B * L * D),
    "deep_cross": (lambda: DeepCross(InteractionContext(M, L, D)), B * M * D + B * D * D + B * L * D),
    "compressed_dots": (lambda: CompressedDots(M, D, K), B * M * D + B * K * D + B * M * K),
    "pairwise_dots": (lambda: PairwiseDots(M), B * M * D + B * M * (M - 1) // 2),
}


def by_bmm(weight: Tensor, x_BMD: Tensor, transposed: bool = False) -> Tensor:
    """The formula in plain torch, with autograd's own backward."""
    return torch.bmm((weight.t() if transposed else weight).expand(len(x_BMD), -1, -1), x_BMD)


def by_linear(weight: Tensor, x_BMD: Tensor) -> Tensor:
    """The formula by nn.Linear's function."""
    return nn.functional.linear(x_BMD.transpose(1, 2), weight).transpose(1, 2)


def call(user: nn.Module, x_BMD: Tensor) -> Tensor:
    return user(x_BMD, NO_DENSE) if isinstance(user, DeepCross) else user(x_BMD)


def bytes_of(user: str, autocast: bool) -> tuple[int, int]:
    """Bytes that are left after the forward, and the peak with the backward, on tensors without memory."""
    with FakeTensorMode():
        module, x_BMD = USERS[user][0](), torch.empty(B, M, D, requires_grad=True) * 1  # autocast caches leaves
        with LiveMemory([*module.parameters(), *module.buffers(), x_BMD]) as memory:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                u = call(module, x_BMD)
            left = memory.bytes
            u.sum().backward()
    return left, memory.peak


def use_bmm(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (linear, deep_cross, dot_products):
        monkeypatch.setattr(module, "mix", by_bmm, raising=False)
        monkeypatch.setattr(module, "autocast", lambda x: x, raising=False)


@pytest.mark.parametrize("user", USERS)
def test_autocast_keeps_one_copy_of_the_input_and_none_of_the_weight_per_example(user, monkeypatch):
    expected = 2 * USERS[user][1]
    assert bytes_of(user, autocast=True)[0] == expected
    if user != "pairwise_dots":  # whose own backward would keep the input as it is
        use_bmm(monkeypatch)  # negative control
        assert bytes_of(user, autocast=True)[0] >= expected + B * M * D


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_the_backward_has_no_gradient_of_the_weight_per_example(autocast, monkeypatch):
    a_weight_per_example = B * L * M * (2 if autocast else 4)
    assert bytes_of("linear", autocast)[1] < a_weight_per_example
    use_bmm(monkeypatch)  # negative control
    assert bytes_of("linear", autocast)[1] > a_weight_per_example


@pytest.mark.parametrize("transposed", [False, True])
def test_its_first_and_second_gradients_are_those_of_finite_differences(transposed):
    torch.manual_seed(0)
    weight = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3 if transposed else 5, 4, dtype=torch.float64, requires_grad=True)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda weight, x: mix(weight, x, transposed), (weight, x))


@pytest.mark.parametrize("size", [0, 1, 33])
@pytest.mark.parametrize("dim", [4, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_rounds_as_in_linear_layers(size, dim, dtype):
    """A weight's gradient is summed in float32 and rounded once. Autocast leaves float64 alone."""
    torch.manual_seed(0)
    weight, x = torch.randn(6, 7, dtype=dtype), torch.randn(size, 7, dim, dtype=dtype)
    exact = gradients(by_bmm, weight.double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = gradients(mix, weight, x), gradients(by_linear, weight, x)
    for value, other, right in zip(ours, plain, exact, strict=True):
        assert value.dtype == other.dtype
        errors = [(each.double() - right).abs().sum() for each in (value, other)]
        assert errors[0] <= 1.1 * errors[1] + 1e-9


def gradients(product, weight: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    weight, x = weight.clone().requires_grad_(), x.clone().requires_grad_()
    u = product(weight, x)
    return u.detach(), *torch.autograd.grad(u.to(x.dtype).square().sum(), (weight, x))


def test_a_frozen_weight_gets_no_gradient_and_a_weight_in_another_place_is_found_again():
    """ZeRO stage 3 frees weight.data after the forward and gathers it for the backward."""
    torch.manual_seed(0)
    weight, x = nn.Parameter(torch.randn(6, 7)), torch.randn(3, 7, 4, requires_grad=True)
    expected = gradients(by_bmm, weight.detach(), x.detach())[1:]
    for hooks in (False, True):
        values, offload = weight.data, ActivationOffload(None)
        u = offload.run(mix, weight, x) if hooks else mix(weight, x)
        weight.data = torch.empty(0)
        loss = u.square().sum()
        weight.data = values.clone()
        values.zero_()
        for value, right in zip(torch.autograd.grad(loss, (weight, x)), expected, strict=True):
            torch.testing.assert_close(value, right)
    weight.requires_grad_(False)
    mix(weight, x).sum().backward()
    assert weight.grad is None
    assert x.grad is not None


def test_torch_compile_traces_it_in_one_graph():
    torch.manual_seed(0)
    weight, x = torch.randn(6, 7), torch.randn(3, 7, 4)

    def run(weight: Tensor, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return mix(weight, x)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for value, right in zip(*(gradients(each, weight, x) for each in (compiled, run)), strict=True):
        assert torch.equal(value, right)
