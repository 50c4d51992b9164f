"""Assembly: texts stored once, reproducible to the byte, free of evaluation texts; whatever is dropped is counted."""

import hashlib
import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, assemble_some

from f2llm.batches import HomogeneousBatches
from f2llm.data.assemble import SHOWN, assemble, texts_of
from f2llm.data.fetch import adopt
from f2llm.data.sources import Part, evaluation_tasks, load_source, parts_of
from f2llm.store.progress import Progress
from f2llm.store.tuples import TupleStore, load_tasks
from f2llm.text import normalise


@pytest.fixture(scope="module")
def store(assembled):
    return TupleStore(assembled, mined=None)


def texts_in(store, name):
    """(queries, documents) of a part."""
    return store.tables[name]["query"].to_pylist(), list(store.documents[name])


# What is stored ---------------------------------------------------------------------------------


def test_documents_are_unique_within_a_part_and_all_referred_to(store):
    total = 0
    for name, table in store.tables.items():
        documents = list(store.documents[name])
        met = {*table["passage"].to_pylist(), *(row for rows in table["negatives"].to_pylist() for row in rows)}
        assert len(set(documents)) == len(documents) == store.sources[name]["documents"]
        assert met == set(range(len(documents)))
        total += len(documents)
    assert total > 10_000, "vacuous: hardly a document"


def test_no_evaluation_text_is_a_query_or_a_document(assembled, store):
    evaluation = load_tasks(assembled / "evaluation")
    evaluated = {normalise(text) for text in texts_of(evaluation)}
    assert all(normalise(text) in evaluated for text in evaluation[0]["data"]["deu-eng"]["sentence1"])
    trained = {normalise(text) for name in store.sources for side in texts_in(store, name) for text in side}
    assert len(evaluated) > 5000 and len(trained) > 50_000
    assert trained & evaluated == set()


def test_every_drawn_row_is_kept_or_counted_as_dropped(store, registry):
    assert set(store.sources) == {source.name for source in registry if "embedded" in source.recipes}
    for name, entry in store.sources.items():
        assert entry["drawn"] == entry["kept"] + sum(entry["dropped"].values())
        assert entry["kept"] == len(store.tables[name]) == sum(entry["rows_by_negatives"].values())
        assert entry["dropped_samples"].keys() == entry["dropped"].keys()
    assert sum(sum(entry["dropped"].values()) for entry in store.sources.values()) > 0, "vacuous: nothing was dropped"


def test_queries_differ_from_their_passages_and_pairs_are_not_repeated(store):
    for name, table in store.tables.items():
        documents = list(store.documents[name])
        pairs = [(row["query"], documents[row["passage"]]) for row in table.to_pylist()]
        assert all(normalise(query) != normalise(passage) for query, passage in pairs)
        if store.sources[name]["task"] == "retrieval":
            assert len(set(pairs)) == len(pairs)


def test_negatives_of_labelled_sources_are_of_other_labels(store, config):
    for name, entry in store.sources.items():
        documents, rows = list(store.documents[name]), store.tables[name].to_pylist()
        if entry["task"] == "retrieval":
            assert entry["negatives"] == "mine"
            assert not any(row["negatives"] for row in rows), "mining comes later"
        elif entry["task"] == "clustering":
            groups = {}
            for row in rows:
                groups.setdefault(row["query"], set()).add(row["group"])
            assert all(len(row["negatives"]) == config.data.negatives for row in rows)
            assert all(row["group"] in groups[documents[row["passage"]]] for row in rows)
            shared = [groups[row["query"]] & groups[documents[other]] for row in rows for other in row["negatives"]]
            assert shared and not any(shared)
        else:
            assert entry["negatives"] == "labels"
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
from functools import partial
from pathlib import Path

from f2llm.data.assemble import assemble
from f2llm.config import read_yaml, resolve
from f2llm.embedded import texts
from f2llm.data.registry import load_registry
from f2llm.data.sources import evaluation_tasks, load_source, parts_of

texts.PACKAGES = ()  # reading them takes long, and nothing that is compared needs them
root, out, *names = sys.argv[1:]
config = resolve(read_yaml(Path(root) / "params.yaml"), "nano")
data, seed = config.data, config.seed
sources = [source for source in load_registry(Path(root) / "data" / "sources.yaml") if source.name in names]
evaluation = [task for task in evaluation_tasks(data, seed) if task["name"] in names]
assemble(parts_of(sources, data), partial(load_source, data=data, seed=seed), evaluation, data, seed, Path(out))
"""


def test_another_process_with_another_hash_seed_writes_the_same_bytes(texts, registry, config, tmp_path):
    names = ["cldr_places", "name_kind", "CldrNamesBitext", "DjangoMessageReranking", "TenseClassification"]
    hash_seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    command = [sys.executable, "-c", ASSEMBLE_WITHOUT_PACKAGES, ROOT, tmp_path / "theirs", *names]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": hash_seed})
    data, seed = config.data, config.seed
    sources = [source for source in registry if source.name in names]
    evaluation = [task for task in evaluation_tasks(data, seed) if task["name"] in names]
    records = partial(load_source, data=data, seed=seed)
    assemble(parts_of(sources, data), records, evaluation, data, seed, tmp_path / "ours")
    ours, theirs = (json.loads((tmp_path / side / "manifest.json").read_text()) for side in ("ours", "theirs"))
    assert ours == theirs
    assert len(ours["sha256"]) == 2 * 2 + 3, "tuples and documents of two sources, three tasks"
    assert sum(entry["kept"] for entry in ours["sources"].values()) > 5000, "vacuous: hardly a row"


def numbered(part):
    """Records of a part that need no corpus; for worker processes."""
    for number in range(300):
        passage = f"{part.name} passage {number // 2}"
        yield {
            "query": f"{part.name} query {number}",
            "passage": passage,
            "negatives": [f"other {number % 7}", passage],
        }


def test_any_number_of_workers_writes_the_same_bytes(source, config, tmp_path):
    parts = [as_part(replace(source("retrieval"), name=name)) for name in "abc"]
    for workers in (1, 2):
        assemble(parts, numbered, [], config.data, 0, tmp_path / str(workers), workers=workers)
    one, two = ((tmp_path / name / "manifest.json").read_text() for name in "12")
    assert one == two and len(json.loads(one)["sha256"]) == 6


def test_a_source_draws_the_same_rows_whatever_else_is_there(assembled, texts, registry, config, tmp_path):
    name = "summary_body"
    assemble_some([source for source in registry if source.name == name], config, tmp_path / "alone")
    for kind in ("tuples", "documents"):
        alone, among = (folder / kind / f"{name}.arrow" for folder in (tmp_path / "alone", assembled))
        assert alone.read_bytes() == among.read_bytes() and alone.stat().st_size > 10_000


# What is dropped --------------------------------------------------------------------------------


@pytest.fixture
def source(registry):
    """A source of any task, under the name 's'."""

    def of(task):
        return replace(next(source for source in registry if source.task == task), name="s")

    return of


def as_part(source, ready_made=True):
    return Part(source.name, source, (), None, {}, ready_made)


def assembled_rows(source, records, out, data, evaluation=()):
    """(manifest entry, rows with their texts) of one source with the given records."""
    ready_made = "passage" in records[0]
    manifest = assemble([as_part(source, ready_made)], lambda _: iter(records), list(evaluation), data, 0, out)
    store = TupleStore(out, mined=None)
    documents = store.documents["s"]
    rows = [
        (row["query"], documents[row["passage"]], [documents[negative] for negative in row["negatives"]])
        for row in store.tables["s"].to_pylist()
    ]
    return manifest["s"], rows


@pytest.fixture
def data(config):
    return replace(config.data, negatives=3, deduplicate="exact", decontaminate="exact")


SECRET = {"name": "t", "type": "STS", "instruction": "deux", "languages": {}}
SECRET |= {"data": {"default": {"text": ["Secret"], "labels": ["hidden label"]}}}


def test_leaks_equal_pairs_repeats_and_empty_texts_are_dropped_and_counted(source, data, tmp_path):
    pairs = [("a cat", "un chat"), ("a cat", "un chat"), ("Web!", "web"), ("...", "points"), ("a dog", "un chien")]
    pairs += [("SECRET!", "un"), ("deux", "secret"), ("trois", "hidden label"), (" ", "x"), ("x", ""), ("\ud800", "y")]
    records = [{"query": query, "passage": passage, "language": "en", "to": "fr"} for query, passage in pairs]
    entry, rows = assembled_rows(source("retrieval"), records, tmp_path / "out", data, [SECRET])
    assert rows == [("a cat", "un chat", []), ("a dog", "un chien", []), ("trois", "hidden label", [])]
    assert entry["dropped"] == {
        "empty passage": 1,
        "empty query": 1,
        "in an evaluation task": 2,
        "nothing but punctuation": 1,
        "query equals passage": 1,
        "query is not valid Unicode": 1,
        "seen before": 1,
    }
    assert (entry["drawn"], entry["kept"], entry["languages"]) == (11, 3, {"en": 3, "fr": 3})
    assert entry["dropped_samples"]["seen before"] == [{"query": "a cat", "passage": "un chat"}]
    assert all(len(samples) <= SHOWN for samples in entry["dropped_samples"].values())


@pytest.mark.parametrize(
    ("deduplicate", "decontaminate", "kept"), [("none", "none", 4), ("exact", "none", 3), ("normalised", "exact", 1)]
)
def test_cleaning_is_switched_by_the_parameters(source, data, tmp_path, deduplicate, decontaminate, kept):
    pairs = [("a cat", "un chat"), ("a cat", "un chat"), ("A CAT", "un chat"), ("secret", "un")]
    records = [{"query": query, "passage": passage} for query, passage in pairs]
    rules = replace(data, deduplicate=deduplicate, decontaminate=decontaminate)
    entry, rows = assembled_rows(source("retrieval"), records, tmp_path / "out", rules, [SECRET])
    assert (len(rows), entry["drawn"]) == (kept, 4)


def test_a_row_that_shares_thirteen_words_with_an_evaluation_text_goes_when_asked(source, data, tmp_path):
    words = " ".join(f"word{number}" for number in range(15))
    task = SECRET | {"data": {"default": {"text": [words]}}}
    records = [{"query": f"and {words[:-7]} so", "passage": "p"}, {"query": "q", "passage": "r"}]
    for rule, reasons in (("exact", {}), ("ngram", {"13 words in common with an evaluation task": 1})):
        rules = replace(data, decontaminate=rule)
        entry, _ = assembled_rows(source("retrieval"), records, tmp_path / rule, rules, [task])
        assert entry["dropped"] == reasons


def test_given_negatives_are_kept_without_empty_ones_and_those_that_are_the_positive(source, data, tmp_path):
    records = [
        {"query": "a", "passage": "right", "negatives": ["b", "RIGHT!", "", "c"]},
        {"query": "d", "passage": "right", "negatives": ["c", "e", "b", "f"]},
    ]
    entry, rows = assembled_rows(source("retrieval"), records, tmp_path / "out", replace(data, source="released"))
    assert rows == [("a", "right", ["b", "c"]), ("d", "right", ["c", "e", "b", "f"])]
    assert (entry["negatives"], entry["negatives_removed"], entry["documents"]) == ("given", 2, 5)
    assert entry["rows_by_negatives"] == {"2": 1, "4": 1}


def test_a_given_negative_that_answers_the_query_in_any_row_is_removed(source, data, tmp_path):
    passages = ["first", "second", "third", "fourth"]
    records = [
        {"query": query, "passage": passage, "negatives": ["Third!", "fourth", "none of them"]}
        for query, passage in zip(["a", "A?", "a", "b"], passages)
    ]
    entry, rows = assembled_rows(source("retrieval"), records, tmp_path / "out", replace(data, source="local"))
    answers = {query: {passage for other, passage, _ in rows if other in (query, query.swapcase())} for query in "ab"}
    assert answers["a"] == {"first", "third"}, "vacuous: one answer per query"
    for query, _, negatives in rows:
        expected = ["Third!", "none of them"] if query == "b" else ["fourth", "none of them"]
        assert negatives == expected
    assert entry["negatives_removed"] == 4


def test_a_pair_of_a_symmetric_source_counts_in_both_directions(source, data, tmp_path):
    for symmetric, negatives in ((True, ["d"]), (False, ["A!", "d"])):
        records = [{"query": "a", "passage": "b"}, {"query": "B", "passage": "c", "negatives": ["A!", "d"]}]
        of = replace(source("retrieval"), symmetric=symmetric)
        _, rows = assembled_rows(of, records, tmp_path / str(symmetric), replace(data, source="local"))
        assert rows[1] == ("B", "c", negatives)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_positive_in_another_part_of_the_source_is_no_negative(source, data, tmp_path, workers):
    parts = [Part(name, source("retrieval"), (), None, {}, ready_made=True) for name in ("one", "two")]
    parts.append(Part("three", replace(source("retrieval"), name="other"), (), None, {}, ready_made=True))
    rules = replace(data, source="released")
    manifest = assemble(parts, records_by_name, [], rules, 0, tmp_path / "out", workers=workers)
    store, negatives = TupleStore(tmp_path / "out", mined=None), {}
    for name in store.sources:
        (row,) = store.tables[name].to_pylist()
        negatives[name] = [store.documents[name][negative] for negative in row["negatives"]]
    assert negatives == {"one": ["x"], "two": ["y"], "three": ["to two!", "z"]}
    assert [manifest[name]["negatives_removed"] for name in ("one", "two", "three")] == [1, 1, 0]


@pytest.mark.parametrize("workers", [1, 2])
def test_every_reading_of_a_row_is_counted_in_whichever_process(source, data, tmp_path, monkeypatch, workers):
    """Once for its tuples, once for positives of its part, once for those of the other parts of its source."""
    made = []
    monkeypatch.setattr(
        "f2llm.data.assemble.Progress", lambda *of, **keys: made.append(Progress(*of, **keys)) or made[-1]
    )
    one = replace(source("retrieval"), rows=1)
    parts = [Part(name, one, (), None, {}, ready_made=True) for name in ("one", "two")]
    parts.append(Part("three", replace(one, name="other"), (), None, {}, ready_made=True))
    assemble(parts, records_by_name, [], replace(data, source="sources"), 0, tmp_path / "out", workers=workers)
    assert [(progress.done, progress.total) for progress in made] == [(3 + 3 + 2, 3 + 3 + 2)]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_error_and_the_tuples_of_before_stay(source, data, tmp_path, workers):
    parts = [Part(name, source("retrieval"), (), None, {}, ready_made=True) for name in ("one", "two")]
    assemble(parts, records_by_name, [], data, 0, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limit[1]))  # as a full disk, but with "File too large" for a reason
    try:
        with pytest.raises(
            RuntimeError, match=r"cannot write .*/out: File too large; .* kept. remedy: free disk space"
        ):
            assemble(parts, records_by_name, [], data, 0, tmp_path / "out", workers=workers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before and len(before) == 5


def records_by_name(part) -> list[dict]:
    """One row; in the first two parts the query is the same, and each has the other's passage as a negative."""
    query, passage, negatives = {
        "one": ("Q", "to one", ["to two!", "x"]),
        "two": ("q", "to two", ["to one", "y"]),
        "three": ("q", "to three", ["to two!", "z"]),
    }[part.name]
    return [{"query": query, "passage": passage, "negatives": negatives}]


@pytest.mark.parametrize("task", ["clustering", "classification"])
def test_a_negative_shares_no_label_with_its_query(source, data, tmp_path, task):
    labels = "abcd" if task == "clustering" else "ab"
    records = [{"query": f"{label} {number}", "label": label} for label in labels for number in range(5)]
    records += [{"query": f"both {number}", "label": label} for number in range(5) for label in "ab"]
    entry, rows = assembled_rows(source(task), records, tmp_path / "out", data)
    if task == "classification":
        assert entry["dropped"] == {"text of all labels": 10} and not any("both" in query for query, *_ in rows)
        return
    labels_of = {text: {"a", "b"} if text.startswith("both") else {text[0]} for text, *_ in rows}
    assert all(labels_of[query].isdisjoint(labels_of[text]) for query, _, negatives in rows for text in negatives)
    assert {len(negatives) for *_, negatives in rows} == {data.negatives}
    assert entry["negatives_removed"] > 0, "vacuous: no drawn text had the label"


def test_a_label_whose_texts_all_have_the_query_s_label_gives_no_negative(source, data, tmp_path):
    records = [{"query": text, "label": label} for text in "uvw" for label in "ab"]
    records += [{"query": text, "label": "a"} for text in "xy"] + [{"query": text, "label": "c"} for text in "st"]
    _, rows = assembled_rows(source("clustering"), records, tmp_path / "out", data)
    of_x = {text for query, _, negatives in rows if query == "x" for text in negatives}
    assert of_x == {"s", "t"}


@pytest.mark.parametrize(("rule", "kept"), [("none", 3), ("exact", 2), ("normalised", 1)])
def test_a_repeated_row_leaves_its_negatives_to_the_first(source, data, tmp_path, rule, kept):
    records = [
        {"query": "a", "passage": "p", "negatives": ["x", "y"]},
        {"query": "a", "passage": "p", "negatives": ["y", "z"]},
        {"query": "A", "passage": "p", "negatives": ["w"]},
    ]
    rules = replace(data, source="local", deduplicate=rule)
    entry, rows = assembled_rows(source("retrieval"), records, tmp_path / "out", rules)
    assert len(rows) == kept and sum(entry["dropped"].values()) == 3 - kept
    expected = {"none": "xy", "exact": "xyz", "normalised": "xyzw"}[rule]
    assert rows[0] == ("a", "p", list(expected))
    assert {text for *_, negatives in rows for text in negatives} == set("xyzw"), "a negative was lost"


@pytest.mark.parametrize(
    ("origin", "counts", "expected"),
    [
        ("local", [2, 2], "given"),
        ("local", [0, 0], "mine"),
        ("sources", [2, 1], "mine"),
        ("sources", [2, 0], "mine"),
        ("released", [2, 1], "given"),
    ],
)
def test_rows_that_came_with_too_few_negatives_are_to_be_mined(source, data, tmp_path, origin, counts, expected):
    records = [
        {"query": f"q{row}", "passage": f"p{row}", "negatives": [f"n{row}.{k}" for k in range(count)]}
        for row, count in enumerate(counts)
    ]
    entry, _ = assembled_rows(source("retrieval"), records, tmp_path / "out", replace(data, source=origin))
    assert entry["negatives"] == expected


def test_rows_of_one_query_are_one_group(source, data, tmp_path):
    records = [{"query": query, "passage": passage} for query, passage in ("ax", "by", "az", "cx")]
    assembled_rows(source("retrieval"), records, tmp_path / "out", data)
    groups = TupleStore(tmp_path / "out", mined=None).tables["s"]["group"].to_pylist()
    assert groups[0] == groups[2] and len(set(groups)) == 3


def test_a_clustering_row_gets_another_text_of_its_label_and_negatives_of_other_labels(source, data, tmp_path):
    records = [{"query": f"{label} {number}", "label": label} for label in "abc" for number in range(4)]
    records += [{"query": "lonely", "label": "d"}]
    entry, rows = assembled_rows(source("clustering"), records, tmp_path / "out", data)
    assert entry["dropped"] == {"only text of its label": 1}
    assert len(rows) == 12
    for query, passage, negatives in rows:
        assert passage[0] == query[0] and passage != query
        assert len(negatives) == 3 and all(text[0] != query[0] for text in negatives)


def test_a_classification_row_has_its_label_as_passage_and_the_other_as_negative(source, data, tmp_path):
    records = [{"query": f"text {number}", "label": ("past", "future")[number % 2]} for number in range(6)]
    _, rows = assembled_rows(source("classification"), records, tmp_path / "out", data)
    assert rows[:2] == [("text 0", "past", ["future"]), ("text 1", "future", ["past"])]


@pytest.mark.parametrize(
    ("task", "labels", "rule"),
    [
        ("clustering", "aaaa", "two labels or more"),
        ("classification", "abca", "needs two labels, found 3.*remedy: task: clustering"),
    ],
)
def test_labels_that_make_no_tuples_are_an_error(source, data, tmp_path, task, labels, rule):
    records = [{"query": f"text {number}", "label": label} for number, label in enumerate(labels)]
    with pytest.raises(ValueError, match=f"source 's': .*{rule}"):
        assembled_rows(source(task), records, tmp_path / "out", data)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_a_source_of_which_nothing_is_left_is_an_error_that_says_why(source, data, tmp_path):
    with pytest.raises(
        ValueError, match=r"source 's': no row of s is left of 1 that were drawn \(\{'empty passage': 1"
    ):
        assembled_rows(source("retrieval"), [{"query": "a", "passage": ""}], tmp_path / "out", data)


# The whole way ----------------------------------------------------------------------------------


def test_released_files_go_all_the_way_into_batches(registry, config, tiny_training, tmp_path):
    """Files in the authors' layout -> mirror -> parts -> store -> batches of both stages."""
    by_name = {source.name: source for source in registry}
    chosen = [by_name[name] for name in ("ocgi", "squad", "banking77", "imdb")]
    files = {"ocgi": (30, 24), "ocgi_part2": (9, 24), "squad": (40, 24), "banking77": (25, 24), "imdb": (12, 1)}
    (tmp_path / "theirs").mkdir()
    for stem, (rows, negatives) in files.items():
        columns = {key: [f"{stem} {key} {row}" for row in range(rows)] for key in ("query", "passage")}
        columns |= {
            f"negative_{k}": [f"{stem} other {row}.{k}" for row in range(rows)] for k in range(1, negatives + 1)
        }
        pq.write_table(pa.table(columns), tmp_path / "theirs" / f"{stem}.parquet", row_group_size=rows)
    adopt(tmp_path / "mirror", config.data.released, tmp_path / "theirs", config.data.revision)
    data = replace(config.data, source="released", mirror=str(tmp_path / "mirror"), cap_per_source=20)
    records = partial(load_source, data=data, seed=0)
    manifest = assemble(parts_of(chosen, data), records, [SECRET], data, 0, tmp_path / "out", workers=2)
    kept = {name: entry["kept"] for name, entry in manifest.items()}
    assert kept == {"ocgi": 30, "ocgi_part2": 9, "squad": 20, "banking77": 20, "imdb": 12}
    assert all(entry["revision"] == config.data.revision and entry["inputs"] for entry in manifest.values())
    store = TupleStore(tmp_path / "out", mined=tmp_path / "nothing was mined")
    stage1 = HomogeneousBatches(store, replace(tiny_training, instructions=False), seed=0, stage1=True)
    assert set(stage1.rows) == {"ocgi", "ocgi_part2"}
    assert not any("Instruct:" in text for step in range(len(stage1)) for text in stage1[step].texts)
    stage2 = HomogeneousBatches(store, replace(tiny_training, document_instruction_share=0.3), seed=0, stage1=False)
    batches = [stage2[step] for step in range(stage2.per_epoch)]
    assert {batch.source for batch in batches} == set(kept)
    for batch in batches:
        prompts = [batch.texts[row].startswith("Instruct: ") for row in batch.query]
        documents = [batch.texts[row].startswith("Instruct: ") for row in (*batch.passage, *batch.hard_negatives.flat)]
        assert all(prompts) and (any(documents) <= (batch.source == "banking77"))
    shares = [text.startswith("Instruct: ") for batch in batches if batch.source == "banking77" for text in batch.texts]
    assert 0.3 < np.mean(shares) < 0.75, "queries, and about 30 % of the documents of a symmetric source"
