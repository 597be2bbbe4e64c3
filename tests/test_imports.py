"""Imports go one way: model <- parallel, data <- training <- recipes, tools; and the model knows of one device only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "model": set(),
    "parallel": {"model"},
    "data": {"model"},
    "training": {"model", "parallel", "data"},
}
NOT_IN_MODEL = ("torch.distributed", "deepspeed", "fbgemm_gpu")
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


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_only_rooms_below(room):
    files = python_files(room)
    assert files
    for path in files:
        wrong = rooms_of(imported(path.read_text())) - MAY_IMPORT[room] - {room}
        assert not wrong, f"{path.relative_to(ROOT)} imports from {sorted(wrong)}"


def test_the_model_imports_nothing_distributed():
    for path in python_files("model"):
        source = path.read_text()
        for package in NOT_IN_MODEL:
            assert not reaches(imported(source), package), f"{path.relative_to(ROOT)} imports {package}"
        wrong = named(source) & set(NOT_NAMED_IN_MODEL)
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
