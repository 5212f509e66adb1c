"""Every notebook runs from its first cell to its last."""
import os

import nbclient
import nbformat

from tests.ends import tiny

NOTEBOOKS = sorted((tiny.ROOT / "notebooks").glob("*.ipynb"))


def test_every_notebook_runs(monkeypatch, cache_directory):
    for name, value in {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache_directory), "PYTHONPATH": str(
            tiny.ROOT) + os.pathsep + os.environ.get("PYTHONPATH", "")}.items():
        monkeypatch.setenv(name, value)
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        place = {"metadata": {"path": str(path.parent)}}
        nbclient.NotebookClient(notebook, timeout=600, resources=place).execute()


def test_every_notebook_opens_with_a_title_and_keeps_no_errors():
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        first = notebook.cells[0]
        assert first.cell_type == "markdown" and first.source.startswith("# "), path.name
        outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
        assert not [output for output in outputs if output.output_type == "error"], path.name
