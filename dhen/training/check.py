"""train.py --check: all that a run does before its first step, on the head of the data, and how long a run takes.

It calls the run's own functions, so it prints and refuses what the run would. It writes nothing into the run folder.
"""

import itertools
import logging
import math
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from dhen.config.arguments import Arguments
from dhen.data.preparation.head import is_partial
from dhen.data.schema import LABEL, SHARES, DenseColumn, Schema
from dhen.runtime.topology import Topology
from dhen.training.dataset import TrainingData, cache_of, open_data
from dhen.training.loop import Trainer, with_ids_ahead
from dhen.training.reporting.progress import duration
from dhen.training.session import build_model, has_nothing_to_do, make_trainer

logger = logging.getLogger(__name__)

_WARM_UP, _MOST_SECONDS = 3, 5.0
_SCORING_COST = 1 / 3
"""Of a trained example: scoring is the forward pass alone, and the backward pass costs about twice as much."""


def check(arguments: Arguments, topology: Topology) -> None:
    """Log what the run would use and how long it would take. Communicates; all ranks call it.

    Raises what the run would raise before its first step.
    """
    cache = cache_of(arguments)
    place = next(folder for folder in (cache, *cache.absolute().parents) if folder.is_dir())  # all nodes can read it
    with tempfile.TemporaryDirectory(prefix=".check-", dir=place) as head:
        began = time.monotonic()
        data = open_data(arguments, topology, Path(head))
        preparation = (time.monotonic() - began) / data.schema.source.get(SHARES, {"train": math.inf})["train"]
        logger.info("check: %s. Columns:\n%s", _what_was_read(data), "\n".join(_columns(data.schema)))
        trainer = make_trainer(arguments, data, build_model(arguments, topology, data))
        if not has_nothing_to_do(arguments, trainer):
            logger.info("check: %s", _expected(data, trainer, *_samples_per_second(trainer), preparation))
        logger.info("check: nothing was trained, and nothing was written to %s", arguments.training.output_dir)
        topology.barrier()  # other ranks may still read the head


def _what_was_read(data: TrainingData) -> str:
    source = data.schema.source
    if SHARES not in source:
        return f"the data is prepared in {data.prepared}"
    how = f"{source[SHARES]['train']:.2%} of them; counts of rows, and table rows of vocabularies, are estimates"
    if not is_partial(data.schema):
        how = "but the hub does not say how many there are" if source["format"] == "hub" else "all of them"
    rows = Schema.load(data.prepared).splits["train"].rows
    return f"the data is not prepared yet; {rows:,} training rows were read, {how}"


def _columns(schema: Schema) -> list[str]:
    lines = [f"  {LABEL}: 0 or 1", *map(_number, schema.dense)]
    for column in schema.sparse:
        kind = "multi-valued " * column.is_multi_valued + "category"
        lines.append(f"  {column.name}: {kind}, {column.encoding}, {column.num_embeddings:,} table rows")
    return lines


def _number(column: DenseColumn) -> str:
    if column.missing_of is not None:
        return f"  {column.name}: 1 if {column.missing_of} is blank, else 0"
    return f"  {column.name}: number, {column.transform}" + (", scaled" if column.mean is not None else "")


def _samples_per_second(trainer: Trainer) -> tuple[float, int]:
    """Take micro steps with learning rate 0. Returns (samples per second of all ranks, number of timed micro steps).

    Communicates; all ranks call it.
    """
    model, loader = trainer.model, trainer.train_loader
    model.start_training_mode()
    model.set_learning_rates(0.0, 0.0)
    samples = steps = 0
    elapsed = torch.zeros((), dtype=torch.float64, device=model.topology.device)
    batches = itertools.chain.from_iterable(loader.epoch(epoch) for epoch in itertools.count())
    for batch, sent_ids in with_ids_ahead(model, batches):
        trainer.micro_step(batch, sent_ids)
        steps, samples = steps + 1, samples + batch.global_rows / loader.accumulation_steps
        if steps <= _WARM_UP:
            samples, began = 0, time.perf_counter()
        elapsed.fill_(time.perf_counter() - began)
        dist.all_reduce(elapsed, dist.ReduceOp.MAX, group=model.topology.world)  # all ranks stop at the same step
        if steps > _WARM_UP and elapsed.item() > _MOST_SECONDS:
            break
    model.settle()
    return samples / elapsed.item(), steps - _WARM_UP


def _expected(data: TrainingData, trainer: Trainer, rate: float, timed: int, preparation: float) -> str:
    """How long the run takes. preparation: seconds to prepare the data."""
    splits, steps = data.schema.splits, trainer.total_steps
    rows_per_step = splits["train"].rows / trainer.steps_per_epoch
    left = steps - trainer.state.step
    evaluations = math.ceil(left / (trainer.arguments.eval_steps or trainer.steps_per_epoch))
    evaluations *= "validation" in splits
    times = {"validation": evaluations + 1, "test": int(not trainer.arguments.skip_test)}
    scored = sum(splits[split].rows * each for split, each in times.items() if split in splits)
    seconds = (left * rows_per_step + _SCORING_COST * scored) / rate
    before = f"{duration(preparation)} to prepare the data, then " if preparation else ""
    return (
        f"{steps:,} steps of {rows_per_step:,.0f} rows, {trainer.steps_per_epoch:,} per epoch. Expected time: {before}"
        f"{duration(seconds)} with {evaluations:,} evaluations, without checkpoints, at the {rate:,.0f} samples/s that "
        f"were measured in {timed} micro steps with learning rate 0"
    )
