"""Notebooks: in style, without outputs, and declared in dvc.yaml with exactly what they use."""

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

from f2llm.notebook import code_of

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
# What these decide is not a matter of results, or is in build/config.yaml, which every stage reads.
UNDECLARED = {"f2llm/__init__.py", "f2llm/embedded/__init__.py", "f2llm/config.py", "f2llm/launch.py"}
TRAINING = {
    "04_stage1": {"stage1", "seed"},
    "05_stage2": {"stage2", "seed"},
    "07_distill": {"distill", "seed", "prune"},
}


def cells(notebook: Path) -> list[dict]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def stage_of(notebook: Path) -> dict:
    return next(stage for stage in STAGES.values() if stage.get("cmd", "").startswith(f"${{run}} {notebook.stem}"))


def path_of(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"


def imported(code: str, package: str) -> set[str]:
    """Modules of f2llm that code imports or launches."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {module} if module.startswith("f2llm") else set()
            if module == "f2llm":  # from . import a_module
                found |= {f"f2llm.{alias.name}" for alias in node.names if path_of(f"f2llm.{alias.name}").exists()}
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "launch":
            found.add(node.args[0].value)
    return found


def closure(modules: set[str]) -> set[str]:
    """The files of modules and of everything that they import in turn."""
    files, waiting = set(), set(modules)
    while waiting:
        path = path_of(module := waiting.pop())
        if path not in files:
            files.add(path)
            package = module if path.name == "__init__.py" else module.rpartition(".")[0]
            waiting |= imported(path.read_text(encoding="utf-8"), package)
    return {path.relative_to(ROOT).as_posix() for path in files}


def test_there_is_one_notebook_per_stage():
    named = [re.sub(r"^\d+_", "", notebook.stem) for notebook in NOTEBOOKS]
    assert named == [
        "backbone",
        "data",
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
    assert STAGES["code"]["foreach"] == [notebook.stem for notebook in NOTEBOOKS]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_stage_declares_every_module_that_its_notebook_uses(notebook):
    used = closure(imported(code_of(notebook), ""))
    assert len(used) > 1, "vacuous: the notebook imports nothing of f2llm"
    declared = {dep for dep in stage_of(notebook)["deps"] if dep.startswith("f2llm/")}
    assert declared == used - UNDECLARED


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
    assert f"build/{notebook.stem}.py" in stage["deps"]
    assert f"notebooks/{notebook.name}" not in stage["deps"]
    assert {f"runs/{notebook.stem}.ipynb", f"runs/{notebook.stem}.html"} <= set(stage["outs"])


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_reads_as_a_short_paper(notebook):
    first, parameters, boot, *rest = cells(notebook)
    title = "".join(first["source"])
    assert title.startswith("# ") and re.search(r"^> .*\?$", title, re.M), "a title and a question"
    assert parameters["metadata"]["tags"] == ["parameters"]
    assert all(re.match(r"\w+ = None", line) for line in parameters["source"] if line.strip())
    assert "load_config(size)" in "".join(boot["source"])
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
