"""Exact search in blocks against sorting all scores, with many exact ties, and its memory."""

import os
import subprocess
import sys
from operator import mul

import numpy as np
import pytest
from conftest import ROOT
from scipy import sparse

from f2llm.mining.search import Blocks, nearest, unit_rows


def in_blocks(rows, size):
    return [rows[start : start + size] for start in range(0, rows.shape[0], size)]


@pytest.fixture(scope="module")
def small_integers():
    """60 queries and 300 documents, among them zeros and copies: exact scores, most of them shared by many."""
    draw = np.random.default_rng(5)
    documents = draw.integers(-1, 2, size=(300, 5)).astype(np.float32)
    documents[200:] = documents[:100]
    queries = draw.integers(-2, 3, size=(60, 5)).astype(np.float32)
    queries[7] = 0  # every document scores 0, or -0
    return queries, documents, draw.integers(300, size=60)


@pytest.fixture(scope="module")
def ranked(small_integers):
    """Oracle: of every query all (-score, row), each score summed in Python, sorted."""
    queries, documents, _ = small_integers
    scores = [[sum(map(mul, query, document)) for document in documents.tolist()] for query in queries.tolist()]
    return [sorted((-score, row) for row, score in enumerate(row_scores)) for row_scores in scores]


@pytest.mark.parametrize("num", [1, 20, 299, 300, 500])
@pytest.mark.parametrize("size", [7, 64, 300])
def test_the_nearest_are_those_of_a_sort_over_all(small_integers, ranked, size, num):
    queries, documents, passages = small_integers
    expected = [found[:num] for found in ranked]
    ties = sum(num < 300 and found[num - 1][0] == found[num][0] for found in ranked)
    assert num >= 300 or ties > 30, "vacuous: no score stands on both sides of the border"
    for form in (np.asarray, sparse.csr_matrix):
        scores, rows, best = nearest(form(queries), in_blocks(form(documents), size), passages, num)
        assert rows.tolist() == [[row for _, row in found] for found in expected]
        np.testing.assert_array_equal(scores, [[-score for score, _ in found] for found in expected])
        np.testing.assert_array_equal(best, (queries * documents[passages]).sum(axis=1))


def test_many_dimensions_give_the_same_in_any_blocks():
    """Integers, whose scores are exact in float32: of rounded ones that almost tie, each CPU has its own order."""
    draw = np.random.default_rng(6)
    queries, documents = (draw.integers(-300, 301, size=(count, 48)) for count in (50, 3000))
    exact = queries @ documents.T
    assert np.abs(exact).max() > 100_000 and 48 * 300**2 < 2**24, "no sum is rounded"
    expected = np.argsort(-exact, axis=1, kind="stable")[:, :100]
    queries, documents = queries.astype(np.float32), documents.astype(np.float32)
    for size in (7, 500, 3000):
        scores, rows, _ = nearest(queries, in_blocks(documents, size), np.zeros(50, dtype=int), 100)
        np.testing.assert_array_equal(rows, expected)
        np.testing.assert_array_equal(scores, np.take_along_axis(exact, rows, axis=1))


def test_other_dimensions_are_an_error():
    with pytest.raises(ValueError, match=r"documents from row 4 on have 7 dimensions, but queries 5.*remedy"):
        nearest(np.ones((2, 5)), [np.ones((4, 5)), np.ones((4, 7))], np.zeros(2, dtype=int), 3)


def test_a_passage_beyond_the_documents_is_an_error():
    with pytest.raises(ValueError, match="row 9, but there are 4"):
        nearest(np.ones((2, 5)), [np.ones((4, 5))], np.array([0, 9]), 3)


@pytest.mark.parametrize("form", ["files", "sparse"])
def test_rows_are_taken_from_blocks_in_the_order_asked_for(form, tmp_path):
    rows = np.random.default_rng(7).normal(size=(50, 4)).astype(np.float32)
    parts = in_blocks(rows, 16)
    if form == "files":
        for number, part in enumerate(parts):
            np.save(tmp_path / f"{number}.npy", part)
        blocks = Blocks([tmp_path / f"{number}.npy" for number in range(len(parts))])
    else:
        blocks = Blocks([sparse.csr_matrix(part) for part in parts])
    wanted = np.array([49, 0, 16, 15, 16, 33, 2])
    taken = blocks.take(wanted)
    np.testing.assert_array_equal(taken.toarray() if form == "sparse" else taken, rows[wanted])
    assert len(blocks) == 4 and blocks[3].shape == (2, 4)


@pytest.mark.parametrize("value", [0, np.nan, np.inf, 0.5])
@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix])
def test_a_row_without_unit_length_names_its_text(value, form):
    rows = np.eye(3, dtype=np.float32)
    assert unit_rows(form(rows), ["a", "b", "c"], "me").shape == (3, 3)
    rows[1, 1] = value
    with pytest.raises(ValueError, match=r"miner me: the embedding of text 'b' has length .* must have 1.*remedy"):
        unit_rows(form(rows), ["a", "b", "c"], "me")


MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np, torch
from f2llm.mining.search import Blocks, nearest
torch.set_num_threads(1)
folder, peaks = Path(sys.argv[1]), []
draw = np.random.default_rng(0)
for number in range(40):
    np.save(folder / f"{number}.npy", draw.normal(size=(2048, 256)).astype(np.float32))
queries = draw.normal(size=(256, 256)).astype(np.float32)
for count in (5, 40):
    blocks = Blocks([folder / f"{number}.npy" for number in range(count)])
    blocks.take(np.arange(0, count * 2048, count * 64))
    nearest(queries, blocks, np.zeros(256, dtype=int), 100)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(*peaks)
"""


def test_memory_does_not_grow_with_the_documents(tmp_path):
    """35 more blocks of 2 MiB, and 35 of scores, add less than five of them."""
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    output = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    few, many = map(int, output.stdout.split())
    unit = 1024 if sys.platform == "darwin" else 1  # bytes there, KiB elsewhere
    assert (many - few) / unit < 10 * 1024
