"""Notebooks: whatever an editor changes without changing what runs leaves the code as it was; the rest is refused."""

import copy
import json
from functools import cache
from pathlib import Path

import nbformat
from registry import reads, refused

from f2llm.pipeline.notebook import code_of

CODE = 'size = None\n\n\nfor step in range(3):\n    text = """a\n    b """\n    print(text, step)  # shown\n'


@cache
def template() -> dict:
    """Three cells: prose, parameters, code with a string over two lines."""
    cells = [nbformat.v4.new_markdown_cell("# Title"), nbformat.v4.new_code_cell("size = None")]
    cells[1]["metadata"]["tags"] = ["parameters"]
    notebook = nbformat.v4.new_notebook(cells=[*cells, nbformat.v4.new_code_cell(CODE)])
    return json.loads(nbformat.writes(notebook))


def written(tmp_path: Path, change, encoding: str = "utf-8") -> Path:
    """The template after `change`, as a file."""
    notebook = copy.deepcopy(template())
    change(notebook)
    path = tmp_path / "changed.ipynb"
    path.write_bytes(json.dumps(notebook).encode(encoding))
    return path


def same(tmp_path: Path, change):
    """Whether a change leaves the code as it was."""

    def compare():
        kept = written(tmp_path, lambda notebook: None)
        before = code_of(kept)
        return code_of(written(tmp_path, change)) == before

    return compare


def reading(tmp_path: Path, content: str | bytes):
    path = tmp_path / "odd.ipynb"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return lambda: code_of(path)


def new_cell(kind: str, source, **more) -> dict:
    cell = {"cell_type": kind, "metadata": {}, "source": source, "id": "new"} | more
    return cell | ({"outputs": [], "execution_count": None} if kind == "code" else {})


# What changes nothing -----------------------------------------------------------------------------


@reads(True)
def run(tmp_path):
    def change(notebook):
        for number, cell in enumerate(notebook["cells"][1:], start=1):
            output = {"output_type": "stream", "name": "stdout", "text": ["a 0\n"]}
            times = {"iopub.status.busy": "2026-01-01T00:00:00Z"}
            cell |= {
                "execution_count": number,
                "outputs": [output],
                "metadata": cell["metadata"] | {"execution": times},
            }

    return same(tmp_path, change)


@reads(True, "", [], "  \n\n", "# only a comment", ["# two\n", "# lines"], '"""only a text"""')
def a_cell_without_code(tmp_path, source):
    return same(tmp_path, lambda notebook: notebook["cells"].insert(2, new_cell("code", source)))


@reads(True, "raw", "markdown")
def a_cell_that_does_not_run(tmp_path, kind):
    return same(tmp_path, lambda notebook: notebook["cells"].append(new_cell(kind, "x = 1")))


@reads(True, "hide-input", "slow", "export")
def a_tag_that_does_not_matter(tmp_path, tag):
    return same(tmp_path, lambda notebook: notebook["cells"][2]["metadata"].update(tags=[tag]))


@reads(True)
def a_tag_beside_parameters(tmp_path):
    return same(tmp_path, lambda notebook: notebook["cells"][1]["metadata"]["tags"].insert(0, "hide-input"))


@reads(True, "\r\n", "\r")
def other_line_endings(tmp_path, end):
    def change(notebook):
        notebook["cells"][2]["source"] = "".join(notebook["cells"][2]["source"]).replace("\n", end)

    return same(tmp_path, change)


@reads(True, "for step in range(3):  ", "for step in range(3):\t", "for step in range(3):  # why")
def spaces_at_the_end_of_a_line(tmp_path, line):
    def change(notebook):
        text = "".join(notebook["cells"][2]["source"])
        notebook["cells"][2]["source"] = text.replace("for step in range(3):", line) + "\n\n"

    return same(tmp_path, change)


@reads(True)
def source_as_one_text(tmp_path):
    def change(notebook):
        for cell in notebook["cells"]:
            cell["source"] = "".join(cell["source"])

    return same(tmp_path, change)


@reads(True, 0, 2, 4, 5)
def another_minor_version(tmp_path, minor):
    def change(notebook):
        notebook["nbformat_minor"] = minor
        for cell in notebook["cells"]:
            cell.pop("id")

    return same(tmp_path, change)


@reads(True)
def another_kernel(tmp_path):
    kernel = {
        "kernelspec": {"name": "mine", "display_name": "Mine"},
        "language_info": {"name": "python", "version": "3"},
    }
    return same(tmp_path, lambda notebook: notebook.update(metadata=kernel | {"widgets": {}}))


@reads(True)
def cells_without_metadata(tmp_path):
    return same(tmp_path, lambda notebook: notebook["cells"][2].pop("metadata"))


# What changes something ---------------------------------------------------------------------------


@reads(False, "text", "step", "a\n")
def another_word_in_the_code(tmp_path, words):
    def change(notebook):
        text = "".join(notebook["cells"][2]["source"])
        notebook["cells"][2]["source"] = text.replace(words, f"another_{words}")

    return same(tmp_path, change)


@reads(False, "parameters", "skip-execution", "raises-exception", "injected-parameters")
def a_tag_that_papermill_acts_on(tmp_path, tag):
    return same(tmp_path, lambda notebook: notebook["cells"][2]["metadata"].update(tags=[tag]))


@reads(False)
def a_space_within_a_text(tmp_path):
    def change(notebook):
        notebook["cells"][2]["source"] = "".join(notebook["cells"][2]["source"]).replace('"""a\n', '"""a \n')

    return same(tmp_path, change)


@reads(False)
def cells_in_another_order(tmp_path):
    return same(tmp_path, lambda notebook: notebook["cells"].reverse())


# Refused ------------------------------------------------------------------------------------------


@refused(
    "is a command of IPython, not Python", "%matplotlib inline", "!pip install x", "x = 1\n%time y = 2", "%%bash\nls"
)
def a_command_of_ipython(tmp_path, source):
    return reading(tmp_path, json.dumps(template() | {"cells": [new_cell("code", source)]}))


@refused(r"cell 1 is not Python", "x = (1,", "def f(:", "  x = 1", "x = !ls", '"""open', "x = 1\n\ty = 2")
def code_that_is_no_python(tmp_path, source):
    return reading(tmp_path, json.dumps(template() | {"cells": [new_cell("code", source)]}))


@refused("line 3 is a mark of git for a conflict; remedy: resolve it")
def a_conflict(tmp_path):
    return reading(tmp_path, '{\n "cells": [\n<<<<<<< HEAD\n ],\n=======\n ]\n>>>>>>> theirs\n}\n')


@refused("a notebook of format 3, but the kit reads format 4; remedy: open and save it in JupyterLab")
def an_old_format(tmp_path):
    old = {"nbformat": 3, "nbformat_minor": 0, "metadata": {}}
    return reading(tmp_path, json.dumps(old | {"worksheets": [{"cells": []}]}))


@refused(
    "a notebook of format (5|None|4.5|'4')", '{"nbformat": 5}', "[]", "{}", '{"nbformat": 4.5}', '{"nbformat": "4"}'
)
def no_format_that_we_know(tmp_path, content):
    return reading(tmp_path, content)


@refused("has no list of cells", '"cells": 5', '"cells": [5]', '"cells": [{"cell_type": "code"}]', '"metadata": {}')
def no_cells(tmp_path, content):
    return reading(tmp_path, f'{{"nbformat": 4, {content}}}')


@refused("has no list of cells", [5], None, {"a": 1}, 7)
def a_source_that_is_no_text(tmp_path, source):
    return reading(tmp_path, json.dumps(template() | {"cells": [new_cell("code", source)]}))


@refused(r"is not a notebook \(invalid JSON", "", "hello", '{"cells": [', "\ufeff{}", "[" * 100_000)
def no_json(tmp_path, content):
    return reading(tmp_path, content)


@refused(r"is not UTF-8 \(byte \d+\); remedy: save it as UTF-8", "utf-16", "latin-1")
def another_encoding(tmp_path, encoding):
    cells = [new_cell("code", "x = 'ä'")]
    return reading(tmp_path, json.dumps(template() | {"cells": cells}, ensure_ascii=False).encode(encoding))


@refused("cannot be read|is missing", "folder", "absent")
def no_file(tmp_path, kind):
    (tmp_path / "folder").mkdir()
    return lambda: code_of(tmp_path / kind)
