"""The first call of every notebook: where it works from, and what it refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, STAGE_NOTEBOOKS

PRINT = "from f2llm.pipeline.boot import boot; import os; print(boot().name, os.getcwd())"


def python(code: str, cwd: Path, path: Path = ROOT) -> subprocess.CompletedProcess:
    """Python in a folder, with `path` to import from, as in an environment where f2llm is installed."""
    environment = {"PYTHONPATH": str(path), "PATH": "/usr/bin:/bin", "MPLBACKEND": "Agg"}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("folder", [".", "notebooks", "data/published"], ids=["root", "notebooks", "deeper"])
def test_a_notebook_works_from_any_folder_of_the_clone(folder, config):
    done = python(PRINT, ROOT / folder)
    assert done.stdout.split(" ", 1) == [config.name, f"{ROOT}\n"], done.stderr


def test_outside_a_clone_one_line_says_what_is_missing(tmp_path):
    done = python(PRINT, tmp_path)
    assert done.returncode == 1
    assert f"no dvc.yaml in {tmp_path} or above; remedy:" in done.stderr.splitlines()[-1]


def test_f2llm_of_another_clone_is_refused(tmp_path):
    """An editable installation of one clone must not run the notebooks of another."""
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "notebooks").mkdir()
    done = python(PRINT, tmp_path / "notebooks")
    assert done.returncode == 1
    message = f"this notebook belongs to {tmp_path}, but f2llm was imported from {ROOT}; remedy: "
    assert message in done.stderr.splitlines()[-1]


def test_bars_that_find_no_widgets_do_not_warn():
    warning = "from tqdm import TqdmWarning; import warnings; warnings.warn('IProgress not found.', TqdmWarning)"
    assert "IProgress not found" in python(warning, ROOT).stderr, "vacuous: nothing would have been shown"
    assert "IProgress not found" not in python(f"{PRINT}\n{warning}", ROOT).stderr


CELLS = {  # what papermill's kernel has run before the first call
    "seeds = 5": "papermill was given seeds, but a notebook's only parameter is size; remedy: all other values are in",
    'size = "nano"\nlr = [1, 2]': "papermill was given lr, but",
    'size = "nanno"': "",
}


@pytest.mark.parametrize("cell", CELLS)
def test_papermill_with_a_parameter_that_does_not_exist_is_an_error(cell, tmp_path):
    import nbformat
    from nbclient import NotebookClient

    sources = ["size = None", f"# Parameters\n{cell}\n", "import os\n\nfrom f2llm.pipeline.boot import boot"]
    sources += ["try:\n    print(boot('nano').name)\nexcept ValueError as error:\n    print(error)"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    (output,) = notebook.cells[-1].outputs
    expected = CELLS[cell]
    assert output.text.startswith(expected) if expected else output.text == "nano\n"


def test_the_first_cell_of_a_notebook_alone_says_to_clone_the_repository(tmp_path):
    """As Colab opens it: f2llm cannot be imported."""
    begins = set()
    for path in [*STAGE_NOTEBOOKS, *(ROOT / "notebooks" / "explore").glob("*.ipynb")]:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        first = next(text for cell in cells if "import boot" in (text := "".join(cell["source"])))
        begins.add(first.partition("config = boot")[0])
    assert len(begins) == 1, "all notebooks begin with the same import"
    (tmp_path / "alone.py").write_text(begins.pop())
    hidden = "import sys; sys.modules['f2llm'] = None; exec(open('alone.py').read())"
    done = python(hidden, tmp_path)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("ModuleNotFoundError: ")
    assert "remedy: git clone its repository, pip install -e . there" in last
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone.py"]
