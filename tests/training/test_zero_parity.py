"""Every ds_config trains like torch alone: losses of 20 steps, at 1, 2 and 4 ranks, at one global batch."""

import functools

import pytest
import torch

from dhen.runtime.topology import Topology
from dhen.training.parallel_model import ParallelDhen
from tests import ROOT
from tests.plain import global_batches, plain_losses
from tests.ranks import run_ranks
from tests.tiny_training import GLOBAL_BATCH, STEPS, difference, train

FP32_TOLERANCE = 1e-5
BF16_TOLERANCE = 0.05  # bf16 keeps 8 bits: after 20 Adam steps losses are within a few per cent
NAMES = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json") if not path.stem.startswith("hsdp"))
"""Hybrid sharding needs nodes: test_hsdp.py has them."""


def train_all(topology: Topology) -> dict[str, list[float]]:
    losses = {name: train(topology, name)[0] for name in NAMES}
    for stage in ("zero0", "zero1", "zero2", "zero3"):
        losses[f"{stage} SGD"] = train(topology, stage, accumulation=2, optimizer="SGD")[0]
    losses["zero2 clipped, 2 micro steps"] = train(topology, "zero2", accumulation=2, max_grad_norm=0.05)[0]
    losses["zero3 clipped, 2 micro steps"] = train(topology, "zero3", accumulation=2, max_grad_norm=0.05)[0]
    return losses


def weights_after(topology: Topology) -> dict[str, dict[str, torch.Tensor]]:
    return {name: train(topology, name)[1].dense_state_dict() for name in ("zero0", "zero2", "zero3_offload")}


def without_the_division(topology: Topology) -> list[float]:
    """The bridge as it would be if table gradients stayed a sum over ranks."""
    from dhen.tables.pooled_exchange import PooledExchange

    right = PooledExchange.receive_gradient
    PooledExchange.receive_gradient = lambda self: right(self) * topology.world_size
    return train(topology, "zero2")[0]


def with_two_tables_swapped(topology: Topology) -> list[float]:
    from dhen.tables.pooled_exchange import PooledLayout

    right = PooledLayout.join

    def wrong(self, *received):
        return right(self, *received)[:, [1, 0, *range(2, self.num_features)]]

    PooledLayout.join = wrong
    return train(topology, "zero2")[0]


@functools.cache
def losses_by_name(world_size: int) -> dict[str, list[float]]:
    return run_ranks(world_size, train_all)[0]


@functools.cache
def reference(accumulation: int = 1, max_grad_norm: float = 0.0, optimizer: str = "AdamW") -> list[float]:
    return plain_losses(global_batches(STEPS, GLOBAL_BATCH), accumulation, max_grad_norm, optimizer)[0]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_losses_equal_plain_torch(world_size, name):
    is_rounded = "bf" in (ROOT / "ds_configs" / f"{name}.json").read_text()  # bf16, bfloat16
    tolerance = BF16_TOLERANCE if is_rounded else FP32_TOLERANCE
    assert difference(losses_by_name(world_size)[name], reference()) < tolerance


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_clipping_and_accumulation_equal_plain_torch(world_size, name):
    losses = losses_by_name(world_size)[f"{name} clipped, 2 micro steps"]
    assert difference(losses, reference(2, 0.05)) < FP32_TOLERANCE
    assert difference(losses, reference(2)) > 100 * FP32_TOLERANCE, "clipping had no effect, so this showed nothing"


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3"])
def test_the_scale_of_dense_gradients_equals_plain_torch(world_size, stage):
    losses = losses_by_name(world_size)[f"{stage} SGD"]
    assert difference(losses, reference(2, 0.0, "SGD")) < FP32_TOLERANCE


def with_summed_dense_gradients(topology: Topology) -> list[float]:
    """As if DeepSpeed summed over ranks: twice the learning rate, on two of them."""
    right = ParallelDhen.set_learning_rates
    ParallelDhen.set_learning_rates = lambda self, dense, tables: right(self, dense * topology.world_size, tables)
    return train(topology, "zero2", accumulation=2, optimizer="SGD")[0]


def test_a_wrong_scale_of_dense_gradients_is_caught():
    losses = run_ranks(2, with_summed_dense_gradients)[0]
    assert difference(losses, reference(2, 0.0, "SGD")) > 100 * FP32_TOLERANCE


def test_the_whole_dense_weights_equal_plain_torch():
    _, expected = plain_losses(global_batches(STEPS, GLOBAL_BATCH))
    by_name, of_rank_1 = run_ranks(2, weights_after)
    assert not any(of_rank_1.values()), "rank 0 alone holds them"
    for name, weights in by_name.items():
        assert set(weights) == {key for key in expected if not key.startswith("tables.")}, name
        for key, tensor in weights.items():
            torch.testing.assert_close(tensor, expected[key], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fault", [without_the_division, with_two_tables_swapped])
def test_a_broken_bridge_is_caught(fault):
    assert difference(run_ranks(2, fault)[0], reference()) > 100 * FP32_TOLERANCE


SOME, ALL = ("C1", "C3"), ("C0", "C1", "C2", "C3", "C4")


def with_replicated_tables(topology: Topology) -> dict[str, list[float]]:
    losses = {name: train(topology, name, replicated=SOME)[0] for name in ("zero0", "zero1", "zero2", "zero3")}
    losses["hsdp"] = train(topology, "hsdp", replicated=SOME, dhen={"shard_group": 2})[0]
    return losses | {"all": train(topology, "zero2", replicated=ALL)[0]}


def test_replicated_tables_train_as_part_of_the_dense_part():
    """In plain torch they are under AdamW, the other tables under SGD."""
    batches = global_batches(STEPS, GLOBAL_BATCH)
    some, every = (plain_losses(batches, replicated=names)[0] for names in (SOME, ALL))
    losses = run_ranks(4, with_replicated_tables)[0]
    assert difference(losses.pop("all"), every) < FP32_TOLERANCE
    for name, of_name in losses.items():
        assert difference(of_name, some) < FP32_TOLERANCE, name
    assert difference(some, reference()) > 100 * FP32_TOLERANCE, "replication had no effect, so this showed nothing"


def main() -> None:
    """Print the table of tools/bench/README.md: loss of step 20 and the largest difference of any step, by ranks."""
    names = [name for name in losses_by_name(1) if name in NAMES]
    print(f"loss of plain torch at step {STEPS}: {reference()[-1]:.7f}")
    print("| ds_config | " + " | ".join(f"{n} ranks: loss, largest difference" for n in (1, 2, 4)) + " |")
    print("| --- | --- | --- | --- |")
    for name in names:
        cells = [losses_by_name(world_size)[name] for world_size in (1, 2, 4)]
        row = " | ".join(f"{losses[-1]:.7f}, {difference(losses, reference()):.1e}" for losses in cells)
        print(f"| {name} | {row} |")


if __name__ == "__main__":
    main()
