"""Hard negatives against the papers' rule in slow Python, and the figures of an audit."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from helpers.mining import RULES
from scipy import sparse

from f2llm.mining.rule import SAMPLE, filled_up, mine, sweep


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
        if (rank < rules.range_min and rules.range_min_after == "ranking") or rank >= rules.range_max or row in own:
            continue
        if scores[row] < rules.max_score and scores[row] < best - abs(best) * rules.relative_margin:
            kept.append(row)
    kept = kept[rules.range_min :] if rules.range_min_after == "limits" else kept
    return [] if rules.drop_short and len(kept) < rules.num_negatives else kept[: rules.num_negatives]


# The rule ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"range_min": 0},
        {"range_max": 7},
        {"max_score": 0.5},
        {"relative_margin": 0.4},
        {"num_negatives": 78, "range_max": 80},
        {"range_min": 0, "max_score": 1.0, "relative_margin": 0.0},
        {"range_min": 0, "max_score": 1.0, "range_max": 80, "relative_margin": 0.05, "num_negatives": 80},
        {"drop_short": True},
        {"range_min_after": "limits"},
        {"range_min_after": "limits", "range_min": 1, "range_max": 60, "num_negatives": 20, "drop_short": True},
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
    loose = replace(rules, range_min=0, range_max=80, num_negatives=80)
    mined = mine_rows(queries, documents, positives, loose)
    assert mined.positive_scores[1] == -1
    assert mined.negatives[1].as_py() == [], "nothing is farther than the opposite"


def test_every_rule_removes_something_and_the_counts_add_up(vectors, rules):
    queries, documents, positives = vectors
    mined = mine_rows(queries, documents, positives, replace(rules, max_score=0.5, drop_short=True))
    assert set(mined.dropped) == {
        "positive",
        "skipped",
        "max_score",
        "relative_margin",
        "beyond_num_negatives",
        "drop_short",
    }
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
    loose = replace(rules, range_min=0, max_score=1.0, relative_margin=0.0, range_max=80, num_negatives=80)
    mined = mine_rows(queries, documents, positives, loose)
    assert mined.dropped["positive"] > 30, "vacuous: no positive was near"
    assert not any(set(own) & set(negatives) for own, negatives in zip(positives, mined.negatives.to_pylist()))


def test_of_equal_scores_the_lower_row_comes_first(rules):
    documents = np.tile(np.array([[0.6, 0.8]], dtype=np.float32), (9, 1))
    documents[4] = [1, 0]
    mined = mine_rows(
        documents[4:5], documents, [[4]], replace(rules, range_min=1, range_max=6, num_negatives=3), block=2
    )
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
    """Its `mine_hard_negatives` skips the first that no other rule removes: range_min_after `limits`.

    It also takes the positive out of the range, which has no effect as long as the range is not exhausted, and keeps
    a score that equals a limit.
    """
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding  # a lookup of fixed vectors
    from sentence_transformers.util import mine_hard_negatives
    from tokenizers import Tokenizer, models, pre_tokenizers

    draw = np.random.default_rng(120)  # no two scores of a query so near to each other that rounding ranks them
    documents = draw.normal(size=(400, 6)).astype(np.float32)
    queries = (documents[:50] + 0.4 * draw.normal(size=(50, 6))).astype(np.float32)
    rows = np.concatenate([queries, documents])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    ranked = -np.sort(-(rows[:50].astype(np.float64) @ rows[50:].T), axis=1)[:, :101]
    assert (ranked[:, :-1] - ranked[:, 1:]).min() > 5e-6, "another seed is needed"
    names = [f"q{number}" for number in range(50)] + [f"d{number}" for number in range(400)]
    words = Tokenizer(models.WordLevel({name: row for row, name in enumerate(names)}, unk_token="q0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    model = SentenceTransformer(modules=[StaticEmbedding(words, embedding_weights=rows)], device="cpu")
    pairs = Dataset.from_dict({"query": names[:50], "positive": names[50:100]})
    theirs = mine_hard_negatives(
        pairs, model, corpus=names[50:], range_min=5, range_max=100, max_score=0.8, relative_margin=0.05,
        num_negatives=24, sampling_strategy="top", output_format="n-tuple", verbose=False,
    )  # fmt: skip
    paper = replace(
        rules, range_min=5, range_max=100, max_score=0.8, relative_margin=0.05, num_negatives=24, drop_short=True
    )
    alike = replace(paper, range_min_after="limits")
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
    long, short = (next(row for row, own in enumerate(found) if len(own) == size) for size in (rules.num_negatives, 0))
    given = [[] for _ in found]
    given[long], given[short] = [found[long][1], 70], [60, 61]
    column = pa.chunked_array([pa.array(given, type=pa.list_(pa.int32()))])
    both = filled_up(column, mined, rules).negatives.to_pylist()
    assert (
        both[long] == [found[long][1], 70, found[long][0], *found[long][2:4]] and len(both[long]) == rules.num_negatives
    )
    assert both[short] == [60, 61]
    assert [row for place, row in enumerate(both) if place not in (long, short)] == [
        row for place, row in enumerate(found) if place not in (long, short)
    ]
    dropped = filled_up(column, mined, replace(rules, drop_short=True))
    assert {len(row) for row in dropped.negatives.to_pylist()} == {0, rules.num_negatives}
    assert dropped.short == dropped.negatives.to_pylist().count([]) > 0


# Figures for an audit ---------------------------------------------------------------------------


def test_a_sweep_says_what_mining_with_other_thresholds_gives(vectors, rules):
    rules = replace(rules, num_negatives=9, range_min=0)
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
    documents, rules = half_vectors(40, np.random.default_rng(0)), replace(rules, range_min=0)
    many = np.tile(documents, (70, 1))
    mined = mine_rows(many, documents, [[row % 40] for row in range(len(many))], rules)
    assert len(many) > 2 * SAMPLE
    np.testing.assert_array_equal(mined.queries, np.arange(0, 2800, 3))
    scores = np.stack([many[query] @ documents[near].T for query, near in zip(mined.queries, mined.candidates)])
    own = np.stack([near == query % 40 for query, near in zip(mined.queries, mined.candidates)])
    assert own.any() and mined.candidates.shape == (934, rules.range_max)
    np.testing.assert_array_equal(mined.candidate_scores, np.where(own, np.nan, scores))
