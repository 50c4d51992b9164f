"""Hard negatives against the papers' rule in slow Python, and what a store's negatives may and may not be."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from f2llm.mining import Tfidf, mine, mine_store

RULES = {"range_max": 20, "skip": 2, "max_score": 0.8, "relative_margin": 0.05, "keep": 5, "drop_short": False}


@pytest.fixture
def rules(config):
    return replace(config.mine, **RULES)


def half_vectors(count, draw):
    """Unit vectors with four entries of +-1/2 among ten: every score is an exact quarter, and ties abound."""
    vectors = np.zeros((count, 10), dtype=np.float32)
    for vector in vectors:
        vector[draw.choice(10, size=4, replace=False)] = draw.choice([-0.5, 0.5, 0.5, 0.5], size=4)
    return vectors


@pytest.fixture
def vectors():
    """(queries, documents, positives): 30 queries, 80 documents, one to three positives each."""
    draw = np.random.default_rng(0)
    positives = [set(draw.choice(80, size=draw.integers(1, 4), replace=False).tolist()) for _ in range(30)]
    documents = half_vectors(80, draw)
    queries = documents[[min(own) for own in positives]].copy()
    queries[::3] = half_vectors(10, draw)  # a third of the queries is not its own positive
    return queries, documents, positives


def slow_negatives(query, documents, own, rules):
    """Oracle: the rule, one document after the other."""
    scores = [sum(q * d for q, d in zip(query.tolist(), document.tolist())) for document in documents]
    best = max(scores[row] for row in own)
    ranked = sorted(range(len(scores)), key=lambda row: (-scores[row], row))
    kept = []
    for rank, row in enumerate(ranked):
        if rank < rules.skip or rank >= rules.range_max or row in own:
            continue
        if scores[row] < rules.max_score and scores[row] < (1 - rules.relative_margin) * best:
            kept.append(row)
    return kept[: rules.keep]


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
    ],
)
def test_negatives_are_those_of_the_rule(vectors, rules, changed):
    queries, documents, positives = vectors
    rules = replace(rules, **changed)
    expected = [slow_negatives(query, documents, own, rules) for query, own in zip(queries, positives)]
    assert sum(map(len, expected)) > 30, "vacuous: hardly anything is kept"
    assert mine(queries, documents, positives, rules).negatives == expected


def test_every_rule_removes_something_and_the_counts_add_up(vectors, rules):
    queries, documents, positives = vectors
    mined = mine(queries, documents, positives, replace(rules, max_score=0.5))
    assert all(count > 0 for count in mined.dropped.values()), f"vacuous: {mined.dropped}"
    kept = sum(map(len, mined.negatives))
    assert kept + sum(mined.dropped.values()) == len(queries) * rules.range_max
    assert len(mined.negative_scores) == kept


def test_scores_are_reported_of_positives_and_negatives(vectors, rules):
    queries, documents, positives = vectors
    mined, scores = mine(queries, documents, positives, rules), queries @ documents.T
    np.testing.assert_array_equal(mined.positive_scores, [max(row[list(own)]) for row, own in zip(scores, positives)])
    expected = [row[negative] for row, negatives in zip(scores, mined.negatives) for negative in negatives]
    assert len(expected) > 40
    np.testing.assert_array_equal(mined.negative_scores, expected)


def test_a_positive_is_never_a_negative(vectors, rules):
    queries, documents, positives = vectors
    loose = replace(rules, skip=0, max_score=1.0, relative_margin=0.0, range_max=80, keep=80)
    mined = mine(queries, documents, positives, loose)
    assert mined.dropped["positive"] > 30, "vacuous: no positive was near"
    assert not any(own & set(negatives) for own, negatives in zip(positives, mined.negatives))


def test_of_equal_scores_the_lower_row_comes_first(rules):
    documents = np.tile(np.array([[0.6, 0.8]], dtype=np.float32), (9, 1))
    documents[4] = [1, 0]
    mined = mine(documents[4:5], documents, [{4}], replace(rules, skip=1, range_max=6, keep=3))
    assert mined.negatives == [[0, 1, 2]]


@pytest.mark.parametrize("block", [1, 7, 30, 512])
def test_the_block_size_does_not_matter(vectors, rules, block):
    whole, parts = mine(*vectors, rules), mine(*vectors, rules, block=block)
    assert parts.negatives == whole.negatives
    assert parts.dropped == whole.dropped


def test_sparse_vectors_give_what_dense_ones_do(vectors, rules):
    queries, documents, positives = vectors
    dense = mine(queries, documents, positives, rules)
    thin = mine(sparse.csr_matrix(queries), sparse.csr_matrix(documents), positives, rules)
    assert thin.negatives == dense.negatives
    assert thin.dropped == dense.dropped
    np.testing.assert_array_equal(thin.negative_scores, dense.negative_scores)


def test_a_range_beyond_the_documents_takes_them_all(vectors, rules):
    queries, documents, positives = vectors
    mined = mine(
        queries, documents[:12], [{row % 12 for row in own} for own in positives], replace(rules, range_max=99)
    )
    assert sum(map(len, mined.negatives)) + sum(mined.dropped.values()) == len(queries) * 12


# TF-IDF and stores ------------------------------------------------------------------------------


def test_tfidf_rows_have_unit_length_and_near_texts_are_near():
    texts = ["a red house", "the red houses", "quantum field theory", "Хлеб и соль"]
    vectors = Tfidf(texts).encode(texts)
    scores = (vectors @ vectors.T).toarray()
    np.testing.assert_allclose(np.diag(scores), 1, atol=1e-6)
    assert scores[0, 1] > 0.4 > 0.1 > scores[0, 2]
    assert scores[0, 3] < 0.01, "nothing is shared between two scripts"


def test_a_stores_negatives_are_passages_of_their_source_but_never_an_answer(small_store, rules, tmp_path):
    loose = replace(rules, skip=0, max_score=1.0, relative_margin=0.0)
    mined = mine_store(small_store, loose, tmp_path / "mined")
    assert set(mined) == {"pairs", "code"}, "only retrieval is mined"
    for name, found in mined.items():
        table = small_store.tables[name].to_pylist()
        answers = {}
        for row in table:
            answers.setdefault(row["group"], set()).add(row["passage"])
        passages = {row["passage"] for row in table}
        assert sum(map(len, found.negatives)) > len(table)
        for row, negatives in zip(table, found.negatives, strict=True):
            assert set(negatives) <= passages - answers[row["group"]]


def test_queries_with_fewer_negatives_are_dropped_on_request(small_store, rules, tmp_path):
    strict = replace(rules, skip=0, keep=12, range_max=12, max_score=0.6)
    short = mine_store(small_store, strict, tmp_path / "all")["code"]
    whole = mine_store(small_store, replace(strict, drop_short=True), tmp_path / "whole")["code"]
    lengths = [len(negatives) for negatives in short.negatives]
    assert sum(length < 12 for length in lengths) > 0, "vacuous: every query has enough"
    assert [len(negatives) for negatives in whole.negatives] == [12 * (length == 12) for length in lengths]
    assert whole.dropped["queries_with_fewer"] == sum(length < 12 for length in lengths)


def test_the_anchor_decides_whose_neighbours_are_taken(small_store, rules, tmp_path):
    loose = replace(rules, skip=0, max_score=1.0, relative_margin=0.0)
    mined = {
        anchor: mine_store(small_store, replace(loose, anchor=anchor), tmp_path / anchor)["pairs"]
        for anchor in ("query", "passage")
    }
    assert mined["passage"].positive_scores.min() == pytest.approx(1), "a passage is its own nearest"
    assert mined["query"].positive_scores.max() < 0.99
    assert mined["query"].negatives != mined["passage"].negatives


def test_mining_writes_the_same_bytes_again(small_store, rules, tmp_path):
    for out in ("first", "second"):
        mine_store(small_store, rules, tmp_path / out)
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert files == ["code.arrow", "pairs.arrow"]
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
