"""The pages can't rot: their commands parse, and the files, keys and arguments that they name exist.

test_documented_code.py runs their code.
"""

import importlib
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
import yaml
from transformers import AutoModel

import dhen.model.modeling_dhen  # noqa: F401
from dhen.config.arguments import parse_arguments
from dhen.config.data_arguments import DataArguments
from dhen.config.dhen_section import DhenSection, PlacementSection
from dhen.config.ds_config import AUTO
from dhen.config.training_arguments import TrainingArguments
from dhen.data.formats.column_role import DenseRole, LabelRole, SparseRole, TaskRole
from dhen.data.formats.roles import ColumnRoles, load_roles
from dhen.data.preparation.settings import Format
from dhen.model.configuration_dhen import DhenArchitecture, DhenConfig
from dhen.model.interactions import PRESETS, interaction_kinds, interaction_options, registry
from dhen.training.saved.scoring import parse_scoring_arguments
from recipes.evaluate import EvaluationArguments
from tests import ROOT
from tools.importance import ImportanceArguments

PAGES = [path for place in (".", "recipes", "ds_configs", "tools", "tools/bench", "tools/docker", "tests")
         for path in sorted((ROOT / place).glob("*.md"))]  # fmt: skip
README, GUIDE, DATA = ROOT / "README.md", ROOT / "recipes/README.md", ROOT / "recipes/DATA.md"
RECIPES = sorted((ROOT / "recipes/configs").glob("*.yaml"))
LONGEST_README_WORDS = 1_300
OF_LAUNCHERS = {
    "num_gpus", "master_port", "main_process_port", "nproc_per_node", "num_processes", "include", "nnodes",
    "max_restarts", "rdzv_backend",
}  # fmt: skip


def blocks(kind: str, pages: list[Path] = PAGES) -> list[tuple[str, str]]:
    """(page's name, block) of each fenced block of that kind."""
    return [
        (str(path.relative_to(ROOT)), block)
        for path in pages
        for block in re.findall(rf"```{kind}\n(.*?)```", path.read_text(), re.DOTALL)
    ]


def prose(path: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)


def inline_code(path: Path) -> list[str]:
    """What stands in backticks, on one line or two."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(path))]


def table(path: Path, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its head."""
    section = path.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def starts_a_script(code: str) -> bool:
    """Whether it is a command that runs a Python file."""
    return re.match(r"(\w+=\S+ )*(deepspeed|torchrun|accelerate|python) (.* )?\S+\.py\b", code) is not None


IN_BLOCKS = [
    (name, command)
    for name, block in blocks("bash")
    for command in block.replace("\\\n", " ").splitlines()
    if starts_a_script(command)
]
IN_TEXT = [(str(path.relative_to(ROOT)), code) for path in PAGES for code in inline_code(path) if starts_a_script(code)]
COMMANDS = [pytest.param(command, id=f"{name}: {command[:60]}") for name, command in IN_BLOCKS + IN_TEXT]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def script_and_flags(command: str) -> tuple[str, list[str]]:
    words = shlex.split(command)
    place = next(index for index, word in enumerate(words) if word.endswith(".py"))
    return words[place], words[place + 1 :]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_parse(command, monkeypatch, capsys):
    script, flags = script_and_flags(command)
    assert (ROOT / script).is_file()
    if script == "tools/cluster.py":  # the rest is the script that it starts
        script, flags = script_and_flags(" ".join(flags))
    if script == "recipes/train.py" and flags != ["--help"]:
        arguments = parse_arguments(flags, quickstart=ROOT / "recipes/configs/quickstart.yaml")
        assert arguments.ds_config == AUTO or (ROOT / arguments.ds_config).is_file()
    elif script in ("recipes/evaluate.py", "recipes/predict.py"):
        parse_scoring_arguments(flags, "")
    elif script.startswith("tools/"):
        parse = parser_of(script)
        if command in [of_block for _, of_block in IN_BLOCKS]:
            monkeypatch.setattr("sys.argv", [script, *flags])
            parse()
        else:  # in a sentence, where a command may be less than whole
            monkeypatch.setattr("sys.argv", [script, "--help"])
            with pytest.raises(SystemExit):
                parse()
            assert {flag for flag in flags if flag.startswith("--")} <= set(
                re.findall(r"--\w+", capsys.readouterr().out)
            )


def parser_of(script: str) -> Callable[[], object]:
    """The function by which a tool reads sys.argv."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    (parse,) = [
        function
        for name, function in vars(module).items()
        if name.startswith("parse_") and function.__module__ == module.__name__
    ]
    return parse


PLANS = [command for _, command in IN_BLOCKS if "tools/plan.py" in command]


@pytest.mark.parametrize("command", PLANS)
def test_the_commands_of_the_planner_describe_a_job(command):
    from tools import plan

    assert plan.job_of(*plan.parse_command_line(script_and_flags(command)[1])).world_size == 256


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_builds_a_model(path):
    arguments = parse_arguments(["--config", str(path)])
    values = vars(arguments.architecture) | {"num_dense_features": 13}
    config = DhenConfig(**values, sparse_features=[{"name": f"C{i}", "num_embeddings": 9} for i in range(3)])
    assert len(AutoModel.from_config(config).model.layers) == len(config.layer_specs)
    assert f"`{path.name}`" in GUIDE.read_text(), "not in the table of recipes"


@pytest.mark.parametrize(("name", "block"), blocks("yaml"))
def test_yaml_is_a_model_or_a_schema(name, block, tmp_path):
    values = yaml.safe_load(block)
    if "layers" in values:
        config = DhenConfig(**values, num_dense_features=13, sparse_features=[{"name": "C1", "num_embeddings": 9}])
        assert len(AutoModel.from_config(config).model.layers) == len(values["layers"])
    else:
        (tmp_path / "schema.yaml").write_text(block)
        roles = load_roles(tmp_path / "schema.yaml")
        assert len(roles.dense) + len(roles.sparse) == len(values["dense"]) + len(values["sparse"])


@pytest.mark.parametrize(("name", "block"), blocks("json"))
def test_json_is_a_piece_of_a_ds_config(name, block):
    values = json.loads(f"{{{block}}}")
    assert set(values["dhen"]) <= {*DhenSection.model_fields, "by_depth"}


def test_the_test_command_is_the_one_that_ci_runs():
    (command,) = [line for _, block in blocks("bash") for line in block.splitlines() if "pytest" in line]
    assert command in (ROOT / ".ci/run").read_text().splitlines()


def anchors(path: Path) -> set[str]:
    """What `page.md#anchor` may name: the headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_and_link_exists(path):
    for named in inline_code(path):
        if re.fullmatch(r"(?:tests|tools|dhen|recipes|ds_configs)/[\w./*-]+|requirements[\w-]*\.txt", named):
            assert list(ROOT.glob(named.rstrip("/"))), named
    for link in re.findall(r"\]\((?!http)([^)\s]+)\)", path.read_text()):
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_is_short():
    assert len(README.read_text().split()) <= LONGEST_README_WORDS


def test_the_figures_of_the_readme_are_among_the_measured_ones():
    results = README.read_text().split("| measured on CPU |")[1].split("\n\n")[0]
    measured = "".join((ROOT / name).read_text() for name in ("tools/bench/README.md", "recipes/RESULTS.md"))
    figures = re.findall(r"\d+\.\d{2,}|\d\.\d %", results)
    assert len(figures) >= 10
    for figure in figures:
        assert figure in measured, figure


def test_every_ds_config_and_key_of_our_section_is_explained():
    text = (ROOT / "ds_configs/README.md").read_text()
    for path in (ROOT / "ds_configs").glob("*.json"):
        assert f"`{path.name}`" in text or path.stem.endswith("_bf16"), path
        json.loads(path.read_text())
    for key in (*DhenSection.model_fields, *PlacementSection.model_fields):
        assert f"`{key}`" in text


def test_every_key_of_the_schema_file_is_in_its_table_and_no_other():
    allowed = {"file": set(ColumnRoles.__dataclass_fields__), "dense": set(DenseRole.__dataclass_fields__),
               "tasks": TaskRole.__dataclass_fields__.keys() - LabelRole.__dataclass_fields__.keys(),
               "sparse": {*SparseRole.__dataclass_fields__, "parts"} - {"part"}}  # fmt: skip
    listed: dict[str, set[str]] = {place: set() for place in allowed}
    for key, where, *_ in table(DATA, "The schema file"):
        for place in where.removesuffix(", csv only").split(", "):
            listed[place].add(key.strip("`"))
    assert listed == allowed


def test_every_format_is_in_its_table():
    assert {row[0].strip("`") for row in table(DATA, "Formats")} == set(get_args(Format)) - {"auto"}


def test_every_interaction_and_option_is_in_the_guide():
    rows = {row[0].strip("`"): row[-1] for row in table(GUIDE, "The model")}
    # Other tests register interactions of users.
    ours = [kind for kind in interaction_kinds() if registry._INTERACTIONS[kind].__module__.startswith("dhen.")]
    assert set(rows) == {*ours, *PRESETS}
    for kind in ours:
        for option in interaction_options(kind).keys() - {"use_dense"}:
            assert f"`{option}`" in rows[kind] or rows[kind] == "as `advanced_dlrm`", (kind, option)


def names_of_arguments() -> set[str]:
    """Of the scripts in recipes/, and of tools/importance.py, which are fields."""
    parts = (DataArguments, DhenArchitecture, TrainingArguments, EvaluationArguments, ImportanceArguments)
    return {item.name for part in parts for item in fields(part)} | {"config", "ds_config", "check"}


def test_every_argument_that_the_pages_name_exists():
    of_tools = "".join(path.read_text() for path in (ROOT / "tools").rglob("*.py"))
    known = names_of_arguments() | OF_LAUNCHERS | {"help"} | set(re.findall(r'"--(\w+)"', of_tools))
    for path in (README, GUIDE, DATA):
        for code in inline_code(path):
            for flag in re.findall(r"(?<!\S)--([a-z]\w*)", code) if not code.startswith("docker ") else ():
                assert flag in known, f"{path.name}: --{flag}"
    for row in table(DATA, "Arguments by size of the data"):
        for name in re.findall(r"`(\w+)`", row[0]):
            assert name in names_of_arguments(), name


@pytest.mark.parametrize("path", [README, GUIDE, DATA], ids=lambda path: path.name)
def test_every_name_with_an_underscore_is_in_the_code(path):
    places = [file for room in ("dhen", "recipes", "tools") for file in (ROOT / room).rglob("*.py")]
    words = set(re.findall(r"\w+", "".join(file.read_text() for file in places)))
    for code in inline_code(path):
        if re.fullmatch(r"[a-z]+(_[a-z0-9]+)+", code):
            assert code in words, f"{path.name}: {code}"


def test_no_path_of_a_machine_is_committed():
    places = [path for pattern in ("*.md", "*.toml", "*.txt") for path in ROOT.glob(pattern)]
    places += [path for room in ("dhen", "recipes", "tools", "ds_configs") for path in (ROOT / room).rglob("*.*")]
    for path in places:
        if path.suffix in {".py", ".md", ".yaml", ".json", ".toml", ".txt"}:
            assert not re.search(r"/(root|work|home|tmp)/", path.read_text()), path
