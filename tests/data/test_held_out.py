"""Rows of local data that are held out for evaluation: which, how many, and that training sees none of their texts."""

import random
from dataclasses import replace

import numpy as np
import pytest

from f2llm.data.assemble import HELD_OUT, assemble
from f2llm.data.held_out import LEAST, MOST, MOST_PASSAGES, hold_out
from f2llm.data.sources import Part
from f2llm.evaluation.run import evaluate
from f2llm.store.tuples import TupleStore, load_tasks
from f2llm.text import normalise


@pytest.fixture
def local(config):
    return replace(config.data, source="local", held_out_percent=12, decontaminate="none", deduplicate="none")


@pytest.fixture(scope="module")
def part_of(registry):
    """part_of(task, name): a part of a local source."""

    def part_of(task: str, name: str = "mine") -> Part:
        source = replace(next(source for source in registry if source.task == task), name=name)
        return Part(name, source, (), None, {}, ready_made=task == "retrieval")

    return part_of


@pytest.fixture
def held_out(local, part_of):
    """held_out(records, data, task): what is held out of one source."""

    def held_out(records: list[dict], data=local, task: str = "retrieval"):
        return hold_out([part_of(task)], lambda part: iter(records), data)["mine"]

    return held_out


def pairs(num: int, num_passages: int | None = None) -> list[dict]:
    return [{"query": f"Question {n}?", "passage": f"answer {n % (num_passages or num)}"} for n in range(num)]


def labelled(num: int, num_labels: int) -> list[dict]:
    return [{"query": f"text {n}", "label": f"label {n % num_labels}"} for n in range(num)]


# How many ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("records", "num"),
    [
        (pairs(300), 36),
        (pairs(300, 100), 36),  # three questions to an answer
        (pairs(20_000), MOST),
        (pairs(5), 0),
        (pairs(LEAST * 100 // 12), 0),
        (pairs(LEAST * 100 // 12 + 1), LEAST),
        (pairs(300, 1), 0),  # all rows share one passage
    ],
)
def test_the_share_of_the_queries_is_held_out_if_it_makes_a_task(records, num, held_out):
    of = held_out(records)
    assert len(of.queries) == num
    if num:
        data = of.task["data"]["default"]
        assert len(data["queries"]) == num and f"{num:,} queries" in of.note
        passages = {record["passage"] for record in records}
        assert len(data["corpus"]) + len(data["distractors"]) == min(len(passages), MOST_PASSAGES)
    else:
        assert of.task is None and of.note.startswith("nothing: ") and f"{LEAST} are the least" in of.note


@pytest.mark.parametrize("task", ["clustering", "classification"])
@pytest.mark.parametrize(("num", "num_labels", "expected"), [(200, 2, 24), (400, 2, 48), (40, 2, 0), (20_000, 2, MOST)])
def test_every_label_gives_the_same_share(num, num_labels, expected, task, held_out):
    of = held_out(labelled(num, num_labels), task=task)
    assert len(of.queries) == expected
    if not expected:
        assert of.note.startswith("nothing: ")
    elif task == "clustering":
        labels = of.task["data"]["default"]["labels"]
        assert [labels.count(label) for label in sorted(set(labels))] == [expected // num_labels] * num_labels
    else:
        halves = of.task["data"]["default"]
        assert {tuple(sorted(set(half["label"]))) for half in halves.values()} == {(0, 1)}
        assert sum(len(half["text"]) for half in halves.values()) == expected


def test_many_small_labels_give_two_texts_each_as_long_as_there_is_room(held_out):
    of = held_out(labelled(400, 50), task="clustering")
    labels = of.task["data"]["default"]["labels"]
    assert len(labels) == 48 and {labels.count(label) for label in labels} == {2}


def test_nothing_is_held_out_of_other_data(config, part_of):
    assert config.data.source == "embedded"
    assert hold_out([part_of("retrieval")], lambda part: pairs(300), config.data) == {}


# Which ------------------------------------------------------------------------------------------


def test_the_choice_depends_on_the_split_and_not_on_the_order_of_rows(held_out, local):
    records = pairs(300)
    shuffled = random.Random(0).sample(records, len(records))
    assert held_out(records) == held_out(shuffled)
    assert held_out(records).queries != held_out(records, replace(local, split="other")).queries


def test_the_relevant_passages_are_all_those_of_the_query_in_any_spelling(held_out):
    records = pairs(300) + [{"query": f"QUESTION {n}", "passage": f"another {n}"} for n in range(300)]
    data = held_out(records).task["data"]["default"]
    known = {}
    for record in records:
        known.setdefault(normalise(record["query"]), set()).add(record["passage"])
    for query, rows in zip(data["queries"], data["relevant"]):
        assert {data["corpus"][row] for row in rows} == known[normalise(query)]


def test_rows_that_cannot_be_used_are_not_held_out(held_out):
    broken = [{"query": "", "passage": "a"}, {"query": "?!", "passage": "b"}, {"query": "same", "passage": "Same!"}]
    broken += [{"query": "\ud800", "passage": "c"}]
    assert held_out(pairs(300) + broken * 100) == held_out(pairs(300))


def test_a_text_of_several_labels_is_not_held_out(held_out):
    records = labelled(300, 3)
    records += [record | {"label": "label 1"} for record in records if record["label"] == "label 0"]
    of = held_out(records, task="clustering")
    assert set(of.task["data"]["default"]["labels"]) == {"label 1", "label 2"}


# Training and evaluation ------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["retrieval", "clustering", "classification"])
@pytest.mark.parametrize("workers", [1, 2])
def test_no_text_of_a_held_out_row_is_trained_on_and_all_rows_are_counted(task, workers, local, part_of, tmp_path):
    parts = [part_of(task), part_of(task, "twin")]
    of = hold_out(parts, RECORDS[task], local)
    manifest = assemble(parts, RECORDS[task], [], local, 0, tmp_path / "out", workers=workers, held_out=of)
    store = TupleStore(tmp_path / "out", mined=None)
    tasks = {task["name"]: task for task in load_tasks(tmp_path / "out" / "evaluation")}
    assert set(tasks) == {"mine-held-out", "twin-held-out"}
    for name, entry in manifest.items():
        num = entry["dropped"][HELD_OUT]
        assert num >= len(of[name].queries) >= LEAST
        assert entry["drawn"] == entry["kept"] + sum(entry["dropped"].values())
        assert entry["held_out"] == of[name].note
        data = tasks[f"{name}-held-out"]["data"]["default"]
        held = {normalise(text) for key in ("queries", "corpus", "sentences") for text in data.get(key, [])}
        held |= {normalise(text) for half in ("train", "test") for text in data.get(half, {}).get("text", [])}
        trained = {normalise(text) for text in store.tables[name]["query"].to_pylist()}
        trained |= {normalise(store.documents[name][row]) for row in store.tables[name]["passage"].to_pylist()}
        assert len(held) >= LEAST and trained and not held & trained


def _rows_of_retrieval(part) -> list[dict]:
    """Pairs of which many share a query, a passage, or a text that is a query here and a passage there."""
    draw = random.Random(part.name)
    texts = [f"{part.name} {n}" for n in range(600)]
    return [dict(zip(("query", "passage"), draw.sample(texts, 2))) for _ in range(250)]


def _rows_of_labels(part) -> list[dict]:
    return [record | {"query": f"{part.name} {record['query']}"} for record in labelled(300, 2)]


RECORDS = {"retrieval": _rows_of_retrieval, "clustering": _rows_of_labels, "classification": _rows_of_labels}


@pytest.mark.parametrize("task", ["retrieval", "clustering", "classification"])
def test_mteb_scores_the_task(task, local, part_of, tmp_path):
    of = hold_out([part_of(task)], RECORDS[task], local)
    assemble([part_of(task)], RECORDS[task], [], local, 0, tmp_path / "out", held_out=of)

    def by_label(texts, _):
        """One of two vectors by the label, which the number of the text tells; random for pairs."""
        if task == "retrieval":
            return np.random.default_rng(0).normal(size=(len(texts), 16))
        return np.array([[1.0, 0.0] if int(text.split()[-1]) % 2 else [0.0, 1.0] for text in texts])

    (score,) = evaluate(by_label, "known", tmp_path / "out" / "evaluation")["score"]
    assert score == 1 if task != "retrieval" else 0 <= score < 0.9
