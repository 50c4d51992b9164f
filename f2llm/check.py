"""A look at a local file of training data, before a run does: what is in it, what is wrong with it."""

import random
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from .local import Layout, layout_of, record_of, where
from .tables import Table, excerpt, open_table
from .text import normalise, prompted

SAMPLE = 2000  # rows whose lengths and scripts are looked at
SAMPLE_CHARACTERS = 4_000_000  # of one column, at most: what a tokenizer reads in seconds
SHOWN = 100  # problems of a kind that are named; further ones are counted
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
        return "\n".join([*lines, "usable" if self.usable else "not usable as it is"])


def check_file(
    path: Path, max_tokens: int, task: str | None = None, instruction: str | None = None, model: Path | None = None
) -> Report:
    """Looks at every row of a local file; the report says whether it is usable and what it is like.

    max_tokens: what longer texts are cut to. task: read off the columns if None; label with two values:
    classification. model: a folder with a tokenizer; models/backbone if None and it is there, or else lengths are in
    characters. ValueError for a file that cannot be opened or lacks a column.
    """
    table = open_table(path)
    look = _Look(table, layout_of(table, task), task)
    folder = _tokenizer_folder(model)
    look.at_all()
    tokenizer = _tokenizer(folder)
    other = look.layout.other
    texts = {"query": [prompted(text, instruction) for text in look.sampled("query")], other: look.sampled(other)}
    if look.layout.negatives:
        texts["negatives"] = look.sampled("negatives")
    return Report(
        path=table.path,
        num_rows=look.number,
        columns=table.columns,
        task=look.task,
        languages=dict(look.languages.most_common()),
        scripts=dict(Counter(script_of(record["query"]) for record in look.sample).most_common()),
        num_sampled=len(look.sample),
        unit=f"tokens of {tokenizer.name_or_path}, with prompt and EOS" if tokenizer else "characters (no tokenizer)",
        max_tokens=max_tokens,
        lengths={name: _lengths(found, tokenizer, max_tokens) for name, found in texts.items() if found},
        counts={kind: count for kind, count in look.counts.items() if count},
        samples=dict(look.samples),
        shown=[line for record in look.first for line in _as_seen(record, other, instruction, tokenizer, max_tokens)],
    )


class _Look:
    """What a pass over the rows gathers; a row takes 24 bytes."""

    def __init__(self, table: Table, layout: Layout, task: str | None):
        self.table, self.layout, self.task = table, layout, task
        self.number = 0
        self.counts, self.samples = dict.fromkeys((*PROBLEMS, *WARNINGS), 0), defaultdict(list)
        self.languages = Counter()
        self.rows, self.exact, self.folded = array("q"), array("q"), array("q")  # hashes of rows without empty texts
        self.num_negatives: dict[int, list] = {}  # number -> [count, first rows]
        self.labels: dict[str, list] = {}  # label -> [hash of its first text, row, whether it has another]
        self.sample, self.first, self.longest = [], [], {}
        self.draw = random.Random(0)
        for column in layout.unused:
            self.found("column without a use", f"{table.path}: {column}")

    def found(self, kind: str, message: str) -> None:
        self.counts[kind] += 1
        if len(self.samples[kind]) < SHOWN:
            self.samples[kind].append(message)

    def unreadable(self, message: str) -> None:
        self.found("unreadable row", message)

    def wrong(self, name: str, value: object, rule: str) -> None:
        self.found("wrong type", f"{where(self.table, self.number, name, value)} {rule}")

    def text(self, name: str, text: str) -> str:
        """The folded text; what is empty, or no text, is found."""
        folded = normalise(text)
        if not folded:
            kind = "nothing but punctuation" if text.strip() else "empty text"
            self.found(kind, where(self.table, self.number, name, text))
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            self.found("not Unicode", where(self.table, self.number, name, text))
        return folded

    def at_all(self) -> None:
        """Look at every row that can be read."""
        try:
            for number, row in self.table.rows(bad=self.unreadable):
                self.at(number, row)
        except ValueError as error:  # a file that is damaged in the middle
            self.unreadable(str(error))
        self.finish()

    def at(self, number: int, row: dict) -> None:
        """Look at one row."""
        self.number, num_wrong, num_broken = number, self.counts["wrong type"], self.counts["not Unicode"]
        record = record_of(row, self.layout, self.wrong)
        if self.counts["wrong type"] > num_wrong:
            return
        other = self.layout.other
        query, answer = self.text("query", record["query"]), self.text(other, record[other])
        if query and answer:
            self.rows.append(number)
            self.exact.append(hash((record["query"], record[other])))
            self.folded.append(hash((query, answer)))
        if query == answer != "":
            self.found("query equals passage", where(self.table, number, other, record[other]))
        if other == "label" and query and answer:
            seen = self.labels.setdefault(record[other], [hash(query), number, False])
            seen[2] = seen[2] or seen[0] != hash(query)
        if self.layout.negatives:
            self._look_at_negatives(record["negatives"], answer)
        if self.layout.language:
            self.languages[record["language"] or "none"] += 1
        if self.counts["not Unicode"] == num_broken:  # a tokenizer takes no others
            self._keep(record)

    def _look_at_negatives(self, negatives: list[str], passage: str) -> None:
        for text in negatives:
            if self.text("negatives", text) == passage != "":
                self.found("passage among its negatives", where(self.table, self.number, "negatives", text))
        known = self.num_negatives.setdefault(len(negatives), [0, []])
        known[0] += 1
        if len(known[1]) < SHOWN:
            known[1].append(self.number)

    def _keep(self, record: dict) -> None:
        """The first rows, the longest texts, and a sample in which every row is as likely as any other."""
        if len(self.first) < 3:
            self.first.append(record)
        for name in ("query", self.layout.other):
            if len(record[name]) > len(self.longest.get(name, "")):
                self.longest[name] = record[name]
        place = len(self.sample) if len(self.sample) < SAMPLE else int(self.draw.random() * self.number)
        if place < SAMPLE:
            self.sample[place : place + 1] = [record]

    def sampled(self, name: str) -> list[str]:
        """Texts of a column in the sample, up to SAMPLE_CHARACTERS, and the longest of the file."""
        texts, characters = [], 0
        for record in self.sample:
            for text in record[name] if name == "negatives" else [record[name]]:
                characters += len(text)
                if characters <= SAMPLE_CHARACTERS and len(texts) < SAMPLE:
                    texts.append(text)
        return [*texts, self.longest[name]] if name in self.longest else texts

    def finish(self) -> None:
        """What can be said only when all rows are known."""
        repeated = _repeated(np.array(self.exact))
        both = _repeated(np.array(self.folded))
        for kind, pairs in (
            ("repeated row", repeated),
            ("repeated row, but for case and punctuation", both[~np.isin(both[:, 0], repeated[:, 0])]),
        ):
            for row, first in pairs.tolist():
                self.found(kind, f"{self.table.path}, row {self.rows[row]}: as row {self.rows[first]}")
        self._finish_negatives()
        if self.layout.other == "label":
            self._finish_labels()
        self.task = self.task or "retrieval"

    def _finish_negatives(self) -> None:
        most = max(self.num_negatives, key=lambda num: (self.num_negatives[num][0], num), default=0)
        for num in sorted(self.num_negatives):
            count, rows = self.num_negatives[num]
            for place in range(count if num < most else 0):
                row = f"row {rows[place]}" if place < len(rows) else "more rows"
                self.found("fewer negatives than most rows", f"{self.table.path}, {row}: {num} instead of {most}")

    def _finish_labels(self) -> None:
        self.task = self.task or ("classification" if len(self.labels) == 2 else "clustering")
        rule = {"classification": "exactly two", "clustering": "two or more"}[self.task]
        if len(self.labels) < 2 or (self.task == "classification" and len(self.labels) > 2):
            shown = excerpt(list(self.labels)[:SHOWN_LABELS])
            self.found(
                "labels", f"{self.table.path}, label: {len(self.labels)} values {shown}, but {self.task} needs {rule}"
            )
        for label, (_, row, several) in self.labels.items():
            if not several:
                self.found("label of a single text", where(self.table, row, "label", label))


def _repeated(hashes: np.ndarray) -> np.ndarray:
    """(place, place of the first that is equal) of everything that came before, by place; (N, 2)."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    places = np.arange(len(hashes))
    first = first[inverse] if len(hashes) else places
    return np.stack([places, first], axis=1)[first != places]


# Lengths, scripts, and what the model sees ------------------------------------------------------


def _tokenizer_folder(model: Path | None) -> Path | None:
    """The folder of a tokenizer; None if none is named and models/backbone is not there."""
    folder = Path(model or "models/backbone")
    if (folder / "tokenizer.json").is_file():
        return folder
    if model:
        raise ValueError(f"{folder} holds no tokenizer.json; remedy: the folder of a model")
    return None


def _tokenizer(folder: Path | None):
    """The tokenizer; loaded after the rows are read, which takes longer with so much in memory."""
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
    """A record's texts with prompt, cut and divided into tokens, `<EOS>` last; parts of characters show as U+FFFD."""
    for name, text in (("query", prompted(record["query"], instruction)), (other, record[other])):
        if tokenizer is None:
            yield f"  {name}: {excerpt(text, 200)}"
            continue
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: max_tokens - 1]
        pieces = [tokenizer.decode([token]) for token in ids[:SHOWN_TOKENS]]
        pieces += [f"... {len(ids) - SHOWN_TOKENS:,} more ..."] if len(ids) > SHOWN_TOKENS else []
        yield f"  {name}: {'|'.join([*pieces, '<EOS>'])!r}, {len(ids) + 1:,} tokens"


def script_of(text: str) -> str:
    """The Unicode script of most letters at the beginning of a text, such as 'LATIN'; 'NONE' without letters."""
    letters = Counter(_script(character) for character in text[:200] if character.isalpha())
    return letters.most_common(1)[0][0] if letters else "NONE"


@cache
def _script(letter: str) -> str:
    return unicodedata.name(letter, "NONE").split()[0]


def _counted(counts: dict[str, int]) -> str:
    shown = [f"{name} {count:,}" for name, count in list(counts.items())[:10]]
    return ", ".join(shown + ["..."] * (len(counts) > 10))
