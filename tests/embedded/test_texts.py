"""The embedded corpus: how much there is, and that evaluation's share of it is in no training text."""

import json

from f2llm.embedded.texts import PACKAGES, TIME_UNITS, language_of, script_of
from f2llm.store.tuples import read_arrow
from f2llm.text import normalise


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


def test_scripts_and_languages_are_read_off():
    assert [script_of(text) for text in ("12 m", "Ω", "你好", "привет", "7")] == [
        "LATIN",
        "GREEK",
        "CJK",
        "CYRILLIC",
        "NONE",
    ]
    assert [language_of(locale) for locale in ("sr_Latn", "en")] == ["sr", "en"]


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
