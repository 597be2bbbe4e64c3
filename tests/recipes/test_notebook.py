"""The notebook runs from its first cell to its last, and its model has learned."""

import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from tests import ROOT

NOTEBOOK = ROOT / "recipes/first_model.ipynb"


def test_the_notebook_runs(tmp_path, monkeypatch):
    for room in ("dhen", "recipes", "ds_configs"):
        (tmp_path / room).symlink_to(ROOT / room)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs before you commit"
    notebook.cells.append(nbformat.v4.new_code_cell("print(round(correlation, 3), log['click'].mean() < 0.5)"))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (output,) = notebook.cells[-1].outputs
    correlation, is_rare = output["text"].split()
    assert float(correlation) > 0.9
    assert is_rare == "True"
    assert (tmp_path / "runs/first_model/run/summary.json").is_file()
    assert Path(os.environ["PYTHONPATH"]) == ROOT
