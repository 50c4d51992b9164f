"""Notebooks as pipeline stages: extracts their code, runs them and writes HTML copies."""

import html
import json
import os
import sys
import tokenize
from pathlib import Path
from string import Template

from ..config import root
from ..store.code import code_digests, imported_modules, plain_code

MODELS = "f2llm.pipeline.models"


def code_of(path: Path) -> str:
    """The code cells of a notebook without comments, each headed by its tags: the text that its stage depends on."""
    parts = []
    for number, cell in enumerate(_read(path)["cells"], start=1):
        if cell["cell_type"] == "code":
            try:
                code = plain_code("".join(cell["source"]))
            except (SyntaxError, tokenize.TokenError) as error:
                raise ValueError(f"{path}, cell {number} is not Python ({error}); remedy: correct the cell") from None
            parts.append(" ".join(["# %%", *cell["metadata"].get("tags", [])]) + "\n" + code)
    return "\n".join(parts)


def stage_notebooks() -> list[Path]:
    """The paths of the notebooks that are stages, in their order."""
    return sorted((root() / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def write_stage_code(out: Path) -> None:
    """Write build/code/<notebook>.py for every stage: a notebook's code, and digests of the modules that it uses.

    The stage `teacher` has no notebook: its file has one import and the digests.
    """
    out.mkdir(parents=True, exist_ok=True)
    codes = {path.stem: code_of(path) for path in stage_notebooks()}
    codes["teacher"] = f"from {MODELS} import copy_teacher\n"
    for name, code in codes.items():
        digests = code_digests(*imported_modules(code))
        lines = [f"# {digest} {module}\n" for module, digest in digests.items()]
        text = "".join([code, "\n# Digests of the modules that this uses\n", *lines])
        (out / f"{name}.py").write_text(text, encoding="utf-8")


def _read(path: Path) -> dict:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; remedy: git checkout -- {path}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a notebook (invalid JSON: {error}); remedy: git checkout -- {path}") from None


def execute(path: Path, out: Path, **parameters) -> None:
    """Run a notebook with papermill; writes the executed copy to `out`, and an HTML copy beside it.

    The output of cells is also printed. If a cell fails, its error is raised as a RuntimeError, and `out` is kept for
    reading.
    """
    # jsonschema takes 2 s to compile this optional grammar at import; papermill's notebooks never use it.
    sys.modules.setdefault("rfc3987_syntax", None)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in f2llm/pipeline/launch.py: no spinning on shared cores
    import papermill
    from papermill.exceptions import PapermillExecutionError

    out = Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        papermill.execute_notebook(
            path,
            out,
            parameters,
            kernel_name="python3",
            progress_bar=False,
            log_output=True,
            stdout_file=sys.stdout,
            extra_arguments=["--IPKernelApp.log_level=50"],  # an error of a cell is in its output
        )
    except PapermillExecutionError as error:
        raise RuntimeError(f"{path}, cell {error.exec_count}: {error.ename}: {error.evalue} (see {out})") from None
    except OSError as error:
        raise RuntimeError(
            f"cannot write {out}: {error.strerror or error}; remedy: free space or rights there"
        ) from error
    write_html(out, out.with_suffix(".html"))


def write_html(notebook: Path, out: Path, with_code: bool = True) -> None:
    """Write a notebook as one HTML file that needs no network; without code, it is a report for readers."""
    import nbformat
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(
        template_name="lab" if with_code else "basic",
        exclude_input=not with_code,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        exclude_anchor_links=not with_code,
    )
    exporter.mathjax_url = exporter.require_js_url = exporter.jquery_url = ""
    cells = nbformat.read(notebook, as_version=4)
    body, _ = exporter.from_notebook_node(cells)
    if not with_code:
        title = html.escape(cells["cells"][0]["source"].splitlines()[0].lstrip("# "))
        body = PAGE.substitute(title=title, body=body)
    Path(out).write_text(body, encoding="utf-8")


PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { max-width: 60rem; margin: 2.5rem auto; padding: 0 1rem; color: #222; background: #fff;
  font: 1rem/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1, h2 { line-height: 1.25; } h1 { font-size: 1.8rem; } h2 { font-size: 1.3rem; margin-top: 2.75rem; }
p, li { max-width: 46rem; }
blockquote { margin: 0; padding-left: 1rem; border-left: 3px solid #bbb; color: #555; font-style: italic; }
code { font-size: 0.9em; background: #f3f3f3; padding: 0.1em 0.3em; border-radius: 3px; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.82rem; line-height: 1.35; }
th, td { padding: 0.3rem 0.4rem; text-align: right; vertical-align: top; font-variant-numeric: tabular-nums; }
th { font-weight: 600; } tbody th { text-align: left; font-weight: normal; }
thead th { vertical-align: bottom; border-bottom: 1.5px solid #888; }
tbody tr { border-bottom: 1px solid #e5e5e5; }
@media print { body { margin: 0; max-width: none; } h2 { break-after: avoid; } img, tr { break-inside: avoid; } }
</style>
</head>
<body>
$body
</body>
</html>
""")
