"""Notebooks as stages: what an editor does to them leaves their code as it was; HTML copies of executed ones."""

import copy
import json
import random
import re
from contextlib import chdir
from html.parser import HTMLParser

import nbformat
import pytest
from conftest import ROOT, STAGE_NOTEBOOKS

from f2llm.pipeline.notebook import code_of, stage_notebooks, write_html

CODE = "secret_name = 1"


class Outside(HTMLParser):
    """Addresses that a page loads something from."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        loaded = attributes.get("src") if tag != "a" else None
        if tag == "link":
            loaded = attributes.get("href")
        if loaded and not loaded.startswith("data:"):
            self.addresses.append(loaded)


@pytest.fixture
def notebook(tmp_path):
    """An executed notebook with a title, code, a table and a result."""
    table = "<table><thead><tr><th>score</th></tr></thead><tbody><tr><td>41.4</td></tr></tbody></table>"
    output = nbformat.v4.new_output(
        "execute_result", {"text/html": table, "text/plain": "score 41.4"}, execution_count=3
    )
    cells = [nbformat.v4.new_markdown_cell("# Scores & <more>\n\n> Which?")]
    cells.append(nbformat.v4.new_code_cell(CODE, outputs=[output], execution_count=3))
    path = tmp_path / "executed.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_the_reading_copy_is_a_whole_page_without_code_and_prompts(notebook, tmp_path):
    write_html(notebook, tmp_path / "copy.html", with_code=False)
    page = (tmp_path / "copy.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>") and page.rstrip().endswith("</html>")
    assert "<title>Scores &amp; &lt;more&gt;</title>" in page
    assert "<td>41.4</td>" in page
    assert "secret_name" not in page and not re.search(r"\b(In|Out)\s*\[", page) and "¶" not in page


@pytest.mark.parametrize("with_code", [True, False])
def test_a_copy_loads_nothing_from_elsewhere(notebook, tmp_path, with_code):
    write_html(notebook, tmp_path / "copy.html", with_code)
    page = (tmp_path / "copy.html").read_text(encoding="utf-8")
    assert ("secret_name" in page) == with_code, "vacuous: not the copy that was asked for"
    outside = Outside()
    outside.feed(page)
    assert outside.addresses == []


# Code ---------------------------------------------------------------------------------------------


def insert(notebook: dict, draw: random.Random, kind: str, source) -> None:
    cell = {"cell_type": kind, "metadata": {}, "source": source, "id": f"new-{draw.random()}"}
    cell |= {"outputs": [], "execution_count": None} if kind == "code" else {}
    notebook["cells"].insert(draw.randrange(len(notebook["cells"]) + 1), cell)


def rewrite(notebook: dict, draw: random.Random, change) -> None:
    """Change the source of a code cell; `change` takes and returns a text."""
    cell = draw.choice([cell for cell in notebook["cells"] if cell["cell_type"] == "code"])
    cell["source"] = change("".join(cell["source"]))


def run_a_cell(notebook: dict, draw: random.Random) -> None:
    cell = draw.choice([cell for cell in notebook["cells"] if cell["cell_type"] == "code"])
    cell["execution_count"] = draw.randrange(1, 99)
    cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["print(1)\n"]}]
    cell["metadata"]["execution"] = {"iopub.execute_input": "2026-01-01T00:00:00Z"}


def spaced(text: str) -> str:
    """Spaces at the ends of lines that no string goes over."""
    return text if '"""' in text else "\n".join(f"{line}  " for line in text.split("\n")) + "\n\n"


EDITS = [  # what an editor may do between two saves; each takes a notebook and a random.Random
    run_a_cell,
    lambda notebook, draw: insert(notebook, draw, "code", draw.choice(["", [], "\n\n", "# later", ["# a\n", "# b"]])),
    lambda notebook, draw: insert(notebook, draw, "markdown", "**Why** `x = 1`?"),
    lambda notebook, draw: insert(notebook, draw, "raw", ["x = 1"]),
    lambda notebook, draw: rewrite(notebook, draw, lambda text: text.replace("\n", "\r\n")),
    lambda notebook, draw: rewrite(notebook, draw, lambda text: text.splitlines(keepends=True)),
    lambda notebook, draw: rewrite(notebook, draw, lambda text: f"# first, a remark\n\n{text}\n# last, another"),
    lambda notebook, draw: rewrite(notebook, draw, spaced),
    lambda notebook, draw: draw.choice(notebook["cells"])["metadata"].setdefault("tags", []).append("hide-input"),
    lambda notebook, draw: draw.choice(notebook["cells"])["metadata"].update(collapsed=True, jupyter={"a": 1}),
    lambda notebook, draw: draw.choice(notebook["cells"]).update(id=f"id-{draw.random()}"),
    lambda notebook, draw: notebook["metadata"].update(kernelspec={"name": "conda-env", "display_name": "Conda"}),
    lambda notebook, draw: notebook.update(nbformat_minor=draw.randrange(6)),
]


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_any_edits_that_change_nothing_that_runs_leave_the_code_as_it_was(path, tmp_path):
    before, original = code_of(path), json.loads(path.read_text(encoding="utf-8"))
    for seed in range(8):
        draw, notebook = random.Random(seed), copy.deepcopy(original)
        for _ in range(12):
            draw.choice(EDITS)(notebook, draw)
        changed = tmp_path / "changed.ipynb"
        changed.write_text(json.dumps(notebook, indent=draw.choice([None, 1, 4])), encoding="utf-8")
        assert changed.read_bytes() != path.read_bytes(), "vacuous: nothing was changed"
        assert code_of(changed) == before, f"seed {seed}"


def test_running_cells_in_a_kernel_and_saving_leaves_the_code_as_it_was(tmp_path):
    """The same as in test_jupyterlab.py, without a server and a browser: the kernel's outputs, saved by nbformat."""
    from nbclient import NotebookClient

    path = ROOT / "notebooks" / "10_ablations.ipynb"
    notebook = nbformat.read(path, as_version=4)
    whole, notebook.cells = notebook.cells, notebook.cells[:6]
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    assert sum(bool(cell.get("outputs")) for cell in notebook.cells) > 1, "vacuous: nothing was run"
    notebook.cells += whole[6:]
    nbformat.write(notebook, tmp_path / path.name)
    assert code_of(tmp_path / path.name) == code_of(path)


def test_copies_and_other_files_beside_the_notebooks_are_no_stages(tmp_path):
    (tmp_path / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    names = [path.name for path in STAGE_NOTEBOOKS]
    beside = [
        "04_stage1-Copy1.ipynb",
        "00_walkthrough.ipynb",
        "Untitled.ipynb",
        "11_mine.ipynb",
        "04_stage1 copy.ipynb",
        "04_stage1.ipynb.orig",
    ]
    for name in names + beside + [".ipynb_checkpoints/04_stage1-checkpoint.ipynb", ".virtual_documents/01_a.ipynb"]:
        (tmp_path / "notebooks" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "notebooks" / name).write_text("{}")
    with chdir(tmp_path):
        assert [path.name for path in stage_notebooks()] == names and len(names) == 10
