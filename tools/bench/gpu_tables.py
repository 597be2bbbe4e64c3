"""Parts of tools/gpu_check.py that need FBGEMM: the tables' bandwidth, a DCN-V2 on Criteo's tables, predicted memory.

A part calls `report(case, **figures)` for each result as it comes.
"""

import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.profiler import ProfilerActivity

from dhen.config.ds_config import DsConfig, Recipe, read_ds_config
from dhen.config.training_arguments import TrainingArguments
from dhen.data.loading.batches import Batch
from dhen.model.configuration_dhen import DhenConfig
from dhen.model.features import SparseIds
from dhen.model.sparse_feature import SparseFeature
from dhen.planner.minimum_set import gib
from dhen.runtime.topology import Topology
from dhen.tables.lookup import make_lookup
from dhen.tables.placement.costs import StepSetting, read_costs
from dhen.tables.placement.plan import PlacementOptions, place_tables
from dhen.tables.sharded_tables import ShardedTables
from dhen.training.loop import with_ids_ahead
from dhen.training.memory_plan import MemoryPlan
from dhen.training.parallel_model import ParallelDhen
from dhen.training.parallelize import Layout, lay_out, parallelize
from tools.bench.clock import now
from tools.bench.gpu_dense import (
    COPY_RATE,
    NUM_DENSE,
    Report,
    Size,
    dense_config,
    forget_peak,
    one_case,
    peak_gib,
    profiled,
    speed,
    step_seconds,
)
from tools.bench.small_work import TABLE_LEARNING_RATE, criteo_tables, random_batch

ROOT = Path(__file__).resolve().parents[2]
MULTI_HOT = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)
"""Ids per example and feature of MLPerf's DLRM-DCNv2."""
_ROUNDS, _WARM = 7, 2
_BATCHES, _TIMED = 4, 20

LookUp = Callable[[SparseIds], Tensor]
"""Embeddings of a batch's ids, whose backward updates the tables."""


def measure_tables(size: Size, topology: Topology, rates: dict[str, float], report: Report) -> None:
    """FBGEMM's kernels alone, then the project's tables around them: time, and the share of the copy's bandwidth."""
    device, tables = topology.device, criteo_tables(size.rows)
    batches = [random_batch(tables, size.table_batch, seed).sparse.to(device) for seed in range(2)]
    for name, build in (("FBGEMM's kernels", kernels_alone), ("sharded tables", sharded_tables)):
        for dtype in ("fp32", "fp16"):
            forget_peak(device)
            start = now(device)
            look_up = build(tables, size, dtype, topology)
            built = now(device) - start
            seconds = _both_seconds(look_up, batches, device)
            moved = least_bytes(batches[0], size.dim, int(dtype[2:]) // 8)
            report(
                f"{name}, {dtype}", **_bandwidth(seconds, moved, rates), GiB=peak_gib(device), **{"built in s": built}
            )
            del look_up


def kernels_alone(tables: Sequence[SparseFeature], size: Size, dtype: str, topology: Topology) -> LookUp:
    """FBGEMM's lookup of bags with one id each."""
    shapes = [(table.num_embeddings, size.dim) for table in tables]
    lookup = make_lookup(shapes, topology.device, "rowwise_adagrad", dtype, rounds_stochastically=dtype == "fp16")
    lookup.set_learning_rate(TABLE_LEARNING_RATE)
    offsets = torch.arange(len(tables) * size.table_batch + 1, device=topology.device)
    return lambda sparse: lookup(sparse.ids, offsets)


def sharded_tables(tables: Sequence[SparseFeature], size: Size, dtype: str, topology: Topology) -> LookUp:
    """The project's tables, none of them cut."""
    setting = StepSetting(1, 1, size.table_batch, table_dtype=dtype)
    placement = place_tables(
        tables, size.dim, setting, read_costs("gpu"), options=PlacementOptions(max_column_shards=1)
    )
    ours = ShardedTables(tables, size.dim, placement, topology, table_dtype=dtype)
    ours.set_learning_rate(TABLE_LEARNING_RATE)
    return ours


def least_bytes(sparse: SparseIds, dim: int, weight_bytes: int) -> tuple[int, int]:
    """The fewest bytes that a lookup and an update of tables with row-wise Adagrad move, at one id per bag.

    A lookup reads the ids and each used row, and writes float32 embeddings. The update reads the ids and the
    embeddings' gradients, and reads and writes each used row and its state.
    """
    used = sum(len(torch.unique(ids)) for ids in sparse.ids.view(sparse.num_features, -1))
    pooled_and_ids = len(sparse.ids) * (4 * dim + 8)
    return pooled_and_ids + used * dim * weight_bytes, pooled_and_ids + 2 * used * (dim * weight_bytes + 4)


def _both_seconds(look_up: LookUp, batches: Sequence[SparseIds], device: torch.device) -> tuple[float, float]:
    """Median seconds of a forward and of a backward."""
    gradient = torch.randn_like(look_up(batches[0]))
    forward, backward = [], []
    for number in range(_WARM + _ROUNDS):
        start = now(device)
        out = look_up(batches[number % len(batches)])
        middle = now(device)
        out.backward(gradient)
        end = now(device)
        forward.append(middle - start)
        backward.append(end - middle)
    return statistics.median(forward[_WARM:]), statistics.median(backward[_WARM:])


def _bandwidth(
    seconds: tuple[float, float], moved: tuple[int, int], rates: dict[str, float]
) -> dict[str, float | None]:
    (forward, backward), both = seconds, sum(moved) / sum(seconds) / 1e9
    figures = {"forward ms": forward * 1e3, "backward ms": backward * 1e3, "GB/s": both}
    if copy := rates.get(COPY_RATE):
        figures["share of copy, forward"] = moved[0] / forward / 1e9 / copy
        figures["share of copy, backward"] = moved[1] / backward / 1e9 / copy
        figures["share of copy"] = both / copy
    return figures


def read_setup(name: str, batch: int, section: dict[str, Any]) -> DsConfig:
    """A ds_config of the project for one rank, with changes to its `dhen` section."""
    recipe = Recipe(TrainingArguments(per_device_train_batch_size=batch, learning_rate=1e-3), world_size=1)
    ds_config = read_ds_config(ROOT / "ds_configs" / f"{name}.json", recipe)
    return DsConfig(ds_config.path, ds_config.deepspeed, ds_config.dhen.model_copy(update=section))


def build(layout: Layout) -> ParallelDhen:
    """The model, ready to train."""
    model = parallelize(layout)
    model.set_learning_rates(1e-3, TABLE_LEARNING_RATE)
    return model


def train(model: ParallelDhen, batches: Sequence[Batch], steps: int) -> None:
    """Take steps over the batches in turn, with the next batch's ids sent ahead, as the training loop does."""
    on_device = [batch.to(model.topology.device) for batch in batches]
    for batch, ids in with_ids_ahead(model, itertools.islice(itertools.cycle(on_device), steps)):
        logits_B = model.score(model.look_up(ids), batch.dense_BN, batch.sparse)
        model.step(binary_cross_entropy_with_logits(logits_B, batch.labels_B))
    model.settle()


def measure_dcn(size: Size, topology: Topology, rates: dict[str, float], report: Report) -> None:
    """Whole training steps of a DCN-V2 shaped as MLPerf's on Criteo's tables: one id per feature, then its many."""
    tables, is_full = criteo_tables(size.rows), size.batch > 1000
    config = DhenConfig(
        num_dense_features=NUM_DENSE,
        sparse_features=[{"name": table.name, "num_embeddings": table.num_embeddings} for table in tables],
        embedding_dim=size.dim,
        num_layers=1,
        num_embeddings_out=len(tables) + 1,
        interactions=[{"kind": "deep_cross_flattened", "num_cross_layers": 3, "cross_width": 512 if is_full else 8}],
        dense_mlp=[512, 256] if is_full else [8],
        head_mlp=[1024, 1024, 512, 256] if is_full else [8],
    )
    cases: list[tuple[str, int, Sequence[int] | None, dict[str, Any]]] = [
        ("one id", size.batch, None, {}),
        ("one id, compiled", size.batch, None, {"compile": "layers"}),
        ("one id, fp16 tables", size.batch, None, {"table_dtype": "fp16"}),
        ("one id, large batch", 8 * size.batch, None, {}),
        ("214 ids", size.batch, MULTI_HOT, {}),
    ]
    for case, batch, counts, section in cases:
        case = f"{case}, batch {batch}"
        with one_case(case, topology.device, report):
            model = build(lay_out(config, topology, read_setup("zero0_bf16", batch, section)))
            batches = [random_batch(tables, batch, seed, counts) for seed in range(_BATCHES)]
            train(model, batches, 5)
            start = now(topology.device)
            train(model, batches, _TIMED)
            seconds = (now(topology.device) - start) / _TIMED
            figures = speed(config, batch, seconds, rates)
            figures |= host_work(functools.partial(train, model, batches, 4), steps=4)
            report(case, **figures, GiB=peak_gib(topology.device))
        model = None


def host_work(call: Callable[[], object], steps: int) -> dict[str, Any]:
    """What the host does in a step: kernels that it starts, waits for the device and their milliseconds, and the
    operations that take it longest, as milliseconds of their own.
    """
    events = profiled(call, [ProfilerActivity.CPU, ProfilerActivity.CUDA])
    on_host = [each for each in events if each.device_type == DeviceType.CPU]
    starts = sum(each.count for each in on_host if each.key.startswith(("cudaLaunchKernel", "cuLaunchKernel")))
    waits = [each for each in on_host if each.key.endswith("Synchronize")]
    slowest = sorted(on_host, key=lambda each: -each.self_cpu_time_total)[:12]
    return {
        "kernels": starts / steps,
        "waits": sum(each.count for each in waits) / steps,
        "ms of waits": sum(each.self_cpu_time_total for each in waits) / steps / 1e3,
        "slowest": {each.key[:80]: round(each.self_cpu_time_total / steps / 1e3, 4) for each in slowest},
    }


SETUPS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("zero0", {}),
    ("zero0_bf16", {}),
    ("zero0_bf16", {"compile": "layers"}),
    ("zero0_bf16", {"activation_checkpointing": "all"}),
    ("zero0_bf16", {"activation_offload": "all"}),
    ("zero2_bf16", {}),
    ("zero2_offload_bf16", {}),
    ("zero3_bf16", {}),
)
"""ds_configs whose memory is predicted, and changes to their `dhen` section. ZeRO-3 is last: its engine stays alive."""


def measure_memory(size: Size, topology: Topology, rates: dict[str, float], report: Report) -> None:
    """Predicted and measured peak memory of whole training steps, and their time, by ds_config."""
    config = dense_config(size, size.middle)
    device = topology.device
    batches = [random_batch(config.tables, size.batch, seed) for seed in range(2)]
    for name, section in SETUPS:
        case = ", ".join([name, *(f"{key} {value}" for key, value in section.items())])
        model = None
        with one_case(case, device, report):
            ds_config = read_setup(name, size.batch, section)
            plan = MemoryPlan.of(config, ds_config, 1, size.batch)
            layout = lay_out(config, topology, ds_config)
            use = plan.use(layout)
            model = build(layout)
            built = peak_gib(device)
            forget_peak(device)
            seconds, _ = step_seconds(lambda model=model: train(model, batches, 2), device)
            measured, predicted = peak_gib(device), use.peak / 2**30
            figures = {"ms": seconds * 500, "built GiB": built, "GiB": measured, "predicted GiB": predicted}
            if measured:
                figures["off by"] = predicted / measured - 1
            parts = {part: gib(size) for part, size in use.parts.items()}
            report(case, **figures, peak_during=use.moment, parts=parts)
        if model is not None:
            model.engine.destroy()  # otherwise ZeRO's hooks keep it, and the next peak has its bytes too
