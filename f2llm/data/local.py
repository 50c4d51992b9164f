"""Local files of training data: the layout of their columns, and their records.

Columns: `query` and `passage`, optionally `negatives` (a list; in CSV a JSON list) or `negative_1`, `negative_2`, ...;
or `query` and `label`; optionally `language` (or `lang`). Other columns are not used.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .readers import Table, excerpt, require_columns

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
    """The layout of a local file for a task (None: any task); ValueError if its columns do not fit the task."""
    columns = table.columns
    labelled = task != "retrieval" and "label" in columns and "passage" not in columns
    require_columns(table, ["query", "label" if labelled else "passage"])
    numbered = [name for name in columns if re.fullmatch(r"negative_\d+", name)]
    numbered.sort(key=lambda name: int(name.rpartition("_")[2]))
    negatives = [] if labelled else [name for name in columns if name == "negatives"] + numbered
    if numbered and "negatives" in negatives:
        raise ValueError(f"{table.path} has columns 'negatives' and '{numbered[0]}'; remedy: one of the two layouts")
    if task in ("clustering", "classification") and not labelled and not negatives:
        raise ValueError(f"{table.path}: {task} from passages needs negatives; remedy: a column 'negatives' or 'label'")
    language = next((name for name in ("language", "lang") if name in columns), None)
    return Layout(frozenset(columns), "label" if labelled else "passage", negatives, language)


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
    """The text in a column, empty for null; a label may be a whole number."""
    value = row.get(column)
    if isinstance(value, str):
        return value
    if column == "label" and isinstance(value, int):
        return str(value)
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
