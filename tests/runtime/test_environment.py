"""The check that FBGEMM and torch belong together."""

import pytest

from dhen.runtime.environment import EnvironmentMismatchError, _check_fbgemm


def test_matching_builds_pass():
    _check_fbgemm({"fbgemm-gpu-cpu": "1.8.0"}, "2.13.0+cpu", "cpu")
    _check_fbgemm({"fbgemm-gpu": "1.6.0"}, "2.11.0+cu130", "cuda")


@pytest.mark.parametrize(
    ("installed", "says"),
    [
        ({}, "not installed"),
        ({"fbgemm-gpu-cpu": "1.8.0", "fbgemm-gpu": "1.8.0"}, "Uninstall both"),
        ({"fbgemm-gpu": "1.6.0"}, "was not built for torch 2.13.0"),
    ],
)
def test_wrong_builds_are_refused_with_the_right_one(installed, says):
    with pytest.raises(EnvironmentMismatchError, match=says) as caught:
        _check_fbgemm(installed, "2.13.0", "cpu")
    assert "fbgemm-gpu-cpu==1.8.0" in str(caught.value)


def test_the_cpu_build_on_a_gpu_is_refused_with_both_ways_out():
    with pytest.raises(EnvironmentMismatchError, match="requirements-cuda") as caught:
        _check_fbgemm({"fbgemm-gpu-cpu": "1.8.0"}, "2.13.0", "cuda")
    assert "DS_ACCELERATOR=cpu" in str(caught.value)
