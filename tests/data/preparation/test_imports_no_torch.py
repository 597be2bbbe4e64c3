"""Data preparation works without importing torch, which takes seconds."""

import pkgutil
import subprocess
import sys

import dhen.data.formats
import dhen.data.preparation
from tests import ROOT

MODULES = [
    info.name
    for package in (dhen.data.formats, dhen.data.preparation)
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]
FIND = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    if "torch" in sys.modules:
        sys.exit(f"{name} imports torch")
"""


def complaint(*modules):
    """Name the first module that imports torch in a fresh interpreter; an empty string if none does."""
    command = [sys.executable, "-c", FIND, *modules]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stderr.strip()


def test_preparation_and_its_tool_do_not_import_torch():
    assert {"dhen.data.preparation.caching", "dhen.data.preparation.reading.sources", "dhen.data.formats.hub"} < {
        *MODULES
    }
    assert complaint(*MODULES, "tools.prepare_data") == ""


def test_a_module_that_imports_torch_is_found():
    """Negative control."""
    assert complaint(MODULES[0], "dhen.data.loading.batches") == "dhen.data.loading.batches imports torch"
