"""Assembly of training tuples: reads the records of each part, cleans them and writes them as tuples.

A part is a file of the released data, or a whole source. `f2llm.store.tuples` reads the result. Memory grows with the
largest part, by about 150 bytes a document.
"""

import hashlib
import json
import multiprocessing
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from operator import mul
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from ..config import Data
from ..store.files import whole_folder
from ..store.progress import Progress
from ..store.tuples import DOCUMENTS, SCHEMA, ArrowWriter
from ..text import normalise
from .clean import Duplicates, EvaluationTexts, Positives, digest, fault_of, is_unicode, texts_compared
from .held_out import HeldOut
from .sources import counted, num_records

SHOWN = 3  # samples kept in the manifest for each reason to drop a row
SHOWN_CHARACTERS = 200
HELD_OUT = "held out for evaluation"
NO_EVALUATION_TEXTS = {"name", "type", "instruction", "languages", "label", "labels", "distractors"}


def assemble(
    parts: list,
    records_of: Callable,
    evaluation: list[dict],
    data: Data,
    seed: int,
    out: Path,
    workers: int = 1,
    held_out: dict[str, HeldOut] | None = None,
) -> dict[str, dict]:
    """Write the tuples of `parts` and the evaluation tasks under `out`; returns {part name: its manifest entry}.

    records_of(part) returns an iterator over the records of a `f2llm.data.sources.Part`; it is called in `workers`
    processes. Duplicates and evaluation texts are dropped and counted by the rules in `data`, and so are rows that
    `f2llm.data.held_out` chose, whose tasks are written too. The same inputs give the same bytes, for any number of
    workers and any hash seed. A part is cleaned of texts of the tasks, and its given negatives of the positives in all
    parts of its source; otherwise its files do not depend on other parts.
    """
    held_out = held_out or {}
    evaluation = [*evaluation, *(of.task for of in held_out.values() if of.task)]
    with whole_folder(out) as folder, TemporaryDirectory() as scratch:
        for name in ("documents", "tuples", "evaluation"):
            (folder / name).mkdir()
        progress = Progress("assemble", "rows read", _rows_to_read(parts, data), shared=True)
        counted_records = partial(counted, records_of, progress)
        work = (folder, Path(scratch), counted_records, list(texts_of(evaluation)), data, seed, held_out)
        if workers > 1 and len(parts) > 1:
            context = multiprocessing.get_context("spawn")  # forking a process that has threads may deadlock
            with ProcessPoolExecutor(workers, context, _start, work) as pool, progress.watch():
                _write_pairs_of_sources(parts, pool.map, Path(scratch))
                entries = list(pool.map(_assemble_part, parts))
        else:
            _start(*work)
            with progress.watch():
                _write_pairs_of_sources(parts, map, Path(scratch))
                entries = [_assemble_part(part) for part in parts]
        for task in evaluation:
            path = folder / "evaluation" / f"{task['name']}.json"
            path.write_text(json.dumps(task, ensure_ascii=False, indent=1), encoding="utf-8")
        manifest = {part.name: entry for part, entry in zip(parts, entries)}
        _write_manifest(folder, manifest)
    return manifest


def _rows_to_read(parts: list, data: Data) -> int | None:
    """Rows of all parts, each as often as it is read: see `_write_pairs_of_sources` and `_assemble_part`."""
    rows = [num_records(part, data) for part in parts]
    several = Counter(part.source.name for part in parts)
    times = [1 + _has_negatives(part, data) + (several[part.source.name] > 1) for part in parts]
    return None if None in rows else sum(map(mul, rows, times))


def texts_of(value) -> Iterator[str]:
    """Yields every text in the data of evaluation tasks that training must not see.

    Names, instructions, language codes and labels are skipped, and distractors, which are training texts.
    """
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key in value.keys() - NO_EVALUATION_TEXTS:
            yield from texts_of(value[key])
    elif isinstance(value, list):
        for item in value:
            yield from texts_of(item)


# One part ---------------------------------------------------------------------------------------

_work = None  # the inputs that all parts share, set once per process by _start


def _start(
    folder: Path, scratch: Path, records_of: Callable, evaluation: list[str], data: Data, seed: int, held_out: dict
) -> None:
    global _work
    _work = (folder, scratch, records_of, EvaluationTexts(evaluation, data.decontaminate), data, seed, held_out)


def _write_pairs_of_sources(parts: list, mapped: Callable, scratch: Path) -> None:
    """Write scratch/<source>.npy for each source of several parts: hashes of the pairs of query and passage of all."""
    of_source = defaultdict(list)
    for part in parts:
        of_source[part.source.name].append(part)
    for source, several in of_source.items():
        if len(several) > 1:
            np.save(scratch / f"{source}.npy", np.unique(np.concatenate(list(mapped(_pairs_of, several)))))


def _pairs_of(part) -> np.ndarray:
    """Hashes of the pairs of query and passage of a part."""
    _, _, records_of, _, data, *_ = _work
    return Positives(records_of(part), data.deduplicate, part.source.symmetric).hashes()


def _assemble_part(part) -> dict:
    """Write the files of one part; returns its entry in the manifest."""
    folder, scratch, records_of, evaluation, data, seed, held_out = _work
    counts, held = Counts(), held_out.get(part.name)
    others = scratch / f"{part.source.name}.npy"
    positives = Positives(
        records_of(part) if _has_negatives(part, data) else (),
        data.deduplicate,
        part.source.symmetric,
        np.load(others, mmap_mode="r") if others.exists() else None,
    )
    kept = _clean(records_of(part), evaluation, Duplicates(data.deduplicate), positives, held, counts)
    with _Rows(folder, part.name) as rows:
        if part.ready_made:
            for record in kept:
                rows.write(record, record["passage"], record.get("negatives") or [])
        else:
            _write_labelled(rows, list(kept), part.source, data.negatives, f"{seed}:{part.name}", counts)
    counts.dropped += Counter()  # removes reasons with a count of 0
    if not rows.num_rows:
        raise ValueError(
            f"source '{part.source.name}': no row of {part.name} is left of {counts.drawn} that were drawn "
            f"({dict(counts.dropped)}); remedy: look at its files, its fields in data/sources.yaml, or data.leave_out"
        )
    return (
        asdict(part.source)
        | {
            "source": part.source.name,
            "revision": part.revision,
            "inputs": part.inputs,
            "drawn": counts.drawn,
            "kept": rows.num_rows,
            "dropped": dict(sorted(counts.dropped.items())),
            "dropped_samples": counts.samples,
            "languages": dict(sorted(rows.languages.items())),
            "documents": len(rows.documents),
            "negatives": _origin_of_negatives(part, data, rows.num_negatives),
            "rows_by_negatives": {str(num): count for num, count in sorted(rows.num_negatives.items())},
            "negatives_removed": counts.negatives_removed,
        }
        | ({"held_out": held.note} if held else {})
    )


def _has_negatives(part, data: Data) -> bool:
    """Whether its rows may bring negatives; those of the embedded sources do not."""
    return part.ready_made and data.source != "embedded"


def _origin_of_negatives(part, data: Data, num_negatives: Counter) -> str:
    """Where negatives come from: "labels", "given" by the data, or "mine": mining adds those that are missing.

    The released tuples are never mined again.
    """
    if not part.ready_made:
        return "labels"
    even = len(num_negatives) == 1 and 0 not in num_negatives
    fillable = part.source.task == "retrieval" and data.source != "released"
    return "mine" if fillable and not even else "given"


class Counts:
    """Counts of a part's rows: drawn, dropped by reason (with samples), and negatives removed."""

    def __init__(self):
        self.drawn = self.negatives_removed = 0
        self.dropped, self.samples = Counter(), defaultdict(list)

    def drop(self, reason: str, record: dict) -> None:
        self.dropped[reason] += 1
        if len(self.samples[reason]) < SHOWN:
            texts = {key: record[key][:SHOWN_CHARACTERS] for key in ("query", "passage", "label") if key in record}
            shown = {key: text.encode("utf-8", "replace").decode() for key, text in texts.items()}
            self.samples[reason].append(shown)


def _clean(
    records: Iterable[dict],
    evaluation: EvaluationTexts,
    duplicates: Duplicates,
    positives: Positives,
    held_out: HeldOut | None,
    counts: Counts,
) -> Iterator[dict]:
    """Yields the records to train on, without invalid negatives; what is dropped is counted in `counts`.

    Negatives are invalid if they are empty, not Unicode, the query, or its passage in any row of the source. A row
    that is repeated later in its part has the negatives of its repetitions too.
    """
    for record in records:
        counts.drawn += 1
        if reason := _reason_to_drop(record, evaluation, duplicates, held_out.queries if held_out else ()):
            counts.drop(reason, record)
            continue
        if negatives := _given_negatives(record, duplicates, positives):
            record["negatives"] = [text for text in negatives if _is_negative(text, record, positives)]
            counts.negatives_removed += len(negatives) - len(record["negatives"])
        yield record


def _given_negatives(record: dict, duplicates: Duplicates, positives: Positives) -> list[str]:
    """The negatives of a record and of the rows that repeat it."""
    negatives = record.get("negatives") or []
    if positives.repeated and "passage" in record:
        pair = (record["query"], record["passage"])
        repeated = positives.repeated.pop(duplicates.key(pair, (normalise(pair[0]), normalise(pair[1]))), [])
        negatives = list(dict.fromkeys([*negatives, *repeated])) if repeated else negatives
    return negatives


def _is_negative(text: str, record: dict, positives: Positives) -> bool:
    """Whether a text may be a negative of a record: a text, not the query itself, and no known answer to it."""
    if not text or not is_unicode(text):
        return False
    folded, query = normalise(text), normalise(record["query"])
    return folded not in (query, normalise(record["passage"])) and not positives.has(query, folded)


def _reason_to_drop(
    record: dict, evaluation: EvaluationTexts, duplicates: Duplicates, held_out: Container[bytes]
) -> str | None:
    if "left_out" in record:  # by its converter
        return record["left_out"]
    pair, folded = texts_compared(record)
    if reason := fault_of(record):
        return reason
    if digest(folded[0]) in held_out:
        return HELD_OUT
    if reason := evaluation.overlap(*(folded if "passage" in record else folded[:1])):
        return reason
    if folded[0] == folded[1]:
        return f"query equals {'passage' if 'passage' in record else 'label'}"
    return "seen before" if duplicates.repeated(pair, folded) else None


def _write_labelled(rows: "_Rows", records: list[dict], source, num_negatives: int, seed: str, counts: Counts) -> None:
    """Write tuples from labels: the positive is another text of the same label, negatives are texts of other labels.

    In two-way classification the positive and the only negative are the labels themselves. A text may have several
    labels, in several rows: no negative shares a label with its query.
    """
    if source.task == "clustering":
        records = _not_alone(records, counts)
    draw, by_label, labels_of = random.Random(seed), defaultdict(list), defaultdict(set)
    for record in records:
        by_label[record["label"]].append(record["query"])
        labels_of[normalise(record["query"])].add(record["label"])
    _check_labels(source, by_label)
    for record in records:
        label, own, passage = record["label"], normalise(record["query"]), record["query"]
        others = [other for other in by_label if other not in labels_of[own]]
        if not others:
            counts.drop("text of all labels", record)
            continue
        if source.task == "classification":
            rows.write(record, label, others, group=label)
            continue
        while normalise(passage) == own:
            passage = draw.choice(by_label[label])
        drawn = draw.sample(others, min(num_negatives, len(others)))
        drawn += draw.choices(others, k=num_negatives - len(drawn))
        negatives = [draw.choice(by_label[other]) for other in drawn]
        for place, text in enumerate(negatives):
            if not labels_of[own].isdisjoint(labels_of[normalise(text)]):
                counts.negatives_removed += 1
                negatives[place] = _without_labels(labels_of[own], others, by_label, labels_of, draw)
        rows.write(record, passage, [text for text in negatives if text is not None], group=label)


def _without_labels(labels: set, others: list, by_label: dict, labels_of: dict, draw: random.Random) -> str | None:
    """A text of one of `others` that has none of `labels`; None if there is no such text."""
    for _ in range(100):
        text = draw.choice(by_label[draw.choice(others)])
        if labels.isdisjoint(labels_of[normalise(text)]):
            return text
    texts = [text for other in others for text in by_label[other] if labels.isdisjoint(labels_of[normalise(text)])]
    return draw.choice(texts) if texts else None


def _not_alone(records: list[dict], counts: Counts) -> list[dict]:
    """The records whose label has at least two different texts; the others are dropped and counted."""
    different = defaultdict(set)
    for record in records:
        different[record["label"]].add(normalise(record["query"]))
    kept = []
    for record in records:
        if len(different[record["label"]]) > 1:
            kept.append(record)
        else:
            counts.drop("only text of its label", record)
    return kept


def _check_labels(source, by_label: dict) -> None:
    """ValueError unless clustering has two labels or more, and two-way classification exactly two."""
    shown = sorted(by_label)[:5]
    if source.task == "clustering" and len(by_label) < 2:
        raise ValueError(f"source '{source.name}': clustering needs two labels or more, found {shown}")
    if source.task == "classification" and len(by_label) != 2:
        raise ValueError(
            f"source '{source.name}': two-way classification needs two labels, found {len(by_label)}: {shown}; "
            "remedy: task: clustering, which takes any number"
        )


class _Rows:
    """Writes the tuples of a part, and each of its documents once."""

    def __init__(self, folder: Path, name: str):
        self.tuples = ArrowWriter(folder / "tuples" / f"{name}.arrow", SCHEMA)
        self.texts = ArrowWriter(folder / "documents" / f"{name}.arrow", DOCUMENTS)
        self.documents: dict[bytes, int] = {}  # digest -> row
        self.groups: dict[object, int] = {}
        self.languages, self.num_negatives = Counter(), Counter()

    @property
    def num_rows(self) -> int:
        return self.tuples.num_rows

    def write(self, record: dict, passage: str, negatives: list[str], group=None) -> None:
        """Write one tuple. All passages of a group answer all its queries; by default, equal queries form a group."""
        row = self._document(passage)
        language = record.get("language")
        self.tuples.write(
            {
                "query": record["query"],
                "passage": row,
                "group": self.groups.setdefault(record.get("group", group) or digest(record["query"]), self.num_rows),
                "negatives": [self._document(text) for text in negatives],
                "language": language,
            }
        )
        self.num_negatives[len(negatives)] += 1
        self.languages.update({language or "unknown", record.get("to") or language or "unknown"})

    def _document(self, text: str) -> int:
        row = self.documents.setdefault(digest(text), len(self.documents))
        if row == self.texts.num_rows:
            self.texts.write({"text": text})
        return row

    def __enter__(self) -> "_Rows":
        self.tuples.__enter__(), self.texts.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.tuples.__exit__(*error), self.texts.__exit__(*error)


def _write_manifest(folder: Path, parts: dict) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {}
    for path in files:
        with path.open("rb") as file:
            hashes[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    text = json.dumps({"sources": parts, "sha256": hashes}, indent=1, ensure_ascii=False)
    (folder / "manifest.json").write_text(text, encoding="utf-8")
