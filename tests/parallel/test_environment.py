"""The check that FBGEMM and torch belong together."""

import pytest

from dhen.parallel.environment import EnvironmentMismatchError, _check_fbgemm


def test_matching_builds_pass():
    _check_fbgemm({"fbgemm-gpu-cpu": "1.8.0"}, "2.13.0+cpu")
    _check_fbgemm({"fbgemm-gpu": "1.6.0"}, "2.11.0+cu130")


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
        _check_fbgemm(installed, "2.13.0")
    assert "fbgemm-gpu-cpu==1.8.0" in str(caught.value)
