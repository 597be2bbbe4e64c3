"""The trace on fake tensors says exactly what a real step keeps, at any depth and without running it."""

import gc

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.flop_counter import FlopCounterMode

from dhen.dense.activation_checkpointing import checkpoint_layers
from dhen.model.configuration_dhen import DhenConfig
from dhen.model.interactions import Interaction, InteractionContext, MixEmbeddings, register_interaction
from dhen.model.mixture_of_experts import ModuleExperts
from dhen.model.modeling_dhen import DhenForClickPrediction
from dhen.planner import step_trace
from dhen.planner.live_memory import LiveMemory
from dhen.planner.step_trace import Precision, StepTrace, evaluation_bytes, trace_step, training_flops_per_sample

KINDS = [
    "advanced_dlrm",
    "self_attention",
    "convolution",
    "linear",
    "deep_cross",
    "deep_cross_flattened",
    "multiplicative",
    {"kind": "advanced_dlrm", "num_experts": 4, "over_arch": [16]},
]
BATCH = 32


def kept_bytes(trace: StepTrace) -> int:
    """Bytes of the activations that are live at the end of the forward."""
    return sum(event.kept for event in trace.events[: trace.loss_at + 1])


def config_of(depth: int, **more) -> DhenConfig:
    features = [{"name": f"C{index}", "num_embeddings": 10} for index in range(5)]
    values = {"num_dense_features": 3, "sparse_features": features, "embedding_dim": 8, "num_embeddings_out": 2}
    return DhenConfig(**values | {"num_layers": depth, "interactions": KINDS, "dropout": 0.1} | more)


def really(
    config: DhenConfig, checkpointing: object = "none", dtype: torch.dtype = torch.float32, num_passes: int = 1
) -> tuple[int, int]:
    """Bytes that are alive after a real forward, and the most in forward and backward, gradients let go at once."""
    model = DhenForClickPrediction(config, with_tables=False).to(dtype)
    checkpoint_layers(model, checkpointing)
    labels = torch.ones(BATCH, 1 + len(config.tasks)) if config.tasks else torch.ones(BATCH)
    inputs = torch.randn(BATCH, 5, 8, requires_grad=True), torch.randn(BATCH, 3), labels
    for weight in model.parameters():
        weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    gc.collect()
    with LiveMemory([*model.parameters(), *model.buffers(), *inputs]) as memory:
        loss = model(inputs_embeds=inputs[0], dense=inputs[1], labels=inputs[2], num_passes=num_passes).loss
        kept = memory.bytes
        loss.backward()
    return kept, memory.peak


def peak_of(trace: StepTrace) -> int:
    alive = peak = 0
    for event in trace.events:
        peak = max(peak, alive + event.peak)
        alive += event.kept
    return peak


@pytest.mark.parametrize("checkpointing", ["none", "all", 2, ["self_attention", "convolution"]], ids=str)
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_it_keeps_what_a_real_step_keeps(depth, checkpointing):
    trace = trace_step(
        config_of(depth), BATCH, checkpointing=min(checkpointing, depth) if checkpointing == 2 else checkpointing
    )
    kept, peak = really(config_of(depth), min(checkpointing, depth) if checkpointing == 2 else checkpointing)
    assert kept_bytes(trace) == kept
    assert peak_of(trace) == pytest.approx(peak, rel=0.02)


def test_two_passes_keep_more_than_one_and_less_than_twice_the_batch():
    trace, (kept, peak) = trace_step(config_of(3), BATCH, num_passes=2), really(config_of(3), num_passes=2)
    assert kept_bytes(trace) == kept
    assert peak_of(trace) == pytest.approx(peak, rel=0.02)
    assert 1.5 * kept_bytes(trace_step(config_of(3), BATCH)) < kept < kept_bytes(trace_step(config_of(3), 2 * BATCH))


@pytest.mark.parametrize("norm_position", ["post", "pre", "inner"])
def test_other_layers_and_dtypes(norm_position):
    config = config_of(4, norm_position=norm_position, ensemble="weighted_sum", norm="rms_norm")
    assert kept_bytes(trace_step(config, BATCH, Precision(torch.bfloat16))) == really(config, dtype=torch.bfloat16)[0]


def test_a_head_that_reads_all_layers_is_traced_at_its_width():
    config = config_of(6, head_inputs="all")
    assert kept_bytes(trace_step(config, BATCH, checkpointing=4)) == really(config, 4)[0]
    assert trace_step(config, BATCH).weights["head.0.weight"] == (6 + 6 * 2 * len(KINDS)) * 8 * 64


def test_the_layers_of_each_task_are_traced():
    config = config_of(3, tasks=["buy", "stay"], task_layers=2)
    assert kept_bytes(trace_step(config, BATCH, checkpointing=2)) == really(config, 2)[0]


def test_layers_that_differ_are_traced_each():
    layers = [{"interactions": ["linear"]}, *[{"interactions": ["self_attention", "linear"]}] * 5, {"norm": "none"}]
    config = config_of(1, layers=layers)
    assert kept_bytes(trace_step(config, BATCH, checkpointing=3)) == really(config, 3)[0]


def test_repeating_a_layer_is_as_good_as_tracing_all(monkeypatch):
    config, short = config_of(9), trace_step(config_of(9), BATCH, checkpointing=4)
    monkeypatch.setattr(step_trace, "_ALIKE", 100)
    step_trace._trace.cache_clear()
    assert trace_step(config, BATCH, checkpointing=4) == short
    assert [event.layer for event in short.events if event.kind == "leave" and event.name.count(".") == 2][:9] == [
        *range(9)
    ]


def test_a_wrong_middle_layer_would_show(monkeypatch):
    """Negative control: were the first layer to stand for the others, the sum would be wrong."""
    monkeypatch.setattr(step_trace, "_ALIKE", 1)
    config = config_of(4, num_embeddings_out=5)
    step_trace._trace.cache_clear()
    monkeypatch.setattr(step_trace, "_shortened", lambda config, recomputed: ([{}], [range(4)]))
    wrong = kept_bytes(trace_step(config, BATCH))
    step_trace._trace.cache_clear()
    assert abs(wrong / really(config)[0] - 1) > 0.02


def test_weights_and_operations_are_those_of_the_model():
    config = config_of(5)
    trace = trace_step(config, BATCH)
    model = DhenForClickPrediction(config, with_tables=False)
    assert trace.weights == {name: weight.numel() for name, weight in model.named_parameters()}
    assert sorted(name for own in trace.modules.values() for name in own) == sorted(trace.weights)
    with FlopCounterMode(display=False) as counter:
        inputs = torch.randn(BATCH, 5, 8, requires_grad=True)
        logits_B = model(inputs_embeds=inputs, dense=torch.randn(BATCH, 3)).logits
        binary_cross_entropy_with_logits(logits_B, torch.ones(BATCH)).backward()
    assert sum(work.flops for event in trace.events for work in event.work) == counter.get_total_flops()
    assert training_flops_per_sample(config) == counter.get_total_flops() / BATCH


def test_the_heads_of_further_tasks_count():
    config = config_of(2, tasks=["buy", "stay"], task_weights="uncertainty")
    model = DhenForClickPrediction(config, with_tables=False)
    assert trace_step(config, BATCH).weights == {name: weight.numel() for name, weight in model.named_parameters()}


def test_training_flops_are_those_of_the_formulas():
    """Forward, and twice as many backward, but as many for dots; half only, if nothing before the layer is trained."""

    def flops(entry: dict[str, object], **more: object) -> int:
        options = {"interactions": [entry], "head_mlp": [], "dense_mlp": [], "num_dense_features": 0}
        return training_flops_per_sample(config_of(1, **options | {"ensemble": "concat", "dropout": 0.0} | more))

    linear = {"kind": "linear", "num_embeddings": 5}
    head = 3 * 2 * 5 * 8  # 5 embeddings of 8 to one logit
    assert flops(linear) == 3 * 2 * 5 * 5 * 8 + head
    assert flops(linear, tasks=["buy", "stay"]) == flops(linear) + 2 * head
    dlrm = {"kind": "advanced_dlrm", "num_embeddings": 5, "over_arch": [16]}
    mlp, gate = 3 * 2 * (10 * 16 + 16 * 40), 3 * 2 * 10 * 4
    dots = 2 * 2 * 5 * 5 * 8  # their backward is one product
    biases = 2 * 2 * (16 + 40)  # of two experts: a product in the backward alone
    assert flops(dlrm) == mlp + dots + head
    layer_gate = 3 * 2 * 5 * 8
    assert flops(dlrm, gate="soft") - flops(dlrm) == layer_gate
    assert flops(dlrm | {"num_experts": 4}) == 2 * mlp + dots + gate + biases + head
    assert flops(dlrm | {"num_experts": 4, "experts_per_example": 1}) == mlp + dots + gate + biases // 2 + head
    attention = {"kind": "self_attention", "num_embeddings": 5, "feedforward_dim": 16}
    products = 3 * 2 * 5 * 8 * (3 * 8 + 8 + 2 * 16) + 3 * 2 * 5 * 5 * 8  # of rows by weights, and of W
    scores = 2 * 2 * 5 * 5 * 8  # of the forward; flash attention's backward computes them again
    assert flops(attention) == products + scores * 7 // 2 + head


EXPERTS = [
    {"experts": "ensembles", "num_experts": 4},
    {"experts": "interactions", "ensemble": "sum", "interactions": ["linear", "deep_cross_flattened"] * 2},
]


@pytest.mark.parametrize("checkpointing", ["none", "all", ["linear"]], ids=str)
@pytest.mark.parametrize("experts", EXPERTS, ids=lambda it: it["experts"])
def test_mixtures_of_experts_are_traced_as_if_all_were_equally_busy(experts, checkpointing, monkeypatch):
    config = config_of(5, **{"interactions": ["linear", "deep_cross_flattened"]} | experts)
    trace = trace_step(config, BATCH, checkpointing=checkpointing)
    monkeypatch.setattr(ModuleExperts, "is_even", True)
    kept, peak = really(config, checkpointing)
    assert kept_bytes(trace) == kept
    assert peak_of(trace) == pytest.approx(peak, rel=0.02)
    monkeypatch.undo()
    kept, peak = really(config, checkpointing)  # a router's choices; interactions differ in what they keep
    assert kept_bytes(trace) == pytest.approx(kept, rel=0.06)
    assert peak_of(trace) == pytest.approx(peak, rel=0.06)


def test_training_flops_are_those_of_the_chosen_experts():
    plain, more = config_of(1, interactions=["linear"]), {"interactions": ["linear"], "experts": "ensembles"}
    router = 3 * 2 * (5 + 1) * 8
    by_number = {
        (e, k): training_flops_per_sample(config_of(1, **more, num_experts=e, experts_per_example=k))
        for e, k in ((8, 1), (8, 2), (4, 2))
    }
    linear = 3 * 2 * (5 + 1) * 2 * 8
    base = training_flops_per_sample(plain)
    assert by_number == {(e, k): base + (k - 1) * linear + e * router for e, k in by_number}


def test_too_many_layers_and_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="9, but the model has 2 layers"):
        trace_step(config_of(2), BATCH, checkpointing=9)
    with pytest.raises(ValueError, match="unknown interaction of this model: 'linea'"):
        trace_step(config_of(2), BATCH, checkpointing=["linea"])


class Pairing(Interaction):
    """A user's own, of modules that return several tensors."""

    def __init__(self, context: InteractionContext) -> None:
        super().__init__(context)
        self.attention = torch.nn.MultiheadAttention(context.embedding_dim, 1, batch_first=True)
        self.mix = MixEmbeddings(context.num_inputs, context.num_outputs)

    def forward(self, x_BMD: torch.Tensor, dense_BN: torch.Tensor) -> torch.Tensor:
        return self.mix(self.attention(x_BMD, x_BMD, x_BMD)[0])


def test_a_users_module_may_return_several_tensors():
    register_interaction("pairing_of_the_trace_test")(Pairing)
    trace = trace_step(config_of(3, interactions=["pairing_of_the_trace_test", "linear"]), BATCH)
    assert sum(event.kind == "enter" and event.name.endswith("attention") for event in trace.events) >= 2 * 3


def test_an_evaluation_keeps_nothing_but_what_it_works_on():
    config, most = config_of(6), evaluation_bytes(config_of(6), 4 * BATCH)
    model = DhenForClickPrediction(config, with_tables=False).eval()
    inputs = torch.randn(4 * BATCH, 5, 8), torch.randn(4 * BATCH, 3), torch.ones(4 * BATCH)
    with torch.no_grad(), LiveMemory([*model.parameters(), *model.buffers(), *inputs]) as memory:
        model(inputs_embeds=inputs[0], dense=inputs[1], labels=inputs[2])
    assert most == pytest.approx(memory.peak, rel=0.02)
    assert most < kept_bytes(trace_step(config, 4 * BATCH))
