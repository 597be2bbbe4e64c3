"""What contributors use agrees with the project: CI, pre-commit, the guide, the Docker files."""

import os
import re
import tomllib

import pytest
import yaml

from tests import ROOT
from tests.test_imports import MAY_IMPORT
from tests.test_imports import __doc__ as IMPORT_RULES

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GUIDE = ROOT / ".github" / "CONTRIBUTING.md"
TEST_COMMAND = "pip install -r requirements.txt -e '.[dev]' && python -m pytest -n 2 --dist worksteal"
DOCKERFILES = {"cpu": "requirements.txt", "cuda": "requirements-cuda.txt"}


def python_versions() -> list[str]:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    return workflow["jobs"]["test"]["strategy"]["matrix"]["python-version"]


def test_the_workflow_runs_ci_on_the_oldest_python_and_the_next():
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["steps"]
    (script,) = [step["run"] for step in steps if "run" in step]
    assert os.access(ROOT / script, os.X_OK)
    assert PROJECT["requires-python"] == f">={python_versions()[0]}"
    assert python_versions() == ["3.11", "3.12"]


def test_ci_and_the_pages_have_the_same_test_command():
    for name in (".ci/run", "README.md", "tests/README.md"):
        assert TEST_COMMAND in (ROOT / name).read_text(), name


def test_pre_commit_has_the_ruff_of_the_dev_extra():
    (hooks,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert f"ruff=={hooks['rev'].removeprefix('v')}" in PROJECT["optional-dependencies"]["dev"]
    assert [hook["id"] for hook in hooks["hooks"]] == ["ruff-check", "ruff-format"]


def test_the_guide_names_what_is_there():
    text = GUIDE.read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    paths = re.findall(r"`((?:dhen|recipes|tools|tests|ds_configs|\.ci)[\w/.]*)`", text)
    assert len(links) >= 2
    for link in links:
        assert (GUIDE.parent / link).exists(), link
    for path in paths:
        assert (ROOT / path).exists(), path
    assert {path.removeprefix("dhen/") for path in paths if path.startswith("dhen/")} >= set(MAY_IMPORT)
    assert IMPORT_RULES.splitlines()[-1] in text


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_a_docker_file_copies_is_there(name):
    text = (ROOT / "tools" / "docker" / f"{name}.Dockerfile").read_text()
    copied = [source for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for source in line.split()[:-1]]
    for source in copied:
        assert (ROOT / source).exists(), source
    assert {"dhen", "recipes", "ds_configs", "tools", "pyproject.toml", PROJECT["readme"]} <= set(copied)
    (installed,) = re.findall(r"pip install .*--requirement (\S+)", text)
    assert installed == DOCKERFILES[name]
    assert installed in copied
    assert f"tools/docker/{name}.Dockerfile" in text, "the command that builds it"
    assert re.findall(r"--ds_config (\S+)", text) == ["ds_configs/zero2.json"]
    for version in re.findall(r"^FROM python:(3\.\d+)", text, re.MULTILINE):
        assert version in python_versions()
