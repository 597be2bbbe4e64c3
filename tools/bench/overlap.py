"""Shows how much of the tables' all-to-all runs while the rank computes (paper 3.1, figure 4): a trace and a picture.

    python tools/bench/overlap.py --output runs/overlap

The benchmark trains a model on two ranks of this machine, first with `overlap_tables` and then without it. It traces
some steps of rank 0 with torch.profiler. It writes trace-on.json and trace-off.json for chrome://tracing or Perfetto,
overlap.png with both timelines, and overlap.json with the share of the all-to-alls' time in which the rank computed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that a call by path finds tools.bench

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.profiler import record_function

from dhen.config.dhen_section import DhenSection
from dhen.model.configuration_dhen import SparseFeature
from dhen.runtime.collectives import WAITING
from dhen.runtime.topology import Topology
from dhen.tables.id_exchange import IDS
from dhen.tables.pooled_exchange import EMBEDDINGS, GRADIENTS
from dhen.training.loop import with_ids_ahead
from tools.bench.clock import covered
from tools.bench.launch import argument_parser, run, run_ranks
from tools.bench.small_work import random_batch, small_dhen

STEP, FORWARD, BACKWARD = "step", "dense forward", "backward"
LANES = {
    FORWARD: "#8aa1b4", BACKWARD: "#5b7489", WAITING: "#d9d9d9", IDS: "#3a7d44", EMBEDDINGS: "#c4502f",
    GRADIENTS: "#e0a030",
}  # fmt: skip
"""The lanes of the picture, from top to bottom, and their colors."""
EXCHANGES = (IDS, EMBEDDINGS, GRADIENTS)
IDS_TYPE, SIZES_TYPE = ["int"], ["long int"]
"""Types of the ids and of their numbers in the trace's all-to-alls."""
WARM_UP, TRACED = 3, 3


@dataclass(frozen=True)
class Span:
    """An event in a thread, from `first` to `last` in microseconds of the trace."""

    name: str
    first: float
    last: float
    thread: int


def trace_steps(topology: Topology, arguments: argparse.Namespace, path: Path, *, overlap: bool) -> None:
    """Train under ds_configs/zero2.json. Rank 0 writes a Chrome trace of the last steps. Communicates; all call it."""
    tables = [SparseFeature(f"C{i}", arguments.rows) for i in range(arguments.tables)]
    architecture = {"embedding_dim": arguments.dim, "num_layers": arguments.layers, "dense_mlp": [512, 256]}
    model = small_dhen(tables, arguments.batch_size, topology, DhenSection(overlap_tables=overlap), **architecture)
    config = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)  # gloo's, too
    profiler = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True, experimental_config=config
    )
    batches = (  # one more than is traced
        random_batch(tables, arguments.batch_size, seed=1000 * number + topology.rank)
        for number in range(WARM_UP + TRACED + 1)
    )
    for number, (batch, sent_ids) in enumerate(with_ids_ahead(model, batches)):
        if number == WARM_UP:
            topology.barrier()
            profiler.start()
        if number == WARM_UP + TRACED:
            profiler.stop()
        with record_function(STEP):
            with record_function(FORWARD):
                logits_B = model.score(model.look_up(sent_ids), batch.dense_BN, batch.sparse)
                loss = binary_cross_entropy_with_logits(logits_B, batch.labels_B)
            with record_function(BACKWARD):
                model.engine.backward(loss)
            model.engine.step()
    model.settle()
    if topology.is_main:
        profiler.export_chrome_trace(str(path))


def spans_of(trace: dict[str, Any]) -> list[Span]:
    """The trace's events in LANES, and its steps.

    An all-to-all lasts from its call until its last byte arrives.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    origin = min((event["ts"] for event in events), default=0.0)
    ids, others, spans = [], [], []
    for event in sorted(events, key=lambda event: event["ts"]):
        first = event["ts"] - origin
        span = Span(event["name"], first, first + event["dur"], event["tid"])
        if span.name in LANES or span.name == STEP:
            spans.append(span)
        elif span.name == "gloo:all_to_all" and event["args"].get("Input type") != SIZES_TYPE:
            (ids if event["args"].get("Input type") == IDS_TYPE else others).append(span)
    # A group's operations run in the order of their calls.
    by_group = ((IDS,), ids), ((EMBEDDINGS, GRADIENTS), others)
    calls = [zip((span for span in spans if span.name in names), group, strict=False) for names, group in by_group]
    arrived = {call: operation.last for call, operation in chain(*calls)}
    return [replace(span, last=max(span.last, arrived.get(span, 0.0))) for span in spans]


def share_under_compute(spans: Sequence[Span]) -> dict[str, float]:
    """Share of each exchange's time, and of all exchanges' time, in which the rank's main thread computed."""
    steps = [span for span in spans if span.name == STEP]
    main = steps[0].thread
    end = max(span.last for span in spans)
    waits = ((s.first, s.last) for s in spans if s.thread == main and s.name == WAITING)
    is_free = covered(((s.first, s.last) for s in steps), end) & ~covered(waits, end)
    whole, under = dict.fromkeys(EXCHANGES, 0.0), dict.fromkeys(EXCHANGES, 0.0)
    for span in spans:
        if span.name in EXCHANGES and steps[0].first <= span.first <= steps[-1].last:
            whole[span.name] += span.last - span.first
            under[span.name] += float(is_free[round(span.first) : round(span.last)].sum())
    shares = {name: under[name] / whole[name] for name in EXCHANGES if whole[name]}
    return shares | {"all": sum(under.values()) / max(sum(whole.values()), 1e-9)}


def draw(by_mode: dict[str, list[Span]], shares: dict[str, dict[str, float]], path: Path) -> None:
    """Draw the timelines below each other, with one time axis."""
    figure = Figure(figsize=(11, 2.6 * len(by_mode)), layout="constrained")
    axes = figure.subplots(len(by_mode), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (mode, spans) in zip(axes, by_mode.items(), strict=True):
        _draw_lanes(axis, spans)
        title = f"overlap_tables {mode}: the rank computes during {shares[mode]['all']:.0%} of the all-to-alls' time"
        axis.set_title(title, loc="left", fontsize=10)
    axes[-1].set_xlabel("ms, rank 0 of 2")
    figure.savefig(path, dpi=90)


def _draw_lanes(axis: Axes, spans: Sequence[Span]) -> None:
    start = next(span.first for span in spans if span.name == STEP)
    for lane, (name, color) in enumerate(LANES.items()):
        bars = [((s.first - start) / 1e3, (s.last - s.first) / 1e3) for s in spans if s.name == name]
        axis.broken_barh(bars, (lane - 0.4, 0.8), facecolors=color)
    for span in spans:
        if span.name == STEP:
            axis.axvline((span.first - start) / 1e3, color="black", linewidth=0.6)
    axis.set_yticks(range(len(LANES)), list(LANES), fontsize=8)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)


def trace_both(topology: Topology, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trace steps with and without overlap; rank 0 draws, prints and returns. Communicates; all ranks call it."""
    output = arguments.output
    spans: dict[str, list[Span]] = {}
    for mode in ("on", "off"):
        path = output / f"trace-{mode}.json"
        trace_steps(topology, arguments, path, overlap=mode == "on")
        if topology.is_main:
            spans[mode] = spans_of(json.loads(path.read_text(encoding="utf-8")))
    shares = {mode: share_under_compute(of_mode) for mode, of_mode in spans.items()}
    if topology.is_main:
        draw(spans, shares, output / "overlap.png")
        for mode, of_mode in shares.items():
            print(f"overlap {mode}: " + ", ".join(f"{name} {share:.0%}" for name, share in of_mode.items()))
        print(f"{output} has the traces, overlap.png and overlap.json")
    return {"shares": shares, "spans": spans}


def start_two_ranks(arguments: argparse.Namespace) -> None:
    """The ranks trace and show."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    run_ranks(2, KINETO_LOG_LEVEL="99")


def parse_arguments(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, which the ranks get too."""
    parser = argument_parser(__doc__)
    parser.add_argument("--output", type=Path, default="runs/overlap", help="folder to write to")
    parser.add_argument("--batch_size", type=int, default=2048, help="examples per rank")
    parser.add_argument("--dim", type=int, default=32, help="embedding dimension")
    parser.add_argument("--layers", type=int, default=2, help="DHEN layers")
    parser.add_argument("--tables", type=int, default=26, help="sparse features")
    parser.add_argument("--rows", type=int, default=100_000, help="rows of each table")
    return parser.parse_args(command_line)


if __name__ == "__main__":
    sys.exit(run(parse_arguments(), trace_both, start_two_ranks, "overlap.json"))
