"""Converters of the original data sets' rows to training records, configured by `fields` in data/sources.yaml.

A field path says where a value is in a row: `question`; nested: `translation.en`, `answers.text.0`; `positive.*`
is every element of a list, and `passages.*.text` the text of each. The texts of a list of paths are joined by line
breaks, without empty ones. A null becomes an empty text, which assembly counts and drops; a value that is not text is
an error.
"""

import inspect
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from .readers import Table, excerpt, require_columns, spelled

Paths = str | list[str]  # a field path, or several whose texts are joined
COMMON = ("where", "language", "to", "per", "columns")  # fields that every converter takes, see `convert`
UNLABELLED = {"-1", "-", ""}  # how the NLI sets mark pairs on which the annotators did not agree


LeftOut = Callable[[str, "Row"], None]  # is told of rows that give no record: a reason and the row


def _ignore(reason: str, row: "Row") -> None:
    """Does nothing with a row that gives no record."""


def convert(
    converter: str, fields: dict, tables: list[Table], where: str, left_out: LeftOut = _ignore
) -> Iterator[dict]:
    """Yields the training records of a source, from its opened files in order; `where` is its name in errors.

    fields: the keyword arguments of the converter and, optionally,
    - where: {path: value or values}, which selects rows;
    - language, to: the paths of the language codes of query and passage;
    - per: a pattern such as "{first}-{second}/*" that groups files by language or pair of languages. Each group is
      converted separately, with {first} in other fields replaced.
    - columns: the names of the columns of CSV and TSV files without a header, which whoever opens them has used.
    left_out: is called with a reason for each row that `where` does not select or the converter passes over.
    ValueError for fields that the converter does not take, columns that a file does not have, and values of a wrong
    type.
    """
    check_fields(converter, fields, where)
    for names, group in _groups(tables, fields.get("per"), where):
        values = {key: _filled(value, names) for key, value in fields.items() if key != "per"}
        own = {key: value for key, value in values.items() if key not in COMMON}
        rows = Rows(group, where, values.get("where", {}), values.get("language"), values.get("to"), left_out)
        yield from CONVERTERS[converter](rows, **own)


def _groups(tables: list[Table], per: str | None, where: str) -> list[tuple[dict, list[Table]]]:
    """(values of the names in braces, files) of every group; without `per` all files are one group."""
    if per is None:
        return [({}, tables)]
    parts = re.split(r"(\{\w+\}|\*)", per)
    kinds = [
        f"(?P<{part[1:-1]}>[^/]+?)" if part[:1] == "{" else "[^/]*" if part == "*" else re.escape(part)
        for part in parts
    ]
    pattern, groups = re.compile(f"(?:.*/)?{''.join(kinds)}"), {}
    for table in tables:
        if not (found := pattern.fullmatch(table.path.as_posix())):
            raise ValueError(f"source '{where}': {table.path} is not named as fields.per says, {per!r}")
        groups.setdefault(tuple(found.groupdict().items()), []).append(table)
    return [(dict(names), group) for names, group in sorted(groups.items(), key=lambda item: item[0])]


def _filled(value: Any, names: dict) -> Any:
    """A value of `fields` with every {name} replaced."""
    if isinstance(value, str):
        for name, text in names.items():
            value = value.replace(f"{{{name}}}", text)
        return value
    if isinstance(value, list):
        return [_filled(item, names) for item in value]
    return (
        {_filled(key, names): _filled(item, names) for key, item in value.items()} if isinstance(value, dict) else value
    )


def check_fields(converter: str, fields: dict, where: str) -> None:
    """ValueError unless the converter exists and takes these fields."""
    if converter not in CONVERTERS:
        raise ValueError(f"source '{where}': converter is '{converter}', but must be one of: {', '.join(CONVERTERS)}")
    signature = inspect.signature(CONVERTERS[converter])
    try:
        signature.bind(None, **{key: value for key, value in fields.items() if key not in COMMON})
    except TypeError as error:
        known = ", ".join([*list(signature.parameters)[1:], *COMMON])
        raise ValueError(f"source '{where}', fields: {error}; remedy: converter '{converter}' takes {known}") from None


# Rows -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """The rows of a source's files that `chosen` selects: {path: allowed value or values}."""

    tables: list[Table]
    name: str
    chosen: dict
    language: str | None
    to: str | None
    left_out: LeftOut = _ignore

    def __call__(self, *paths: Paths | None) -> Iterator["Row"]:
        """Yields the selected rows, with the columns of `paths`; every file must have these columns."""
        chosen = {path: {spelled(value) for value in _listed(known)} for path, known in self.chosen.items()}
        wanted = [path for one in (*paths, self.language, self.to, list(chosen)) if one for path in _listed(one)]
        for table in self.tables:
            columns = [path if path in table.columns else path.split(".")[0] for path in wanted]
            require_columns(table, columns)
            for number, values in table.rows(columns=list(dict.fromkeys(columns))):
                row = Row(self, table, number, values)
                if all(spelled(row.value(path)) in known for path, known in chosen.items()):
                    yield row
                else:
                    self.left_out(f"not selected by where: {', '.join(chosen)}", row)

    def of(self, glob: str) -> "Rows":
        """All rows of the files whose path ends with a match of the glob."""
        tables = [table for table in self.tables if table.path.match(glob)]
        if not tables:
            files = ", ".join(str(table.path) for table in self.tables)
            raise ValueError(f"source '{self.name}': '{glob}' matches no file of {files}; remedy: look at hub_files")
        if self.chosen or self.language:
            raise ValueError(f"source '{self.name}': files that are joined take none of the fields {COMMON}")
        return Rows(tables, self.name, {}, None, None, self.left_out)


@dataclass(frozen=True, slots=True)
class Row:
    """A row, with its file and row number."""

    rows: Rows
    table: Table
    number: int
    values: dict

    def record(self, **texts: str | list[str]) -> dict:
        """A training record: the texts, and their language codes if the source has paths to them."""
        paths = (("language", self.rows.language), ("to", self.rows.to))
        codes = {key: self.text(path) for key, path in paths if path}
        return texts | {key: code for key, code in codes.items() if key == "language" or code != codes.get("language")}

    def text(self, paths: Paths) -> str:
        """The text at a path, or the joined texts at several; null is the empty text."""
        return self.texts(paths)[0]

    def texts(self, paths: Paths) -> list[str]:
        """The texts at a path: one or, with `*`, one per list element; several paths are joined element by element."""
        found = [[self._as_text(value, path) for value in self._all(path)] for path in _listed(paths)]
        if len(found) == 1:
            return found[0] or [""]
        return ["\n".join(filter(None, parts)) for parts in zip_longest(*found, fillvalue="")] or [""]

    def label(self, path: str) -> str:
        """A text, or a number as text (whole numbers without a decimal point); null is the empty text."""
        value = self.value(path)
        return spelled(value) if isinstance(value, (int, float)) else self._as_text(value, path)

    def number_at(self, path: str) -> float:
        """The number at a path; a number that is stored as text, as in CSV files, is parsed."""
        value = self.value(path)
        try:
            return float(value)
        except (TypeError, ValueError):
            self.fail(path, value, "is no number; remedy: the path of a number, or `where` to leave out such rows")

    def value(self, path: str) -> Any:
        """The value at a path without `*`, None if there is none."""
        return self._all(path)[0]

    def _all(self, path: str) -> list:
        column, *steps = [path] if path in self.values else path.split(".")
        found = [self.values.get(column)]
        for step in steps:
            found = [inner for value in found for inner in self._inner(value, step, path)]
        return found

    def _inner(self, value: Any, step: str, path: str) -> list:
        if value is None:
            return [] if step == "*" else [None]
        if isinstance(value, dict) and step in value:
            return [value[step]]
        if isinstance(value, list) and step == "*":
            return value
        if isinstance(value, list) and step.isdecimal():
            return value[int(step) : int(step) + 1] or [None]
        there = f"an object with {sorted(value)}" if isinstance(value, dict) else f"of type {type(value).__name__}"
        self.fail(path, value, f"is {there}, where '{step}' leads nowhere; remedy: a path that is there")

    def _as_text(self, value: Any, path: str) -> str:
        if value is None or isinstance(value, str):
            return value or ""
        self.fail(path, value, f"is of type {type(value).__name__}, not text; remedy: the path of a text")

    def fail(self, path: str, value: Any, rule: str) -> None:
        """ValueError that names file, row, field and value."""
        raise ValueError(f"{self.table.path}, row {self.number}, field '{path}': {excerpt(value)} {rule}")


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [value]


# Converters -------------------------------------------------------------------------------------


def pairs(rows: Rows, query: Paths, passage: Paths, negatives: Paths | None = None) -> Iterator[dict]:
    """Query and passage, unchanged from the row: questions and answers, titles, summaries, code, instructions.

    A passage path with `*` gives one record per passage. negatives: one path to a list of texts, or a list of paths
    to one negative each, of which one may be a list whose texts are joined; empty negatives are left out.
    """
    given = negatives or []
    if isinstance(given, str):
        given = [given if "*" in given else f"{given}.*"]
    for row in rows(query, passage, *given):
        record = row.record(query=row.text(query))
        if given:
            record["negatives"] = [text for path in given for text in row.texts(path) if text]
        yield from (record | {"passage": text} for text in row.texts(passage))


def bitext(
    rows: Rows, first: Paths, second: Paths, first_language: str, second_language: str, both_ways: bool
) -> Iterator[dict]:
    """Translations, from the first language to the second and, with both_ways, back. The languages are codes."""
    for row in rows(first, second):
        one, other = row.text(first), row.text(second)
        yield {"query": one, "passage": other, "language": first_language, "to": second_language}
        if both_ways:
            yield {"query": other, "passage": one, "language": second_language, "to": first_language}


def nli(
    rows: Rows, premise: Paths, hypothesis: Paths, label: str, entailment: Any, group_by: str | None = None
) -> Iterator[dict]:
    """One record per premise: an entailed hypothesis is the passage, hypotheses not entailed are the negatives.

    A premise without an entailed hypothesis gives no record. The passage and the order of the negatives are drawn at
    random, seeded by the premise: the order of the rows has no effect. Pairs without a gold label are left out. All
    pairs are held in memory. group_by: the path of a value that identifies the premise; its text if None.
    Source: arXiv 2510.02294, construction of the NLI tuples.
    """
    entailed, others, records, last = {}, {}, {}, {}
    entailing = {spelled(value) for value in _listed(entailment)}
    for row in rows(premise, hypothesis, label, group_by):
        found = row.label(label)
        if found not in UNLABELLED:
            key = row.label(group_by) if group_by else row.text(premise)
            records.setdefault(key, row.record(query=row.text(premise)))
            (entailed if found in entailing else others).setdefault(key, set()).add(row.text(hypothesis))
            last[key] = row
        else:
            rows.left_out("no gold label", row)
    for key in (key for key in last if key not in entailed):
        rows.left_out("premise without an entailed hypothesis", last[key])
    for key, positives in entailed.items():
        draw = random.Random(records[key]["query"])  # a text as seed gives the same draws in every process
        passage = draw.choice(sorted(positives - {""}) or [""])
        negatives = sorted(others.get(key, set()) - positives - {""})
        draw.shuffle(negatives)
        yield records[key] | {"passage": passage, "negatives": negatives}


def sts(rows: Rows, first: Paths, second: Paths, score: str, minimum: float) -> Iterator[dict]:
    """Sentence pairs with a score of `minimum` or more, in both directions. Source: arXiv 2510.02294, STS sets."""
    for row in rows(first, second, score):
        if row.number_at(score) >= minimum:
            yield row.record(query=row.text(first), passage=row.text(second))
            yield row.record(query=row.text(second), passage=row.text(first))
        else:
            rows.left_out(f"score below {minimum}", row)


def duplicates(rows: Rows, first: Paths, second: Paths, label: str, duplicate: Any) -> Iterator[dict]:
    """Pairs that are labelled as duplicates (same meaning), in one direction."""
    same = {spelled(value) for value in _listed(duplicate)}
    for row in rows(first, second, label):
        if row.label(label) in same:
            yield row.record(query=row.text(first), passage=row.text(second))
        else:
            rows.left_out("labelled as no duplicate", row)


def conversation(rows: Rows, messages: str, role: str, content: str, user: Any, assistant: Any) -> Iterator[dict]:
    """Query: the user's first turn; passage: the assistant's first turn after it. A row has a list of turns."""
    for row in rows(messages):
        speakers, said = row.texts(f"{messages}.*.{role}"), row.texts(f"{messages}.*.{content}")
        asked = next((turn for turn, who in enumerate(speakers) if who in _listed(user)), len(speakers))
        answers = [turn for turn, who in enumerate(speakers) if turn > asked and who in _listed(assistant)]
        yield row.record(query="".join(said[asked : asked + 1]), passage="".join(said[turn] for turn in answers[:1]))


def qrels(
    rows: Rows,
    queries: str,
    corpus: str,
    qrels: str,
    query_id: str = "query-id",
    passage_id: str = "corpus-id",
    score: str | None = "score",
    minimum: float = 1,
    id: str = "_id",
    query: Paths = "text",
    passage: Paths | tuple[str, ...] = ("title", "text"),
) -> Iterator[dict]:
    """Relevant pairs in the layout of BEIR and mteb: the judgements `qrels` link `queries` to `corpus`.

    qrels, queries, corpus: globs of files. A pair is used if its score is `minimum` or more; score null: every pair.
    id, query and passage are paths in the files of queries and corpus. The texts of the pairs used are held in memory;
    records are in the order of the judgements.
    """
    judged, judgements = [], rows.of(qrels)
    for row in judgements(query_id, passage_id, score):
        if score is None or row.number_at(score) >= minimum:
            judged.append((row.label(query_id), row.label(passage_id), row.table, row.number))
        else:
            rows.left_out(f"score below {minimum}", row)
    questions = _texts_by_id(rows.of(queries), id, query, {pair[0] for pair in judged})
    passages = _texts_by_id(
        rows.of(corpus), id, [passage] if isinstance(passage, str) else list(passage), {pair[1] for pair in judged}
    )
    for asked, answer, table, number in judged:
        for path, key, found, files in ((query_id, asked, questions, queries), (passage_id, answer, passages, corpus)):
            if key not in found:
                rule = f"is the id of no row of {files}; remedy: files of one revision"
                Row(rows, table, number, {}).fail(path, key, rule)
        yield {"query": questions[asked], "passage": passages[answer]}


def _texts_by_id(rows: Rows, id: str, paths: Paths, wanted: set[str]) -> dict[str, str]:
    found = {}
    for row in rows(id, paths):
        if (key := row.label(id)) in wanted:
            found.setdefault(key, row.text(paths))
    return found


def labels(rows: Rows, text: Paths, label: str, names: dict | None = None) -> Iterator[dict]:
    """Texts with a label, for clustering and two-way classification. names: {label value: text that replaces it}."""
    name_of = {spelled(value): name for value, name in (names or {}).items()}
    for row in rows(text, label):
        found = row.label(label)
        if names and found and not isinstance(name_of.get(found), str):
            row.fail(label, found, f"has no text among the names {names}; remedy: add it, in quotes")
        yield row.record(query=row.text(text), label=name_of.get(found, found))


CONVERTERS: dict[str, Callable[..., Iterator[dict]]] = {
    function.__name__: function for function in (pairs, bitext, nli, sts, duplicates, conversation, qrels, labels)
}
