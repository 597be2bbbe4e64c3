"""The time model by hand, on steps simple enough to add up."""

import math
from dataclasses import replace

import pytest

from dhen.planner.machine import Machine
from dhen.planner.memory import gathering_of
from dhen.planner.memory_setting import MemorySetting
from dhen.planner.step_time import compute_seconds, step_seconds
from dhen.planner.step_trace import StepTrace, Work, trace_step
from dhen.planner.zero3_gathering import Limits
from tests.planner.test_memory import planner_of

BATCH, DEPTH = 64, 4
MACHINE = Machine(
    name="two nodes of two", source="made up", is_gpu=True, ranks_per_node=2, memory_gib=1, host_memory_gib=8,
    flops={"fp32": 1e9, "tf32": 2e9, "bf16": 4e9}, memory_bytes_per_second=1e9, local_bytes_per_second=1e9,
    node_bytes_per_second=1e7, host_bytes_per_second=1e8, host_memory_bytes_per_second=1e8,
)  # fmt: skip


@pytest.fixture(scope="module")
def trace() -> StepTrace:
    return trace_step(planner_of("fp32", DEPTH).job.config, BATCH)


def test_an_operation_takes_what_it_needs_most():
    work = [Work(flops=2 * 10**9, bytes=10**9), Work(flops=0, bytes=3 * 10**9), Work(flops=1, bytes=1)]
    slow_start = replace(MACHINE, seconds_per_operation=0.5)
    assert compute_seconds(work, slow_start) == pytest.approx(2 + 3 + 0.5)
    assert compute_seconds(work, MACHINE, "bf16") == pytest.approx(1 + 3, abs=1e-6)
    assert compute_seconds(work, replace(MACHINE, compute_efficiency=0.5)) == pytest.approx(4 + 3, abs=1e-6)


def test_the_layers_come_forward_and_backward_with_all_gradients(trace):
    forward, backward = trace.events[: trace.loss_at], trace.events[trace.loss_at :]
    for events, layers in ((forward, range(DEPTH)), (backward, reversed(range(DEPTH)))):
        assert list(dict.fromkeys(each.layer for each in events if each.layer is not None)) == list(layers)
    assert sum(trace.weights[each.name] for each in backward if each.kind == "gradient") == trace.num_weights


def layer_weights(trace: StepTrace) -> int:
    """Elements of a layer's weights."""
    return sum(elements for name, elements in trace.weights.items() if name.startswith("model.layers.1."))


@pytest.mark.parametrize(("stage", "passes"), [(0, 2), (1, 3), (2, 3)])
def test_data_parallel_stages_wait_for_their_bytes(trace, stage, passes):
    """A ring of four ranks over the nodes' links: passes x P x 3/4, at the links' pace."""
    setting = MemorySetting(stage, 1 if stage == 0 else 4)
    waiting = step_seconds(trace, setting, MACHINE, nodes=2).waiting
    assert waiting == pytest.approx(passes * 4 * trace.num_weights * 3 / 4 / 1e7, rel=0.01)


def test_hybrid_sharding_hides_what_crosses_nodes_under_the_backward(trace):
    limits = Limits(param_persistence_threshold=0, prefetch_bucket_size=0, max_reuse_distance=0)
    across = 2 * 4 * trace.num_weights * 1 / 2 / 1e7
    inside = 3 * 4 * trace.num_weights * 1 / 2 / 1e9
    layer = layer_weights(trace)
    hybrid = MemorySetting(3, 2, num_replicas=2, reduce_bucket=layer, limits=limits)
    instant = replace(MACHINE, flops={"fp32": 1e15, "tf32": 1e15}, memory_bytes_per_second=1e15)
    hidden, shown = (step_seconds(trace, hybrid, machine, nodes=2).waiting for machine in (MACHINE, instant))
    assert shown == pytest.approx(across + inside, rel=0.05)
    assert hidden < 0.4 * shown  # all but the last layer's
    one_bucket = replace(hybrid, reduce_bucket=2 * trace.num_weights)
    assert step_seconds(trace, one_bucket, MACHINE, nodes=2).waiting > 0.9 * shown, "it leaves when all is computed"
    flat = step_seconds(trace, MemorySetting(3, 4, limits=limits), instant, nodes=2).waiting
    assert flat == pytest.approx(3 * 4 * trace.num_weights * 3 / 4 / 1e7, rel=0.05)


def test_waiting_at_once_shows_what_crosses_nodes(trace):
    """On ranks that wait for their reduce-scatter, as gloo's do."""
    layer = layer_weights(trace)
    hybrid = MemorySetting(3, 2, num_replicas=2, reduce_bucket=layer)
    gloo = replace(MACHINE, is_gpu=False)
    hidden, shown = (
        step_seconds(trace, replace(hybrid, async_all_reduce=is_async), gloo, nodes=2).waiting
        for is_async in (True, False)
    )
    across = 2 * 4 * trace.num_weights * 1 / 2 / 1e7
    assert shown > across > 2 * hidden


def test_a_gpus_stage_3_gathers_and_reduces_under_the_backward(trace):
    """Two thirds as much communication as compute: all of it is hidden but what the first layer and the last leave."""
    layer = layer_weights(trace)
    limits = Limits(0, prefetch_bucket_size=layer, max_live_parameters=2 * layer, max_reuse_distance=0)
    setting = MemorySetting(3, 4, reduce_bucket=layer, limits=limits)
    compute = step_seconds(trace, setting, MACHINE, nodes=1).compute
    rate = 4.5 * 4 * trace.num_weights * 3 / 4 / compute
    alike = replace(MACHINE, ranks_per_node=4, local_bytes_per_second=rate)
    hidden, shown = (
        step_seconds(trace, setting, replace(alike, can_overlap=can), nodes=1).waiting for can in (True, False)
    )
    weights = gathering_of(trace, setting)
    for event in trace.events:
        weights.follow(event)
    assert shown == pytest.approx(4 * (sum(weights.sent) + trace.num_weights) * 3 / 4 / rate, rel=0.01)
    assert hidden < 0.4 * shown


@pytest.mark.parametrize("stage", [1, 2])
def test_each_bucket_is_a_message(trace, stage):
    """A hop's time for each way of each, on a ring of two nodes' four ranks; then the weights are gathered at once."""
    slow = replace(MACHINE, is_gpu=False, seconds_per_collective=1.0)
    room = math.ceil(trace.num_weights / 4)
    one, several = (
        step_seconds(trace, MemorySetting(stage, 4, reduce_bucket=size), slow, nodes=2).waiting
        for size in (trace.num_weights, room)
    )
    more = (several - one) / (2 * 3)
    assert more == pytest.approx(3, abs=0.01) if stage == 1 else 3 <= round(more) <= 6


def test_recomputation_costs_a_forward(trace):
    config = planner_of("fp32", DEPTH).job.config
    setting = MemorySetting(0, 1)
    plain, recomputed = (
        step_seconds(each, setting, MACHINE, nodes=1).compute
        for each in (trace, trace_step(config, BATCH, checkpointing="all"))
    )
    forward = sum(compute_seconds(event.work, MACHINE) for event in trace.events[: trace.loss_at])
    assert recomputed == pytest.approx(plain + forward, rel=0.1)


def test_an_offloaded_optimizer_pays_for_the_host(trace):
    plain = step_seconds(trace, MemorySetting(2, 4), MACHINE, nodes=2).optimizer
    offloaded = step_seconds(trace, MemorySetting(2, 4, offload_optimizer=1.0), MACHINE, nodes=2).optimizer
    shard = trace.num_weights / 4
    assert plain == pytest.approx(shard * (4 + 4 + 2 * 12) / 1e9)
    assert offloaded == pytest.approx(shard * (4 + 4 + 2 * 12 + 4 + 4) / 1e8)


def test_offloaded_activations_wait_for_a_slow_host_alone(trace):
    def waiting(layers: int, rate: float) -> float:
        machine = replace(MACHINE, host_bytes_per_second=rate)
        return step_seconds(trace, MemorySetting(0, 1, offload_activations=layers), machine, nodes=1).waiting

    none, fast = waiting(0, 1e6), waiting(DEPTH, 1e12)
    assert fast == pytest.approx(none, abs=1e-6)
    assert none < waiting(1, 1e6) < waiting(DEPTH, 1e6)
    moved = sum(event.kept for event in trace.events[: trace.loss_at] if event.layer is not None)
    assert waiting(DEPTH, 1e3) - none == pytest.approx(2 * moved / 1e3, rel=0.02), "out and back"


def test_micro_steps_share_the_updates_time(trace):
    one, four = (step_seconds(trace, MemorySetting(1, 4), MACHINE, nodes=2, accumulation_steps=k) for k in (1, 4))
    assert four.compute == one.compute
    assert four.waiting == pytest.approx(one.waiting / 4)
    assert four.optimizer == pytest.approx(one.optimizer / 4)


@pytest.mark.parametrize("is_gpu", [True, False])
def test_the_host_starts_the_step_and_loads_its_rows(trace, is_gpu):
    """A GPU hides both behind its step; a CPU rank does all of it itself."""
    setting = MemorySetting(2, 4)
    machine = replace(MACHINE, is_gpu=is_gpu, seconds_per_step={2: 0.25}, seconds_per_value=1e-3)
    alone = step_seconds(trace, setting, replace(MACHINE, is_gpu=is_gpu), nodes=2).total
    for num_values in (0, 1_000_000):
        host = num_values * 1e-3
        total = step_seconds(trace, setting, machine, nodes=2, num_values=num_values).total
        assert total == pytest.approx(max(alone, 0.25, host) if is_gpu else alone + 0.25 + host)


def test_a_job_loads_its_dense_values_and_ids():
    job = planner_of("fp32", DEPTH).job
    tables = job.config.tables
    assert job.values_per_example == job.config.num_dense_features + len(tables)
    ten = replace(job, ids_per_bag={tables[0].name: 10.0})
    assert ten.values_per_example == job.values_per_example + 9
