"""With overlap, the ids of the next batch leave before the backward pass of this batch ends, by a profiler's trace."""

import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.profiler import ProfilerActivity, record_function

from dhen.config.dhen_section import DhenSection
from dhen.config.ds_config import DsConfig, read_ds_config
from dhen.model.configuration_dhen import DhenConfig, SparseFeature
from dhen.runtime.topology import Topology
from dhen.tables.id_exchange import IDS
from dhen.tables.pooled_exchange import EMBEDDINGS, GRADIENTS
from dhen.training.loop import with_ids_ahead
from dhen.training.parallelize import lay_out, parallelize
from tests import ROOT
from tests.plain import recipe
from tests.ranks import run_ranks
from tools.bench.small_work import NUM_DENSE, TABLE_LEARNING_RATE, random_batch

TABLES = [SparseFeature(f"C{index}", 1000) for index in range(8)]
WARM_UP, TRACED, BATCH = 3, 3, 256
STEP, BACKWARD = "step", "backward"
Spans = dict[str, list[tuple[float, float, int]]]
"""By name: start, end and thread of each span, in the order of time."""


def spans_of_steps(topology: Topology, overlap: bool) -> Spans:
    zero2 = read_ds_config(ROOT / "ds_configs/zero2.json", recipe(topology.world_size, BATCH))
    features = [{"name": table.name, "num_embeddings": table.num_embeddings} for table in TABLES]
    config = DhenConfig(num_dense_features=NUM_DENSE, sparse_features=features, interactions=["linear"], num_layers=1)
    section = DhenSection(overlap_tables=overlap)
    model = parallelize(lay_out(config, topology, DsConfig(zero2.path, zero2.deepspeed, section)))
    model.set_learning_rates(1e-3, TABLE_LEARNING_RATE)
    all_threads = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)  # ids travel in another thread
    profiler = torch.profiler.profile(activities=[ProfilerActivity.CPU], experimental_config=all_threads)
    batches = (random_batch(TABLES, BATCH, 100 * number + topology.rank) for number in range(WARM_UP + TRACED + 1))
    for number, (batch, sent_ids) in enumerate(with_ids_ahead(model, batches)):
        if number == WARM_UP:
            topology.barrier()
            profiler.start()
        if number == WARM_UP + TRACED:  # one batch more than is traced
            profiler.stop()
        with record_function(STEP):
            logits_B = model.score(model.look_up(sent_ids), batch.dense_BN, batch.sparse)
            with record_function(BACKWARD):
                model.engine.backward(binary_cross_entropy_with_logits(logits_B, batch.labels_B))
            model.engine.step()
    model.settle()
    spans: Spans = {name: [] for name in (STEP, BACKWARD, IDS, EMBEDDINGS, GRADIENTS)}
    for event in profiler.events():
        if event.name in spans:
            spans[event.name].append((event.time_range.start, event.time_range.end, event.thread))
    return {name: sorted(of_name) for name, of_name in spans.items()}


def test_ids_of_the_next_batch_leave_before_this_ones_backward_ends_and_in_their_own_thread():
    with_overlap, without = (run_ranks(2, spans_of_steps, overlap)[0] for overlap in (True, False))
    main = {thread for *_, thread in with_overlap[STEP]}
    # The ids of the first traced step are sent before the trace starts, but their thread may be late.
    assert len(with_overlap[BACKWARD]) == TRACED
    assert len(with_overlap[IDS]) in (TRACED - 1, TRACED)
    for (_, backward_ends, _), (ids_leave, _, thread) in zip(
        with_overlap[BACKWARD][1:], with_overlap[IDS][-2:], strict=True
    ):
        assert ids_leave < backward_ends
        assert thread not in main, "the main thread computes meanwhile"
    assert len(without[IDS]) == TRACED - 1
    assert {thread for *_, thread in without[IDS]} == {thread for *_, thread in without[STEP]}
    for spans in (with_overlap, without):
        for name in (EMBEDDINGS, GRADIENTS):
            for (begin, end, _), (sent, *_) in zip(spans[STEP], spans[name], strict=True):
                assert begin < sent < end
