"""What the user left out follows the number of rows, or the run of an earlier version that is resumed."""

import math

import pytest

from dhen.config.arguments import parse_arguments
from dhen.config.left_out import choose_sizes, take_recorded


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


def test_a_resumed_run_of_an_earlier_version_keeps_its_defaults():
    earlier = {"id_encoding": "hash", "hash_size": 100_000, "min_count": 1, "num_train_epochs": 1}
    earlier |= {"per_device_train_batch_size": 2048, "lr_scheduler_type": "constant", "table_epsilon": 1e-8}
    earlier |= {"learning_rate": 1e-3, "table_learning_rate": 0.02}
    flags = ["--dataset_name=a", "--resume_from_checkpoint=true", "--num_train_epochs=3"]
    for more in ([], ["--model_name_or_path=m"]):
        arguments = parse_arguments([*flags, *more])
        said = take_recorded(arguments, earlier)
        data, training = arguments.data, arguments.training
        assert (data.id_encoding, data.hash_size, data.vocabulary_keys) == ("hash", 100_000, "new")
        assert (training.lr_scheduler_type, training.table_epsilon) == ("constant", 1e-8)
        assert (training.learning_rate, training.table_learning_rate) == (1e-3, 0.02)
        assert training.num_train_epochs == 3, "it was given"
        assert "lr_scheduler_type is constant, as in the run that is resumed" in said
    arguments = parse_arguments(flags)
    assert take_recorded(arguments, earlier | {"vocabulary_keys": "union"}) == []
    default = parse_arguments(flags)
    assert not [line for line in take_recorded(default, earlier | {"table_epsilon": None}) if "epsilon" in line]
    assert arguments.training.lr_scheduler_type == "cosine"
