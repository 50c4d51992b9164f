"""Tables in Markdown that `f2llm readme` writes into README.md, docs/ablations.md and data/README.md.

Each table is written between two marks; the rest of the file is written by hand. This module also makes the summary
that `make repro` prints at its end, and the badge that opens the walkthrough in Colab.
"""

import json
import re
from collections import defaultdict
from pathlib import Path

import pandas as pd

from ..data.registry import PUBLISHED, Source
from ..embedded.tasks import names_of_tasks
from ..evaluation.results import by_origin
from .tables import by_models, label, read_scores, table_by_type

RESULT_MARKS = ("<!-- results: written by `f2llm readme` -->", "<!-- end of results -->")
CLAIM_MARKS = ("<!-- claims: written by `f2llm readme` -->", "<!-- end of claims -->")
SMOLLM2_MARKS = ("<!-- smollm2: written by `f2llm readme` -->", "<!-- end of smollm2 -->")
ABLATION_MARKS = ("<!-- ablations: written by `f2llm readme` -->", "<!-- end of ablations -->")
REGISTRY_MARKS = ("<!-- registry: written by `f2llm readme` -->", "<!-- end of registry -->")


def summary_lines(folder: Path, seconds: int) -> list[str]:
    """The first columns of the results, the path of the report and, unless `seconds` is 0, the run time."""
    lines = []
    for title, scores in by_origin(read_scores(folder)).items():
        table = table_by_type(scores).iloc[:, :4].rename_axis(index=None, columns=None)
        lines += ["", f"Scores, times 100 ({title}):", table.to_string()]
    lines += ["", f"Report: {Path(folder) / 'results' / 'report.html'}"]
    if seconds:
        lines.append(f"Time:   {seconds // 60} min {seconds % 60} s, installation not counted")
    return lines


def results_markdown(means: pd.DataFrame, halves: pd.DataFrame) -> str:
    """Scores times 100 by type of task: a row per type, a column per model, the best of a row in bold.

    means, halves: mean scores and half the width of their intervals, both with types as index and models as columns.
    """
    lines = ["| | " + " | ".join(map(label, means.columns)) + " |", "|---" * (len(means.columns) + 1) + "|"]
    for kind, row in means.iterrows():
        cells = [f"{100 * score:.1f} ±{100 * halves.loc[kind, model]:.1f}" for model, score in row.items()]
        cells[row.argmax()] = f"**{cells[row.argmax()]}**"
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def smollm2_markdown(scores: pd.DataFrame) -> str:
    """Scores times 100 of the models of results/smollm2.csv, in their order: means over public, own and all tasks.

    scores: of `f2llm evaluate`, a row per model, task, split and subset. ValueError unless all have the same tasks.
    """
    by_task = scores.groupby(["task", "model"])["score"].mean().unstack()[scores["model"].unique()]
    if by_task.isna().any(axis=None):
        raise ValueError(f"not every model has every task:\n{by_task.to_string()}\nremedy: f2llm evaluate for the rest")
    own = by_task.index.isin(names_of_tasks())
    rows = {f"{sum(~own)} tasks of MTEB, English": by_task[~own], f"{sum(own)} tasks of the kit": by_task[own]}
    names = ["before" if model == "backbone" else label(model) for model in by_task.columns]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for title, part in {**rows, "Mean of all": by_task}.items():
        lines.append(f"| {title} | " + " | ".join(f"{100 * mean:.1f}" for mean in part.mean()) + " |")
    return "\n".join(lines)


def ablations_markdown(compared: pd.DataFrame) -> str:
    """The table that `ablations.compare` returns, as one Markdown table for each set of models.

    A row per arm; a cell is a difference of mean scores times 100 (its interval), in bold if the interval excludes 0.
    """
    tables = []
    for models, rows in by_models(compared):
        names = [label(model).removesuffix(", distilled") for model in models]
        lines = ["| changed | against | seeds | " + " | ".join(names) + " |", "|---" * (len(models) + 3) + "|"]
        for (_, arm), of_arm in rows.groupby(["group", "arm"], sort=False):
            cells, against = {}, of_arm["against"].iloc[0]
            for row in of_arm.itertuples():
                bold = "**" if row.verdict in ("lower", "higher") else ""
                cells[row.model] = f"{bold}{row.difference:+.1f} ({row.low:+.1f} to {row.high:+.1f}){bold}"
            shown = " | ".join(cells.get(model, "") for model in models)
            lines.append(f"| {arm} | {against} | {of_arm['seeds'].min()} | {shown} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def claims_markdown(claims: pd.DataFrame) -> str:
    """The table that `ablations.claims` returns."""
    lines = ["| the papers say | model | gain here | 95 % interval | seeds | shown here |", "|---|---|---|---|---|---|"]
    for row in claims.itertuples():
        name = label(row.model).removesuffix(", distilled")
        interval = f"{row.low:+.1f} to {row.high:+.1f}"
        lines.append(f"| {row.claim} | {name} | {row.gain:+.1f} | {interval} | {row.seeds} | {row.shown} |")
    return "\n".join(lines)


def write_between(path: Path, marks: tuple[str, str], content: str) -> None:
    """Replace the text between two marks in a file."""
    text, (start, end) = path.read_text(encoding="utf-8"), marks
    before, _, rest = text.partition(start)
    _, end_found, after = rest.partition(end)
    if not end_found or text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(
            f"{path} must have each of the two marks {start!r} and {end!r} exactly once, in this order; "
            "remedy: put both lines where the table belongs"
        )
    path.write_text(f"{before}{start}\n\n{content}\n\n{end}{after}", encoding="utf-8")


# The badge ---------------------------------------------------------------------------------------

WALKTHROUGH = "notebooks/00_walkthrough.ipynb"
_BADGE = re.compile(r"\n\[!\[Open in Colab\]\S*\n")
_ADDRESS = re.compile(r'^address = "[^"]*"', re.MULTILINE)


def write_badge(folder: Path, address: str, branch: str) -> None:
    """Let README.md and the walkthrough open in Colab: a badge under both titles, and the address for a clone there.

    address: of the repository, https://github.com/<owner>/<name>. ValueError for any other.
    """
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?", address)
    if not found:
        raise ValueError(f"{address!r} is not a repository on GitHub; remedy: https://github.com/<owner>/<name>")
    opened = f"https://colab.research.google.com/github/{found[1]}/blob/{branch}/{WALKTHROUGH}"
    badge = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({opened})"

    def with_badge(text: str) -> str:
        title, _, rest = _BADGE.sub("", text).partition("\n")
        return f"{title}\n\n{badge}\n{rest}"

    readme, path = folder / "README.md", folder / WALKTHROUGH
    notebook = json.loads(path.read_text(encoding="utf-8"))
    title, *_ = (cell for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    title["source"] = with_badge("".join(title["source"])).splitlines(keepends=True)
    set_up, *_ = (cell for cell in notebook["cells"] if _ADDRESS.search("".join(cell["source"])))
    text = _ADDRESS.sub(f'address = "https://github.com/{found[1]}"', "".join(set_up["source"]))
    set_up["source"] = text.splitlines(keepends=True)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    readme.write_text(with_badge(readme.read_text(encoding="utf-8")), encoding="utf-8")


# The registry ------------------------------------------------------------------------------------


def registry_markdown(registry: list[Source]) -> str:
    """The registry as Markdown: its totals beside the papers', then one table of sources per family."""
    lines = ["| mixture | sources | papers | rows | papers | rows of stage 1 | papers |", "|---|" + "---:|" * 6]
    for mixture, published in PUBLISHED.items():
        ours = _totals(source for source in registry if mixture in source.recipes)
        cells = [f"{number:,}" for pair in zip(ours, published, strict=True) for number in pair]
        lines.append(f"| {mixture} | {' | '.join(cells)} |")
    families = defaultdict(list)
    for source in registry:
        families[source.family].append(source)
    for family, sources in families.items():
        lines += ["", f"### {family}", "", _HEADER, "|---|---|---|---|---:|---|---|---|---|"]
        lines += [_row(source) for source in sources]
    return "\n".join(lines)


_HEADER = "| source | recipes | task | languages | rows | licence | original | converter | MTEB evaluates on it |"


def _totals(sources) -> tuple[int, int, int]:
    """(sources, published rows, published rows of stage 1)"""
    sources = list(sources)
    rows = [source.published_rows or 0 for source in sources]
    return len(sources), sum(rows), sum(n for n, source in zip(rows, sources, strict=True) if source.stage1)


def _row(source: Source) -> str:
    languages = ", ".join(source.languages) if isinstance(source.languages, list) else source.languages or ""
    rows = f"{source.published_rows:,}" if source.published_rows else f"up to {source.rows:,}" if source.rows else ""
    cells = [source.title, ", ".join(source.recipes), source.task, languages, rows, source.licence]
    cells += [source.hub_id or "", "yes" if source.converter else "no", ", ".join(source.overlap)]
    return f"| {' | '.join(str(cell) for cell in cells)} |".replace("  ", " ")
