"""The moving average of all weights: right under each ZeRO stage, used by evaluations, and kept in checkpoints."""

import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dhen.model.modeling_dhen import DhenForClickPrediction
from dhen.runtime.topology import Topology
from dhen.training.parallel_model import ParallelDhen
from dhen.training.saved.checkpoint import TrainerState, load_checkpoint, start_save
from tests.plain import global_batches
from tests.ranks import run_ranks
from tests.tiny_training import train

DECAY, STEPS = 0.8, 6
ARCHITECTURE = {"batch_norm": True}
SET_UPS = {
    "zero0": (2, 2, {}),
    "zero1": (2, 2, {}),
    "zero2": (2, 2, {}),
    "zero3": (3, 3, {}),  # the last shards are padded
    "hsdp": (4, 2, {"shard_group": 2}),
    "zero2_bf16": (2, 2, {}),
    "zero3_bf16": (2, 2, {}),
}


def states_of(model: ParallelDhen) -> dict[str, Tensor]:
    """All weights and statistics that rank 0 can see: the dense part, and its own shards of tables."""
    shards = [] if model.tables is None else model.tables.shard_tensors()
    own = {f"{shard.name}:{shard.first_column}": tensors["weight"].clone() for shard, tensors in shards}
    return model.dense_state_dict() | own


def averaged_run(topology: Topology, name: str, dhen: dict, folder: Path) -> dict[str, float]:
    raw: list[dict[str, Tensor]] = []

    def record(step: int, model: ParallelDhen) -> None:
        if step == 0:
            model.start_average(DECAY)
        else:
            model.end_step(step)
        model.average_buffers()
        raw.append(states_of(model))

    arguments = {"global_batch": 24, "dhen": dhen, "architecture": ARCHITECTURE, "steps": STEPS}
    _, model = train(topology, name, before_step=record, **arguments)
    record(STEPS, model)
    with model.averaged():
        with model.evaluating():
            pass
        average = states_of(model)
    after = states_of(model)
    start_save(model, folder, TrainerState(step=STEPS)).finish(topology)
    _, again = train(topology, name, before_step=lambda step, model: None, **arguments | {"steps": 1})
    again.start_average(DECAY)
    load_checkpoint(again, folder / f"checkpoint-{STEPS}")
    with again.averaged():
        loaded = states_of(again)
    batch = global_batches(1, 24)[0]
    sparse, dense_BN, _ = (part.to(topology.device) for part in batch.rows(0, 24))
    with model.evaluating():
        embeddings_BFD = model.look_up(sparse)()
        scores = model.score(embeddings_BFD, dense_BN)
    if not topology.is_main:
        return {}
    expected = {key: value.double() for key, value in raw[0].items() if value.is_floating_point()}
    for step in range(1, STEPS + 1):
        decay = min(DECAY, (1 + step) / (10 + step))
        expected = {key: decay * value + (1 - decay) * raw[step][key].double() for key, value in expected.items()}

    def largest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
        return max((one[key].double() - other[key].double()).abs().max().item() for key in expected)

    plain = DhenForClickPrediction(model.config, with_tables=False).eval()
    plain.load_state_dict({key: value for key, value in average.items() if ":" not in key})
    with torch.no_grad():
        expected_scores = plain(inputs_embeds=embeddings_BFD.cpu(), dense=dense_BN.cpu()).logits
    return {
        "from the formula": largest(average, expected),
        "moved": largest(raw[-1], average),
        "raw weights changed by looking": largest(after, raw[-1]),
        "loaded": largest(loaded, average),
        "scores of the average": (scores.cpu() - expected_scores).abs().max().item(),
    }


@pytest.mark.parametrize("name", SET_UPS)
def test_it_is_the_average_of_every_step_and_is_saved(tmp_path, name):
    ranks, local_size, dhen = SET_UPS[name]
    found, *_ = run_ranks(ranks, averaged_run, name, dhen, tmp_path, local_size=local_size)
    assert found["from the formula"] < 1e-6
    assert found["moved"] > 1e-3, "the average is the last weights, so this shows nothing"
    assert found["raw weights changed by looking"] == 0
    assert found["loaded"] == 0
    assert found["scores of the average"] < (0.05 if "bf16" in name else 1e-5)


def failing_on_one_rank(topology: Topology, name: str) -> None:
    _, model = train(topology, name, steps=1)
    model.start_average(DECAY)
    with model.evaluating():
        if topology.rank == 1:
            raise OSError("no space left")
        topology.barrier()


def test_an_error_on_one_rank_ends_it_at_once():
    began = time.monotonic()
    with pytest.raises(AssertionError, match="no space left"):
        run_ranks(2, failing_on_one_rank, "zero2", timeout=60)
    assert time.monotonic() - began < 60
