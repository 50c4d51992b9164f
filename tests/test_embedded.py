"""The embedded corpus: how much there is, and that evaluation's share of it is in no training text."""

import json
import random

import pytest

from f2llm.arrow import read_arrow
from f2llm.embedded.records import function_pairs, message_labels, message_pairs
from f2llm.embedded.tasks import LATIN, OTHER_SCRIPTS, _overlap, tasks
from f2llm.embedded.tasks import ZERO_SHOT as ZERO_SHOT_TASKS
from f2llm.embedded.texts import (
    PACKAGES,
    TIME_UNITS,
    ZERO_SHOT,
    Function,
    Message,
    Texts,
    language_of,
    script_of,
)
from f2llm.text import normalise


@pytest.fixture(scope="module")
def evaluation(texts):
    return tasks(texts[1], seed=0)


# Amounts ----------------------------------------------------------------------------------------


def test_the_assembled_corpus_is_large_and_multilingual(assembled):
    manifest = json.loads((assembled / "manifest.json").read_text())["sources"]
    assert len(manifest) >= 8
    assert sum(entry["kept"] for entry in manifest.values()) >= 40_000
    tables = [read_arrow(assembled / "tuples" / f"{name}.arrow") for name in manifest]
    assert sum(map(len, tables)) == sum(entry["kept"] for entry in manifest.values())
    languages = {language for table in tables for language in table["language"].to_pylist()}
    assert len(languages) >= 200
    assert languages <= {language for entry in manifest.values() for language in entry["languages"]}


def test_every_package_and_many_scripts_are_in_training_texts(texts):
    training, _ = texts
    assert {function.package for function in training.functions} == set(PACKAGES)
    assert len({script_of(message.text) for message in training.messages[::50]}) >= 20


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


# The split --------------------------------------------------------------------------------------


def test_a_held_out_concept_is_in_no_training_text_in_any_language(texts):
    training, held_out = texts
    trained, evaluated = ({message.concept for message in side.messages} for side in texts)
    assert len(evaluated) > 500
    assert not trained & evaluated
    names = {concept.split("=")[0] for concept in evaluated if not concept.startswith("relative/")}
    members = {member for concept in trained for member in concept.split("+")}
    assert len(members) > len(trained) / 2
    assert not names & members, "a held-out name is a member of a training list"
    assert {message.locale for message in held_out.messages} >= {"en", "fr", "ru", "ja"}
    assert len(training.messages) > 3 * len(held_out.messages)


def test_english_texts_of_held_out_messages_are_not_among_training_messages(texts):
    english = [{normalise(m.text) for m in side.messages if m.locale == "en"} for side in texts]
    assert len(english[1]) > 300
    assert not english[0] & english[1]


def test_a_module_is_on_one_side_only(texts):
    trained, evaluated = ({function.module for function in side.functions} for side in texts)
    assert len(evaluated) > 50
    assert not trained & evaluated


def test_held_out_time_units_keep_both_tenses(texts):
    units = [
        {tuple(m.concept.split("=")[0].split("/")[1:]) for m in side.messages if m.domain.startswith("relative:")}
        for side in texts
    ]
    assert {tense for _, tense in units[1]} == {tense for _, tense in units[0]} == {"future", "past"}
    assert len({unit for unit, _ in units[1]}) == 2
    assert {unit for unit, _ in units[0] | units[1]} == set(TIME_UNITS)
    assert not units[0] & units[1]


def test_zero_shot_languages_are_in_no_training_text_but_are_evaluated(texts, evaluation):
    training, held_out = texts
    assert not {language_of(message.locale) for message in training.messages} & set(ZERO_SHOT)
    assert {language_of(message.locale) for message in held_out.messages} >= set(ZERO_SHOT_TASKS)
    task = next(task for task in evaluation if task["name"] == "ZeroShotLanguagesBitext")
    assert len(task["data"]) >= 5


# Tasks ------------------------------------------------------------------------------------------


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


# Small pieces -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("Hello, World!", "hello world", True),
        ("ＦＵＬＬ width", "full width", True),
        ("Straße", "strasse", True),
        ("hello", "hallo", False),
        ("你好。", "你好", True),
    ],
)
def test_case_punctuation_and_width_are_folded_away(one, other, equal):
    assert (normalise(one) == normalise(other)) == equal
    assert normalise("...") == ""


def test_scripts_and_languages_are_read_off():
    assert [script_of(text) for text in ("12 m", "Ω", "你好", "привет", "7")] == [
        "LATIN",
        "GREEK",
        "CJK",
        "CYRILLIC",
        "NONE",
    ]
    assert [language_of(locale) for locale in ("sr_Latn", "en")] == ["sr", "en"]


@pytest.fixture
def few_texts():
    """Three concepts in four languages, one of them in two scripts; two functions."""
    words = {"cat": ("cats", "chats", "Katzen", "коты"), "dog": ("dogs", "chiens", "Hunde", "собаки")}
    words["net"] = ("Internet",) * 4
    messages = [
        Message(f"animal:{concept}", concept, locale, text)
        for concept, translations in words.items()
        for locale, text in zip(("en", "fr", "de", "ru"), translations)
    ]
    functions = [
        Function("p", "p/m.py", False, "Adds two numbers.", "", "def add(a, b):\n    return a + b" + " " * 40),
        Function("p", "p/m.py", True, "Holds two numbers.", "A long explanation " * 5, ""),
    ]
    return Texts(messages, functions)


@pytest.mark.parametrize("partner", ["any", "english"])
def test_bitext_pairs_two_languages_of_one_concept(few_texts, partner):
    records = message_pairs(few_texts, {"domains": ["animal:"], "partner": partner}, rows=50, seed="s")
    known = few_texts.by_concept(["animal:"])
    assert len(records) >= 6
    for record in records:
        assert record["language"] != record["to"] and record["query"] != record["passage"]
        assert {record["query"], record["passage"]} <= set(known[record["group"]].values())
        assert partner == "any" or "en" in (record["language"], record["to"])
    assert "Internet" not in {record["query"] for record in records}, "equal texts are no pair"
    assert len(message_pairs(few_texts, {"domains": ["animal:"], "partner": partner}, rows=2, seed="s")) == 2


def test_functions_without_the_wanted_text_are_left_out(few_texts):
    code = function_pairs(few_texts, {"passage": "code", "to": "python"}, rows=9, seed="s")
    body = function_pairs(few_texts, {"passage": "body", "to": "en"}, rows=9, seed="s")
    assert [record["query"] for record in code] == ["Adds two numbers."]
    assert [record["query"] for record in body] == ["Holds two numbers."]


def test_labels_are_read_off_messages_and_none_takes_over(few_texts):
    few_texts.messages.extend(Message("animal:cat", f"x{n}", "fr", f"chat numéro {n}") for n in range(50))
    records = message_labels(few_texts, {"domains": ["animal:"], "label": "subkind"}, rows=12, seed="s")
    labels = [record["label"] for record in records]
    assert len(labels) == 12
    assert set(labels) == {"cat", "dog", "net"}
    assert labels.count("cat") <= 8, "a label gets at most twice its share"
