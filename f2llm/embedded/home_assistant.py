"""Messages of Home Assistant's interface in some 60 languages, read from its wheel (Apache-2.0).

Texts of settings, devices, actions and errors: sentences, beside the names and phrases of CLDR. A message of several
integrations, as "Failed to connect", is one message.
"""

import json
import re
from collections import defaultdict
from functools import lru_cache
from typing import NamedTuple
from zipfile import ZipFile

from ..store.packages import HOME_ASSISTANT, path_of

FILE = re.compile(r"homeassistant/components/(\w+)/translations/([\w-]+)\.json")
LOCALES = {"en-GB": None, "zh-Hans": "zh"}  # of the wheel, what is not its name here: None: not read
LEAST_CHARACTERS = 12
KINDS = {  # what a message is for, by the beginning of its key
    "problem": ("config.error", "config.abort", "options.error", "options.abort", "exceptions", "issues"),
    "reading": ("entity.sensor", "entity.binary_sensor"),
    "control": ("entity.switch", "entity.number", "entity.select", "entity.button"),
    "action": ("services",),
    "setting": ("config.step", "options.step"),
    "event": ("device_automation", "triggers", "conditions"),
}
EXPLAINED = {"name": "description", "title": "description", "data": "data_description"}  # a key and what explains it


class Interface(NamedTuple):
    """texts: {English text: {locale: text}}; integrations, kinds: of each English text; explained: (name, text)."""

    texts: dict[str, dict[str, str]]
    integrations: dict[str, set[str]]
    kinds: dict[str, str]
    explained: list[tuple[str, str]]


@lru_cache(maxsize=1)
def interface() -> Interface:
    """All messages of at least 12 characters, and names of any length that a message explains.

    ValueError if the wheel is not there.
    """
    files = defaultdict(dict)
    with ZipFile(path_of(HOME_ASSISTANT)) as wheel:
        for name in sorted(wheel.namelist()):
            if match := FILE.fullmatch(name):
                locale = LOCALES.get(match[2], match[2].replace("-", "_"))
                if locale:
                    files[match[1]][locale] = dict(_leaves(json.loads(wheel.read(name))))
    texts, integrations, kinds, explained = defaultdict(dict), defaultdict(set), {}, {}
    for integration, by_locale in files.items():
        english = {key: plain for key, text in by_locale.pop("en").items() if (plain := _plain(text))}
        pairs = {key: other for key in english if (other := _explaining(key)) in english}
        for key, text in english.items():
            if len(text) < LEAST_CHARACTERS and key not in pairs:
                continue
            integrations[text].add(integration)
            kinds.setdefault(text, next((kind for kind, begins in KINDS.items() if key.startswith(begins)), "other"))
            texts[text].setdefault("en", text)
            for locale, translated in by_locale.items():
                if key in translated and locale not in texts[text]:
                    plain = _plain(translated[key])
                    if plain and plain != text:
                        texts[text][locale] = plain
        explained |= dict.fromkeys((english[key], english[other]) for key, other in pairs.items())
    known = [(name, text) for name, text in explained if len(text) >= 2 * LEAST_CHARACTERS and name != text]
    return Interface(dict(texts), dict(integrations), kinds, known)


def _explaining(key: str) -> str | None:
    """The key of the text that explains the one of `key`: services.start.name -> services.start.description."""
    parts = key.split(".")
    for position in (-1, -2):
        if len(parts) > 1 and parts[position] in EXPLAINED:
            return ".".join([*parts[:position], EXPLAINED[parts[position]], *parts[len(parts) + position + 1 :]])
    return None


def _leaves(tree: dict, path: str = ""):
    """(key with dots, text) of every message."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield path + key, value


def _plain(text: str) -> str:
    """A message without markup, addresses and line breaks; a placeholder becomes an ellipsis. Empty without words."""
    if any(sign in text for sign in "[<{*`_#/"):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
        text = re.sub(r"<[^>]+>|https?://\S+|[*`_#]{1,3}(?=\S)|(?<=\S)[*`_]{1,3}", " ", text)
        text = re.sub(r"\{[^{}]*\}", "…", text)
    return " ".join(text.split()) if re.search(r"[^\W\d_]{2}", text) else ""
