"""Local files of training data: the layout of their columns, and their records.

Columns: `query` and `passage`, optionally `negatives` (a list; in CSV a JSON list) or `negative_1`, `negative_2`, ...;
or `query` and `label`; optionally `language` (or `lang`). Other columns are not used.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches

from .readers import Table, excerpt, require_columns, spelled
from .shapes import flow, recognise

Wrong = Callable[[str, object, str], None]  # field, value, rule that it breaks


@dataclass(frozen=True)
class Layout:
    """The columns of a local file. other: `passage` or `label`; negatives: the names of their columns, if any."""

    columns: frozenset[str]
    other: str
    negatives: list[str]
    language: str | None

    @property
    def unused(self) -> list[str]:
        return sorted(self.columns - {"query", self.other, *self.negatives, self.language})


def layout_of(table: Table, task: str | None) -> Layout:
    """The layout of a local file for a task (None: any task).

    ValueError if its columns do not fit the task, are nearly those that are read, or change what a row means.
    """
    columns = table.columns
    labelled = task != "retrieval" and "label" in columns and "passage" not in columns
    required = ["query", "label" if labelled else "passage"]
    if not set(required) <= set(columns) and (hint := _hint(table, required)):
        raise ValueError(f"{table.path} has the columns {', '.join(map(repr, columns))}; remedy: {hint}")
    require_columns(table, required)
    numbered = [name for name in columns if re.fullmatch(r"negative_\d+", name)]
    numbered.sort(key=lambda name: int(name.rpartition("_")[2]))
    negatives = [] if labelled else [name for name in columns if name == "negatives"] + numbered
    if numbered and "negatives" in negatives:
        raise ValueError(f"{table.path} has columns 'negatives' and '{numbered[0]}'; remedy: one of the two layouts")
    if task in ("clustering", "classification") and not labelled and not negatives:
        raise ValueError(f"{table.path}: {task} from passages needs negatives; remedy: a column 'negatives' or 'label'")
    language = next((name for name in ("language", "lang") if name in columns), None)
    layout = Layout(frozenset(columns), required[1], negatives, language)
    _check_unused(table, layout)
    return layout


def _check_unused(table: Table, layout: Layout) -> None:
    """ValueError for an unused column that is nearly one that is read, or that says which pairs are positives."""
    for name in layout.unused:
        meaning = MEANINGS.get(name.strip().lower())
        if layout.other == "passage" and meaning:
            raise ValueError(
                f"{table.path} has a column {name!r} beside query and passage, but here every pair is a positive; "
                f"remedy: {meaning} in the source's entry in data/sources.yaml, or remove the column"
            )
        if similar := _similar(name, layout):
            raise ValueError(
                f"{table.path} has a column {name!r}, which is not read; did you mean {similar!r}? "
                "remedy: rename or remove it"
            )


# Columns that say what a pair is worth, and the converter that reads them.
_DUPLICATES = "converter: duplicates, fields: {{first: query, second: passage, label: {}, duplicate: 1}}"
_STS = "converter: sts, fields: {{first: query, second: passage, score: {}, minimum: <least score of a positive>}}"
MEANINGS = {name: _DUPLICATES.format(name) for name in ("label", "labels", "is_duplicate", "target", "gold_label")}
MEANINGS |= {name: _STS.format(name) for name in ("score", "scores", "similarity", "relevance", "rating")}


def _hint(table: Table, required: list[str]) -> str:
    """What to do about a file without the required columns: a converter, or names that are nearly right."""
    if shape := recognise((table.path,), {}):
        return (
            f"converter: {shape.converter}, fields: {flow(shape.fields)} in the source's entry in data/sources.yaml, "
            f"since it holds {shape.what}; `f2llm check` prints the entry"
        )
    columns = table.columns
    nearly = {name: column for name in required if name not in columns for column in columns if _alike(name, column)}
    return " and ".join(f"rename {column!r} to {name!r}" for name, column in nearly.items())


def _similar(column: str, layout: Layout) -> str | None:
    """The name of a column that is read and that this one nearly has."""
    if layout.other == "passage" and _NEGATIVES.fullmatch(column.strip().lower()):
        return "negatives" if column.strip().lower().endswith("s") else "negative_1"
    return next((name for name in ("query", layout.other, "language") if _alike(name, column)), None)


_NEGATIVES = re.compile(r"(hard[_ -]?)?neg(ativ|ative)?s?[_ -]?(passage|text|doc|document|sample|one|\d+)?s?")


def _alike(name: str, column: str) -> bool:
    """Whether a column has this name but for case, spaces, a plural or one letter."""
    folded = column.strip().lower()
    plurals = {name, f"{name}s", f"{name[:-1]}ies", name.removesuffix("s")}
    return folded in plurals or bool(get_close_matches(folded, [name], n=1, cutoff=0.8))


def local_records(table: Table, task: str | None = None) -> Iterator[dict]:
    """Training records of a local file. Empty texts are passed on; a value of a wrong type is a ValueError."""
    layout, number = layout_of(table, task), 0

    def wrong(name: str, value: object, rule: str) -> None:
        raise ValueError(where(table, number, name, value) + f" {rule}")

    for number, row in table.rows():  # noqa: B007, `wrong` reads it
        yield record_of(row, layout, wrong)


def record_of(row: dict, layout: Layout, wrong: Wrong) -> dict:
    """The training record of a row; `wrong` is called for each value of a wrong type."""
    if not row.keys() <= layout.columns:
        name = min(row.keys() - layout.columns)
        wrong(name, row[name], "stands in a column that the first rows do not have; remedy: the same keys in every row")
    record = {"query": _text(row, "query", wrong), layout.other: _text(row, layout.other, wrong)}
    if layout.negatives == ["negatives"]:
        record["negatives"] = _negatives(row.get("negatives"), wrong)
    elif layout.negatives:
        record["negatives"] = [text for name in layout.negatives if (text := _text(row, name, wrong))]
    if layout.language:
        record["language"] = _text(row, layout.language, wrong)
    return record


def _text(row: dict, column: str, wrong: Wrong) -> str:
    """The text in a column, empty for null and NaN; a label may be a whole number."""
    value = row.get(column)
    if isinstance(value, str):
        return value
    if isinstance(value, float) and math.isnan(value):
        value = None  # how pandas writes a missing value
    if column == "label" and (isinstance(value, int) or (isinstance(value, float) and value.is_integer())):
        return spelled(value)
    if value is not None:
        wrong(column, value, f"is of type {type(value).__name__}, not text; remedy: text in every row")
    return ""


def _negatives(value: object, wrong: Wrong) -> list[str]:
    """The texts of a list, or of a JSON list in a CSV cell."""
    try:
        found = json.loads(value) if isinstance(value, str) and value else value or []
    except json.JSONDecodeError:
        found = value
    if not isinstance(found, list):
        wrong("negatives", value, 'is no list; remedy: a list of texts, in CSV ["one", "two"]')
        return []
    for text in found:
        if text is not None and not isinstance(text, str):
            wrong("negatives", text, f"is of type {type(text).__name__}, not text; remedy: a list of texts")
    return [text if isinstance(text, str) else "" for text in found]


def where(table: Table, number: int, name: str, value: object) -> str:
    return f"{table.path}, row {number}, {name}: {excerpt(value)}"
