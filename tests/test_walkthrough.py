"""The walkthrough: runs from a fresh clone, and again from what it has kept."""

import json
import os
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

PATH = ROOT / "notebooks" / "00_walkthrough.ipynb"


def run(steps):
    """(printed, figures) of all cells, with fewer steps of training."""
    notebook = nbformat.read(PATH, as_version=4)
    (cell,) = (cell for cell in notebook.cells if "steps = 400" in cell.source)
    cell.source = cell.source.replace("steps = 400", f"steps = {steps}")
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(PATH.parent)}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.get("name") == "stderr" and "Warning" in output.text]
    printed = "".join(output.get("text", "") for output in outputs)
    return printed, sum("image/png" in output.get("data", {}) for output in outputs)


def test_it_has_no_outputs_and_reads_as_a_paper():
    notebook = json.loads(PATH.read_text(encoding="utf-8"))
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    prose = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    assert "\n\n> " in prose[0] and "**What we did not check.**" in prose[-1]


def test_without_a_clone_its_first_cell_makes_one_or_says_how(tmp_path):
    (source,) = (cell.source for cell in nbformat.read(PATH, as_version=4).cells if 'address = ""' in cell.source)
    clone = tmp_path / "f2llm-kit"
    clone.mkdir()  # on the path, as its installation would be
    own = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")} | {"PYTHONPATH": str(clone)}

    def opened(address: str) -> subprocess.CompletedProcess:
        text = source.replace('address = ""', f'address = "{address}"') + "\nprint(config.name, Path.cwd())"
        return subprocess.run([sys.executable, "-c", text], cwd=tmp_path, env=own, capture_output=True, text=True)

    missing = opened("")
    assert missing.returncode and "remedy: git clone it and open it there" in missing.stderr
    for _ in range(2):
        done = opened(f"file://{ROOT}")
        assert done.stdout.split() == ["nano", str(clone)], done.stderr


def test_all_cells_run_and_a_second_run_goes_on_where_the_first_stopped(tmp_path, monkeypatch):
    pytest.importorskip("mteb")
    monkeypatch.setenv("F2LLM_WALKTHROUGH", str(tmp_path / "kept"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    printed, figures = run(steps=40)
    assert "walkthrough: step 40/40" in printed and figures == 2
    assert "no public task is at hand" in printed or "JSTS" in printed
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept" / "backbone").iterdir()}
    printed, figures = run(steps=40)
    assert "walkthrough: resumes after step 40 of 40" in printed and "walkthrough: step" not in printed
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "kept" / "backbone").iterdir()} == made
    assert figures == 2
