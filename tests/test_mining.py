"""Hard negatives against the papers' rule in slow Python, and what a store's negatives may and may not be."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy import sparse

from f2llm.arrow import read_arrow, write_arrow
from f2llm.checkpoint import sha256
from f2llm.miners import EmbedderMiner
from f2llm.mining import SAMPLE, Answers, filled_up, mine, mine_store, sweep, text_hashes
from f2llm.text import normalise
from f2llm.tuples import DOCUMENTS, SCHEMA, TupleStore

ROOT = Path(__file__).parents[1]
RULES = {"range_max": 20, "skip": 2, "max_score": 0.8, "relative_margin": 0.05, "keep": 5, "drop_short": False}
RULES |= {"skip_after": "ranking"}


@pytest.fixture
def rules(config):
    return replace(config.mine, **RULES)


def half_vectors(count, draw):
    """Unit vectors with four entries of +-1/2 among ten: every score is an exact quarter, and ties abound."""
    vectors = np.zeros((count, 10), dtype=np.float32)
    for vector in vectors:
        vector[draw.choice(10, size=4, replace=False)] = draw.choice([-0.5, 0.5, 0.5, 0.5], size=4)
    return vectors


def in_blocks(rows, size=512):
    return [rows[start : start + size] for start in range(0, rows.shape[0], size)]


def mine_rows(queries, documents, positives, rules, block=512):
    return mine(in_blocks(queries, block), in_blocks(documents, block), positives, rules)


@pytest.fixture
def vectors():
    """(queries, documents, positives): 30 queries, 80 documents, one to three positives each, in any order."""
    draw = np.random.default_rng(0)
    positives = [draw.choice(80, size=draw.integers(1, 4), replace=False).tolist() for _ in range(30)]
    documents = half_vectors(80, draw)
    queries = documents[[own[0] for own in positives]].copy()
    queries[::3] = half_vectors(10, draw)  # a third of the queries is not its own positive
    queries[1] = -queries[1]  # and one is far from it
    return queries, documents, positives


def slow_negatives(query, documents, own, rules):
    """Oracle: the rule, one document after the other."""
    scores = [sum(q * d for q, d in zip(query.tolist(), document.tolist())) for document in documents]
    best = scores[own[0]]
    ranked = sorted(range(len(scores)), key=lambda row: (-scores[row], row))
    kept = []
    for rank, row in enumerate(ranked):
        if (rank < rules.skip and rules.skip_after == "ranking") or rank >= rules.range_max or row in own:
            continue
        if scores[row] < rules.max_score and scores[row] < best - abs(best) * rules.relative_margin:
            kept.append(row)
    kept = kept[rules.skip :] if rules.skip_after == "limits" else kept
    return [] if rules.drop_short and len(kept) < rules.keep else kept[: rules.keep]


# The rule ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"skip": 0},
        {"range_max": 6},
        {"max_score": 0.5},
        {"relative_margin": 0.4},
        {"keep": 100, "range_max": 80},
        {"skip": 0, "max_score": 1.0, "relative_margin": 0.0},
        {"skip": 0, "max_score": 1.0, "range_max": 80, "relative_margin": 0.05, "keep": 80},
        {"drop_short": True},
        {"skip_after": "limits"},
        {"skip_after": "limits", "skip": 1, "range_max": 60, "keep": 20, "drop_short": True},
    ],
)
def test_negatives_are_those_of_the_rule(vectors, rules, changed):
    queries, documents, positives = vectors
    rules = replace(rules, **changed)
    expected = [slow_negatives(query, documents, own, rules) for query, own in zip(queries, positives)]
    assert sum(map(len, expected)) > 30, "vacuous: hardly anything is kept"
    mined = mine_rows(queries, documents, positives, rules)
    assert mined.negatives.to_pylist() == expected
    assert mined.negatives.type == pa.list_(pa.int32())


def test_the_far_positive_keeps_its_margin(vectors, rules):
    """Below a negative score 95 % of it would be nearer, not farther."""
    queries, documents, positives = vectors
    loose = replace(rules, skip=0, range_max=80, keep=80)
    mined = mine_rows(queries, documents, positives, loose)
    assert mined.positive_scores[1] == -1
    assert mined.negatives[1].as_py() == [], "nothing is farther than the opposite"


def test_every_rule_removes_something_and_the_counts_add_up(vectors, rules):
    queries, documents, positives = vectors
    mined = mine_rows(queries, documents, positives, replace(rules, max_score=0.5, drop_short=True))
    assert set(mined.dropped) == {"positive", "skipped", "max_score", "relative_margin", "beyond_keep", "drop_short"}
    assert all(count > 0 for count in mined.dropped.values()), f"vacuous: {mined.dropped}"
    kept = len(mined.negatives.combine_chunks().flatten())
    assert kept + sum(mined.dropped.values()) == len(queries) * rules.range_max
    assert len(mined.negative_scores) == kept
    assert mined.short == sum(len(negatives) == 0 for negatives in mined.negatives)


def test_scores_are_reported_of_positives_and_negatives(vectors, rules):
    queries, documents, positives = vectors
    mined, scores = mine_rows(queries, documents, positives, rules), queries @ documents.T
    np.testing.assert_array_equal(mined.positive_scores, [row[own[0]] for row, own in zip(scores, positives)])
    lists = mined.negatives.to_pylist()
    expected = [row[negative] for row, negatives in zip(scores, lists) for negative in negatives]
    assert len(expected) > 40
    np.testing.assert_array_equal(mined.negative_scores, expected)


def test_a_positive_is_never_a_negative(vectors, rules):
    queries, documents, positives = vectors
    loose = replace(rules, skip=0, max_score=1.0, relative_margin=0.0, range_max=80, keep=80)
    mined = mine_rows(queries, documents, positives, loose)
    assert mined.dropped["positive"] > 30, "vacuous: no positive was near"
    assert not any(set(own) & set(negatives) for own, negatives in zip(positives, mined.negatives.to_pylist()))


def test_of_equal_scores_the_lower_row_comes_first(rules):
    documents = np.tile(np.array([[0.6, 0.8]], dtype=np.float32), (9, 1))
    documents[4] = [1, 0]
    mined = mine_rows(documents[4:5], documents, [[4]], replace(rules, skip=1, range_max=6, keep=3), block=2)
    assert mined.negatives.to_pylist() == [[0, 1, 2]]


@pytest.mark.parametrize("block", [1, 7, 30])
def test_the_block_size_does_not_matter(vectors, rules, block):
    whole, parts = mine_rows(*vectors, rules), mine_rows(*vectors, rules, block=block)
    assert parts.negatives.to_pylist() == whole.negatives.to_pylist()
    assert parts.dropped == whole.dropped
    np.testing.assert_array_equal(parts.candidates, whole.candidates)


def test_sparse_vectors_give_what_dense_ones_do(vectors, rules):
    queries, documents, positives = vectors
    dense = mine_rows(queries, documents, positives, rules)
    thin = mine_rows(sparse.csr_matrix(queries), sparse.csr_matrix(documents), positives, rules, block=16)
    assert thin.negatives.to_pylist() == dense.negatives.to_pylist()
    assert thin.dropped == dense.dropped
    np.testing.assert_array_equal(thin.negative_scores, dense.negative_scores)


def test_a_range_beyond_the_documents_takes_them_all(vectors, rules):
    queries, documents, positives = vectors
    few = [[row % 12 for row in own] for own in positives]
    mined = mine_rows(queries, documents[:12], few, replace(rules, range_max=99))
    kept = sum(map(len, mined.negatives.to_pylist()))
    assert kept + sum(mined.dropped.values()) == len(queries) * 12


def test_negatives_are_those_of_sentence_transformers(vectors, rules):
    """Its `mine_hard_negatives` skips the first that no other rule removes: skip_after `limits`.

    It also takes the positive out of the range, which has no effect as long as the range is not exhausted, and keeps
    a score that equals a limit.
    """
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding  # a lookup of fixed vectors
    from sentence_transformers.util import mine_hard_negatives
    from tokenizers import Tokenizer, models, pre_tokenizers

    draw = np.random.default_rng(1)
    documents = draw.normal(size=(400, 6)).astype(np.float32)
    queries = (documents[:50] + 0.4 * draw.normal(size=(50, 6))).astype(np.float32)
    rows = np.concatenate([queries, documents])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    names = [f"q{number}" for number in range(50)] + [f"d{number}" for number in range(400)]
    words = Tokenizer(models.WordLevel({name: row for row, name in enumerate(names)}, unk_token="q0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    model = SentenceTransformer(modules=[StaticEmbedding(words, embedding_weights=rows)], device="cpu")
    pairs = Dataset.from_dict({"query": names[:50], "positive": names[50:100]})
    theirs = mine_hard_negatives(
        pairs, model, corpus=names[50:], range_min=5, range_max=100, max_score=0.8, relative_margin=0.05,
        num_negatives=24, sampling_strategy="top", output_format="n-tuple", verbose=False,
    )  # fmt: skip
    paper = replace(rules, skip=5, range_max=100, max_score=0.8, relative_margin=0.05, keep=24, drop_short=True)
    alike = replace(paper, skip_after="limits")
    ours = mine_rows(rows[:50], rows[50:], [[row] for row in range(50)], alike, block=64)
    by_rank = mine_rows(rows[:50], rows[50:], [[row] for row in range(50)], paper, block=64)
    assert by_rank.negatives.to_pylist() != ours.negatives.to_pylist(), "vacuous: both skip the same"
    expected = {f"q{row}": negatives for row, negatives in enumerate(ours.negatives.to_pylist()) if negatives}
    found = {row["query"]: [int(row[f"negative_{rank}"][1:]) for rank in range(1, 25)] for row in theirs}
    assert len(expected) > 40, "vacuous: hardly any query has enough"
    assert ours.dropped["max_score"] > 100 and ours.dropped["relative_margin"] > 10, "vacuous: nothing is too near"
    assert found == expected


# Given negatives --------------------------------------------------------------------------------


def test_given_negatives_come_first_and_mined_ones_fill_up(vectors, rules):
    mined = mine_rows(*vectors, rules)
    found = mined.negatives.to_pylist()
    long, short = (next(row for row, own in enumerate(found) if len(own) == size) for size in (rules.keep, 0))
    given = [[] for _ in found]
    given[long], given[short] = [found[long][1], 70], [60, 61]
    column = pa.chunked_array([pa.array(given, type=pa.list_(pa.int32()))])
    both = filled_up(column, mined, rules).negatives.to_pylist()
    assert both[long] == [found[long][1], 70, found[long][0], *found[long][2:4]] and len(both[long]) == rules.keep
    assert both[short] == [60, 61]
    assert [row for place, row in enumerate(both) if place not in (long, short)] == [
        row for place, row in enumerate(found) if place not in (long, short)
    ]
    dropped = filled_up(column, mined, replace(rules, drop_short=True))
    assert {len(row) for row in dropped.negatives.to_pylist()} == {0, rules.keep}
    assert dropped.short == dropped.negatives.to_pylist().count([]) > 0


# Figures for an audit ---------------------------------------------------------------------------


def test_a_sweep_says_what_mining_with_other_thresholds_gives(vectors, rules):
    rules = replace(rules, keep=9, skip=0)
    mined = mine_rows(*vectors, rules)
    found = sweep(mined, rules, max_scores=[0.25, 0.5, 1.0], margins=[0.0, 0.3, 0.6])
    assert len({row["negatives"] for row in found}) > 2, "vacuous: no threshold changes anything"
    for row in found:
        other = replace(rules, max_score=row["max_score"], relative_margin=row["relative_margin"])
        again = mine_rows(*vectors, other)
        assert row["negatives"] == len(again.negative_scores)
        assert row["complete"] == row["queries"] - again.short
    assert len(found) == 9


def test_the_sample_is_spread_over_all_queries_and_bounded(rules):
    documents, rules = half_vectors(40, np.random.default_rng(0)), replace(rules, skip=0)
    many = np.tile(documents, (70, 1))
    mined = mine_rows(many, documents, [[row % 40] for row in range(len(many))], rules)
    assert len(many) > 2 * SAMPLE
    np.testing.assert_array_equal(mined.queries, np.arange(0, 2800, 3))
    scores = np.stack([many[query] @ documents[near].T for query, near in zip(mined.queries, mined.candidates)])
    own = np.stack([near == query % 40 for query, near in zip(mined.queries, mined.candidates)])
    assert own.any() and mined.candidates.shape == (934, rules.range_max)
    np.testing.assert_array_equal(mined.candidate_scores, np.where(own, np.nan, scores))


# Positives --------------------------------------------------------------------------------------


def slow_answers(texts, queries, passages, groups, row):
    """Oracle: texts that answer a query, compared as strings."""
    alike = {groups[other] for other, query in enumerate(queries) if normalise(query) == normalise(queries[row])}
    known = {normalise(texts[passage]) for passage, group in zip(passages, groups) if group in alike}
    known.add(normalise(queries[row]))
    return {number for number, text in enumerate(texts) if normalise(text) in known}


def test_all_texts_that_answer_a_query_are_its_positives():
    draw = np.random.default_rng(3)
    words = ["Red", "red", "RED!", "blue", "Blue.", "green", "a green", "x", "y", "z", "u", "v"]
    asked = ["Who?", "who", "blue", "x"] + [f"What {number}?" for number in range(20)]
    queries = draw.choice(asked, size=40).tolist()
    passages, groups = draw.integers(len(words), size=40), draw.integers(90, size=40)
    answers = Answers(text_hashes([queries[:9], queries[9:]]), text_hashes([words]), passages, groups)
    expected = [slow_answers(words, queries, passages, groups, row) for row in range(40)]
    assert len({len(own) for own in expected}) > 4, "vacuous: all queries are alike"
    assert len(answers) == 40
    for row in range(40):
        assert set(answers[row].tolist()) == expected[row]
        assert answers[row][0] == passages[row], "its own passage comes first: scores are compared with it"


# Stores -----------------------------------------------------------------------------------------


def write_store(folder: Path, **parts) -> TupleStore:
    """parts: name -> (negatives, documents, [(query, passage row, group)])."""
    (folder / "documents").mkdir(parents=True)
    (folder / "tuples").mkdir()
    for name, (_, documents, rows) in parts.items():
        records = [dict(zip(SCHEMA.names, (*row, [], "en"))) for row in rows]
        write_arrow(pa.table({"text": documents}, schema=DOCUMENTS), folder / "documents" / f"{name}.arrow")
        write_arrow(pa.Table.from_pylist(records, schema=SCHEMA), folder / "tuples" / f"{name}.arrow")
    entries = {name: {"negatives": part[0], "instruction": f"Find {name}."} for name, part in parts.items()}
    hashes = {str(path.relative_to(folder)): sha256(path) for path in folder.rglob("*.arrow")}
    (folder / "manifest.json").write_text(json.dumps({"sources": entries, "sha256": hashes}))
    return TupleStore(folder, mined=None)


def sentences(count, seed=0):
    """Distinct texts that share words."""
    draw = np.random.default_rng(seed)
    words = ["red", "green", "blue", "old", "new", "house", "tree", "river", "stone", "bird", "walks", "sings"]
    return [" ".join(draw.choice(words, size=6)) + f" {number}" for number in range(count)]


@pytest.fixture
def some_store(tmp_path):
    first, second = sentences(60), sentences(40, seed=1)
    return write_store(
        tmp_path / "assembled",
        first=("mine", first, [(text.upper() + " really", row, row // 2) for row, text in enumerate(first)]),
        given=("given", ["a", "b"], [("c", 0, 0)]),
        second=("mine", second, [(f"what {text}", row, row) for row, text in enumerate(second)]),
    )


@pytest.fixture
def mine_it(some_store, rules, tmp_path):
    """mine_it(out name, scratch name, **rules) -> (found, {file: bytes})."""

    def mine_it(out="out", scratch="scratch", **changed):
        found = mine_store(some_store, replace(rules, **changed), tmp_path / out, scratch=tmp_path / scratch)
        return found, {path.name: path.read_bytes() for path in (tmp_path / out).iterdir()}

    return mine_it


def test_only_parts_to_be_mined_are_mined_among_their_own_documents(mine_it, some_store, tmp_path):
    found, files = mine_it(skip=0, max_score=1.0, relative_margin=0.0, anchor="query")
    assert sorted(files) == ["first.arrow", "second.arrow"] and set(found) == {"first", "second"}
    for name, mined in found.items():
        column = read_arrow(tmp_path / "out" / f"{name}.arrow")["negatives"]
        assert column.type == pa.list_(pa.int32())
        assert column.to_pylist() == mined.negatives.to_pylist()
        assert len(column) == len(some_store.tables[name]) and len(mined.negative_scores) > 100
    answered = some_store.tables["first"]["group"].to_pylist()
    for row, negatives in enumerate(found["first"].negatives.to_pylist()):
        assert negatives and not any(answered[negative] == answered[row] for negative in negatives)
    assert TupleStore(tmp_path / "assembled", mined=tmp_path / "out").tables["first"]["negatives"][3].as_py()


def test_equal_texts_of_a_store_are_no_negatives(rules, tmp_path):
    documents = ["the red house", "The red house!", "a red house", "find a house", "the red mouse", "blue"]
    rows = [("Find a house", 0, 0), ("find a house?", 4, 1), ("a colour", 5, 2)]
    store = write_store(tmp_path / "assembled", part=("mine", documents, rows))
    loose = replace(rules, skip=0, max_score=1.0, relative_margin=-9.0, range_max=6, keep=6, anchor="query")
    mined = mine_store(store, loose, tmp_path / "out", scratch=tmp_path / "scratch")["part"]
    kept = [sorted(rows) for rows in mined.negatives.to_pylist()]
    assert kept[:2] == [[2, 5], [2, 5]], "all but the answers of 'find a house', and its own text"
    assert mined.dropped["positive"] == 4 + 4 + 1


def test_a_store_with_nothing_to_mine_gives_an_empty_folder(rules, tmp_path):
    store = write_store(tmp_path / "assembled", given=("given", ["a", "b"], [("c", 0, 0)]))
    assert mine_store(store, rules, tmp_path / "out", scratch=tmp_path / "scratch") == {}
    assert list((tmp_path / "out").iterdir()) == []


def test_the_anchor_decides_whose_neighbours_are_taken(mine_it):
    loose = {"skip": 0, "max_score": 1.0, "relative_margin": 0.0}
    by_query, by_passage = (mine_it(anchor=anchor, **loose)[0]["second"] for anchor in ("query", "passage"))
    assert by_passage.positive_scores.min() == pytest.approx(1), "a passage is its own nearest"
    assert by_query.positive_scores.max() < 0.99
    assert by_query.negatives.to_pylist() != by_passage.negatives.to_pylist()


@pytest.mark.parametrize("instructions", [True, False])
def test_scores_are_the_models_own_with_or_without_instruction(instructions, mine_it, some_store, embedder, tmp_path):
    embedder.save(tmp_path / "model")
    changed = {"miner": f"embedder:{tmp_path / 'model'}", "max_tokens": 24, "instructions": instructions}
    loose = {"anchor": "query", "skip": 0, "max_score": 1.0}
    mined = mine_it(f"out {instructions}", **changed, **loose)[0]["second"]
    texts = [some_store.documents["second"][row] for row in range(40)]
    asked = some_store.tables["second"]["query"].to_pylist()
    scores = embedder.encode(asked, "Find second." if instructions else None) @ embedder.encode(texts).T
    np.testing.assert_allclose(mined.positive_scores, np.diag(scores), atol=1e-5)
    found = [scores[row, negative] for row, own in enumerate(mined.negatives.to_pylist()) for negative in own]
    assert len(found) > 10, "vacuous: hardly anything is kept"
    np.testing.assert_allclose(mined.negative_scores, found, atol=1e-5)


def test_a_part_without_tuples_is_named(rules, tmp_path):
    store = write_store(tmp_path / "assembled", void=("mine", ["a"], [("b", 0, 0)]))
    store.tables["void"] = store.tables["void"].slice(0, 0)
    with pytest.raises(ValueError, match="part 'void' has no tuples to mine for; remedy: leave it out"):
        mine_store(store, rules, tmp_path / "out", scratch=tmp_path / "scratch")


def test_queries_with_fewer_negatives_are_dropped_on_request(mine_it):
    strict = {"skip": 0, "keep": 12, "range_max": 20, "max_score": 0.5}
    short, whole = (mine_it(drop_short=drop, **strict)[0]["first"] for drop in (False, True))
    lengths = [len(negatives) for negatives in short.negatives]
    assert 0 < short.short == sum(length < 12 for length in lengths) < 60, "vacuous: all or none"
    assert [len(negatives) for negatives in whole.negatives] == [12 * (length == 12) for length in lengths]
    assert len(whole.negative_scores) == 12 * (60 - short.short)


# Going on ---------------------------------------------------------------------------------------


def test_finished_parts_are_not_mined_again_and_a_broken_one_is(mine_it, tmp_path):
    _, first = mine_it()
    kept = {path.parent.name: path.stat().st_mtime_ns for path in (tmp_path / "scratch").glob("*/counts.json")}
    broken = next(path for path in (tmp_path / "scratch").glob("second-*/negatives.arrow"))
    broken.write_bytes(broken.read_bytes()[:-9])
    _, second = mine_it()
    again = {path.parent.name: path.stat().st_mtime_ns for path in (tmp_path / "scratch").glob("*/counts.json")}
    assert first == second and len(first) == 2
    assert {name for name in kept if kept[name] != again[name]} == {broken.parent.name}


def test_other_rules_are_mined_anew(mine_it, tmp_path):
    mine_it()
    mine_it(max_score=0.4)
    assert len(list((tmp_path / "scratch").glob("*/counts.json"))) == 4


WORKER = """
import json, sys
from pathlib import Path
from f2llm.config import Mine
from f2llm.miners import EmbedderMiner
from f2llm.mining import mine_store
from f2llm.tuples import TupleStore

folder, rules = Path(sys.argv[1]), Mine(**json.loads(sys.argv[2]))
EmbedderMiner.block = 16
encode = EmbedderMiner.encode_queries
def announced(self, texts, instruction):
    print("block", flush=True)
    return encode(self, texts, instruction)
EmbedderMiner.encode_queries = announced
mine_store(TupleStore(folder / "assembled", mined=None), rules, folder / "killed", scratch=folder / "scratch")
"""


def test_mining_that_was_killed_goes_on_with_the_same_result(mine_it, rules, embedder, tmp_path, monkeypatch):
    embedder.save(tmp_path / "model")
    monkeypatch.setattr(EmbedderMiner, "block", 16)
    changed = {"miner": f"embedder:{tmp_path / 'model'}", "anchor": "query", "max_tokens": 24}
    changed |= {"skip": 0, "keep": 3, "max_score": 1.0}
    mined, whole = mine_it("whole", "other", **changed)
    command = [sys.executable, "-c", WORKER, str(tmp_path), json.dumps(asdict(replace(rules, **changed)))]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    for _ in range(6):  # four blocks of documents and four of queries are the first part's
        assert killed.stdout.readline() == "block\n"
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed").exists()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "scratch").rglob("*.npy")}
    _, rest = mine_it("killed", "scratch", **changed)
    blocks = {path.name for path in (tmp_path / "other").glob("embeddings-*/*.npy")}
    assert 5 <= len(done) < len(blocks) == 14, "vacuous: nothing or everything was done when it was killed"
    assert {path.name for path in (tmp_path / "scratch").glob("embeddings-*/*.npy")} == blocks
    assert all(path.stat().st_mtime_ns == when for path, when in done.items()), "a block was computed again"
    assert rest == whole and sum(map(len, mined["first"].negatives)) > 10
