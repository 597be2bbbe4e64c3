"""tools/bench/overlap.py: the ids of the next batch leave early, and overlapped time is measured as such."""

import json

import pytest

from tests.ranks import run_ranks
from tools.bench import overlap as bench_overlap
from tools.bench.overlap import BACKWARD, EMBEDDINGS, GRADIENTS, IDS, STEP, WAITING, Span, share_under_compute


@pytest.fixture(scope="module")
def overlap(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("overlap")
    small = ["--batch_size=256", "--dim=16", "--layers=1", "--rows=1000", "--tables=8"]
    traced = run_ranks(2, bench_overlap.trace_both, bench_overlap.parse_arguments([f"--output={folder}", *small]))
    assert 0 < (folder / "overlap.png").stat().st_size < 150_000
    assert json.loads((folder / "trace-on.json").read_text())["traceEvents"]
    return traced[0]


def spans(overlap: dict, mode: str, name: str) -> list[Span]:
    return [span for span in overlap["spans"][mode] if span.name == name]


def test_ids_of_the_next_batch_leave_before_this_ones_backward_begins(overlap):
    backwards, ids = (spans(overlap, "on", name) for name in (BACKWARD, IDS))
    assert len(backwards) == 3
    for backward, of_next in zip(backwards, ids, strict=True):
        assert of_next.first < backward.first


def test_every_exchange_is_in_the_trace(overlap):
    for mode in ("on", "off"):
        steps = spans(overlap, mode, STEP)
        for name in (EMBEDDINGS, GRADIENTS):
            exchanges = spans(overlap, mode, name)
            assert len(exchanges) == len(steps)
            for step, exchange in zip(steps, exchanges, strict=True):
                assert step.first < exchange.first < step.last


def test_more_is_under_compute_with_overlap(overlap):
    assert overlap["shares"]["on"]["all"] > overlap["shares"]["off"]["all"]
    assert overlap["shares"]["off"][IDS] == 0


def test_the_share_is_of_the_time_in_which_the_main_thread_computes():
    spans = [Span(STEP, 0, 100, 1), Span(WAITING, 40, 60, 1), Span(EMBEDDINGS, 30, 50, 1), Span(IDS, 70, 90, 2)]
    assert share_under_compute(spans) == {IDS: 1.0, EMBEDDINGS: 0.5, "all": 0.75}
