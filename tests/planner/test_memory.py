"""The predicted peak of a rank is that of a real run, under every ZeRO stage, HSDP, recomputation, offload and bf16."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from deepspeed.utils import set_z3_leaf_modules

from dhen.config.dhen_section import DhenSection
from dhen.config.ds_config import DsConfig
from dhen.model.configuration_dhen import DhenConfig
from dhen.model.features import SparseIds
from dhen.model.layer import DhenLayer
from dhen.model.parts import part_of
from dhen.planner.job import Job
from dhen.planner.live_memory import LiveMemory
from dhen.planner.machine import read_machine
from dhen.planner.memory import predict_memory
from dhen.planner.memory_setting import MemorySetting
from dhen.planner.minimum_set import Planner
from dhen.planner.step_trace import trace_step
from dhen.planner.technique import Technique
from dhen.planner.zero3_gathering import Gathering, Limits
from dhen.runtime.topology import Topology
from dhen.training import parallelize as parallelize_module
from dhen.training.loop import summed_loss
from dhen.training.parallelize import lay_out, parallelize
from tests.planner.test_step_trace import kept_bytes
from tests.ranks import run_ranks

DEPTH, BATCH, TABLES = 3, 64, 4
TOLERANCE = 0.04
"""Tensors that gloo's threads let go late, and inputs, are left out of the prediction; the model here is tiny."""
FP32 = [
    Technique("dp"),
    Technique("dp", checkpointing=DEPTH),
    Technique("zero1"),
    Technique("zero2"),
    Technique("zero2", checkpointing=2),
    Technique("zero2", offload="optimizer"),
    Technique("hsdp"),
    Technique("hsdp", checkpointing=DEPTH),
    Technique("zero3"),
    Technique("zero3", checkpointing=DEPTH, offload="parameters"),
]
BF16 = [Technique("dp"), Technique("zero2"), Technique("hsdp"), Technique("zero3", checkpointing=DEPTH)]


EXPERTS = {"kind": "advanced_dlrm", "num_experts": 8, "over_arch": [128]}
INTERACTIONS = ("advanced_dlrm", "self_attention", "linear", "deep_cross_flattened")


def planner_of(precision: str, depth: int = DEPTH, interactions: Sequence[Any] = INTERACTIONS, **layer: Any) -> Planner:
    config = DhenConfig(
        num_dense_features=5,
        sparse_features=[{"name": f"C{index}", "num_embeddings": 50} for index in range(TABLES)],
        embedding_dim=16,
        num_layers=depth,
        num_embeddings_out=6,
        interactions=list(interactions),
        **layer,
    )
    machine = read_machine("cpu", ranks_per_node=2)
    return Planner(Job(config, BATCH, machine, nodes=2, precision=precision))


def measured_peaks(
    topology: Topology,
    precision: str,
    techniques: list[Technique],
    accumulation: int = 1,
    interactions: Sequence[Any] = INTERACTIONS,
    frozen: frozenset[str] = frozenset(),
    **layer: Any,
) -> list[int]:
    """Most bytes alive in a step of this rank, by technique."""
    planner, peaks = planner_of(precision, interactions=interactions, **layer), []
    for technique in techniques:
        whole = planner.whole_ds_config(technique)
        section = DhenSection(**whole.pop("dhen", {}))
        optimizer = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True, "fused": True}}
        settings = whole | {"optimizer": optimizer, "gradient_clipping": 0.0}
        settings |= {"train_micro_batch_size_per_gpu": BATCH, "gradient_accumulation_steps": accumulation}
        del settings["train_batch_size"]
        generator = torch.Generator().manual_seed(topology.rank)
        with LiveMemory() as memory:
            layout = lay_out(planner.job.config, topology, DsConfig("test", settings, section))
            model = parallelize(layout, frozen=frozen)
            of_steps = []
            for micro_step in range(5 * accumulation):
                if micro_step % accumulation == 0:
                    memory.reset_peak()
                sparse = SparseIds(torch.randint(0, 50, (TABLES * BATCH,), generator=generator), num_features=TABLES)
                dense_BN, labels_B = torch.randn(BATCH, 5, generator=generator), torch.ones(BATCH)
                loss, _ = summed_loss(model.forward(model.look_up(sparse), dense_BN, sparse), labels_B, 1)
                model.step(loss / BATCH)
                of_steps.append(memory.peak)
        peaks.append(min(of_steps[accumulation - 1 :: accumulation][3:]))  # by then stage 3 knows the order
    return peaks


def fullest_ranks(predicted: Sequence[int], measure: Any, *arguments: Any) -> list[int]:
    """The fullest rank's peak, by technique. What takes more than predicted is measured up to twice more.

    The least counts: on a busy machine gloo's threads let tensors go late, and that can only make a peak larger.
    """
    peaks = [sys.maxsize] * len(predicted)
    for _ in range(3):
        measured = run_ranks(4, measure, *arguments, local_size=2)
        peaks = [min(peak, max(of_ranks)) for peak, *of_ranks in zip(peaks, *measured, strict=True)]
        if all(peak <= (1 + TOLERANCE) * size for peak, size in zip(peaks, predicted, strict=True)):
            break
    return peaks


@pytest.mark.parametrize(("precision", "techniques"), [("fp32", FP32), ("bf16", BF16)])
def test_the_predicted_peak_is_the_fullest_ranks(precision, techniques):
    assert_predicted(planner_of(precision), techniques, precision, techniques)


def test_the_memory_of_gates_is_predicted():
    techniques = [Technique("dp"), Technique("zero2", checkpointing=2), Technique("zero3")]
    measure = partial(measured_peaks, gate="hard")
    assert_predicted(planner_of("fp32", gate="hard"), techniques, "fp32", techniques, measure=measure)


def test_the_memory_of_a_mixture_of_experts_is_predicted():
    """Wide weights: 8 experts of 128 units."""
    techniques, interactions = (
        [Technique("dp"), Technique("zero2", checkpointing=2), Technique("hsdp")],
        [EXPERTS, "linear"],
    )
    assert_predicted(planner_of("fp32", interactions=interactions), techniques, "fp32", techniques, 1, interactions)


@pytest.mark.parametrize(
    "experts",
    [
        {"experts": "ensembles", "num_experts": 4, "capacity_factor": 2.0},
        {"experts": "interactions", "ensemble": "sum"},
    ],
    ids=lambda it: it["experts"],
)
def test_the_memory_of_layers_of_experts_is_predicted(experts):
    techniques = [Technique("dp"), Technique("zero2", checkpointing=2), Technique("hsdp")]
    assert_predicted(
        planner_of("fp32", **experts), techniques, "fp32", techniques, measure=partial(measured_peaks, **experts)
    )


def assert_predicted(
    planner: Planner, techniques: list[Technique], *arguments: Any, measure: Any = measured_peaks
) -> None:
    """arguments: of `measured_peaks`."""
    predicted = [planner.predict(technique).memory for technique in techniques]
    peaks = fullest_ranks([use.peak for use in predicted], measure, *arguments)
    for technique, use, peak in zip(techniques, predicted, peaks, strict=True):
        assert use.peak == pytest.approx(peak, rel=TOLERANCE), f"{technique}: {use}"


def test_frozen_weights_have_no_gradients_and_no_optimizer_states():
    """Activations count as if none were frozen, so the prediction is a little too large: by 6 to 7 % here."""
    techniques, frozen = [Technique("dp"), Technique("hsdp")], frozenset({"layers.1", "layers.2"})
    planner = planner_of("fp32")
    trace, tables = trace_step(planner.job.config, BATCH), planner.table_bytes(Technique())[0]
    names = frozenset(name for name in trace.weights if part_of(name, DEPTH) in frozen)
    settings = [planner.setting(technique) for technique in techniques]
    predicted = [predict_memory(replace(trace, frozen=names), setting).peak + tables for setting in settings]
    peaks = fullest_ranks(predicted, measured_peaks, "fp32", techniques, 1, INTERACTIONS, frozen)
    for technique, ours, peak in zip(techniques, predicted, peaks, strict=True):
        assert (1 - TOLERANCE) * peak < ours < 1.12 * peak, technique
        assert ours < planner.predict(technique).memory.peak * (0.85 if technique.scheme == "dp" else 1)


def peaks_of_whole_layers(topology: Topology, techniques: list[Technique]) -> list[int]:
    """Like `measured_peaks`, where stage 3 gathers whole layers as it does for compiled ones.

    The layers run as written, because operations inside compiled code cannot be counted.
    """
    parallelize_module.compile_layers = lambda model, *_: set_z3_leaf_modules(model, [DhenLayer])
    return measured_peaks(topology, "fp32", techniques)


def test_the_weights_of_a_compiled_layer_are_counted_together():
    techniques = [Technique("zero3"), Technique("zero3", checkpointing=DEPTH), Technique("hsdp")]
    planner = planner_of("fp32")
    traces = [trace_step(planner.job.config, BATCH, checkpointing=each.checkpointing) for each in techniques]
    settings, tables = [planner.setting(each) for each in techniques], planner.table_bytes(Technique())[0]
    whole, apart = (
        [predict_memory(trace, setting).peak + tables for trace, setting in zip(variant, settings, strict=True)]
        for variant in ([trace.of_compiled_layers(4) for trace in traces], traces)
    )
    peaks = fullest_ranks(whole, peaks_of_whole_layers, techniques)
    assert whole == pytest.approx(peaks, rel=TOLERANCE)
    assert all(ours < (1 - TOLERANCE) * peak for ours, peak in zip(apart, peaks, strict=True))


def test_gradients_summed_over_micro_steps_are_held_meanwhile():
    techniques = [Technique("dp"), Technique("zero2", checkpointing=DEPTH), Technique("hsdp")]
    planner, predicted = planner_of("fp32"), []
    for technique in techniques:
        trace = trace_step(planner.job.config, BATCH, checkpointing=technique.checkpointing)
        setting = replace(planner.setting(technique), accumulates=True)
        predicted.append(predict_memory(trace, setting).peak + planner.table_bytes(Technique())[0])
    peaks = fullest_ranks(predicted, measured_peaks, "fp32", techniques, 2)
    for technique, ours, peak in zip(techniques, predicted, peaks, strict=True):
        # Of stage 3 a little more is predicted than there is: it gathers less ahead between micro steps.
        assert (1 - TOLERANCE) * peak < ours < (1 + 2 * TOLERANCE) * peak, technique


@pytest.mark.parametrize(
    ("scheme", "forgotten"),
    [
        ("zero2", {"master_bytes": 0}),
        ("zero2", {"gradient_bytes": 0}),
        ("hsdp", {"state_bytes": 0}),
        ("hsdp", {"weight_bytes": 0}),
        ("hsdp", {"stage": 2}),
    ],
)
def test_what_is_forgotten_shows(scheme, forgotten):
    """Negative control: each part is more than the tolerance."""
    planner = planner_of("fp32")
    trace, setting = trace_step(planner.job.config, BATCH), planner.setting(Technique(scheme))
    right = predict_memory(trace, setting).peak + planner.table_bytes(Technique())[0]
    wrong = predict_memory(trace, replace(setting, **forgotten)).peak + planner.table_bytes(Technique())[0]
    assert abs(wrong / right - 1) > TOLERANCE


def test_parts_add_up_and_name_their_moment():
    use = planner_of("fp32").predict(Technique("zero3")).memory
    assert use.peak == sum(use.parts.values())
    assert use.moment.partition(",")[0] in ("forward", "backward", "reduction", "gathering", "optimizer step")


def test_offload_goes_to_the_host_of_a_gpu_and_stays_where_there_is_none():
    trace = trace_step(planner_of("fp32").job.config, BATCH)
    setting = MemorySetting(3, 4, offload_optimizer=1.0, offload_param=True)
    on_gpu, on_cpu = (predict_memory(trace, setting, is_gpu=is_gpu) for is_gpu in (True, False))
    assert on_gpu.host >= on_cpu.parts["offloaded"] > 0
    assert on_gpu.peak < on_cpu.peak
    steps_on_host = replace(setting, temporaries="all", reduce_bucket=1000, shard_size=1)
    moment = predict_memory(trace, steps_on_host, is_gpu=True).moment
    assert moment != "optimizer step", "nothing of it is on the device"
    half = predict_memory(trace, replace(setting, offload_optimizer=0.5), is_gpu=True)
    assert 0 < half.host < on_gpu.host


def test_an_evaluation_may_need_more_than_a_step():
    trace, setting = trace_step(planner_of("fp32").job.config, BATCH), MemorySetting(0, 1)
    step, evaluated = (predict_memory(trace, setting, evaluation=size) for size in (0, 1 << 30))
    assert step.moment != "evaluation" == evaluated.moment
    assert evaluated.peak > 1 << 30


def test_offloaded_activations_are_there_for_their_backward_alone():
    config = planner_of("fp32", depth=8).job.config
    trace, setting = trace_step(config, BATCH), MemorySetting(2, 4, reduce_bucket=1000)
    peaks = [predict_memory(trace, replace(setting, offload_activations=n)).parts["activations"] for n in (0, 4, 8)]
    assert peaks[0] > peaks[1] > peaks[2]
    hosts = [predict_memory(trace, replace(setting, offload_activations=n), is_gpu=True).host for n in (0, 4, 8)]
    assert hosts[0] == 0 < hosts[1] < hosts[2] < kept_bytes(trace)


WEIGHTS = {"a.weight": 100, "a.bias": 10, "b.weight": 200, "c.weight": 300}
MODULES = {"a": ("a.weight", "a.bias"), "b": ("b.weight",), "c": ("c.weight",)}
VISITS = ["a", "b", "c", "c", "b", "a"]


def gathering(**limits: int) -> Gathering:
    values = {"param_persistence_threshold": 0, "prefetch_bucket_size": 0, "max_reuse_distance": 0}
    return Gathering(WEIGHTS, MODULES, VISITS, Limits(**values | limits), shard_size=4)


def test_a_module_has_its_weights_while_it_is_entered():
    weights = gathering()
    weights.enter("a")  # two weights: gathered side by side, then copied out
    assert (weights.peak, weights.elements) == (112 + 110, 110)
    weights.leave("a")
    assert weights.elements == 0
    weights.enter("b")  # one weight is its buffer
    assert (weights.peak, weights.elements) == (200, 200)
    assert weights.sent == [112, 200]


def test_small_weights_stay_and_those_needed_soon_too():
    weights = gathering(param_persistence_threshold=50, max_reuse_distance=400)
    assert weights.elements == 10
    for module in ("a", "b", "c"):
        weights.enter(module)
        weights.leave(module)
    assert weights.elements == 10 + 300  # c comes again at once, and a and b not within 400 elements
    weights.enter("c")
    assert sum(weights.sent) == 100 + 200 + 300


def test_weights_are_gathered_ahead_within_two_limits():
    weights = gathering(prefetch_bucket_size=250)
    weights.enter("a")
    assert weights.elements == 110 + 500  # b alone is less than the bucket, so c comes too
    assert gathering(prefetch_bucket_size=150)._ahead() == ["a.weight", "a.bias", "b.weight"]
    capped = gathering(prefetch_bucket_size=250, max_live_parameters=111)
    capped.enter("a")
    assert capped.elements == 110 + 200
