"""Parts of tools/gpu_check.py that need FBGEMM: the tables' bandwidth, a DCN-V2 on Criteo's tables, predicted memory.

A part calls `report(case, **figures)` for each result as it comes.
"""

import functools
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.profiler import ProfilerActivity, profile

from dhen.config.ds_config import DsConfig, Recipe, read_ds_config
from dhen.data.loading.batches import Batch
from dhen.model.configuration_dhen import DhenConfig, SparseFeature
from dhen.planner.minimum_set import gib
from dhen.runtime.topology import Topology
from dhen.tables.lookup import make_lookup
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
    speed,
    step_seconds,
)
from tools.bench.small_work import random_batch, random_ids
from tools.bench.table_systems import CRITEO, Case, build_ours

ROOT = Path(__file__).resolve().parents[2]
MULTI_HOT = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)
"""Ids per example and feature of MLPerf's DLRM-DCNv2."""
_ROUNDS = 7
_BATCHES, _TIMED = 4, 20


@dataclass(frozen=True)
class Moved:
    """The fewest bytes that a lookup and an update move: rows, pooled embeddings, gradients and optimizer states."""

    forward: int
    backward: int


def least_bytes(ids_per_table: Sequence[Tensor], bags: int, dim: int, weight_bytes: int) -> Moved:
    """Of tables with row-wise Adagrad, looked up with these ids in so many bags of float32 embeddings per table."""
    count = sum(len(ids) for ids in ids_per_table)
    unique = sum(len(torch.unique(ids)) for ids in ids_per_table)
    pooled = len(ids_per_table) * bags * dim * 4
    index = 8 * count
    # The backward reads each bag's gradient, and reads and writes each row that was used, and its state.
    return Moved(unique * dim * weight_bytes + pooled + index, pooled + index + unique * 2 * (dim * weight_bytes + 4))


def measure_tables(size: Size, topology: Topology, rates: dict[str, float], report: Report) -> None:
    """FBGEMM's kernels alone, then the project's tables around them: time, and the share of the copy's bandwidth."""
    case = Case(ranks=1, dim=size.dim, ids_per_bag=1, batch_size=size.table_batch, max_rows=size.rows)
    device, tables = topology.device, case.tables
    batches = [random_ids(tables, [1] * len(tables), case.batch_size, seed).to(device) for seed in range(2)]
    ids = batches[0].ids.view(len(tables), -1).unbind()
    shapes = [(table.num_embeddings, case.dim) for table in tables]
    offsets = torch.arange(batches[0].ids.numel() + 1, device=device)
    gradient = torch.randn(case.batch_size, len(tables) * case.dim, device=device)
    for dtype in ("fp32", "fp16"):
        moved = least_bytes(ids, case.batch_size, case.dim, int(dtype[2:]) // 8)
        lookup = make_lookup(shapes, device, "rowwise_adagrad", dtype, rounds_stochastically=dtype == "fp16")
        lookup.set_learning_rate(0.01)
        calls = itertools.cycle([functools.partial(lookup, batch.ids, offsets) for batch in batches])
        report(f"FBGEMM's kernels, {dtype}", **_bandwidth(*_both_seconds(calls, gradient, device), moved, rates))
        del lookup, calls
        forget_peak(device)
    for dtype in ("fp32", "fp16"):
        moved = least_bytes(ids, case.batch_size, case.dim, int(dtype[2:]) // 8)
        start = now(device)
        ours, _ = build_ours(case, topology, table_dtype=dtype)
        seconds = now(device) - start
        calls = itertools.cycle([functools.partial(ours, batch) for batch in batches])
        shape = gradient.view(case.batch_size, len(tables), case.dim)
        figures = _bandwidth(*_both_seconds(calls, shape, device), moved, rates)
        report(f"sharded tables, {dtype}", **figures, **{"built in s": seconds, "GiB": peak_gib(device)})
        del ours, calls
        forget_peak(device)


def _both_seconds(calls: Any, gradient: Tensor, device: torch.device) -> tuple[float, float]:
    """Median seconds of a forward and of a backward."""
    forward, backward = [], []
    for number in range(_ROUNDS + 2):
        start = now(device)
        out = next(calls)()
        middle = now(device)
        out.backward(gradient)
        end = now(device)
        if number >= 2:
            forward.append(middle - start)
            backward.append(end - middle)
    return sorted(forward)[_ROUNDS // 2], sorted(backward)[_ROUNDS // 2]


def _bandwidth(forward: float, backward: float, moved: Moved, rates: dict[str, float]) -> dict[str, float | None]:
    copy = rates.get(COPY_RATE)
    both = (moved.forward + moved.backward) / (forward + backward) / 1e9
    shares = {} if copy is None else {
        "share of copy, forward": moved.forward / forward / 1e9 / copy,
        "share of copy, backward": moved.backward / backward / 1e9 / copy,
        "share of copy": both / copy,
    }  # fmt: skip
    return {"forward ms": forward * 1e3, "backward ms": backward * 1e3, "GB/s": both, **shares}


def read_setup(name: str, batch: int, section: dict[str, Any]) -> DsConfig:
    """A ds_config of the project for one rank, with changes to its `dhen` section."""
    recipe = Recipe(batch, 1, 1, 0.0, 1e-3, 0.0, 0.9, 0.999, 1e-8)
    ds_config = read_ds_config(ROOT / "ds_configs" / f"{name}.json", recipe)
    return DsConfig(ds_config.path, ds_config.deepspeed, ds_config.dhen.model_copy(update=section))


def build(layout: Layout) -> ParallelDhen:
    """The model, ready to train."""
    model = parallelize(layout)
    model.set_learning_rates(1e-3, 0.01)
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
    tables = [SparseFeature(f"C{index}", min(rows, size.rows)) for index, rows in enumerate(CRITEO)]
    is_full = size.batch > 1000
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
    cases: list[tuple[str, int, Sequence[int], dict[str, Any]]] = [
        ("one id", size.batch, [1] * len(tables), {}),
        ("one id, compiled", size.batch, [1] * len(tables), {"compile": "layers"}),
        ("one id, fp16 tables", size.batch, [1] * len(tables), {"table_dtype": "fp16"}),
        ("one id, large batch", 8 * size.batch, [1] * len(tables), {}),
        ("214 ids", size.batch, MULTI_HOT, {}),
    ]
    for case, batch, counts, section in cases:
        case = f"{case}, batch {batch}"
        with one_case(case, topology.device, report):
            model = build(lay_out(config, topology, read_setup("zero0_bf16", batch, section)))
            batches = [_batch(tables, counts, batch, seed) for seed in range(_BATCHES)]
            train(model, batches, 5)
            start = now(topology.device)
            train(model, batches, _TIMED)
            seconds = (now(topology.device) - start) / _TIMED
            figures = host_work(lambda model=model, batches=batches: train(model, batches, 4), steps=4)
            report(case, **speed(config, batch, seconds, rates), **figures, GiB=peak_gib(topology.device))
        model = None


def host_work(call: Callable[[], object], steps: int) -> dict[str, Any]:
    """What the host does in a step: kernels that it starts, waits for the device and their milliseconds, and the
    operations that take it longest, as milliseconds of their own.
    """
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]):  # the first profile takes seconds to start
        pass
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
    on_host = [each for each in profiler.key_averages() if each.device_type == DeviceType.CPU]
    starts = sum(each.count for each in on_host if each.key.startswith(("cudaLaunchKernel", "cuLaunchKernel")))
    waits = [each for each in on_host if each.key.endswith("Synchronize")]
    slowest = sorted(on_host, key=lambda each: -each.self_cpu_time_total)[:12]
    return {
        "kernels": starts / steps,
        "waits": sum(each.count for each in waits) / steps,
        "ms of waits": sum(each.self_cpu_time_total for each in waits) / steps / 1e3,
        "slowest": {each.key[:80]: round(each.self_cpu_time_total / steps / 1e3, 4) for each in slowest},
    }


def _batch(tables: Sequence[SparseFeature], ids_per_bag: Sequence[int], size: int, seed: int) -> Batch:
    return replace(random_batch(tables, size, seed), sparse=random_ids(tables, ids_per_bag, size, seed))


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
    config = dense_config(size, size.depths[len(size.depths) // 2])
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
            report(case, **figures, peak_during=use.moment, parts=json.dumps(parts))
        if model is not None:
            model.engine.destroy()  # otherwise ZeRO's hooks keep it, and the next peak has its bytes too
