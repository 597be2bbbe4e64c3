"""A small click log for the recipes' tests, prepared once, and a place for the scripts' output."""

import os
from pathlib import Path

import pytest

from tests.recipes.launch import prepared_click_log


@pytest.fixture(scope="session", autouse=True)
def _place_for_output(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["PYTEST_TMP"] = str(tmp_path_factory.mktemp("output"))


@pytest.fixture(scope="session")
def click_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared folder: 640 training rows, 200 validation, 300 test."""
    return prepared_click_log(tmp_path_factory.mktemp("click_log"))
