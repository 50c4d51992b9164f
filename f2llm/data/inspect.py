"""Checks a local file of training data before a run (`f2llm check`): its content, problems and warnings."""

import random
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd

from ..text import normalise, prompted
from .local import Layout, layout_of, local_records, record_of, where
from .readers import Table, excerpt, open_table
from .shapes import Shape

SAMPLE = 2000  # rows sampled to measure lengths and scripts
SAMPLE_CHARACTERS = 4_000_000  # most characters sampled of one column: a tokenizer reads them in seconds
SAMPLE_TEXT = 100_000  # characters that are kept of a sampled text: many times the longest that a model reads
LONGEST_TEXT = 4_000_000  # characters that are kept of the longest text
SHOWN = 100  # messages printed per kind of problem; further ones are only counted
SHOWN_LABELS = 5
SHOWN_TOKENS = 40
PROBLEMS = ("unreadable row", "wrong type", "empty text", "not Unicode", "passage among its negatives", "labels")
WARNINGS = (
    "nothing but punctuation",
    "query equals passage",
    "repeated row",
    "repeated row, but for case and punctuation",
    "fewer negatives than most rows",
    "label of a single text",
    "text of several labels",
    "column without a use",
)


@dataclass(frozen=True)
class Report:
    """What `check_file` found. counts and samples: by kind of problem or warning; lengths: by column."""

    path: Path
    num_rows: int
    columns: list[str]
    task: str
    languages: dict[str, int]
    scripts: dict[str, int]
    num_sampled: int
    unit: str
    max_tokens: int
    lengths: dict[str, dict[str, float]]
    counts: dict[str, int]
    samples: dict[str, list[str]]
    shown: list[str]
    rows_by_negatives: dict[int, int]
    records: Callable[[], Iterator[dict]] = field(repr=False)  # the training records
    fit: tuple[str, ...] = ()  # lines of `f2llm.data.fit`

    @property
    def usable(self) -> bool:
        """Whether there are no problems; warnings are allowed."""
        return not any(self.counts.get(kind) for kind in PROBLEMS)

    def __str__(self) -> str:
        """The report as it is printed."""
        languages = _counted(self.languages) or "not declared; remedy, if you want them counted: a column 'language'"
        lines = [
            f"{self.path}: {self.num_rows:,} rows, task {self.task}",
            f"columns: {', '.join(self.columns)}",
            f"languages: {languages}",
            f"scripts: {_counted(self.scripts)} (queries of {self.num_sampled:,} rows)",
            f"lengths in {self.unit}, of {self.num_sampled:,} rows and the longest:",
            f"{'':>10}  {'median':>8}  {'95 %':>8}  {'longest':>8}  beyond {self.max_tokens}",
        ]
        for name, of in self.lengths.items():
            numbers = f"{of['median']:8.0f}  {of['95 %']:8.0f}  {of['longest']:8.0f}  {of['beyond']:.1%}"
            lines.append(f"{name:>10}  {numbers}")
        for title, kinds in (("problems", PROBLEMS), ("warnings", WARNINGS)):
            found = [kind for kind in kinds if self.counts.get(kind)]
            lines.append(f"{title}: {sum(self.counts[kind] for kind in found):,}")
            for kind in found:
                lines += [f"  {kind}: {self.counts[kind]:,}", *(f"    {sample}" for sample in self.samples[kind])]
                if (more := self.counts[kind] - len(self.samples[kind])) > 0:
                    lines.append(f"    and {more:,} more")
        lines += ["as the model sees them:", *self.shown] if self.shown else []
        return "\n".join([*lines, *self.fit, "usable" if self.usable else "not usable as it is"])


def check_file(
    path: Path,
    max_tokens: int,
    task: str | None = None,
    instruction: str | None = None,
    model: Path | None = None,
    shape: Shape | None = None,
) -> Report:
    """A report on all rows of a local file: whether it is usable, its languages, lengths, problems and warnings.

    max_tokens: the length that longer texts are cut to. task: if None it is inferred from the columns; two different
    labels mean classification. model: a folder with a tokenizer; if None, models/backbone if that exists, otherwise
    lengths are in characters. shape: of `shape_of`; the rows are then the records that its converter makes. ValueError
    for a file that cannot be opened or lacks a column.
    """
    table = table_of(shape, path) if shape else open_table(path)
    task = task or (shape.task if shape else None)
    layout, folder, findings = layout_of(table, task), _tokenizer_folder(model), Findings()
    for column in layout.unused:
        findings.add("column without a use", f"{table.path}: {column}")
    num_rows, comparable, sample, languages = _look_at_rows(table, layout, findings)
    rows = comparable.as_frame()
    _check_repeats(table.path, rows, findings)
    if layout.negatives:
        _check_num_negatives(table.path, rows, findings)
    if layout.other == "label":
        task = task or ("classification" if len(comparable.labels) == 2 else "clustering")
        _check_labels(table, task, rows, list(comparable.labels), findings)

    tokenizer = _tokenizer(folder)
    columns = ["query", layout.other, *(["negatives"] if layout.negatives else [])]
    texts = {name: sample.texts(name) for name in columns}
    texts["query"] = [prompted(text, instruction) for text in texts["query"]]
    seen = [_as_seen(record, layout.other, instruction, tokenizer, max_tokens) for record in sample.first]
    return Report(
        path=table.path,
        num_rows=num_rows,
        columns=table.columns,
        task=task or "retrieval",
        languages=dict(languages.most_common()),
        scripts=dict(Counter(script_of(record["query"]) for record in sample.records).most_common()),
        num_sampled=len(sample.records),
        unit=f"tokens of {tokenizer.name_or_path}, with prompt and EOS" if tokenizer else "characters (no tokenizer)",
        max_tokens=max_tokens,
        lengths={name: _lengths(some, tokenizer, max_tokens) for name, some in texts.items() if some},
        counts=dict(findings.counts),
        samples=dict(findings.samples),
        shown=[line for lines in seen for line in lines],
        records=lambda: local_records(table, task),
        rows_by_negatives={int(num): int(count) for num, count in rows["num_negatives"].value_counts().items()},
    )


@dataclass(frozen=True)
class Converted:
    """The records of a shape with the interface of a table, so that they are checked as the rows of a file are."""

    path: Path
    columns: list[str]
    records: Callable[[], Iterator[dict]]

    def rows(self, numbers=None, columns=None, bad=None) -> Iterator[tuple[int, dict]]:
        """(number from 1, record) of every record."""
        yield from enumerate(self.records(), start=1)


def table_of(shape: Shape, path: Path) -> Converted:
    """The records of a shape as a table with columns query, passage or label, and perhaps negatives and language."""
    records = (
        shape.records if shape.converter else lambda: chain(*(local_records(open_table(file)) for file in shape.files))
    )
    first = next(iter(records()), None)
    if first is None:
        raise ValueError(f"{path} holds {shape.what}, but no row gives a training pair; remedy: other rows")
    known = ("query", "passage", "label", "negatives", "language")
    return Converted(path, [name for name in known if name in first], records)


def _look_at_rows(table: Table, layout: Layout, findings: "Findings"):
    """(number of rows, ComparableRows, Sample, rows by language) of a file, read once."""
    num_rows, comparable, sample, languages = 0, ComparableRows(), Sample(), Counter()
    for num_rows, values in _readable_rows(table, findings):
        if (row := _typed_row(table, num_rows, values, layout, findings)) is None:
            continue
        comparable.add(row)
        _check_copies(row, findings)
        if _check_texts(row, findings):  # a tokenizer takes Unicode only
            sample.add(row)
        if layout.language:
            languages[row.record["language"] or "none"] += 1
    return num_rows, comparable, sample, languages


class Findings:
    """Problems and warnings by kind: how many there are, and the first SHOWN messages."""

    def __init__(self):
        self.counts, self.samples = Counter(), defaultdict(list)

    def add(self, kind: str, message: str) -> None:
        self.counts[kind] += 1
        if len(self.samples[kind]) < SHOWN:
            self.samples[kind].append(message)


# One row ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A row whose values are of the right types."""

    table: Table
    number: int
    record: dict
    columns: tuple[str, str]  # of query and answer: `query`, and `passage` or `label`
    texts: list[str]  # query, answer, negatives
    folded: list[str]  # the texts without case and punctuation

    @property
    def complete(self) -> bool:
        """Whether neither query nor answer is empty."""
        return bool(self.folded[0] and self.folded[1])

    def where(self, place: int) -> str:
        """File, row, column and value of one of the texts."""
        return where(self.table, self.number, (*self.columns, "negatives")[min(place, 2)], self.texts[place])


def _readable_rows(table: Table, findings: Findings) -> Iterator[tuple[int, dict]]:
    """(row number, row) of every row that can be read."""
    try:
        yield from table.rows(bad=lambda message: findings.add("unreadable row", message))
    except ValueError as error:  # a file that is damaged in the middle
        findings.add("unreadable row", str(error))


def _typed_row(table: Table, number: int, row: dict, layout: Layout, findings: Findings) -> Row | None:
    """The row; None if a value is of a wrong type."""
    faults = []
    record = record_of(row, layout, lambda *fault: faults.append(fault))
    for name, value, rule in faults:
        findings.add("wrong type", f"{where(table, number, name, value)} {rule}")
    if faults:
        return None
    texts = [record["query"], record[layout.other], *record.get("negatives", [])]
    return Row(table, number, record, ("query", layout.other), texts, [normalise(text) for text in texts])


def _check_texts(row: Row, findings: Findings) -> bool:
    """Finds texts that are empty, only punctuation, or not Unicode; returns whether all are Unicode."""
    all_unicode = True
    for place, text in enumerate(row.texts):
        if not row.folded[place]:
            findings.add("nothing but punctuation" if text.strip() else "empty text", row.where(place))
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            findings.add("not Unicode", row.where(place))
            all_unicode = False
    return all_unicode


def _check_copies(row: Row, findings: Findings) -> None:
    """Finds a passage that equals its query, and negatives that equal the passage."""
    query, answer, *negatives = row.folded
    if query == answer != "":
        findings.add("query equals passage", row.where(1))
    for place, text in enumerate(negatives, start=2):
        if text == answer != "":
            findings.add("passage among its negatives", row.where(place))


# All rows ---------------------------------------------------------------------------------------


class ComparableRows:
    """A table to compare all rows of a file with each other: hashes and numbers, 56 bytes per row."""

    COLUMNS = ("row", "exact", "folded", "query", "label", "num_negatives", "complete")

    def __init__(self):
        self.values = array("q")  # one row after the other
        self.labels: dict[str, int] = {}  # label of a complete row -> its number in column `label`

    def add(self, row: Row) -> None:
        (query, answer, *negatives), (folded_query, folded_answer, *_) = row.texts, row.folded
        label = -1
        if row.columns[1] == "label" and row.complete:
            label = self.labels.setdefault(answer, len(self.labels))
        exact, folded = hash((query, answer)), hash((folded_query, folded_answer))
        self.values.extend((row.number, exact, folded, hash(folded_query), label, len(negatives), row.complete))

    def as_frame(self) -> pd.DataFrame:
        return pd.DataFrame(np.asarray(self.values).reshape(-1, len(self.COLUMNS)), columns=self.COLUMNS)


def _check_repeats(path: Path, rows: pd.DataFrame, findings: Findings) -> None:
    """Finds rows that repeat query and answer of an earlier row, exactly or except for case and punctuation."""
    complete = rows[rows["complete"] == 1]
    exact, folded = _repeated(complete, "exact"), _repeated(complete, "folded")
    for kind, repeated in (
        ("repeated row", exact),
        ("repeated row, but for case and punctuation", folded[~folded["row"].isin(exact["row"])]),
    ):
        for number, first in zip(repeated["row"], repeated["first"]):
            findings.add(kind, f"{path}, row {number}: as row {first}")


def _repeated(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """The rows whose value in a column occurs in an earlier row; `first` is the first row with that value."""
    rows = rows.assign(first=rows.groupby(column)["row"].transform("min"))
    return rows.loc[rows["row"] != rows["first"], ["row", "first"]]


def _check_num_negatives(path: Path, rows: pd.DataFrame, findings: Findings) -> None:
    """Finds rows with fewer negatives than the most frequent number (the largest, if several are as frequent)."""
    most = rows["num_negatives"].mode().max()
    fewer = rows[rows["num_negatives"] < most].sort_values(["num_negatives", "row"])
    for number, num in zip(fewer["row"], fewer["num_negatives"]):
        findings.add("fewer negatives than most rows", f"{path}, row {number}: {num} instead of {most}")


def _check_labels(table: Table, task: str, rows: pd.DataFrame, labels: list[str], findings: Findings) -> None:
    """Finds a number of labels that the task does not allow, labels of one text only, and texts of several labels."""
    rule = {"classification": "exactly two", "clustering": "two or more"}[task]
    if len(labels) < 2 or (task == "classification" and len(labels) > 2):
        some = excerpt(labels[:SHOWN_LABELS])
        findings.add("labels", f"{table.path}, label: {len(labels)} values {some}, but {task} needs {rule}")
    by_label = rows[rows["complete"] == 1].groupby("label")
    single = by_label["query"].nunique() == 1
    for label, number in by_label["row"].min()[single].items():
        findings.add("label of a single text", where(table, number, "label", labels[label]))
    by_text = rows[rows["complete"] == 1].groupby("query")
    for number in sorted(by_text["row"].min()[by_text["label"].nunique() > 1]):
        findings.add("text of several labels", f"{table.path}, row {number}: other rows give it other labels")


class Sample:
    """The first three records, the longest texts, and a random sample in which all rows are equally likely."""

    def __init__(self):
        self.records, self.first = [], []
        self.longest: dict[str, str] = {}
        self.draw = random.Random(0)

    def add(self, row: Row) -> None:
        if len(self.first) < 3:
            self.first.append(_cut(row.record))
        for name, text in zip(row.columns, row.texts):
            if len(text) > len(self.longest.get(name, "")):
                self.longest[name] = text[:LONGEST_TEXT]
        place = len(self.records) if len(self.records) < SAMPLE else int(self.draw.random() * row.number)
        if place < SAMPLE:
            self.records[place : place + 1] = [_cut(row.record)]

    def texts(self, name: str) -> list[str]:
        """The sampled texts of a column, up to SAMPLE_CHARACTERS in all, and the longest text of the file."""
        texts, characters = [], 0
        for record in self.records:
            for text in record[name] if name == "negatives" else [record[name]]:
                characters += len(text)
                if characters <= SAMPLE_CHARACTERS and len(texts) < SAMPLE:
                    texts.append(text)
        return [*texts, self.longest[name]] if name in self.longest else texts


def _cut(record: dict) -> dict:
    """The record with texts of at most SAMPLE_TEXT characters, so that a sample of huge texts fits into memory."""

    def cut(value):
        return [text[:SAMPLE_TEXT] for text in value] if isinstance(value, list) else value and value[:SAMPLE_TEXT]

    return {key: cut(value) for key, value in record.items()}


# Lengths, scripts, and what the model sees ------------------------------------------------------


def _tokenizer_folder(model: Path | None) -> Path | None:
    """The folder of a tokenizer; None if `model` is None and models/backbone does not exist."""
    folder = Path(model or "models/backbone")
    if (folder / "tokenizer.json").is_file():
        return folder
    if model:
        raise ValueError(f"{folder} holds no tokenizer.json; remedy: the folder of a model")
    return None


def _tokenizer(folder: Path | None):
    """The tokenizer; it is loaded after the rows are read, since reading is slower with the libraries in memory."""
    if folder is None:
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _lengths(texts: list[str], tokenizer, max_tokens: int) -> dict[str, float]:
    if tokenizer:
        lengths = np.array([len(ids) + 1 for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]])
    else:
        lengths = np.array([len(text) for text in texts])
    median, most = np.percentile(lengths, [50, 95])
    return {"median": median, "95 %": most, "longest": lengths.max(), "beyond": (lengths > max_tokens).mean()}


def _as_seen(record: dict, other: str, instruction: str | None, tokenizer, max_tokens: int) -> Iterator[str]:
    """Lines that show a record's texts as the model reads them: with prompt, cut, as tokens, with `<EOS>` at the end.

    A token that is only part of a character is shown as U+FFFD.
    """
    for name, text in (("query", prompted(record["query"], instruction)), (other, record[other])):
        if tokenizer is None:
            yield f"  {name}: {excerpt(text, 200)}"
            continue
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: max_tokens - 1]
        pieces = [tokenizer.decode([token]) for token in ids[:SHOWN_TOKENS]]
        pieces += [f"... {len(ids) - SHOWN_TOKENS:,} more ..."] if len(ids) > SHOWN_TOKENS else []
        yield f"  {name}: {'|'.join([*pieces, '<EOS>'])!r}, {len(ids) + 1:,} tokens"


def script_of(text: str) -> str:
    """The Unicode script of most letters in a text's first 200 characters, such as 'LATIN'; 'NONE' without letters."""
    letters = Counter(_script(character) for character in text[:200] if character.isalpha())
    return letters.most_common(1)[0][0] if letters else "NONE"


@cache
def _script(letter: str) -> str:
    return unicodedata.name(letter, "NONE").split()[0]


def _counted(counts: dict[str, int]) -> str:
    shown = [f"{name} {count:,}" for name, count in list(counts.items())[:10]]
    return ", ".join(shown + ["..."] * (len(counts) > 10))
