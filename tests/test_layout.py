"""Who may import whom: flat files hold the method and know `store` alone; nothing needs the pipeline."""

import ast
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from f2llm.store.code import imported_modules

PACKAGE = ROOT / "f2llm"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}
PACKAGES = sorted(PACKAGE.rglob("__init__.py"))
WINGS = {path.parent.name for path in PACKAGES} - {"f2llm", "store"}  # planning lies within pipeline


def wing_of(module: str) -> str:
    """'store' of f2llm.store.files, '' of f2llm.train."""
    return module.split(".")[1] if module.count(".") > 1 else ""


def imports_of(module: str) -> set[str]:
    return imported_modules(MODULES[module].read_text(encoding="utf-8"), module.rpartition(".")[0])


def test_the_rules_see_imports_at_all():
    assert {"data", "embedded", "mining", "evaluation", "reporting", "pipeline", "planning"} == WINGS
    assert imports_of("f2llm.resume") > {"f2llm.optimizer", "f2llm.store.checkpoint"}
    assert sum(wing_of(module) == "" for module in MODULES) > 10


@pytest.mark.parametrize("module", [module for module in MODULES if wing_of(module) == ""])
def test_a_file_of_the_method_imports_no_wing_but_store(module):
    if module != "f2llm.__main__":
        assert {wing_of(used) for used in imports_of(module)} <= {"", "store"}


@pytest.mark.parametrize("module", [module for module in MODULES if wing_of(module) == "store"])
def test_store_imports_nothing_but_the_configuration(module):
    assert {used for used in imports_of(module) if wing_of(used) != "store"} <= {"f2llm.config"}


@pytest.mark.parametrize("module", [module for module in MODULES if wing_of(module) != "pipeline"])
def test_nothing_imports_the_pipeline(module):
    if module != "f2llm.__main__":
        assert "pipeline" not in {wing_of(used) for used in imports_of(module)}


@pytest.mark.parametrize("path", PACKAGES, ids=lambda path: path.parent.name)
def test_the_init_file_of_a_package_only_names_where_things_come_from(path):
    """Digests of code pass over these files, so nothing may be decided there."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = [node.name] if isinstance(node, ast.FunctionDef) else []
        names += [target.id for target in node.targets] if isinstance(node, ast.Assign) else []
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert is_text or isinstance(node, ast.ImportFrom) or names in (["__all__"], ["__getattr__"])


def test_importing_any_module_changes_no_environment_variable_of_ours():
    """What a library sets at its own import is its own affair."""
    code = f"import os\nbefore = dict(os.environ)\nimport {', '.join(MODULES.keys() - {'f2llm.__main__'})}\n"
    code += "print(*(key for key in os.environ.keys() | before.keys() if os.environ.get(key) != before.get(key)))"
    ours = {"HF_HUB_OFFLINE", "MTEB_CACHE", "OMP_WAIT_POLICY", "PYTHONWARNINGS", "TOKENIZERS_PARALLELISM"}
    clean = {key: value for key, value in os.environ.items() if key not in ours}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean, capture_output=True, text=True, check=True)
    assert not ours & set(done.stdout.split())
