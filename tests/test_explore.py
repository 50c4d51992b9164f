"""The notebooks to explore: each runs on what `make repro` has made, shows its figures, and changes nothing of it."""

import json
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

from f2llm.store.files import sha256

NOTEBOOKS = sorted((ROOT / "notebooks" / "explore").glob("*.ipynb"))
WITHOUT_FIGURE = {"search"}
MADE = [ROOT / path for path in ("models/stage2/model.safetensors", "data/assembled/manifest.json", "data/mined")]


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 8


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_reads_as_a_short_paper(path):
    """A title, a question, prose between code, what was not checked; no outputs and no machine's metadata."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    prose = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    assert prose[0].startswith("# ") and "\n\n> " in prose[0]
    assert any("**What we did not check.**" in text for text in prose)
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}


@pytest.mark.skipif(not all(path.exists() for path in MADE), reason="needs what `make repro` makes")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_after_make_repro(path):
    before = {file: sha256(file) for file in _made()}
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    warned = ["".join(output.text) for output in outputs if output.get("name") == "stderr" and "Warning" in output.text]
    assert not warned
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert figures or path.stem in WITHOUT_FIGURE
    assert {file: sha256(file) for file in _made()} == before


def _made() -> list[Path]:
    """Files of the pipeline that a notebook could overwrite."""
    folders = [ROOT / "models" / "stage2", ROOT / "data" / "assembled", ROOT / "results"]
    return sorted(file for folder in folders for file in folder.rglob("*") if file.is_file())
