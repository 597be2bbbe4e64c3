"""The rule by which gradients leave in buckets is DeepSpeed's own, and stage 3's: real backwards, counted."""

import pytest
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from dhen.dense.gradient_bucket import GradientBucket
from dhen.dense.hsdp import HsdpStage3
from dhen.dense.lean_stage3 import LeanStage3
from dhen.runtime.topology import Topology
from tests.ranks import run_ranks
from tests.tiny_training import train

ROOM = 2600
CASES = {
    "zero1": (DeepSpeedZeroOptimizer, "reduce_ipg_grads"),
    "zero2": (DeepSpeedZeroOptimizer, "reduce_ipg_grads"),
    "zero3": (LeanStage3, "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads"),
    "hsdp": (HsdpStage3, "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads"),
}
"""By ds_config: the optimizer, and its method that reduces the bucket."""


def gradients_and_buckets(topology: Topology, name: str) -> tuple[list[int], list[int]]:
    """Elements of each gradient of a step as it comes, and of each bucket that is reduced."""
    optimizer, reduction = CASES[name]
    takes, reduces = optimizer.reduce_independent_p_g_buckets_and_remove_grads, getattr(optimizer, reduction)
    came: list[int] = []
    left: list[int] = []

    def take(self, param, *rest):
        came.append(getattr(param, "ds_numel", param.numel()))
        return takes(self, param, *rest)

    def reduce(self, *arguments, **options):
        left.extend(bucket.elements for bucket in self.ipg_buckets.values() if bucket.elements)
        return reduces(self, *arguments, **options)

    optimizer.reduce_independent_p_g_buckets_and_remove_grads = take
    setattr(optimizer, reduction, reduce)
    train(topology, name, steps=1, zero={"reduce_bucket_size": ROOM})
    return came, left


def replayed(came: list[int], *, is_eager: bool) -> list[int]:
    """The latter by the rule."""
    bucket, left = GradientBucket(ROOM, is_eager=is_eager), []
    for number, elements in enumerate(came):
        left += [sum(due.values()) for due in bucket.take(str(number), elements)]
    return [*left, bucket.elements] if bucket.waiting else left


@pytest.mark.parametrize("name", CASES)
def test_buckets_leave_by_the_rule(name):
    came, left = run_ranks(4, gradients_and_buckets, name, local_size=2)[0]
    assert max(came) > ROOM, "a gradient larger than the bucket"
    is_eager = name in ("zero3", "hsdp")
    assert left == replayed(came, is_eager=is_eager)
    assert left != replayed(came, is_eager=not is_eager), "the model must tell the rules apart"
