"""Shapes in which other tools keep training data, recognised by files and columns, with the registry entry for each.

A shape is read by a converter (`converters.py`). What the files do not tell, such as the score from which on a pair is
a positive, is asked for.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import yaml

from .converters import convert
from .readers import Table, open_table

LOOKED_AT = 1000  # rows that are read to say what a question is about
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".tsv", ".csv", ".arrow")


@dataclass(frozen=True)
class Shape:
    """What files of training data are. what: in words; converter: None for the kit's own columns.

    files: in an order that the converter takes. asks: {what the files do not tell: question about it}. unused: columns
    that are not read.
    """

    what: str
    converter: str | None
    fields: dict
    files: tuple[Path, ...] = ()
    task: str | None = "retrieval"  # None: by the number of labels
    symmetric: bool = False
    asks: dict[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    def records(self) -> Iterator[dict]:
        """The converter's records, without the language of the passage, which a report does not need."""
        tables = [open_table(path, self.fields.get("columns")) for path in self.files]
        for record in convert(self.converter, self.fields, tables, where=str(self.files[0])):
            yield {key: value for key, value in record.items() if key != "to"}


def shape_of(path: Path, answers: dict[str, str] | None = None) -> Shape | None:
    """The shape of a file or folder; None for a file that has the kit's own columns, or others that nobody knows.

    answers: {what the files do not tell: answer}. ValueError for a folder of no known kind, for a question without an
    answer, and for an answer without a question.
    """
    path, answers = Path(path), answers or {}
    shape = _of_folder(path, answers) if path.is_dir() else recognise((path,), answers)
    asks = shape.asks if shape else {}
    for name in answers:
        if name not in asks:
            raise ValueError(f"--set {name}: {path} asks for {', '.join(asks) or 'nothing'}; remedy: leave it out")
    if missing := [name for name in asks if name not in answers]:
        questions = "; ".join(f"{asks[name]} remedy: --set {name}=..." for name in missing)
        raise ValueError(f"{path} holds {shape.what}: {questions}")
    return shape


def entry_of(path: Path, shape: Shape | None, task: str, instruction: str | None, folder: Path) -> str:
    """The entry for data/sources.yaml of a file or folder; `folder` is that of local files.

    Without an instruction it has to be filled in: the registry refuses null.
    """
    inside = path.resolve().is_relative_to(folder.resolve())
    base = folder.resolve() if inside else path.resolve().parent
    files = [file.resolve().relative_to(base).as_posix() for file in (shape.files if shape else [path])]
    name = re.sub(r"[^a-z0-9]+", "_", path.name.partition(".")[0].lower()).strip("_") or "mine"
    said = f"instruction: {flow(instruction)}," if instruction else "instruction: null,  # what a query asks for\n    "
    lines = [
        f"  - {{name: {name}, recipes: [local], task: {task}, files: {flow(files)}, licence: unknown,",
        f"     {said} symmetric: {str(bool(shape and shape.symmetric)).lower()}",
    ]
    if shape and shape.converter:
        lines[1] += ","
        lines.append(f"     converter: {shape.converter}, fields: {flow(shape.fields)}")
    return "\n".join(lines) + "}"


def flow(value) -> str:
    """A value as YAML in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


# Files of the same columns ----------------------------------------------------------------------


def recognise(files: tuple[Path, ...], answers: dict) -> Shape | None:
    """The shape of one file, or of several parts of one; None for the kit's own columns, or unknown ones."""
    if fields := _fields_of_headless(files[0]):
        return Shape("triples without a header, as MS MARCO's (query, passage, negative)", "pairs", fields, files)
    table = open_table(files[0])
    if "query" in table.columns and {"passage", "label"} & set(table.columns):
        return None
    for known in (_lists, _passages_with_titles, _triplets, _scored, _labelled_pairs, _labelled_texts, _questions):
        if shape := known(table, answers):
            used = {path.split(".")[0] for path in _paths(shape.fields)}
            return replace(shape, files=files, unused=tuple(sorted(set(table.columns) - used)))
    return None


def _paths(fields: dict) -> Iterator[str]:
    """Every field path, also of lists in lists."""
    for value in fields.values():
        values = value if isinstance(value, list) else [value]
        for one in values:
            yield from one if isinstance(one, list) else [str(one)]


def _lists(table: Table, answers: dict) -> Shape | None:
    """FlagEmbedding: query, pos, neg; pos and neg are lists."""
    if not {"query", "pos"} <= set(table.columns):
        return None
    row, fields = _first(table), {"query": "query"}
    fields["passage"] = "pos.*" if isinstance(row["pos"], list) else "pos"
    if "neg" in table.columns:
        fields["negatives"] = "neg" if isinstance(row.get("neg"), list) else ["neg"]
    return Shape("FlagEmbedding's rows (query, pos, neg)", "pairs", fields)


def _passages_with_titles(table: Table, answers: dict) -> Shape | None:
    """Tevatron: query, positive_passages, negative_passages; a passage is an object with title and text."""
    if not {"query", "positive_passages"} <= set(table.columns):
        return None
    passages = _first(table)["positive_passages"] or [{}]
    parts = [part for part in ("title", "text") if part in passages[0]]
    fields = {"query": "query", "passage": [f"positive_passages.*.{part}" for part in parts]}
    if "negative_passages" in table.columns:
        fields["negatives"] = [[f"negative_passages.*.{part}" for part in parts]]
    return Shape("Tevatron's rows (query, positive_passages, negative_passages)", "pairs", fields)


def _triplets(table: Table, answers: dict) -> Shape | None:
    """sentence-transformers: anchor or query, positive, and negative or negative_1, negative_2, ..."""
    query = next((name for name in ("anchor", "query") if name in table.columns), None)
    if not query or "positive" not in table.columns:
        return None
    fields = {"query": query, "passage": "positive"}
    if negatives := [name for name in table.columns if re.fullmatch(r"negative(_\d+)?", name)]:
        fields["negatives"] = negatives
    return Shape(f"sentence-transformers' rows ({query}, positive, negative)", "pairs", fields)


def _scored(table: Table, answers: dict) -> Shape | None:
    """Two sentences and how similar they are."""
    pair, score = _two_texts(table), _one_of(table, "score", "similarity_score", "similarity")
    if not pair or not score:
        return None
    scores = sorted(float(row[score]) for _, row in islice(table.rows(), LOOKED_AT) if _is_number(row[score]))
    middle = scores[len(scores) // 2] if scores else 0
    seen = f" (they are {scores[0]:g} to {scores[-1]:g}, half of them above {middle:g})" if scores else ""
    fields = {"first": pair[0], "second": pair[1], "score": score}
    if "minimum" in answers:
        fields["minimum"] = _number(answers["minimum"])
    asks = {"minimum": f"from which {score} on is a pair a positive{seen}?"}
    return Shape(f"scored pairs ({', '.join(pair)}, {score})", "sts", fields, symmetric=True, asks=asks)


def _labelled_pairs(table: Table, answers: dict) -> Shape | None:
    """Two sentences with a label, such as 1 for the same meaning, or 0 for entailment."""
    pair, label = _two_texts(table), _one_of(table, "label", "is_duplicate", "gold_label")
    if not pair or not label:
        return None
    counts = Counter(str(row[label]) for _, row in islice(table.rows(), LOOKED_AT))
    seen = ", ".join(f"{value} {count} times" for value, count in counts.most_common(5))
    fields = {"first": pair[0], "second": pair[1], "label": label}
    if "duplicate" in answers:
        fields["duplicate"] = answers["duplicate"]
    asks = {"duplicate": f"which {label} says that the second text answers the first (there is {seen})?"}
    return Shape(f"labelled pairs ({', '.join(pair)}, {label})", "duplicates", fields, asks=asks)


def _labelled_texts(table: Table, answers: dict) -> Shape | None:
    text, label = _one_of(table, "text", "sentence"), _one_of(table, "label_text", "label")
    if text and label:
        fields = {"text": text, "label": label}
        return Shape(f"labelled texts ({text}, {label})", "labels", fields, task=None, symmetric=True)
    return None


def _questions(table: Table, answers: dict) -> Shape | None:
    for query, passage in (("question", "answer"), ("question", "context"), ("title", "body"), ("title", "text")):
        if {query, passage} <= set(table.columns):
            return Shape(f"pairs ({query}, {passage})", "pairs", {"query": query, "passage": passage})
    return None


def _first(table: Table) -> dict:
    return next(row for _, row in table.rows())


def _one_of(table: Table, *names: str) -> str | None:
    return next((name for name in names if name in table.columns), None)


def _two_texts(table: Table) -> tuple[str, str] | None:
    names = (("sentence1", "sentence2"), ("sentence_1", "sentence_2"), ("text1", "text2"), ("premise", "hypothesis"))
    return next((pair for pair in names if set(pair) <= set(table.columns)), None)


def _is_number(value) -> bool:
    try:
        return float(value) == float(value)
    except (TypeError, ValueError):
        return False


def _number(answer: str) -> float:
    if not _is_number(answer):
        raise ValueError(f"--set minimum={answer}: must be a number; remedy: as in --set minimum=4")
    return float(answer)


def _fields_of_headless(path: Path) -> dict | None:
    """The fields of a TSV file of three texts a row whose first line is no header; ValueError for ids without texts."""
    if path.name.endswith((".tsv", ".tsv.gz")):
        cells = [cell.strip() for cell in open_table(path).columns]
        if len(cells) == 3 and all(cell.isdecimal() for cell in cells):
            raise ValueError(
                f"{path} begins with three numbers, so it names texts by their ids; remedy: a file of texts, or a "
                "folder with corpus, queries and qrels"
            )
        if len(cells) == 3 and sum(" " in cell for cell in cells) >= 2:
            names = ["query", "passage", "negative"]
            return {"columns": names, "query": "query", "passage": "passage", "negatives": ["negative"]}
    return None


# Folders ----------------------------------------------------------------------------------------


def _of_folder(folder: Path, answers: dict) -> Shape:
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        what = "a DatasetDict of `datasets`"
        split, asks = _split(folder, splits, answers)
        return _saved(folder / split, answers, asks) if split else Shape(what, None, {}, asks=asks)
    if (folder / "state.json").is_file():
        return _saved(folder, answers, {})
    corpus, queries = (_files_named(folder, name) for name in ("corpus", "queries"))
    if corpus and queries and (judgements := _judgements(folder)):
        return _search_set(folder, corpus, queries, judgements, answers)
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise ValueError(
        f"{folder} is a folder of no known kind (in it: {there}); remedy: a file, what save_to_disk of `datasets` "
        "wrote, or corpus, queries and qrels as BEIR and mteb have them"
    )


def _split(folder: Path, splits: list[str], answers: dict) -> tuple[str | None, dict[str, str]]:
    """(the split to train on, question about it): `train` where there is one, or the only one."""
    if "train" in splits or len(splits) == 1:
        return ("train" if "train" in splits else splits[0]), {}
    if (split := answers.get("split")) not in (None, *splits):
        raise ValueError(f"--set split={split}: {folder} has {', '.join(splits)}; remedy: one of these")
    return split, {"split": f"which of {', '.join(splits)} is for training?"}


def _saved(folder: Path, answers: dict, asks: dict[str, str]) -> Shape:
    """A data set that save_to_disk of `datasets` wrote."""
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    files = tuple(folder / file["filename"] for file in state["_data_files"])
    shape = recognise(files, {name: answer for name, answer in answers.items() if name not in asks})
    shape = shape or Shape("rows of the kit's own columns", None, {}, files, task=None)
    return replace(shape, what=f"{shape.what}, saved by `datasets`", asks=asks | shape.asks)


def _files_named(folder: Path, name: str) -> list[Path]:
    """corpus.jsonl, or the files of a folder corpus."""
    found = [folder / f"{name}{suffix}" for suffix in SUFFIXES]
    found += sorted((folder / name).rglob("*")) if (folder / name).is_dir() else []
    return [path for path in found if path.is_file() and path.name.endswith(SUFFIXES)]


def _judgements(folder: Path) -> dict[str, list[Path]]:
    """{split: files of judgements}, of files such as qrels/test.tsv and qrels/test-00000-of-00001.parquet."""
    splits = {}
    for path in _files_named(folder, "qrels"):
        splits.setdefault(re.sub(r"-\d+-of-\d+$", "", path.name.partition(".")[0]), []).append(path)
    return splits


def _search_set(folder: Path, corpus: list[Path], queries: list[Path], judgements: dict, answers: dict) -> Shape:
    what = "a search set, as BEIR and mteb have them (corpus, queries, qrels)"
    split, asks = _split(folder, list(judgements), answers)
    if not split:
        return Shape(what, "qrels", {}, asks=asks)
    texts, judged = open_table(corpus[0]).columns, open_table(judgements[split][0]).columns
    files = {"queries": queries, "corpus": corpus, "qrels": judgements[split]}
    fields = {name: _glob(folder, paths) for name, paths in files.items()}
    fields |= {} if "_id" in texts else {"id": "id"}
    fields |= {"passage": [name for name in ("title", "text") if name in texts]}
    fields |= {} if "score" in judged else {"score": None}
    return Shape(what, "qrels", fields, (*queries, *corpus, *judgements[split]), asks=asks)


def _glob(folder: Path, files: list[Path]) -> str:
    """A glob that these files match, and no other of the source."""
    names = [file.relative_to(folder).as_posix() for file in files]
    return names[0] if len(names) == 1 else f"{Path(names[0]).parent.as_posix()}/*"
