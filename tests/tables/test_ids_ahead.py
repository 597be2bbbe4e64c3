"""With overlap, the ids of the next batch leave before the backward pass of this batch begins: in the profiler."""

import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.profiler import ProfilerActivity, record_function

from dhen.config.dhen_section import DhenSection
from dhen.config.ds_config import DsConfig, read_ds_config
from dhen.model.configuration_dhen import DhenConfig
from dhen.model.sparse_feature import SparseFeature
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
Spans = dict[str, list[tuple[float, float]]]
"""By name: start and end of each span, in the order of time."""


def spans_of_steps(topology: Topology, overlap: bool) -> Spans:
    zero2 = read_ds_config(ROOT / "ds_configs/zero2.json", recipe(topology.world_size, BATCH))
    features = [{"name": table.name, "num_embeddings": table.num_embeddings} for table in TABLES]
    config = DhenConfig(num_dense_features=NUM_DENSE, sparse_features=features, interactions=["linear"], num_layers=1)
    section = DhenSection(overlap_tables=overlap)
    model = parallelize(lay_out(config, topology, DsConfig(zero2.path, zero2.deepspeed, section)))
    model.set_learning_rates(1e-3, TABLE_LEARNING_RATE)
    profiler = torch.profiler.profile(activities=[ProfilerActivity.CPU])
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
            spans[event.name].append((event.time_range.start, event.time_range.end))
    return {name: sorted(of_name) for name, of_name in spans.items()}


def test_ids_of_the_next_batch_leave_before_this_ones_backward_begins():
    with_overlap, without = (run_ranks(2, spans_of_steps, overlap)[0] for overlap in (True, False))
    assert len(with_overlap[BACKWARD]) == len(with_overlap[IDS]) == TRACED
    for (begins, _), (leave, _), (backward_begins, _) in zip(
        *(with_overlap[name] for name in (STEP, IDS, BACKWARD)), strict=True
    ):
        assert begins < leave < backward_begins
    for leave, _ in without[IDS]:
        assert not any(begins < leave < ends for begins, ends in without[STEP]), "between the steps, which wait for it"
    for spans in (with_overlap, without):
        for name in (EMBEDDINGS, GRADIENTS):
            for (begin, end), (sent, _) in zip(spans[STEP], spans[name], strict=True):
                assert begin < sent < end
