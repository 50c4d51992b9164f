"""Notebooks as pipeline stages: their code alone, and their execution with an HTML copy."""

import json
import os
import sys
from pathlib import Path

PARAMETERS = "parameters"


def code_of(path: Path) -> str:
    """The code cells of a notebook and their tags: what a stage depends on, whatever was run or explained."""
    cells = _read(path)["cells"]
    parts = [
        " ".join(["# %%", *cell["metadata"].get("tags", [])]) + "\n" + "".join(cell["source"]).rstrip() + "\n"
        for cell in cells
        if cell["cell_type"] == "code"
    ]
    return "\n".join(parts)


def _read(path: Path) -> dict:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; remedy: git checkout -- {path}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a notebook (invalid JSON: {error}); remedy: git checkout -- {path}") from None


def execute(path: Path, out: Path, **parameters) -> None:
    """Run a notebook into `out` by papermill, its output also to the terminal, with an HTML copy beside it.

    A failing cell ends as one RuntimeError with the cell's own error; `out` is then kept for reading.
    """
    # jsonschema compiles this optional grammar for 2 s at import and papermill's notebooks never use it.
    sys.modules.setdefault("rfc3987_syntax", None)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in f2llm/launch.py: no spinning on shared cores
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")  # tqdm, about widgets that nobody needs
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
            extra_arguments=["--IPKernelApp.log_level=40"],  # errors only
        )
    except PapermillExecutionError as error:
        raise RuntimeError(f"{path}, cell {error.exec_count}: {error.ename}: {error.evalue} (see {out})") from None
    except OSError as error:
        raise RuntimeError(
            f"cannot write {out}: {error.strerror or error}; remedy: free space or rights there"
        ) from error
    write_html(out, out.with_suffix(".html"))


def write_html(notebook: Path, out: Path, with_code: bool = True) -> None:
    """A notebook as one HTML file that needs no network."""
    import nbformat
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(exclude_input=not with_code, exclude_input_prompt=True, exclude_output_prompt=True)
    exporter.mathjax_url = exporter.require_js_url = exporter.jquery_url = ""
    body, _ = exporter.from_notebook_node(nbformat.read(notebook, as_version=4))
    Path(out).write_text(body, encoding="utf-8")
