"""Digests of code: prose leaves them alone, any other edit changes those of exactly the modules that use it."""

import ast

import pytest
from conftest import ROOT

from f2llm.store import code
from f2llm.store.code import code_digest, code_digests, plain_code

TEXT = '''"""Prompts."""


def prompted(text):
    """With a prompt."""
    return "# " + text  # not a comment


LINES = """one

two"""
'''
PACKAGE = {  # every way in which one module uses another
    "__init__.py": """
from .config import load

def __getattr__(name):
    from .model import Embedder
    return Embedder
""",
    "config.py": "def load(): return {}\n",
    "text.py": TEXT,
    "lone.py": "NUMBER = 1\n",
    "model.py": "from .text import prompted\nclass Embedder:\n    dim = 8\n",
    "train.py": "from . import Embedder, load\nfrom .store.files import whole\n",
    "store/__init__.py": '"""What lies on disk."""\n',
    "store/files.py": "def whole(): return 1\n",
    "mining/__init__.py": "from .rule import mine\n",
    "mining/rule.py": "def mine():\n    from ..text import prompted\n    return prompted('')\n",
    "pipeline/__init__.py": "",
    "pipeline/launch.py": "def launch(module, *arguments): ...\n",
    "pipeline/stage.py": "import f2llm.train\n",
    "pipeline/start.py": "from .launch import launch\ndef start():\n    launch('f2llm.pipeline.stage', 1)\n",
    "pipeline/audit.py": "from f2llm.mining import mine\nfrom f2llm import text\n",
}
MODULES = [name.removesuffix(".py").replace("/", ".") for name in PACKAGE if not name.endswith("__init__.py")]
USERS = {  # by hand: whose digest an edit of a module changes
    "text": {"text", "model", "train", "mining.rule", "pipeline.stage", "pipeline.start", "pipeline.audit"},
    "model": {"model", "train", "pipeline.stage", "pipeline.start"},
    "store.files": {"store.files", "train", "pipeline.stage", "pipeline.start"},
    "train": {"train", "pipeline.stage", "pipeline.start"},
    "mining.rule": {"mining.rule", "pipeline.audit"},
    "pipeline.stage": {"pipeline.stage", "pipeline.start"},
    "pipeline.start": {"pipeline.start"},
    "pipeline.audit": {"pipeline.audit"},
    "lone": {"lone"},
    "config": set(),
    "pipeline.launch": set(),
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The small package in the place of f2llm."""
    for name, source in PACKAGE.items():
        (tmp_path / "f2llm" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f2llm" / name).write_text(source)
    monkeypatch.setattr(code, "PACKAGE", tmp_path / "f2llm")
    code._digest_and_imports.cache_clear()  # where a name comes from was found in the other package
    yield tmp_path / "f2llm"
    code._digest_and_imports.cache_clear()


def all_digests():
    return {module: code_digest(f"f2llm.{module}") for module in MODULES}


def changed_by(edit):
    before = all_digests()
    edit()
    after = all_digests()
    return {module for module in MODULES if before[module] != after[module]}


# What a digest depends on -----------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
def test_an_edit_changes_the_digests_of_the_module_and_of_all_that_use_it_in_turn(package, module):
    path = package / f"{module.replace('.', '/')}.py"
    assert changed_by(lambda: path.write_text(f"{path.read_text()}MORE = 1\n")) == USERS[module]


EDITS = {  # of text.py, and whether they change what it does
    "a comment": ("not a comment", "another remark", False),
    "a line of comment": ("def prompted", "# A remark: (\n\ndef prompted", False),
    "no comment": ("  # not a comment", "", False),
    "the docstring of a function": ("With a prompt.", "With its\n\n    prompt # here.", False),
    "the docstring of a module": ("Prompts.", "Texts: ä 敏.", False),
    "no docstring": ('    """With a prompt."""\n', "", False),
    "blank lines": ("\n\n\ndef", "\n\n\n\n\ndef", False),
    "a string": ('"# "', '"## "', True),
    "a space in a string": ('"# "', '"#"', True),
    "a name": ("def prompted(text", "def prompted(words", True),
    "a blank line in a string": ("one\n\ntwo", "one\n\n\ntwo", True),
    "a space at the end of a line in a string": ("one\n", "one \n", True),
    "a string that is no docstring": ('    return "# "', '    "more"\n    "words"\n    return "# "', True),
}


@pytest.mark.parametrize(("old", "new", "matters"), EDITS.values(), ids=EDITS)
def test_comments_docstrings_and_blank_lines_do_not_count_and_all_else_does(package, old, new, matters):
    path = package / "text.py"
    assert path.read_text().count(old) == 1
    found = changed_by(lambda: path.write_text(path.read_text().replace(old, new)))
    assert found == (USERS["text"] if matters else set())


def test_files_that_are_no_code_do_not_count(package):
    assert changed_by(lambda: (package / "README.md").write_text("# Read me")) == set()


def test_digests_are_told_by_module_and_agree_with_the_one_of_all(package):
    digests = code_digests("f2llm.train", "f2llm.lone")
    assert list(digests) == ["f2llm.lone", "f2llm.model", "f2llm.store.files", "f2llm.text", "f2llm.train"]
    assert len(set(digests.values())) == 5
    assert code_digest("f2llm.train") != code_digest("f2llm.model")
    assert len(code_digest("f2llm.train")) == 64


def test_a_name_that_a_package_does_not_import_is_an_error_with_a_remedy(package):
    (package / "lone.py").write_text("from f2llm.mining import nothing\n")
    with pytest.raises(ValueError, match=r"f2llm.mining does not import 'nothing'; remedy: import it from the module"):
        code_digest("f2llm.lone")


# The package itself -----------------------------------------------------------------------------

FILES = sorted((ROOT / "f2llm").rglob("*.py"))


def without_docstrings(source: str) -> str:
    """Oracle: the syntax tree with the docstrings taken out of it; `pass` where nothing else is left."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        has_body = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if has_body and ast.get_docstring(node):
            alone = len(node.body) == 1 and not isinstance(node, ast.Module)
            node.body = [ast.Pass()] if alone else node.body[1:]
    return ast.dump(tree)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_left_of_a_file_is_its_code_without_docstrings(path):
    source = path.read_text(encoding="utf-8")
    plain = plain_code(source)
    assert ast.dump(ast.parse(plain)) == without_docstrings(source)
    assert not [line for line in plain.splitlines() if line.lstrip().startswith("#")]


def test_the_method_is_part_of_the_digests_of_training():
    """By hand, on the real package: one module of each kind of import."""
    assert len(FILES) > 40, "vacuous: hardly any file"
    digests = code_digests("f2llm.pipeline.train_stage")
    assert {"f2llm.train", "f2llm.step", "f2llm.losses", "f2llm.store.tuples", "f2llm.attention"} <= digests.keys()
    assert not {"f2llm.prune", "f2llm.evaluation.run", "f2llm.config"} & digests.keys()
