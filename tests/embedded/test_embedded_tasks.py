"""The evaluation tasks of the embedded corpus: how many, of what, and that their answers are right."""

import random

import pytest

from f2llm.embedded.tasks import LATIN, OTHER_SCRIPTS, _overlap, tasks
from f2llm.embedded.tasks import ZERO_SHOT as ZERO_SHOT_TASKS
from f2llm.embedded.texts import ZERO_SHOT, Message, Texts, language_of
from f2llm.text import normalise


@pytest.fixture(scope="module")
def evaluation(texts):
    return tasks(texts[1], seed=0)


def test_evaluation_has_many_types_and_enough_of_each(evaluation):
    assert len({task["type"] for task in evaluation}) >= 6
    assert len({task["name"] for task in evaluation}) == len(evaluation) >= 10
    for task in evaluation:
        assert set(task["data"]) == set(task["languages"])
        assert task["instruction"].endswith((".", "?"))
        for columns in task["data"].values():
            longest = max(
                len(column) if isinstance(column, list) else len(column["text"]) for column in columns.values()
            )
            assert longest >= 40
    subsets = {subset for task in evaluation for subset in task["data"]}
    assert len(subsets) > 0.8 * len(LATIN | OTHER_SCRIPTS)


def test_zero_shot_languages_are_in_no_training_text_but_are_evaluated(texts, evaluation):
    training, held_out = texts
    assert not {language_of(message.locale) for message in training.messages} & set(ZERO_SHOT)
    assert {language_of(message.locale) for message in held_out.messages} >= set(ZERO_SHOT_TASKS)
    task = next(task for task in evaluation if task["name"] == "ZeroShotLanguagesBitext")
    assert len(task["data"]) >= 5


def test_bitext_subsets_pair_different_texts_without_repeats(evaluation):
    compared = 0
    for task in (task for task in evaluation if task["type"] == "BitextMining"):
        for pairs in task["data"].values():
            for side in pairs.values():
                assert len(set(map(normalise, side))) == len(side)
            for one, other in zip(pairs["sentence1"], pairs["sentence2"], strict=True):
                assert normalise(one) != normalise(other)
                compared += 1
    assert compared > 2000


def test_relevant_documents_are_among_the_corpus_and_the_candidates(evaluation):
    searched = [task["data"]["default"] for task in evaluation if task["type"] in ("Retrieval", "Reranking")]
    assert len(searched) >= 3
    for data in searched:
        assert len(data["relevant"]) == len(data["queries"])
        assert all(0 <= row < len(data["corpus"]) for rows in data["relevant"] for row in rows)
        for relevant, shown in zip(data["relevant"], data.get("candidates", data["relevant"]), strict=True):
            assert set(relevant) <= set(shown)
            offered = [data["corpus"][row] for row in shown]
            assert len(set(offered)) == len(offered)


def test_labels_and_scores_vary(evaluation):
    by_type = {}
    for task in evaluation:
        by_type.setdefault(task["type"], []).append(task["data"].get("default"))
    for data in by_type["Classification"]:
        assert set(data["train"]["label"]) == set(data["test"]["label"])
        assert len(set(data["test"]["label"])) >= 2
        assert not set(data["train"]["text"]) & set(data["test"]["text"])
    assert all(len(set(data["labels"])) >= 3 for data in by_type["Clustering"])
    assert all(set(data["labels"]) == {0, 1} for data in by_type["PairClassification"])
    assert all(len(set(data["score"])) >= 4 and max(data["score"]) <= 1 for data in by_type["STS"])


def test_tasks_are_the_same_for_the_same_seed(texts, evaluation):
    assert tasks(texts[1], seed=0) == evaluation
    assert tasks(texts[1], seed=1) != evaluation


def test_a_list_that_only_one_language_has_is_no_pair():
    lists = {"city/A+city/B": ("A and B", "A et B"), "city/C+city/D": ("C and D",)}
    messages = [
        Message("list:city", concept, locale, text)
        for concept, versions in lists.items()
        for locale, text in zip(("en", "fr"), versions)
    ]
    task = _overlap("Overlap", Texts(messages, []), random.Random(0))
    first, second = task["data"]["default"]["sentence1"], task["data"]["default"]["sentence2"]
    assert len(first) == len(second) > 100
    english, french, alone = "A and B", "A et B", "C and D"
    assert {(english, french), (french, english)} <= set(zip(first, second))
    assert set(zip(first, second)) <= {(english, french), (french, english), (alone, french), (french, alone)}
