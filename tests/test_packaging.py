"""What pip installs: dependencies, pins inside their ranges, and a wheel with all of the package's files."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from dhen.runtime.environment import FBGEMM_PACKAGES, FIRST_MINOR_OFFSET
from tests import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {"cpu": "requirements.txt", "cuda": "requirements-cuda.txt"}
"""Extra -> the file that pins it."""
BASE_ROOMS = ("model", "data")
"""What scoring in Python needs: raw rows to ids, and the model."""
LAZY = {
    "dhen/exported_graph.py": {"onnxruntime"},
    "dhen/data/formats/hub.py": {"datasets"},
    "dhen/data/preparation/running/runners.py": {"dask"},
    "dhen/data/preparation/encoding/key_counts.py": {"duckdb"},
}
"""Packages of an extra that a base room imports only when the user asks for what needs them."""

OF_EXTRAS = {"tools/tune.py": "tune", "dhen/training/reporting/trackers.py": "trackers"}
"""The file that alone imports the packages of an extra, by its path."""
MODULES = {"mlflow": "mlflow-skinny"}
"""The package of a module that may not be installed."""


def ranges(extra: str | None) -> list[Requirement]:
    """What an extra asks for besides the base; None: the base."""
    texts = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    found = []
    for requirement in map(Requirement, texts):
        if requirement.name == "dhen":
            (of_itself,) = requirement.extras
            found += ranges(of_itself)
        else:
            found.append(requirement)
    return found


def names(requirements: list[Requirement]) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements}


def pins(file: str) -> dict[str, str]:
    """Package -> version; every line pins one, except comments and the project itself."""
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    assert lines.pop() == "-e ."
    return dict(re.fullmatch(r"([\w-]+)==([\w.]+)", line).groups() for line in lines)


@pytest.mark.parametrize("extra", PINS)
def test_the_pins_are_of_every_dependency_and_lie_inside_its_range(extra):
    pinned, asked = pins(PINS[extra]), ranges(None) + ranges(extra)
    assert set(pinned) == names(asked)
    for requirement in asked:
        assert requirement.specifier.contains(pinned[requirement.name]), str(requirement)
        assert ">=" in str(requirement.specifier)
        assert "<" in str(requirement.specifier).replace("<=", "")


def test_the_two_requirements_files_differ_in_the_fbgemm_build_alone():
    cpu, cuda = pins(PINS["cpu"]), pins(PINS["cuda"])
    assert cpu.pop("fbgemm-gpu-cpu") == cuda.pop("fbgemm-gpu")
    assert cpu == cuda


@pytest.mark.parametrize("extra", PINS)
def test_every_fbgemm_of_the_range_is_built_for_every_torch_of_the_range(extra):
    by_name = {requirement.name: requirement.specifier for requirement in ranges(extra)}
    (fbgemm,) = by_name.keys() & set(FBGEMM_PACKAGES)
    minor = Version(pins(PINS[extra])["torch"]).minor
    assert by_name["torch"] == Requirement(f"torch>=2.{minor},<2.{minor + 1}").specifier
    offset = minor - FIRST_MINOR_OFFSET
    assert by_name[fbgemm] == Requirement(f"{fbgemm}>=1.{offset},<1.{offset + 1}").specifier


def third_party(path) -> set[str]:
    """Names of packages outside the standard library and the project that a file imports."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0])
    modules -= {*sys.stdlib_module_names, "dhen", "tools", "recipes"}
    packages = packages_distributions()
    return {
        canonicalize_name(name) for module in modules for name in packages.get(module, [MODULES.get(module, module)])
    }


def test_what_the_code_imports_is_declared():
    base, training = names(ranges(None)), names(ranges("cpu") + ranges("cuda"))
    files = [path for room in ("dhen", "recipes", "tools") for path in (ROOT / room).rglob("*.py")]
    large, others = (
        names(ranges("dask") + ranges("large") + ranges("export")),
        {extra: names(ranges(extra)) for extra in OF_EXTRAS.values()},
    )
    assert len(files) > 90
    used = set()
    for path in files:
        name = str(path.relative_to(ROOT))
        is_base = path.is_relative_to(ROOT / "dhen") and path.relative_to(ROOT / "dhen").parts[0] in BASE_ROOMS
        imported = third_party(path)
        undeclared = (
            imported
            - base
            - others.get(OF_EXTRAS.get(name), set())
            - LAZY.get(name, set())
            - (set() if is_base else training)
        )
        assert not undeclared, f"{name} imports {sorted(undeclared)}"
        used |= imported
    # A launcher, and what DeepSpeed and torch import. One build of FBGEMM is installed.
    by_others = {"accelerate", "ninja", "tensorboard", "onnx", "onnxscript", *FBGEMM_PACKAGES}
    assert base.union(training, large, *others.values()) == used | by_others


def test_a_wheel_holds_every_file_of_the_package(tmp_path):
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "dhen", tmp_path / "dhen", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir=out"]
    done = subprocess.run([*command, "--verbose"], cwd=tmp_path, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "Deprecat" not in output
    (wheel,) = (tmp_path / "out").glob("dhen-*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("dhen/")}
    assert packed == {str(path.relative_to(tmp_path)) for path in (tmp_path / "dhen").rglob("*") if path.is_file()}
    assert {"dhen/tables/placement/costs/cpu.json", "dhen/planner/machines/h100.yaml"} < packed
