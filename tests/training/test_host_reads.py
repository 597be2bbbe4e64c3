"""How often a training step makes the host wait for a value of the device: once, to know whether the step is finite.

Counted on the CPU by the functions that read a tensor's values. Some read tensors that are on the host in any case;
these are named here with the reason.
"""

import contextlib
import functools
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dhen.runtime.topology import Topology
from dhen.tables.lookup import make_lookup
from dhen.tables.updated_tables import TableUpdate, UpdatedTables
from dhen.training.parallel_model import ParallelDhen
from tests.ranks import run_ranks
from tests.tiny_training import train

READS = {
    "tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "masked_select",
    "unique", "unique_consecutive", "bincount",
}  # fmt: skip
ON_THE_HOST = {
    ("id_exchange.py", "tolist"): "the sizes of the other ranks' batches, which travel between the hosts",
    ("id_exchange.py", "__bool__"): "the ids are inside their tables; a GPU asserts that by itself",
    ("averaged_tables.py", "item"): "the decay since the last evaluation",
    ("split_table_batched_embeddings_ops_training.py", "cpu"): "FBGEMM's list of widths, which it moves once",
    ("updated_tables.py", "__int__"): "the number of Adam's updates",
}
NORM = {("utils.py", "__bool__"): 1}
"""DeepSpeed asks whether the norm of the gradient is finite."""
SET_UPS: dict[str, tuple[dict[str, Any], dict[tuple[str, str], int]]] = {
    "zero0": ({}, {("parallel_model.py", "__bool__"): 1}),
    "zero1": ({}, NORM),
    "zero2": ({}, NORM),
    "zero2_bf16": ({}, NORM | {("stage_1_and_2.py", "item"): 1}),  # DeepSpeed asks every gradient, too
    "zero3": ({}, NORM),
    "zero3_bf16": ({}, NORM),
    "hsdp": ({"dhen": {"shard_group": 2}}, NORM),
}


@contextlib.contextmanager
def counting_reads() -> Iterator[Counter[tuple[str, str]]]:
    """Counts the reads of tensors' values by file and function, in backward passes, too."""
    counts: Counter[tuple[str, str]] = Counter()

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            files = (Path(frame.filename) for frame in reversed(traceback.extract_stack()[:-1]))
            caller = next(file.name for file in files if "torch" not in file.parts)
            if caller != "tiny_training.py" and (caller, name) not in ON_THE_HOST:
                counts[caller, name] += 1
            return function(*args, **kwargs)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for owner in (Tensor, torch):
            for name in READS & set(dir(owner)):
                if callable(function := getattr(owner, name)):
                    patch.setattr(owner, name, counting(name, function))
        yield counts


def reads_of_a_step(topology: Topology) -> dict[str, dict[tuple[str, str], int]]:
    found = {}
    for name, (more, _) in SET_UPS.items():
        with counting_reads() as reads:

            def before_step(step: int, model: ParallelDhen, reads: Counter[tuple[str, str]] = reads) -> None:
                if step == 0:
                    model.start_average(0.9)
                else:
                    model.end_step(step)
                if step == 2:
                    reads.clear()  # what the first steps set up; ZeRO-3 records the order of its weights

            train(topology, name, before_step=before_step, steps=3, **more)
        found[name] = dict(reads)
    return found


def test_a_step_reads_once_whether_it_is_finite():
    assert run_ranks(2, reads_of_a_step)[0] == {name: reads for name, (_, reads) in SET_UPS.items()}


@pytest.mark.parametrize("has_new_rows", [False, True])
@pytest.mark.parametrize(("optimizer", "l2"), [("rowwise_adagrad", 0.0), ("adam", 0.0), ("adam", 0.01)])
def test_updates_that_fbgemm_does_not_have_read_once(optimizer, l2, has_new_rows):
    sizes = [(50, 4), (3000, 4), (9, 4), (1000, 8), (5000, 16)]
    is_new = torch.rand(sum(rows for rows, _ in sizes)) < 0.5 if has_new_rows else None
    lookup = make_lookup(sizes, torch.device("cpu"), "sgd" if optimizer == "adam" else optimizer, "fp16")
    tables = UpdatedTables(lookup, TableUpdate(optimizer, l2=l2, has_new_rows=has_new_rows), is_new=is_new)
    tables.learning_rates = (0.1, 0.2)
    ids = torch.cat([torch.randint(0, rows, (64,)) for rows, _ in sizes])
    pooled = tables(ids, torch.arange(len(ids) + 1), None)
    with counting_reads() as reads:
        pooled.backward(torch.ones_like(pooled))
    assert reads == {("updated_tables.py", "tolist"): 1}
