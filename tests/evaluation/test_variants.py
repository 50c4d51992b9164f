"""Prefixes, int8 and binary codes of embeddings, against slow formulas."""

import numpy as np
import pytest

from f2llm.evaluation.models import RememberedRows
from f2llm.evaluation.variants import PRECISIONS, at_precision, variants_of

ROWS = np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32)
ROWS /= np.linalg.norm(ROWS, axis=1, keepdims=True)
TEXTS = [str(number) for number in range(40)]


@pytest.fixture
def encode():
    remembered = RememberedRows(lambda texts, _: ROWS[[int(text) for text in texts]])
    remembered(TEXTS, None)
    return remembered


def test_int8_codes_are_the_middles_of_255_levels_between_a_rows_largest_values(encode):
    coded = at_precision(encode, "int8")(TEXTS, None)
    for row, code in zip(ROWS.astype(float), coded):
        edges = np.linspace(-abs(row).max(), abs(row).max(), 256)
        middles = (edges[1:] + edges[:-1]) / 2
        slow = np.array([middles[abs(middles - value).argmin()] for value in row])
        np.testing.assert_allclose(code, slow / np.linalg.norm(slow), rtol=1e-4, atol=1e-6)
    assert (coded * ROWS).sum(1).min() > 0.9999 and len(np.unique(coded[0])) > 10


def test_a_row_has_the_same_int8_code_whatever_is_encoded_with_it_or_before(encode):
    coded, fresh = at_precision(encode, "int8"), at_precision(lambda texts, _: ROWS[3:5], "int8")
    np.testing.assert_array_equal(coded(TEXTS, None)[3:5], coded(TEXTS[3:5], None))
    np.testing.assert_array_equal(coded(TEXTS, None)[3:5], fresh(TEXTS[3:5], None))


def test_binary_codes_are_the_signs_at_unit_length(encode):
    coded = at_precision(encode, "binary")(TEXTS, None)
    np.testing.assert_array_equal(coded, np.where(ROWS > 0, 0.25, -0.25))


def test_each_variant_is_asked_for_once_and_a_dim_must_be_below_the_whole(encode):
    found = variants_of(encode, 16, [4, 16, 32], ["float32", "int8"])
    assert list(found) == [(16, "float32"), (4, "float32"), (16, "int8")]
    assert {name: PRECISIONS[name] * 1024 for name in PRECISIONS} == {"float32": 4096, "int8": 1024, "binary": 128}
    short = found[4, "float32"](TEXTS, None)
    np.testing.assert_allclose(short, ROWS[:, :4] / np.linalg.norm(ROWS[:, :4], axis=1, keepdims=True), rtol=1e-6)
