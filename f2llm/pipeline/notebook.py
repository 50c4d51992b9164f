"""Notebooks as pipeline stages: extracts their code, runs them and writes HTML copies."""

import html
import json
import logging
import os
import re
import sys
import tokenize
from pathlib import Path
from string import Template

from ..config import read_yaml, root
from ..store.code import code_digests, imported_modules, plain_code

MODELS = "f2llm.pipeline.models"


# Tags that papermill and its kernel client act on; all others decide only how a cell is shown.
TAGS_THAT_ACT = {"parameters", "injected-parameters", "skip-execution", "raises-exception"}


def code_of(path: Path) -> str:
    """The code cells of a notebook without comments, each headed by its tags: the text that its stage depends on.

    What an editor changes without changing what runs has no effect on it: outputs, counts, ids, metadata, prose, line
    endings, spaces at the ends of lines, cells without code, other tags.
    """
    parts = []
    for number, cell in enumerate(_cells(path), start=1):
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"]).replace("\r\n", "\n").replace("\r", "\n")  # as Python's parser reads it
        if code := _python(source, f"{path}, cell {number}"):
            tags = sorted(TAGS_THAT_ACT.intersection(cell.get("metadata", {}).get("tags", [])))
            parts.append(" ".join(["# %%", *tags]) + "\n" + code)
    return "\n".join(parts)


def _python(source: str, where: str) -> str:
    """`plain_code` of a cell; a ValueError if it is not Python, as magics and shell commands are not."""
    try:
        return plain_code(source)
    except (SyntaxError, tokenize.TokenError) as error:
        number = error.lineno if isinstance(error, SyntaxError) else error.args[1][0]
        line = source.split("\n")[(number or 1) - 1 :][:1]
        if line and line[0].lstrip().startswith(("%", "!", "?")):
            raise ValueError(
                f"{where}: {line[0].strip()[:60]!r} is a command of IPython, not Python: its effect is not recorded; "
                "remedy: remove it, or write it in Python, as in subprocess.run([...], check=True)"
            ) from None
        raise ValueError(f"{where} is not Python ({error}); remedy: correct the cell") from None


def stage_notebooks() -> list[Path]:
    """The notebooks that are stages, in their order: those that the stage `code` of dvc.yaml depends on, no copies."""
    names = read_yaml(root() / "dvc.yaml")["stages"]["code"]["deps"]
    return sorted(root() / name for name in names if name.endswith(".ipynb"))


def write_stage_code(out: Path) -> None:
    """Write build/code/<notebook>.py for every stage: a notebook's code, and digests of the modules that it uses.

    The stage `teacher` has no notebook: its file has one import and the digests.
    """
    out.mkdir(parents=True, exist_ok=True)
    codes = {path.stem: code_of(path) for path in stage_notebooks()}
    codes["teacher"] = f"from {MODELS} import copy_teacher\n"
    for name, code in codes.items():
        (out / f"{name}.py").write_text(code + _digests_of(code), encoding="utf-8")


def _digests_of(code: str) -> str:
    lines = [f"# {digest} {module}\n" for module, digest in code_digests(*imported_modules(code)).items()]
    return "".join(["\n# Digests of the modules that this uses\n", *lines])


def require_unchanged(name: str, when: str, notebook: bool = True) -> None:
    """Raise a RuntimeError if the code of a stage is not what build/code has, which DVC takes its result to be of.

    Somebody edited it after stage `code`. notebook: False: the modules only, since papermill reads the notebook once.
    """
    taken = (Path("build/code") / f"{name}.py").read_text(encoding="utf-8")
    code = code_of(Path("notebooks") / f"{name}.ipynb") if notebook else taken.partition("\n# Digests")[0]
    if code + _digests_of(code) != taken:
        raise RuntimeError(
            f"the code of {name} was changed {when}, so no result is recorded; remedy: the same command again, which "
            "takes the new code; a training whose code is the old one goes on where it was"
        )


def _cells(path: Path) -> list[dict]:
    """The cells of a notebook file (nbformat 4)."""
    back = f"git checkout -- {path}"
    try:
        text = Path(path).read_text(encoding="utf-8")
        if conflict := re.search(r"^(<{7}|>{7}) .*", text, re.M):
            line = text.count("\n", 0, conflict.start()) + 1
            raise ValueError(f"{path}, line {line} is a mark of git for a conflict; remedy: resolve it, or {back}")
        notebook = json.loads(text)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; remedy: {back}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); remedy: {back}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}); remedy: save it as UTF-8, or {back}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not a notebook (invalid JSON: {error}); remedy: {back}") from None
    if not isinstance(notebook, dict) or notebook.get("nbformat") != 4:
        version = notebook.get("nbformat") if isinstance(notebook, dict) else None
        raise ValueError(
            f"{path} is a notebook of format {version!r}, but the kit reads format 4; "
            f"remedy: open and save it in JupyterLab, or {back}"
        )
    cells = notebook.get("cells")
    if not (isinstance(cells, list) and all(map(_is_cell, cells))):
        raise ValueError(f"{path} has no list of cells with a type and a source; remedy: {back}")
    return cells


def _is_cell(cell) -> bool:
    if not (isinstance(cell, dict) and isinstance(cell.get("cell_type"), str)):
        return False
    source, metadata = cell.get("source"), cell.get("metadata", {})
    return _is_texts([source] if isinstance(source, str) else source) and (
        isinstance(metadata, dict) and _is_texts(metadata.get("tags", []))
    )


def _is_texts(values) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def execute(path: Path, out: Path, **parameters) -> None:
    """Run a notebook with papermill; writes the executed copy to `out`, and an HTML copy beside it.

    The output of cells is also printed. If a cell fails, its error is raised as a RuntimeError, and `out` is kept for
    reading.
    """
    # jsonschema takes 2 s to compile this optional grammar at import; papermill's notebooks never use it.
    sys.modules.setdefault("rfc3987_syntax", None)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in f2llm/pipeline/launch.py: no spinning on shared cores
    import papermill
    from nbclient.exceptions import DeadKernelError
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
    except KeyboardInterrupt:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it would tell of the kernel's end, with a traceback
        raise
    except DeadKernelError:
        raise RuntimeError(
            f"{path}: its process was killed, mostly for lack of memory; remedy: the same command, which resumes; "
            "if it is killed again, a smaller machine.token_budget, or close other programs"
        ) from None
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
