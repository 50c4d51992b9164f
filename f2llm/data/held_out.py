"""Holds out rows of local sources, so that a run on your own data is also evaluated on your own data.

Rows that share a query or a passage, directly or through other rows, are held out together: no held-out query or
passage is a query or passage of a training row of its source. Pairs become a retrieval task, labels a clustering or a
classification task. Memory: about 250 bytes per different text.
"""

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from ..config import Data
from ..store.progress import Progress
from ..store.tuples import OWN
from ..text import normalise
from .clean import digest, fault_of, texts_compared
from .sources import counted

LEAST, MOST = 10, 1000  # queries or labelled texts of a task: with fewer, a score would be chance
MOST_PASSAGES = 2000  # searched in a retrieval task


@dataclass(frozen=True)
class HeldOut:
    """What is held out of one part. task: as `f2llm.evaluation` reads it; None if nothing is held out, note says why.

    queries: digests of the normalised queries (or labelled texts), of which no row is trained on.
    """

    note: str
    task: dict | None = None
    queries: frozenset[bytes] = field(default=frozenset(), repr=False)


def hold_out(parts: list, records_of: Callable, data: Data) -> dict[str, HeldOut]:
    """{part: what is held out of it} of local sources, by data.held_out_percent and data.split; {} of all others.

    records_of: as `assemble` takes it; each part is read twice or three times. The choice depends on the texts and on
    data.split alone, not on the order of rows or the seed.
    """
    if data.source != "local":
        return {}
    progress = Progress("hold out", "rows read")
    with progress.watch():
        return {part.name: _of_part(part, partial(counted, records_of, progress), data) for part in parts}


def _of_part(part, records_of: Callable, data: Data) -> HeldOut:
    def valid() -> Iterable[dict]:
        """The records that assembly can keep."""
        for record in records_of(part):
            if "left_out" in record:
                continue
            _, (query, answer) = texts_compared(record)
            if query != answer and fault_of(record) is None:
                yield record

    if not part.ready_made:
        return _labelled(part.source, valid(), data)
    if part.source.task != "retrieval":
        return HeldOut(f"nothing: {part.source.task} with passages has no task of its own here")
    return _pairs(part.source, valid, data)


# Pairs ------------------------------------------------------------------------------------------


def _pairs(source, valid: Callable[[], Iterable[dict]], data: Data) -> HeldOut:
    """Groups of rows in the order of a hash, as long as their queries stay within the share."""
    groups, queries = Groups(), set()
    for record in valid():
        query = digest(normalise(record["query"]))
        groups.join(query, digest(normalise(record["passage"])))
        queries.add(query)
    most = min(MOST, len(queries) * data.held_out_percent // 100)
    members = defaultdict(list)
    for query in queries:
        members[groups.of(query)].append(query)
    chosen = set()
    for group in sorted(members.values(), key=lambda group: min(_drawn(query, data) for query in group)):
        if len(chosen) + len(group) <= most:
            chosen.update(group)
    if len(chosen) < LEAST:
        return HeldOut(_too_few(len(chosen), "queries", len(queries), data))
    task = _task(source, "Retrieval", _retrieval(valid(), chosen, data))
    passages = sum(len(task["data"]["default"][key]) for key in ("corpus", "distractors"))
    return HeldOut(f"{len(chosen):,} queries, searched among {passages:,} passages", task, frozenset(chosen))


def _retrieval(records: Iterable[dict], chosen: set[bytes], data: Data) -> dict:
    """Queries, their passages, and passages of training rows beside them (distractors), which stay in training."""
    queries, corpus, relevant, distractors = {}, {}, defaultdict(set), {}
    for record in records:
        query, passage = digest(normalise(record["query"])), digest(normalise(record["passage"]))
        if query in chosen:
            queries.setdefault(query, record["query"])
            corpus.setdefault(passage, record["passage"])
            relevant[query].add(passage)
        else:
            distractors.setdefault(passage, record["passage"])
            if len(distractors) > 2 * MOST_PASSAGES:
                distractors = _first_drawn(distractors, MOST_PASSAGES, data)
    kept = _first_drawn(distractors, max(0, MOST_PASSAGES - len(corpus)), data)
    row = {passage: number for number, passage in enumerate(sorted(corpus))}
    order = sorted(queries)
    return {
        "queries": [queries[query] for query in order],
        "corpus": [corpus[passage] for passage in sorted(corpus)],
        "relevant": [sorted(row[passage] for passage in relevant[query]) for query in order],
        "distractors": [kept[passage] for passage in sorted(kept)],
    }


def _first_drawn(texts: dict[bytes, str], num: int, data: Data) -> dict[bytes, str]:
    return {key: texts[key] for key in heapq.nsmallest(num, texts, key=lambda key: _drawn(key, data))}


class Groups:
    """Disjoint sets of digests: `join` unites the sets of two, `of` names the set of one."""

    def __init__(self):
        self.numbers: dict[bytes, int] = {}
        self.parents: list[int] = []

    def join(self, one: bytes, other: bytes) -> None:
        self.parents[self._root(one)] = self._root(other)

    def of(self, key: bytes) -> int:
        return self._root(key)

    def _root(self, key: bytes) -> int:
        number = self.numbers.setdefault(key, len(self.parents))
        if number == len(self.parents):
            self.parents.append(number)
        while self.parents[number] != number:
            self.parents[number] = self.parents[self.parents[number]]
            number = self.parents[number]
        return number


# Labels -----------------------------------------------------------------------------------------


def _labelled(source, records: Iterable[dict], data: Data) -> HeldOut:
    """The same share of each label's texts, but two at least, as long as there is room; no texts of several labels."""
    texts, labels = {}, defaultdict(set)
    for record in records:
        key = digest(normalise(record["query"]))
        texts.setdefault(key, record["query"])
        labels[key].add(record["label"])
    by_label = defaultdict(list)
    for key, of_text in labels.items():
        if len(of_text) == 1:
            by_label[min(of_text)].append(key)
    share = min(data.held_out_percent / 100, MOST / max(len(texts), 1))
    rows, most = [], share * len(texts)
    for label, keys in sorted(by_label.items(), key=lambda item: _drawn(digest(item[0]), data)):
        num = max(2, int(share * len(keys)))
        if len(keys) >= num + 2 and len(rows) + num <= most:  # two stay in training: a query and its passage
            drawn = sorted(keys, key=lambda key: _drawn(key, data))[:num]
            rows += [(place, label, key) for place, key in enumerate(drawn)]
    rows.sort()
    labels_held_out = len({label for _, label, _ in rows})
    if len(rows) < LEAST or labels_held_out < 2:
        return HeldOut(_too_few(len(rows), f"texts of {labels_held_out} labels", len(texts), data))
    names = sorted(by_label)
    if source.task == "clustering":
        content = {"sentences": [texts[key] for _, _, key in rows], "labels": [label for _, label, _ in rows]}
    else:
        content = {split: {"text": [], "label": []} for split in ("train", "test")}
        for place, label, key in rows:  # every other text of a label trains mteb's classifier, the rest is scored
            content["test" if place % 2 else "train"]["text"].append(texts[key])
            content["test" if place % 2 else "train"]["label"].append(names.index(label))
    task = _task(source, source.task.title(), content)
    return HeldOut(f"{len(rows):,} texts of {labels_held_out} labels", task, frozenset(key for _, _, key in rows))


# Both -------------------------------------------------------------------------------------------


def _drawn(key: bytes, data: Data) -> bytes:
    """The hash by which texts are chosen."""
    return digest(f"{data.split}\0{key.hex()}")


def _task(source, kind: str, content: dict) -> dict:
    """An evaluation task as `f2llm.embedded.tasks` describes it."""
    return {
        "name": f"{source.name}{OWN}",
        "type": kind,
        "instruction": source.instruction,
        "languages": {"default": []},  # mteb wants codes with scripts, which a local file does not have
        "data": {"default": content},
    }


def _too_few(num: int, what: str, total: int, data: Data) -> str:
    return (
        f"nothing: {num} {what} could be held out of {total:,} at data.held_out_percent {data.held_out_percent}, "
        f"{LEAST} are the least (rows that share texts stay together)"
    )
