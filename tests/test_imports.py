"""Imports go one way between rooms and in no circle between files; the model knows of one device only.

model, runtime <- config <- data, tables, dense <- planner <- training <- recipes, tools
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BELOW_CONFIG = {"model", "runtime"}
BELOW_PLANNER = {*BELOW_CONFIG, "config", "tables", "dense"}
MAY_IMPORT = {
    "model": set(),
    "runtime": set(),
    "config": BELOW_CONFIG,
    "data": {"model"},
    "tables": {*BELOW_CONFIG, "config"},
    "dense": {*BELOW_CONFIG, "config"},
    "planner": BELOW_PLANNER,
    "training": {*BELOW_PLANNER, "planner", "data"},
}
IN_PREPARATION = {"reading": set(), "encoding": set(), "running": {"reading"}}
"""Rooms of data/preparation, and which others each of them may import. The files beside them join them."""
NOT_IN = {
    "model": ("torch.distributed", "deepspeed", "fbgemm_gpu"),
    "config": ("fbgemm_gpu",),
    "data/formats": ("torch", "deepspeed", "fbgemm_gpu"),
    "data/preparation": ("torch", "deepspeed", "fbgemm_gpu"),
}
NOT_NAMED_IN_MODEL = ("rank", "local_rank", "world_size", "process_group")


def python_files(room):
    return sorted((ROOT / "dhen" / room).rglob("*.py"))


def imported(source):
    """The full names that a file's text imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the room"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def named(source):
    """Variables, attributes and arguments in a file's text."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        names |= {getattr(node, key) for key in ("id", "attr", "arg") if isinstance(getattr(node, key, None), str)}
    return names


def rooms_of(names):
    parts = [name.split(".") for name in names]
    ours = {part[1] for part in parts if part[0] == "dhen" and len(part) > 1 and part[1] in MAY_IMPORT}
    return ours | {part[0] for part in parts if part[0] in ("recipes", "tools")}


def reaches(names, package):
    return any(name == package or name.startswith(package + ".") for name in names)


def circle(graph):
    """The files of a circle of imports, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@pytest.fixture(scope="module")
def imports_by_file():
    """Module name -> names of the project's modules that it imports."""
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in python_files("")}
    paths = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    graph = {}
    for name, path in paths.items():
        modules = {other if other in paths else other.rpartition(".")[0] for other in imported(path.read_text())}
        graph[name] = modules & paths.keys() - {name}
    return graph


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_only_rooms_below(room):
    files = python_files(room)
    assert files
    for path in files:
        wrong = rooms_of(imported(path.read_text())) - MAY_IMPORT[room] - {room}
        assert not wrong, f"{path.relative_to(ROOT)} imports from {sorted(wrong)}"


def test_every_folder_is_a_room_with_rules():
    assert {path.name for path in (ROOT / "dhen").iterdir() if path.is_dir() and path.name[0] != "_"} == set(MAY_IMPORT)


def test_files_import_each_other_in_no_circle(imports_by_file):
    assert len(imports_by_file) > 80
    assert not circle(imports_by_file)
    assert circle(imports_by_file | {"dhen.model.names": {"dhen.training.loop"}}), "negative control"


@pytest.mark.parametrize("room", IN_PREPARATION)
def test_rooms_of_the_preparation_import_one_way(imports_by_file, room):
    prefix = "dhen.data.preparation."
    own = {name: modules for name, modules in imports_by_file.items() if name.startswith(f"{prefix}{room}.")}
    assert own
    allowed = {"settings", room, *IN_PREPARATION[room]}
    for name, modules in own.items():
        used = {module.removeprefix(prefix).partition(".")[0] for module in modules if module.startswith(prefix)}
        assert used <= allowed, f"{name} imports {sorted(used - allowed)}"


@pytest.mark.parametrize("room", NOT_IN)
def test_rooms_leave_packages_to_others(room):
    for path in python_files(room):
        for package in NOT_IN[room]:
            assert not reaches(imported(path.read_text()), package), f"{path.relative_to(ROOT)} imports {package}"


def test_the_model_names_no_rank():
    for path in python_files("model"):
        wrong = named(path.read_text()) & set(NOT_NAMED_IN_MODEL)
        assert not wrong, f"{path.relative_to(ROOT)} names {sorted(wrong)}"


def test_the_check_sees_every_form_of_import():
    """Negative control."""
    text = "def f(rank):\n    import torch.distributed as d\n    from dhen import data\n"
    assert reaches(imported(text), "torch.distributed")
    assert reaches(imported("from torch import distributed"), "torch.distributed")
    assert reaches(imported("import deepspeed.zero"), "deepspeed")
    assert not reaches(imported("import torch"), "torch.distributed")
    assert rooms_of(imported(text)) == {"data"}
    assert "rank" in named(text)
