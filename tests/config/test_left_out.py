"""Sizes that the user left out follow the number of rows."""

import math

import pytest

from dhen.config.arguments import parse_arguments
from dhen.config.left_out import choose_sizes


@pytest.mark.parametrize(
    ("rows", "world_size", "batch", "epochs"),
    [(50, 1, 64, 500), (2_400, 1, 64, 14), (8_000, 2, 32, 4), (40_000, 1, 256, 4), (262_000, 4, 256, 2),
     (1_000_000, 1, 2048, 2), (1_000_000, 8, 512, 3), (45_000_000, 8, 2048, 1)],
)  # fmt: skip
def test_sizes_that_are_left_out_make_hundreds_of_steps(rows, world_size, batch, epochs):
    arguments = parse_arguments(["--dataset_name=a"]).training
    said = choose_sizes(arguments, rows, world_size)
    assert (arguments.per_device_train_batch_size, arguments.num_train_epochs) == (batch, epochs)
    evaluates = ", eval_steps 25" if rows == 50 else ""
    sizes = f"per_device_train_batch_size {batch}, num_train_epochs {epochs}{evaluates}"
    assert said == f"chosen for {rows:,} training rows: {sizes}"
    assert epochs * math.ceil(rows / (batch * world_size)) >= 500
    given = parse_arguments(["--dataset_name=a", "--per_device_train_batch_size=7", "--num_train_epochs=1"]).training
    assert choose_sizes(given, rows, world_size) == ""
    assert (given.per_device_train_batch_size, given.num_train_epochs) == (7, 1)
