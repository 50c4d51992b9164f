"""Which texts answer a query, against a comparison of strings."""

import numpy as np
import pytest

from f2llm.mining.positives import Answers, text_hashes
from f2llm.text import normalise


def slow_answers(texts, queries, passages, groups, row, symmetric):
    """Oracle: texts that answer a query, compared as strings."""
    alike = {groups[other] for other, query in enumerate(queries) if normalise(query) == normalise(queries[row])}
    known = {normalise(texts[passage]) for passage, group in zip(passages, groups) if group in alike}
    known.add(normalise(queries[row]))
    if symmetric:
        asked = normalise(queries[row])
        known |= {normalise(query) for query, passage in zip(queries, passages) if normalise(texts[passage]) == asked}
    return {number for number, text in enumerate(texts) if normalise(text) in known}


@pytest.mark.parametrize("symmetric", [False, True])
def test_all_texts_that_answer_a_query_are_its_positives(symmetric):
    draw = np.random.default_rng(3)
    words = ["Red", "red", "RED!", "blue", "Blue.", "green", "a green", "x", "y", "z", "u", "v"]
    asked = ["Who?", "who", "blue", "x", "Y", "green", "z"] * 2 + [f"What {number}?" for number in range(20)]
    queries = draw.choice(asked, size=40).tolist()
    passages, groups = draw.integers(len(words), size=40), draw.integers(90, size=40)
    answers = Answers(text_hashes([queries[:9], queries[9:]]), text_hashes([words]), passages, groups, symmetric)
    expected = [slow_answers(words, queries, passages, groups, row, symmetric) for row in range(40)]
    others = [slow_answers(words, queries, passages, groups, row, not symmetric) for row in range(40)]
    assert expected != others, "vacuous: no text answers its query only in the other direction"
    assert len({len(own) for own in expected}) > 4, "vacuous: all queries are alike"
    assert len(answers) == 40
    for row in range(40):
        assert set(answers[row].tolist()) == expected[row]
        assert answers[row][0] == passages[row], "its own passage comes first: scores are compared with it"
