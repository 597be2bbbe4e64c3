"""The documentation can't rot: its commands parse, the files and keys that it names exist."""

import json
import re
import shlex

import pytest
import yaml
from transformers import AutoModel

import dhen.model.modeling_dhen  # noqa: F401
from dhen.config.arguments import parse_arguments
from dhen.config.dhen_section import DhenSection
from dhen.config.ds_config import AUTO
from dhen.model.configuration_dhen import DhenConfig
from dhen.training.saved.scoring import parse_scoring_arguments
from tests import ROOT

READMES = [ROOT / "README.md", ROOT / "recipes/README.md", ROOT / "ds_configs/README.md"]
RECIPES = sorted((ROOT / "recipes/configs").glob("*.yaml"))


def blocks(kind: str) -> list[tuple[str, str]]:
    """(README's name, block) of each fenced block of that kind."""
    return [
        (str(path.relative_to(ROOT)), block)
        for path in READMES
        for block in re.findall(rf"```{kind}\n(.*?)```", path.read_text(), re.DOTALL)
    ]


COMMANDS = [
    pytest.param(line, id=f"{name}: {line[:60]}")
    for name, block in blocks("bash")
    for line in block.splitlines()
    if re.search(r"recipes/\w+\.py", line)
]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_readmes_parse(command):
    words = shlex.split(command)
    script = next(index for index, word in enumerate(words) if word.startswith("recipes/"))
    assert (ROOT / words[script]).is_file()
    flags = words[script + 1 :]
    if words[script] == "recipes/train.py":
        arguments = parse_arguments(flags, quickstart=ROOT / "recipes/configs/quickstart.yaml")
        assert arguments.ds_config == AUTO or (ROOT / arguments.ds_config).is_file()
    else:
        parse_scoring_arguments(flags, "")


PLANS = [line for _, block in blocks("bash") for line in block.splitlines() if "tools/plan.py" in line]


@pytest.mark.parametrize("command", PLANS)
def test_the_commands_of_the_planner_describe_a_job(command, monkeypatch):
    from tools import plan

    assert plan.job_of(*plan.parse_command_line(shlex.split(command)[2:])).world_size == 256


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_builds_a_model(path):
    arguments = parse_arguments(["--config", str(path)])
    values = vars(arguments.architecture) | {"num_dense_features": 13}
    config = DhenConfig(**values, sparse_features=[{"name": f"C{i}", "num_embeddings": 9} for i in range(3)])
    assert len(AutoModel.from_config(config).model.layers) == len(config.layer_specs)
    assert f"`{path.name}`" in (ROOT / "recipes/README.md").read_text(), "not in the table of recipes"


@pytest.mark.parametrize(("name", "block"), blocks("yaml"))
def test_the_layers_of_the_readme_are_right(name, block):
    values = yaml.safe_load(block)
    config = DhenConfig(**values, num_dense_features=13, sparse_features=[{"name": "C1", "num_embeddings": 9}])
    assert len(AutoModel.from_config(config).model.layers) == len(values["layers"])


def test_the_test_command_is_the_one_that_ci_runs():
    (command,) = [line for _, block in blocks("bash") for line in block.splitlines() if "pytest" in line]
    assert command in (ROOT / ".ci/run").read_text().splitlines()


def test_every_test_and_file_that_the_readmes_name_exists():
    for path in READMES:
        text = path.read_text()
        for named in re.findall(r"`((?:tests|tools|dhen|recipes|ds_configs)/[\w./*-]+)`", text):
            assert list(ROOT.glob(named.rstrip("/"))), f"{path}: {named}"
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (path.parent / link).exists(), f"{path}: {link}"


def test_every_ds_config_and_key_of_our_section_is_explained():
    text = (ROOT / "ds_configs/README.md").read_text()
    for path in (ROOT / "ds_configs").glob("*.json"):
        assert f"`{path.name}`" in text or path.stem.endswith("_bf16"), path
        json.loads(path.read_text())
    for key in DhenSection.model_fields:
        assert f"`{key}`" in text


def test_no_path_of_a_machine_is_committed():
    places = [path for pattern in ("*.md", "*.toml", "*.txt") for path in ROOT.glob(pattern)]
    places += [path for room in ("dhen", "recipes", "tools", "ds_configs") for path in (ROOT / room).rglob("*.*")]
    for path in places:
        if path.suffix in {".py", ".md", ".yaml", ".json", ".toml", ".txt"}:
            assert not re.search(r"/(root|work|home|tmp)/", path.read_text()), path
