"""The mixture of experts equals its formulas in float64, and so do its gradients; its loss exists only in training."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from dhen.model import mixture_of_experts
from dhen.model.configuration_dhen import DhenConfig
from dhen.model.expert_mlps import ExpertMlps, grouped_mm, grouped_outer
from dhen.model.mixture_of_experts import Gate, MixtureOfExperts, balance_loss
from dhen.model.mlp import MLP
from dhen.model.modeling_dhen import DhenForClickPrediction
from tests.plain import CONFIG

B, IN, OUT = 23, 7, 5
ALPHA = 0.3
CASES = [(4, 2, [6], "tanh"), (16, 2, [], "relu"), (8, 1, [6, 3], "relu"), (5, 5, [6], "silu"), (3, 2, [], "identity")]


def make(num_experts: int, num_chosen: int, hidden: list[int], activation: str, **gate: object) -> MixtureOfExperts:
    gate = Gate(IN, num_experts, num_chosen, ALPHA, **gate)
    return MixtureOfExperts(gate, ExpertMlps(num_experts, IN, hidden, OUT, activation)).double()


def formula(mixture: MixtureOfExperts, x_BI: Tensor, noise_BE: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y and alpha times the balancing loss, example by example, with all experts computed for each."""
    state = dict(mixture.named_parameters())
    num_experts, num_chosen = mixture.gate.num_experts, mixture.gate.num_chosen
    h_BE = x_BI @ state["gate.linear.weight"].T
    if noise_BE is not None:
        h_BE = h_BE + noise_BE * (1 + (x_BI @ state["gate.noise.weight"].T).exp()).log()
    p_BE = h_BE.exp() / h_BE.exp().sum(1, keepdim=True)
    act = mixture.experts.activation
    ys, chosen_counts = [], [0] * num_experts
    for x, h in zip(x_BI, h_BE, strict=True):
        chosen = sorted(range(num_experts), key=lambda e, h=h: -h[e].item())[:num_chosen]
        total = sum(h[e].exp() for e in chosen) if num_chosen > 1 else h.exp().sum()
        y = 0
        for expert in chosen:
            chosen_counts[expert] += 1
            value = x
            for index in range(len(mixture.experts.layers)):
                value = act(value) if index else value
                weight, bias = (state[f"experts.layers.{index}.{name}"][expert] for name in ("weight", "bias"))
                value = value @ weight + bias
            y = y + h[expert].exp() / total * value
        ys.append(y)
    f_E = torch.tensor(chosen_counts, dtype=torch.float64) / (len(x_BI) * num_chosen)
    return torch.stack(ys), ALPHA * num_experts * sum(f_E * p_BE.mean(0))


def assert_equal(mixture: MixtureOfExperts, x_BI: Tensor, **noise: Tensor) -> None:
    """Outputs, losses and all gradients of both, to 1e-11."""
    of_mixture, expected = [], []
    random_state = torch.get_rng_state()
    for found, function in ((of_mixture, mixture), (expected, lambda x: formula(mixture, x, **noise))):
        torch.set_rng_state(random_state)
        x = x_BI.clone().requires_grad_()
        y, loss = function(x)
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
        found += [y, loss, *torch.autograd.grad((y * weights).sum() + loss, [x, *mixture.parameters()])]
    for one, other in zip(of_mixture, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_output_loss_and_gradients_are_those_of_the_formula(case, seed):
    torch.manual_seed(seed)
    assert_equal(make(*case), torch.randn(B, IN, dtype=torch.float64))


def test_a_noisy_gate_is_its_formula_in_training_and_has_no_noise_in_evaluation():
    torch.manual_seed(4)
    mixture, x_BI = make(4, 2, [6], "tanh", is_noisy=True), torch.randn(B, IN, dtype=torch.float64)
    state = torch.get_rng_state()
    noise_BE = torch.randn(B, 4, dtype=torch.float64)
    torch.set_rng_state(state)
    assert_equal(mixture, x_BI, noise_BE=noise_BE)
    torch.testing.assert_close(mixture.eval()(x_BI), formula(mixture, x_BI)[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("break_it", ["gate", "order"])
def test_another_gate_or_order_would_show(monkeypatch, break_it):
    """Negative control."""
    torch.manual_seed(0)
    mixture, x_BI = make(*CASES[0]), torch.randn(B, IN, dtype=torch.float64)
    if break_it == "gate":
        weight = mixture.gate.linear.weight
        monkeypatch.setattr(mixture.gate.linear, "forward", lambda x: 1.01 * x @ weight.T)
    else:
        monkeypatch.setattr(torch.Tensor, "argsort", lambda ids, **_: torch.arange(len(ids)))
    with pytest.raises(AssertionError):
        assert_equal(mixture, x_BI)


def test_all_experts_chosen_are_the_full_softmax_mixture():
    """Of plain MLPs; and one expert is a plain MLP."""
    torch.manual_seed(0)
    mixture, x_BI = make(4, 4, [6], "relu").eval(), torch.randn(B, IN, dtype=torch.float64)
    expected = 0
    for expert, probability_B in enumerate(mixture.gate.linear(x_BI).softmax(1).unbind(1)):
        mlp = MLP(IN, [6], OUT).double()
        for linear, grouped in zip((mlp[0], mlp[2]), mixture.experts.layers, strict=True):
            linear.weight.data, linear.bias.data = grouped.weight[expert].T, grouped.bias[expert]
        expected = expected + probability_B.unsqueeze(1) * mlp(x_BI)
    torch.testing.assert_close(mixture(x_BI), expected, rtol=1e-12, atol=1e-12)


def test_the_balancing_loss_pushes_examples_from_a_crowded_expert():
    """1 when balanced. When all choose expert 0 it is E P_0, and its gradient lowers expert 0's logit alone."""
    logits_BE = torch.zeros(8, 4, dtype=torch.float64, requires_grad=True)
    assert balance_loss(logits_BE.softmax(1), torch.arange(8).view(8, 1) % 4).item() == pytest.approx(1)
    crowded = balance_loss(logits_BE.softmax(1), torch.zeros(8, 1, dtype=torch.int64))
    (gradient_BE,) = torch.autograd.grad(crowded, logits_BE)
    p = 1 / 4  # d(E P_0)/dh_be = E p_0 (1{e = 0} - p_e) / B
    expected = 4 * p * (torch.eye(4, dtype=torch.float64)[0] - p) / 8
    torch.testing.assert_close(gradient_BE, expected.expand(8, 4))
    assert balance_loss(torch.empty(0, 4), torch.empty(0, 2, dtype=torch.int64)).item() == 0


def test_training_with_the_balancing_loss_spreads_the_examples():
    """A gate that starts with one expert for all. Without the loss it stays like that."""
    most = {}
    for alpha in (0.0, 0.1):
        torch.manual_seed(1)
        gate = Gate(IN, 4, 1, alpha)
        gate.linear.weight.data[0, 0] = 3.0  # x_0 is 1
        x_BI = torch.cat([torch.ones(256, 1), torch.randn(256, IN - 1)], dim=1)
        optimizer = torch.optim.SGD(gate.parameters(), lr=2.0)
        for _ in range(200):
            _, _, *losses = gate(x_BI)
            for loss in losses:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        most[alpha] = gate(x_BI)[1].flatten().bincount(minlength=4).max().item() / 256
    assert most[0.0] > 0.9, most
    assert most[0.1] < 0.5, most


@pytest.mark.parametrize("ends", [[0, 0, 5, 5], [5, 5, 5, 5], [1, 2, 3, 5]], ids=str)
def test_experts_without_examples_have_gradients_of_0(ends):
    rows_RI, rows_RO, weight_EIO = torch.randn(5, IN), torch.randn(5, OUT), torch.randn(4, IN, OUT)
    ends_E = torch.tensor(ends, dtype=torch.int32)
    of_rows = torch.bucketize(torch.arange(5), ends_E, right=True)
    torch.testing.assert_close(grouped_mm(rows_RI, weight_EIO, ends_E)[2], rows_RI[2] @ weight_EIO[of_rows[2]])
    expected = [rows_RI[of_rows == e].T @ rows_RO[of_rows == e] for e in range(4)]
    torch.testing.assert_close(grouped_outer(rows_RI, rows_RO, ends_E), torch.stack(expected))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("ends", [[3, 3, 90, 99], [0, 99, 99, 99]], ids=str)
def test_on_a_gpu_the_kernel_for_groups_is_the_product_per_expert(ends):
    """Sizes that are no multiples of 16 bytes. bf16: 2 %."""
    rows_RI, rows_RO, weight_EIO = torch.randn(99, 13), torch.randn(99, 11), torch.randn(4, 13, 11)
    ends_E = torch.tensor(ends, dtype=torch.int32)
    for operation, *inputs in ((grouped_mm, rows_RI, weight_EIO), (grouped_outer, rows_RI, rows_RO)):
        expected = operation(*inputs, ends_E)
        result = operation(*(each.cuda().bfloat16() for each in inputs), ends_E.cuda()).cpu().float()
        torch.testing.assert_close(result, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


def model_of(**options: object) -> DhenForClickPrediction:
    torch.manual_seed(0)
    interactions = [{"kind": "advanced_dlrm", **options}, "linear"]
    return DhenForClickPrediction(DhenConfig(**CONFIG | {"interactions": interactions}), with_tables=False)


def inputs_of(size: int) -> dict[str, Tensor]:
    torch.manual_seed(size)
    return {"inputs_embeds": torch.randn(size, 5, 8), "dense": torch.randn(size, 3), "labels": torch.ones(size)}


def test_the_loss_is_in_training_alone_and_is_the_sum_over_layers(monkeypatch):
    model, inputs = model_of(num_experts=4, balance_loss=0.5), inputs_of(9)
    losses = []
    original = mixture_of_experts.balance_loss
    monkeypatch.setattr(mixture_of_experts, "balance_loss", lambda *of: losses.append(original(*of)) or losses[-1])
    output = model(**inputs)
    assert len(losses) == 2
    assert output.auxiliary_loss.item() == pytest.approx(0.5 * sum(losses).item())
    clicks = binary_cross_entropy_with_logits(output.logits, inputs["labels"])
    assert output.loss.item() == pytest.approx((clicks + output.auxiliary_loss).item())
    with torch.no_grad():
        assert model(**inputs).auxiliary_loss is None
    evaluated = model.eval()(**inputs)
    assert evaluated.auxiliary_loss is None
    assert evaluated.loss.item() == pytest.approx(clicks.item())
    assert model_of(num_experts=4, balance_loss=0)(**inputs).auxiliary_loss is None


@pytest.mark.parametrize("size", [0, 1])
def test_a_batch_of_one_example_or_none_trains(size):
    model = model_of(num_experts=4)
    model(**inputs_of(size)).loss.backward()
    gradients = [weight.grad for weight in model.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients) == bool(size)


def test_one_expert_is_the_plain_over_arch():
    plain, one = model_of(), model_of(num_experts=1)
    assert list(plain.state_dict()) == list(one.state_dict())
    assert "model.layers.0.interactions.0.over_arch.0.weight" in plain.state_dict()
    outputs = [model(**inputs_of(9)) for model in (plain, one)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert outputs[0].auxiliary_loss is None


@pytest.mark.parametrize("norm_position", ["post", "pre"])
def test_a_mixture_can_start_at_zero(norm_position):
    options = {"interactions": [{"kind": "advanced_dlrm", "num_experts": 3}], "interaction_init": "zero"}
    config = DhenConfig(**CONFIG | options | {"norm_position": norm_position})
    interaction = DhenForClickPrediction(config, with_tables=False).model.layers[0].interactions[0]
    u_BLD, loss = interaction(torch.randn(3, 6, 8), torch.randn(3, 3))
    assert not u_BLD.any()
    assert loss > 0


def test_under_autocast_the_experts_are_in_bf16_and_the_gate_is_not():
    model, inputs = model_of(num_experts=4), inputs_of(9)
    seen = {}
    mixture = model.model.layers[0].interactions[0].over_arch
    mixture.gate.register_forward_hook(lambda _, __, output: seen.update(gate=output[0].dtype))
    mixture.experts.register_forward_hook(lambda _, __, output: seen.update(experts=output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs).loss
    loss.backward()
    assert seen == {"gate": torch.float32, "experts": torch.bfloat16}
    assert mixture.experts.layers[0].weight.grad.dtype == torch.float32
    assert loss.item() == pytest.approx(model(**inputs).loss.item(), rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_experts": 4, "experts_per_example": 5},
            "experts_per_example is 5. Use a number up to that of the experts, 4.",
        ),
        ({"experts_per_example": 1}, "experts_per_example has no effect because num_experts is 1"),
        ({"balance_loss": 0.0}, "balance_loss has no effect because num_experts is 1"),
        ({"noisy_gate": True}, "noisy_gate has no effect because num_experts is 1"),
        ({"num_experts": 4, "batch_norm": True}, "batch_norm does not work with num_experts"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        model_of(**options)
