"""ZeRO's "auto" sizes follow from the model's layers, and numbers stay as they are."""

import pytest

from dhen.config.ds_config import DsConfigError
from dhen.config.zero_sizes import SIZE_KEYS, with_sizes, zero_sizes
from tests.config.test_ds_config import RECIPE, read_ds_config, written

DEEP = {f"model.layers.{layer}.{name}": size for layer in range(20)
        for name, size in {"mix.weight": 400_000, "cross.weight": 300_000, "norm.weight": 512}.items()}  # fmt: skip


def sizes_of(weights: dict[str, int]) -> list[int]:
    return [zero_sizes(weights)[key] for key in SIZE_KEYS]


def test_they_are_those_of_the_largest_layer_however_deep_the_model():
    layer = 400_000 + 300_000 + 512
    assert sizes_of(DEEP) == [layer, layer, layer + 1, 0, 512]
    assert sizes_of(DEEP | {"model.layers.20.mix.weight": 5}) == [layer, layer, layer + 1, 0, 512]
    assert sizes_of(DEEP | {"head.0.weight": 900_000})[0] == 900_000, "a module outside the layers counts as one"


@pytest.mark.parametrize(
    ("weights", "threshold"),
    [
        ({"a": 1_000_000, "b": 100, "c": 90}, 100),
        ({"a": 1_000_000, "b": 100_000, "c": 100_000, "d": 100_000}, 0),  # three of one size: all or none
        ({"a": 30_000_000, "b": 100_000, "c": 100_000, "d": 100_000}, 100_000),  # a hundredth of this model
        ({"a": 1000, "b": 2000}, 2000),  # a small model stays gathered as a whole
    ],
)
def test_the_smallest_weights_stay_gathered(weights, threshold):
    assert zero_sizes(weights)["stage3_param_persistence_threshold"] == threshold


def test_a_small_model_has_no_tiny_messages():
    assert sizes_of({"model.layers.0.mix.weight": 100}) == [250_000, 250_000, 250_001, 0, 100]


def test_numbers_stay_and_stages_without_a_key_get_none():
    zero = {"stage": 3, "reduce_bucket_size": 7, "stage3_max_live_parameters": "auto"}
    sized = with_sizes({"zero_optimization": zero, "bf16": {}}, DEEP)
    assert sized == {"zero_optimization": zero | {"stage3_max_live_parameters": 700_513}, "bf16": {}}
    assert with_sizes({"bf16": {}}, DEEP) == {"bf16": {}}
    assert zero["stage3_max_live_parameters"] == "auto", "the argument is not changed"


def test_auto_elsewhere_is_refused_with_the_keys_that_may_be(tmp_path):
    path = written(tmp_path, {"zero_optimization": {"stage": 3, "sub_group_size": "auto"}})
    with pytest.raises(DsConfigError, match=r'sub_group_size is "auto"\. Set a value: only .*reduce_bucket_size'):
        read_ds_config(path, RECIPE)
