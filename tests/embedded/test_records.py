"""Records of the embedded corpus: pairs of messages, functions, labels."""

import pytest

from f2llm.embedded.records import explained_pairs, function_pairs, message_labels, message_pairs
from f2llm.embedded.texts import Function, Message, Texts


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


@pytest.mark.parametrize("across", [False, True])
def test_names_and_explanations_are_of_one_language_or_of_two(across):
    texts = {"a/pump": ("pump", "Pumpe", "pompe"), "a/It pumps.": ("It pumps.", "Sie pumpt.", "Elle pompe.")}
    texts |= {"a/tap": ("tap", "Hahn", "robinet"), "a/It drips.": ("It drips.", "Er tropft.", "Il goutte.")}
    messages = [
        Message("home:action", concept, locale, text)
        for concept, known in texts.items()
        for locale, text in zip(("en", "de", "fr"), known)
    ]
    pairs = [("a/pump", "a/It pumps."), ("a/tap", "a/It drips.")]
    records = explained_pairs(Texts(messages, [], pairs), {"across": across}, rows=20, seed="s")
    assert len(records) == 6, "each name in each language, once"
    for record in records:
        assert (record["language"] != record["to"]) == across
        assert record["query"] in texts[record["group"]]
        assert record["passage"] in texts[dict(pairs)[record["group"]]]
    assert len(explained_pairs(Texts(messages, [], pairs), {"across": across}, rows=2, seed="s")) == 2


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


def test_a_message_of_several_integrations_has_no_integration():
    texts = ("Failed to connect", "Pump station", "Street lamp")
    concepts = ("several/Failed to connect", "pump/Pump station", "lamp/Street lamp")
    messages = [Message("home:problem", concept, "en", text) for concept, text in zip(concepts, texts)]
    records = message_labels(Texts(messages, []), {"domains": ["home:"], "label": "integration"}, rows=9, seed="s")
    assert sorted((record["query"], record["label"]) for record in records) == [
        ("Pump station", "pump"),
        ("Street lamp", "lamp"),
    ]
