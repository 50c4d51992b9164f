"""Assembled tuples: stored once, reproducible to the byte, and free of every evaluation text."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import pyarrow as pa
import pytest
from conftest import ROOT, SMALL_SOURCES, assemble_some, write_small_store

from f2llm.sources import Source, evaluation_tasks, load_source
from f2llm.text import normalise
from f2llm.tuples import TupleStore, assemble, load_tasks, read_arrow, texts_of, write_arrow


@pytest.fixture(scope="module")
def store(assembled):
    return TupleStore(assembled, mined=None)


# What is stored ---------------------------------------------------------------------------------


def test_documents_are_unique_and_referred_to_by_row(store):
    documents = store.documents.to_pylist()
    assert len(set(documents)) == len(documents) > 10_000
    met = set()
    for table in store.tables.values():
        met.update(table["passage"].to_pylist())
        met.update(row for rows in table["negatives"].to_pylist() for row in rows)
    assert met == set(range(len(documents)))


def test_no_evaluation_text_is_a_query_or_a_document(assembled, store):
    evaluation = load_tasks(assembled / "evaluation")
    evaluated = {normalise(text) for text in texts_of(evaluation)}
    assert all(normalise(text) in evaluated for text in evaluation[0]["data"]["deu-eng"]["sentence1"])
    trained = {normalise(text) for text in store.documents.to_pylist()}
    for table in store.tables.values():
        trained |= {normalise(text) for text in table["query"].to_pylist()}
    assert len(evaluated) > 5000 and len(trained) > 50_000
    assert trained & evaluated == set()


def test_every_drawn_row_is_kept_or_counted_as_dropped(store, registry):
    assert set(store.sources) == {source.name for source in registry}
    for name, entry in store.sources.items():
        assert entry["drawn"] == entry["kept"] + sum(entry["dropped"].values())
        assert entry["kept"] == len(store.tables[name])
    assert sum(sum(entry["dropped"].values()) for entry in store.sources.values()) > 0, "vacuous: nothing was dropped"


def test_queries_differ_from_their_passages_and_pairs_are_not_repeated(store):
    documents = store.documents.to_pylist()
    for name, table in store.tables.items():
        pairs = [(row["query"], documents[row["passage"]]) for row in table.to_pylist()]
        assert all(normalise(query) != normalise(passage) for query, passage in pairs)
        if store.sources[name]["task"] == "retrieval":
            assert len(set(pairs)) == len(pairs)


def test_negatives_of_labelled_sources_are_of_other_labels(store, config):
    documents = store.documents.to_pylist()
    for name, entry in store.sources.items():
        rows = store.tables[name].to_pylist()
        if entry["task"] == "retrieval":
            assert not any(row["negatives"] for row in rows), "mining comes later"
        elif entry["task"] == "clustering":
            groups = {}
            for row in rows:
                groups.setdefault(row["query"], set()).add(row["group"])
            assert all(len(row["negatives"]) == config.data.negatives for row in rows)
            assert all(row["group"] in groups[documents[row["passage"]]] for row in rows)
            assert all({row["group"]} != groups[documents[other]] for row in rows for other in row["negatives"])
        else:
            labels = {row["passage"] for row in rows}
            assert len(labels) == 2
            assert all({row["passage"], *row["negatives"]} == labels for row in rows)


def test_the_manifest_holds_the_hash_of_every_file(assembled):
    hashes = json.loads((assembled / "manifest.json").read_text())["sha256"]
    files = {path for path in assembled.rglob("*") if path.is_file() and path.name != "manifest.json"}
    assert {assembled / name for name in hashes} == files and len(files) > 10
    for name, digest in hashes.items():
        assert hashlib.sha256((assembled / name).read_bytes()).hexdigest() == digest


# Reproducibility --------------------------------------------------------------------------------

ASSEMBLE_WITHOUT_PACKAGES = """
import sys
from pathlib import Path

from f2llm.config import read_yaml, resolve
from f2llm.embedded import texts
from f2llm.sources import evaluation_tasks, load_registry, load_source
from f2llm.tuples import assemble

texts.PACKAGES = ()  # reading them takes long, and nothing that is compared needs them
root, out, *names = sys.argv[1:]
config = resolve(read_yaml(Path(root) / "params.yaml"), "nano")
data, seed = config.data, config.seed
sources = [source for source in load_registry(Path(root) / "data" / "sources.yaml") if source.name in names]
evaluation = [task for task in evaluation_tasks(data, seed) if task["name"] in names]
assemble(sources, lambda source: load_source(source, data, seed), evaluation, data.negatives, seed, Path(out))
"""


def test_another_process_with_another_hash_seed_writes_the_same_bytes(texts, registry, config, tmp_path):
    names = ["cldr_places", "name_kind", "CldrNamesBitext", "DjangoMessageReranking", "TenseClassification"]
    hash_seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    command = [sys.executable, "-c", ASSEMBLE_WITHOUT_PACKAGES, ROOT, tmp_path / "theirs", *names]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": hash_seed})
    data, seed = config.data, config.seed
    sources = [source for source in registry if source.name in names]
    evaluation = [task for task in evaluation_tasks(data, seed) if task["name"] in names]
    out = tmp_path / "ours"
    assemble(sources, lambda source: load_source(source, data, seed), evaluation, data.negatives, seed, out)
    ours, theirs = (json.loads((tmp_path / side / "manifest.json").read_text()) for side in ("ours", "theirs"))
    assert ours == theirs
    assert len(ours["sha256"]) == len(names) + 1, "a file for each name, and the documents"
    assert len(read_arrow(out / "documents.arrow")) > 5000, "vacuous: hardly a document"


def test_a_source_draws_the_same_rows_whatever_else_is_there(store, texts, registry, config, tmp_path):
    name = "summary_body"
    assemble_some([source for source in registry if source.name == name], config, tmp_path / "alone")
    alone = TupleStore(tmp_path / "alone", mined=None)
    assert list(alone.tables) == [name]
    pairs = [
        [(row["query"], each.documents[row["passage"]].as_py()) for row in each.tables[name].slice(0, 500).to_pylist()]
        for each in (alone, store)
    ]
    assert len(pairs[0]) == 500
    assert pairs[0] == pairs[1]


# What is dropped --------------------------------------------------------------------------------


@pytest.fixture
def source(registry):
    """A source of any task, under the name 's'."""

    def of(task) -> Source:
        return replace(next(source for source in registry if source.task == task), name="s")

    return of


def assembled_rows(source, records, out, evaluation=()):
    """(manifest entry, rows with their texts) of one source with the given records."""
    languages = {"language": "en"} | ({"to": "fr", "group": "g"} if source.task == "retrieval" else {})
    manifest = assemble([source], lambda _: [languages | record for record in records], list(evaluation), 3, 0, out)
    store = TupleStore(out, mined=None)
    documents = store.documents.to_pylist()
    rows = [
        (row["query"], documents[row["passage"]], [documents[negative] for negative in row["negatives"]])
        for row in store.tables["s"].to_pylist()
    ]
    return manifest["s"], rows


def test_leaks_equal_pairs_repeats_and_punctuation_are_dropped_and_counted(source, tmp_path):
    pairs = [("a cat", "un chat"), ("a cat", "un chat"), ("Web!", "web"), ("...", "points"), ("a dog", "un chien")]
    pairs += [("SECRET!", "un"), ("deux", "secret"), ("trois", "hidden label")]
    records = [{"query": query, "passage": passage} for query, passage in pairs]
    data = {"default": {"text": ["Secret"], "labels": ["hidden label"]}}
    task = {"name": "t", "type": "STS", "instruction": "deux", "languages": {}, "data": data}
    entry, rows = assembled_rows(source("retrieval"), records, tmp_path / "out", [task])
    assert rows == [("a cat", "un chat", []), ("a dog", "un chien", []), ("trois", "hidden label", [])]
    assert entry["dropped"] == {
        "in an evaluation task": 2,
        "nothing but punctuation": 1,
        "query equals passage": 1,
        "seen before": 1,
    }
    assert (entry["drawn"], entry["kept"], entry["languages"]) == (8, 3, ["en", "fr"])


def test_a_clustering_row_gets_another_text_of_its_label_and_negatives_of_other_labels(source, tmp_path):
    records = [{"query": f"{label} {number}", "label": label} for label in "abc" for number in range(4)]
    entry, rows = assembled_rows(source("clustering"), [*records, {"query": "lonely", "label": "d"}], tmp_path / "out")
    assert entry["dropped"] == {"only text of its label": 1}
    assert len(rows) == 12
    for query, passage, negatives in rows:
        assert passage[0] == query[0] and passage != query
        assert len(negatives) == 3 and all(text[0] != query[0] for text in negatives)


def test_a_classification_row_has_its_label_as_passage_and_the_other_as_negative(source, tmp_path):
    records = [{"query": f"text {number}", "label": ("past", "future")[number % 2]} for number in range(6)]
    _, rows = assembled_rows(source("classification"), records, tmp_path / "out")
    assert rows[:2] == [("text 0", "past", ["future"]), ("text 1", "future", ["past"])]


@pytest.mark.parametrize(
    ("task", "labels", "rule"),
    [("clustering", "aaaa", "two labels or more"), ("classification", "abca", "needs two labels, found")],
)
def test_labels_that_make_no_tuples_are_an_error(source, tmp_path, task, labels, rule):
    records = [{"query": f"text {number}", "label": label} for number, label in enumerate(labels)]
    with pytest.raises(ValueError, match=f"source 's': .*{rule}"):
        assembled_rows(source(task), records, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


# Reading ----------------------------------------------------------------------------------------


def test_a_folder_without_tuples_is_named_with_a_remedy(tmp_path):
    with pytest.raises(ValueError, match="holds no assembled tuples; remedy: dvc repro data"):
        TupleStore(tmp_path)
    with pytest.raises(ValueError, match="holds no evaluation tasks; remedy: dvc repro data"):
        load_tasks(tmp_path)


def test_mined_negatives_must_be_there_and_of_the_same_length(tmp_path):
    write_small_store(tmp_path / "assembled")
    mined = tmp_path / "mined"
    mined.mkdir()
    with pytest.raises(ValueError, match=r"pairs\.arrow is missing, the mined negatives of 'pairs'; remedy"):
        TupleStore(tmp_path / "assembled", mined)
    column = pa.array([[1, 2]] * SMALL_SOURCES["pairs"][0], type=pa.list_(pa.int32()))
    write_arrow(pa.table({"negatives": column}), mined / "pairs.arrow")
    write_arrow(pa.table({"negatives": column}), mined / "code.arrow")
    with pytest.raises(ValueError, match="has 60 rows, but 'code' has 26; remedy: dvc repro mine"):
        TupleStore(tmp_path / "assembled", mined)
    write_arrow(pa.table({"negatives": column[:26]}), mined / "code.arrow")
    store = TupleStore(tmp_path / "assembled", mined)
    assert store.tables["pairs"]["negatives"].to_pylist() == [[1, 2]] * 60
    assert store.tables["kinds"]["negatives"][0].as_py() != [1, 2], "labelled sources keep their own"


def test_an_arrow_file_reads_back_without_being_loaded(tmp_path):
    table = pa.table({"text": ["a", "б", "字"] * 1000})
    write_arrow(table, tmp_path / "t.arrow")
    before = pa.total_allocated_bytes()
    assert read_arrow(tmp_path / "t.arrow").equals(table)
    assert pa.total_allocated_bytes() == before
