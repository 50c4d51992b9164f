"""Duplicates and evaluation texts are found, by a slow oracle too, and nothing else is."""

import random

import pytest

from f2llm.data.clean import NGRAM, Duplicates, EvaluationTexts, ngrams
from f2llm.text import normalise

WORDS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
]


def overlap(evaluation, text, rule):
    return EvaluationTexts(evaluation, rule).overlap(normalise(text))


@pytest.mark.parametrize(
    ("text", "exact", "ngram"),
    [
        ("Where is the CAT?", True, True),
        ("where is the ｃａｔ", True, True),
        ("where is the cat now", False, False),
        (" ".join(WORDS[:13]), False, True),
        ("so: " + " ".join(WORDS[1:14]).title() + "!", False, True),
        (" ".join(WORDS[:12]), False, False),
        (" ".join([*WORDS[:12], "other", *WORDS[12:]]), False, False),
        ("", False, False),
    ],
)
def test_equal_texts_and_thirteen_words_in_a_row_are_found(text, exact, ngram):
    evaluation = ["where is the cat", " ".join(WORDS)]
    assert bool(overlap(evaluation, text, "exact")) == exact
    assert bool(overlap(evaluation, text, "ngram")) == ngram
    assert overlap(evaluation, text, "none") is None


def test_scripts_without_spaces_count_characters():
    chinese = "机器学习模型在训练时不应该看到评测数据"
    assert len(chinese) > NGRAM + 2
    assert "13 words" in overlap([chinese], "我们说" + chinese[2 : 2 + NGRAM] + "吧", "ngram")
    assert overlap([chinese], "我们说" + chinese[2 : 1 + NGRAM] + "吧", "ngram") is None


def test_ngrams_agree_with_a_slow_search_for_common_runs():
    draw = random.Random(0)
    texts = [" ".join(draw.choices("ab", k=draw.randint(10, 40))) for _ in range(60)]
    evaluation, training = texts[:20], texts[20:]

    def share(one, other):
        runs = [" ".join(one.split()[start : start + NGRAM]) for start in range(len(one.split()) - NGRAM + 1)]
        return any(f" {run} " in f" {other} " for run in runs)

    expected = [any(share(text, other) for other in evaluation) for text in training]
    assert 0 < sum(expected) < len(expected), "vacuous"
    assert [bool(overlap(evaluation, text, "ngram")) for text in training] == expected
    assert len(list(ngrams("a " * 20))) == 20 - NGRAM + 1


@pytest.mark.parametrize(
    ("rule", "found"), [("none", [0, 0, 0, 0]), ("exact", [0, 1, 0, 0]), ("normalised", [0, 1, 1, 0])]
)
def test_repeated_pairs_are_found_as_the_rule_says(rule, found):
    pairs = [("A cat", "un chat"), ("A cat", "un chat"), ("a CAT!", "un chat"), ("a cat", "le chat")]
    duplicates = Duplicates(rule)
    assert [duplicates.repeated(pair, tuple(map(normalise, pair))) for pair in pairs] == list(map(bool, found))


def test_where_one_text_ends_and_the_next_begins_matters():
    duplicates = Duplicates("exact")
    assert not duplicates.repeated(("ab", "c"), ("ab", "c"))
    assert not duplicates.repeated(("a", "bc"), ("a", "bc"))
