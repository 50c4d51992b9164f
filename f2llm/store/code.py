"""Digests of code: what a stage, a checkpoint or a mined set depends on, whatever comments and docstrings say.

A module counts with every module of f2llm that it imports or launches in turn. Package `__init__` files only name
where something comes from, so a name imported from a package counts as the module that defines it.
"""

import ast
import hashlib
import io
import json
import tokenize
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# What these decide is in build/config.yaml, which every stage reads, or is no matter of results.
OUTSIDE = {"f2llm.config", "f2llm.store.checked", "f2llm.store.progress", "f2llm.pipeline.launch"}
FSTRING_PART = getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)  # from Python 3.12 on f-strings come in parts


def code_digest(module: str) -> str:
    """One digest (64 hexadecimal digits) of a module's code and of all code that it uses."""
    return hashlib.sha256(json.dumps(code_digests(module), sort_keys=True).encode()).hexdigest()


def code_digests(*modules: str) -> dict[str, str]:
    """{module: digest of its code} of modules such as "f2llm.train" and of all that they use, in order of names."""
    digests, waiting = {}, set(modules)
    while waiting:
        module = waiting.pop()
        if module not in digests and module not in OUTSIDE:
            source = _path_of(module).read_text(encoding="utf-8")
            digests[module], used = _digest_and_imports(source, module.rpartition(".")[0])
            waiting |= used
    return dict(sorted(digests.items()))


@cache
def _digest_and_imports(source: str, package: str) -> tuple[str, frozenset[str]]:
    return hashlib.sha256(plain_code(source).encode()).hexdigest()[:16], frozenset(imported_modules(source, package))


def imported_modules(source: str, package: str = "") -> set[str]:
    """Modules of f2llm that code imports, also within functions, or starts by `launch("a.module")`.

    package: that of the module, which relative imports start from.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("f2llm.")}
        elif isinstance(node, ast.ImportFrom):
            if (origin := _origin(node, package)).partition(".")[0] == "f2llm":
                found |= {_defining_module(origin, alias.name) for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "launch" and node.args:
            found.add(ast.literal_eval(node.args[0]))
    return found


def _origin(node: ast.ImportFrom, package: str) -> str:
    """The module or package that an import statement names, in full."""
    parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
    return ".".join([*parents, *([node.module] if node.module else [])])


def _defining_module(origin: str, name: str) -> str:
    """The module that `from origin import name` gets its name from."""
    if not _is_package(origin):
        return origin
    if _exists(f"{origin}.{name}"):
        return f"{origin}.{name}"
    for node in ast.walk(ast.parse(_path_of(origin).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return _defining_module(_origin(node, origin), name)
    raise ValueError(f"{origin} does not import {name!r}; remedy: import it from the module that defines it")


def _path_of(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _is_package(module: str) -> bool:
    return _path_of(module).name == "__init__.py"


def _exists(module: str) -> bool:
    return _path_of(module).exists()


def plain_code(source: str) -> str:
    """Source text without comments, docstrings and blank lines; what remains keeps its layout.

    Cut out by position, not rewritten by `ast.unparse`, whose text differs between versions of Python.
    """
    lines, within = source.split("\n"), set()  # within: numbers of lines that end inside a string
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            lines[line - 1] = lines[line - 1][:column]
        elif token.type in (tokenize.STRING, FSTRING_PART):
            within |= {*range(token.start[0], token.end[0])}
    cut = [line.encode() for line in lines]  # ast counts bytes
    for node in ast.walk(ast.parse(source)):
        if first := _docstring(node):
            before, after = cut[first.lineno - 1][: first.col_offset], cut[first.end_lineno - 1][first.end_col_offset :]
            left = b"" if len(node.body) > 1 or isinstance(node, ast.Module) else b"pass"
            more = range(first.lineno, first.end_lineno)
            cut[first.lineno - 1 : first.end_lineno] = [before + left + after] + [b""] * len(more)
            within -= {*more}
    kept = []
    for number, line in enumerate(map(bytes.decode, cut), start=1):
        if line.strip() or number - 1 in within:
            kept.append(line if number in within else line.rstrip())
    return "".join(f"{line}\n" for line in kept)


def _docstring(node: ast.AST) -> ast.Expr | None:
    """The docstring of a module, class or function."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
        first = node.body[0]
        is_text = isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str)
        return first if is_text else None
    return None
