"""Messages of Home Assistant's interface, from a small wheel of the same layout and from the real one."""

import json
from zipfile import ZipFile

import pytest

from f2llm.embedded import home_assistant
from f2llm.embedded.home_assistant import KINDS, interface
from f2llm.store import packages

ENGLISH = {
    "title": "Boiler",
    "config": {
        "error": {"cannot_connect": "Failed to connect", "none": "{name}"},
        "step": {
            "user": {
                "data": {"host": "Host", "pump": "Pump station"},
                "data_description": {"host": "The address of your [boiler](https://x.org) at {host}."},
            }
        },
    },
    "services": {"heat": {"name": "Start heating", "description": "Heats the water to a *given* temperature."}},
    "entity": {"sensor": {"level": {"name": "Level of hot water"}}},
}
GERMAN = {
    "config": {
        "error": {"cannot_connect": "Verbindung fehlgeschlagen"},
        "step": {"user": {"data": {"host": "Adresse", "pump": "Pump station", "old": "Ein Text ohne Englisch"}}},
    },
    "services": {"heat": {"description": "Erwärmt das Wasser auf eine `gegebene` Temperatur."}},
}


@pytest.fixture
def small_wheel(tmp_path, monkeypatch):
    """A wheel of two integrations, in English, German and traditional Chinese."""
    files = {"boiler": {"en": ENGLISH, "de": GERMAN}, "lamp": {"en": {"config": {"abort": {"x": "Failed to connect"}}}}}
    files["lamp"] |= {"de": {"config": {"abort": {"x": "Keine Verbindung"}}}, "en-GB": {"title": "A British lamp here"}}
    files["lamp"]["zh-Hant"] = {"config": {"abort": {"x": "無法連接到裝置"}}}
    path = tmp_path / "small.whl"
    with ZipFile(path, "w") as wheel:
        wheel.writestr("homeassistant/core.py", "raise SystemExit")
        for integration, by_locale in files.items():
            for locale, tree in by_locale.items():
                name = f"homeassistant/components/{integration}/translations/{locale}.json"
                wheel.writestr(name, json.dumps(tree))
    monkeypatch.setattr(home_assistant, "path_of", lambda package: path)
    interface.cache_clear()
    yield interface()
    interface.cache_clear()


def test_a_message_of_two_integrations_is_one_with_its_first_translation(small_wheel):
    assert small_wheel.integrations["Failed to connect"] == {"boiler", "lamp"}
    expected = {"en": "Failed to connect", "de": "Verbindung fehlgeschlagen", "zh_Hant": "無法連接到裝置"}
    assert small_wheel.texts["Failed to connect"] == expected
    assert "A British lamp here" not in small_wheel.texts


def test_markup_goes_and_placeholders_become_an_ellipsis(small_wheel):
    assert small_wheel.texts["Heats the water to a given temperature."]["de"].endswith("eine gegebene Temperatur.")
    assert "The address of your boiler at …." in small_wheel.texts
    assert not any("{" in text or "http" in text for by in small_wheel.texts.values() for text in by.values())


def test_short_texts_stay_only_if_something_explains_them(small_wheel):
    assert "Host" in small_wheel.texts and "Boiler" not in small_wheel.texts
    assert small_wheel.texts["Pump station"] == {"en": "Pump station"}, "what equals English is not translated"


def test_names_go_with_their_explanations_and_keys_with_kinds(small_wheel):
    explained = [
        ("Host", "The address of your boiler at …."),
        ("Start heating", "Heats the water to a given temperature."),
    ]
    assert sorted(small_wheel.explained) == explained
    kinds = {
        "Failed to connect": "problem",
        "Host": "setting",
        "Start heating": "action",
        "Level of hot water": "reading",
    }
    assert {text: small_wheel.kinds[text] for text in kinds} == kinds


def test_the_real_wheel_has_messages_of_every_kind_in_many_languages():
    found = interface()
    assert {*found.kinds.values()} == {*KINDS, "other"}
    assert len(found.texts) > 15_000 and len(found.explained) > 3_000
    number = {locale: sum(locale in by for by in found.texts.values()) for locale in ("de", "ru", "ja", "el", "he")}
    assert min(number.values()) > 5_000
    assert all(text == by["en"] for text, by in found.texts.items())


# The wheel itself -------------------------------------------------------------------------------


def test_a_missing_or_another_wheel_is_one_clear_error(tmp_path, monkeypatch):
    package = packages.Package("small", "1.0", "0" * 64, 3, "3.11", "nano")
    monkeypatch.setattr(packages, "folder", lambda: tmp_path)
    with pytest.raises(ValueError, match=r"small-1.0-py3-none-any.whl is not there; remedy: f2llm fetch nano"):
        packages.path_of(package)
    (tmp_path / package.file).write_bytes(b"other")
    with pytest.raises(ValueError, match=r"has the SHA-256 \w{64}, but must have 0{64}; remove it; remedy: f2llm"):
        packages.path_of(package)
