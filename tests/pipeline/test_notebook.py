"""HTML copies of executed notebooks."""

import re
from html.parser import HTMLParser

import nbformat
import pytest

from f2llm.pipeline.notebook import write_html

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
