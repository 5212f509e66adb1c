"""Every notebook runs from its first cell to its last."""
import os

import nbclient
import nbformat
import pytest

from tests.ends import tiny

NOTEBOOKS = sorted((tiny.ROOT / "notebooks").glob("*.ipynb"))


def stem(path):
    return path.stem


@pytest.mark.parametrize("path", NOTEBOOKS, ids=stem)
def test_it_runs(path, monkeypatch, cache_directory):
    for name, value in {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache_directory), "PYTHONPATH": str(
            tiny.ROOT) + os.pathsep + os.environ.get("PYTHONPATH", "")}.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=place).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=stem)
def test_it_opens_with_a_title_and_keeps_its_outputs_and_no_errors(path):
    notebook = nbformat.read(path, as_version=4)
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error"]
    assert path.stat().st_size < 300_000
