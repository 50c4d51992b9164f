"""Notebooks: in style, without outputs, and declared in dvc.yaml with exactly what they read."""

import ast
import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, STAGE_NOTEBOOKS

from f2llm.pipeline.notebook import code_of, write_stage_code
from f2llm.store.code import code_digests, imported_modules

NOTEBOOKS = STAGE_NOTEBOOKS
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
TRAINING = {
    "04_stage1": {"stage1", "seed"},
    "05_stage2": {"stage2", "seed"},
    "07_distill": {"distill", "seed", "prune"},
    "08_evaluate": {"start_from", "distill", "prune", "stage2", "name"},  # by models_of and ledger_of_pipeline
}


def cells(notebook: Path) -> list[dict]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def stage_of(notebook: Path) -> dict:
    return next(stage for stage in STAGES.values() if stage.get("cmd", "").startswith(f"${{run}} {notebook.stem}"))


def test_there_is_one_notebook_per_stage():
    named = [re.sub(r"^\d+_", "", notebook.stem) for notebook in NOTEBOOKS]
    assert named == [
        "data",
        "backbone",
        "mine",
        "stage1",
        "stage2",
        "prune",
        "distill",
        "evaluate",
        "report",
        "ablations",
    ]
    assert set(STAGES) == {*named, "config", "code", "teacher"}


def test_the_code_of_a_stage_names_every_module_that_its_notebook_uses(tmp_path):
    write_stage_code(tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == {notebook.stem for notebook in NOTEBOOKS} | {"teacher"}
    for notebook in NOTEBOOKS:
        code, written = code_of(notebook), (tmp_path / f"{notebook.stem}.py").read_text()
        used = code_digests(*imported_modules(code))
        assert len(used) > 1, "vacuous: the notebook imports nothing of f2llm"
        assert written.startswith(code)
        assert dict(reversed(line.split()[1:]) for line in written[len(code) :].splitlines()[2:]) == used
    assert "f2llm.losses" in (tmp_path / "04_stage1.py").read_text(), "what a launched module uses counts, too"
    assert "f2llm.data.mirror" in (tmp_path / "teacher.py").read_text()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_stage_declares_exactly_the_parameters_that_it_reads(notebook):
    tree = ast.parse(code_of(notebook))
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "config"
    }
    read = (read | TRAINING.get(notebook.stem, set())) - {"machine"}
    (table,) = stage_of(notebook)["params"]
    assert {name.split(".")[0] for name in table["build/config.yaml"]} == read


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_stage_depends_on_code_and_keeps_the_executed_copies(notebook):
    stage = stage_of(notebook)
    assert f"build/code/{notebook.stem}.py" in stage["deps"]
    assert f"notebooks/{notebook.name}" not in stage["deps"]
    assert {f"runs/{notebook.stem}.ipynb", f"runs/{notebook.stem}.html"} <= set(stage["outs"])


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_reads_as_a_short_paper(notebook):
    first, parameters, boot, *rest = cells(notebook)
    title = "".join(first["source"])
    assert title.startswith("# ") and re.search(r"^> .*\?$", title, re.M), "a title and a question"
    assert parameters["metadata"]["tags"] == ["parameters"]
    assert all(re.match(r"\w+ = None", line) for line in parameters["source"] if line.strip())
    assert "config = boot(size)" in "".join(boot["source"])
    kinds = [cell["cell_type"] for cell in rest]
    assert "markdown" in kinds and "code" in kinds
    end = "".join(cell_source for cell in rest[-1:] for cell_source in cell["source"])
    assert "**What " in end, "a notebook ends with what was not checked"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_are_short_and_nothing_is_hidden(notebook):
    code = [cell for cell in cells(notebook) if cell["cell_type"] == "code"]
    assert code
    for cell in code:
        source = "".join(cell["source"])
        assert not cell["outputs"] and cell["execution_count"] is None, "outputs belong into runs/"
        assert len(cell["source"]) <= 25
        assert not re.search(r"^\s*[!%]|import \*", source, re.M)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                assert node.end_lineno - node.lineno < 10, "a longer definition belongs into f2llm/"


def test_code_of_a_notebook_ignores_prose_outputs_ids_and_metadata(tmp_path):
    source = json.loads(NOTEBOOKS[0].read_text(encoding="utf-8"))
    changed = json.loads(json.dumps(source))
    for number, cell in enumerate(changed["cells"]):
        cell["id"] = f"other-{number}"
        cell["metadata"]["collapsed"] = True
        if cell["cell_type"] == "markdown":
            cell["source"] = ["another prose"]
        else:
            cell["execution_count"] = 7
            cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["hello"]}]
    copy = tmp_path / "copy.ipynb"
    copy.write_text(json.dumps(changed))
    assert code_of(copy) == code_of(NOTEBOOKS[0])
    changed["cells"][2]["source"].append("\nx = 1")
    copy.write_text(json.dumps(changed))
    assert code_of(copy) != code_of(NOTEBOOKS[0])
