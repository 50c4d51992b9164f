"""Real multilingual text that ships inside installed packages: nothing is downloaded, nothing is committed.

Messages that exist in many languages (CLDR names and phrases in Babel, the interfaces of Django and Home Assistant) and
English documentation with its Python source. A message is held out in every language at once: one of CLDR or Django
by the hash of its English text, one of Home Assistant if all integrations that have it are held out by the hash of
their names. A function is held out by the hash of its module.
"""

import ast
import hashlib
import random
import re
import sysconfig
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from babel import localedata
from babel.messages.mofile import read_mo

from ..text import normalise
from .home_assistant import interface

# Texts of these languages are in no training source: evaluation only.
ZERO_SHOT = ("fo", "lb", "oc", "tk", "rm", "kl", "ceb", "szl", "dsb", "ia")
PACKAGES = (
    *("stdlib", "django", "matplotlib", "networkx", "numpy", "pandas", "scipy", "sklearn", "sympy"),
    *("torch", "transformers"),
)
TIME_UNITS = ("year", "quarter", "month", "week", "day", "hour", "minute", "second")
NUMBERS = (2, 3, 4, 5, 7, 10, 12, 25, 40, 100)  # for "in 5 weeks", "12 metres"


class Message(NamedTuple):
    domain: str  # what kind of thing it is: territory, unit, relative:future, django:admin, home:problem, ...
    concept: str  # the same in all languages
    locale: str
    text: str


class Function(NamedTuple):
    package: str
    module: str
    is_class: bool
    summary: str  # first paragraph of the docstring
    body: str  # the rest of it
    code: str  # source without the docstring; empty where there is none


@dataclass(frozen=True)
class Texts:
    """One side of the split: everything that training may see, or everything that evaluation uses."""

    messages: list[Message]
    functions: list[Function]
    explained: Sequence[
        tuple[str, str]
    ] = ()  # concepts of messages of Home Assistant: a name, and the text that explains it

    def by_concept(self, domains) -> dict[str, dict[str, str]]:
        """{concept: {locale: text}} of the messages whose domain starts with one of `domains`."""
        table = defaultdict(dict)
        for message in self.messages:
            if message.domain.startswith(tuple(domains)):
                table[message.concept][message.locale] = message.text
        return table


def script_of(text: str) -> str:
    """The Unicode script of the first letter of a text, such as 'LATIN' or 'CYRILLIC'."""
    letter = next((character for character in text if character.isalpha()), "\0")
    return unicodedata.name(letter, "NONE").split()[0]


def language_of(locale: str) -> str:
    """'sr' of 'sr_Latn'."""
    return locale.split("_")[0]


@lru_cache(maxsize=2)
def texts(held_out_percent: int, salt: str) -> tuple[Texts, Texts]:
    """(training, evaluation). Source: CLDR through Babel, Django catalogs, installed Python packages."""

    def draw(key: str) -> int:
        return int(hashlib.sha256(f"{salt}:{key}".encode()).hexdigest(), 16)

    def held_out(key: str) -> bool:
        return draw(key) % 100 < held_out_percent

    sides = ([], [])
    names = cldr_names()
    english = {m.concept: m.text for m in names if m.locale == "en"}
    names = [message for message in names if message.concept in english]
    side_of = {concept: held_out(normalise(text)) for concept, text in english.items()}
    for message in [*names, *cldr_quantities(english)]:
        sides[side_of[message.concept.split("=")[0]]].append(message)
    held_out_units = sorted(TIME_UNITS, key=draw)[:2]  # both tenses of a unit, so that both can be asked for
    for message in cldr_relative_times():
        sides[message.concept.split("/")[1] in held_out_units].append(message)
    for side in (False, True):
        members = [message for message in names if side_of[message.concept] == side]
        sides[side].extend(cldr_lists(members, num_lists=150 if side else 900, seed=f"{salt}:{side}"))
    for message in django_messages(known={normalise(text) for text in english.values()}):
        sides[held_out(normalise(message.concept))].append(message)

    elsewhere = {normalise(message.text) for side in sides for message in side if message.locale == "en"}
    home, explained = home_messages(held_out, elsewhere)
    for side in (False, True):
        sides[side].extend(home[side])

    functions = ([], [])
    for function in python_functions():
        functions[held_out(function.module)].append(function)

    training = [message for message in sides[False] if language_of(message.locale) not in ZERO_SHOT]
    return Texts(training, functions[False], explained[False]), Texts(sides[True], functions[True], explained[True])


# Names and phrases of CLDR ----------------------------------------------------------------------


@lru_cache(maxsize=1)
def locales() -> dict[str, dict]:
    """{locale: its own CLDR data}, one locale per language and script, nothing inherited from English."""
    names = [n for n in localedata.locale_identifiers() if re.fullmatch(r"[a-z]{2,3}(_[A-Z][a-z]{3})?", n)]
    return {name: localedata.load(name, merge_inherited=False) for name in sorted(names)}


def cldr_names() -> list[Message]:
    """Territories, languages, scripts, currencies, units, cities, time zones, months, weekdays."""
    found = []
    for locale, data in locales().items():
        for domain, code, text in _names_of(data):
            text = " ".join(text.replace("\u200e", "").replace("\u200f", "").split())
            if len(text) > 1 and text != code and not text.isdigit() and "{" not in text:
                found.append(Message(domain, f"{domain}/{code}", locale, text))
    cities = {m.concept for m in found if m.domain == "city"} - {m.concept for m in found if m.locale == "en"}
    for concept in sorted(cities):  # English writes most cities as the zone id does: Europe/Paris
        found.append(Message("city", concept, "en", concept.rpartition("/")[2].replace("_", " ")))
    return found


def _names_of(data: dict):
    """(domain, code, text) of one locale's plain strings."""
    tables = {"territories": "territory", "languages": "language", "scripts": "script"}
    for key, domain in {**tables, "currency_names": "currency"}.items():
        yield from ((domain, str(code), text) for code, text in data.get(key, {}).items() if isinstance(text, str))
    for code, forms in data.get("unit_display_names", {}).items():
        if isinstance(forms, dict) and isinstance(forms.get("long"), str):
            yield "unit", code, forms["long"]
    for code, zone in data.get("time_zones", {}).items():
        if isinstance(zone, dict) and isinstance(zone.get("city"), str):
            yield "city", code, zone["city"]
    for code, zone in data.get("meta_zones", {}).items():
        long = zone.get("long") if isinstance(zone, dict) else None
        if isinstance(long, dict) and isinstance(long.get("standard", long.get("generic")), str):
            yield "timezone", code, long.get("standard", long.get("generic"))
    for key, domain in {"months": "month", "days": "weekday"}.items():
        table = data.get(key, {}).get("format", {})
        wide = table.get("wide", {}) if isinstance(table, dict) else {}
        if isinstance(wide, dict):
            yield from ((domain, str(code), text) for code, text in wide.items() if isinstance(text, str))


def cldr_relative_times() -> list[Message]:
    """'in 5 weeks', '5 weeks ago', by each language's own pattern."""
    found = []
    for locale, data in locales().items():
        fields = data.get("date_fields", {})
        for unit in TIME_UNITS:
            for tense in ("future", "past"):
                forms = fields.get(unit, {}).get(tense, {}) if isinstance(fields.get(unit, {}), dict) else {}
                pattern = forms.get("other", "") if isinstance(forms, dict) else ""
                if re.search(r"\w", pattern.replace("{0}", "")):
                    for number in NUMBERS:
                        concept, text = f"relative/{unit}/{tense}={number}", pattern.replace("{0}", str(number))
                        found.append(Message(f"relative:{tense}", concept, locale, text))
    return found


def cldr_quantities(english: dict[str, str]) -> list[Message]:
    """'12 metres', by each language's own plural pattern, two numbers a unit."""
    found = []
    for locale, data in locales().items():
        for unit, forms in data.get("unit_patterns", {}).items():
            long = forms.get("long") if isinstance(forms, dict) else None
            pattern = long.get("other", "") if isinstance(long, dict) else ""
            if f"unit/{unit}" not in english or "{0}" not in pattern:
                continue
            for number in random.Random(unit).sample(NUMBERS, 2):
                text = " ".join(pattern.replace("{0}", str(number)).split())
                found.append(Message(f"quantity:{unit.split('-')[0]}", f"unit/{unit}={number}", locale, text))
    return found


def cldr_lists(names: list[Message], num_lists: int, seed: str) -> list[Message]:
    """'France, Kenya and Japan', by each language's own list pattern; the concept names its members."""
    draw = random.Random(seed)
    by_locale = defaultdict(dict)
    for message in names:
        if message.domain in ("territory", "language", "currency", "city"):
            by_locale[message.locale][message.concept] = message.text
    pools = defaultdict(list)
    for concept in sorted(by_locale["en"]):
        pools[concept.split("/")[0]].append(concept)
    found = []
    for _ in range(num_lists):
        domain = draw.choice(sorted(pools))
        members = draw.sample(pools[domain], min(draw.choice((2, 3, 3, 4)), len(pools[domain])))
        for locale, known in by_locale.items():
            patterns = locales()[locale].get("list_patterns", {}).get("standard")
            if len(members) > 1 and isinstance(patterns, dict) and all(member in known for member in members):
                text = _join([known[member] for member in members], patterns)
                found.append(Message(f"list:{domain}", "+".join(members), locale, text))
    return found


def _join(parts: list[str], patterns: dict) -> str:
    """A list in words. Source: Unicode TR35, list patterns; a missing pattern is a comma."""
    if len(parts) == 2:
        return patterns.get("2", patterns.get("end", "{0}, {1}")).format(*parts)
    text = patterns.get("start", "{0}, {1}").format(parts[0], parts[1])
    for part in parts[2:-1]:
        text = patterns.get("middle", "{0}, {1}").format(text, part)
    return patterns.get("end", "{0}, {1}").format(text, parts[-1])


# Django's catalogs ------------------------------------------------------------------------------


def django_messages(known: set[str]) -> list[Message]:
    """Interface sentences; the concept is the English text. Those that CLDR knows already are left out."""
    root = Path(find_spec("django").origin).parent
    found = {}
    for path in sorted(root.glob("**/locale/*/LC_MESSAGES/*.mo")):
        parts = path.relative_to(root).parts
        app = "core" if parts[0] == "conf" else parts[1]
        locale = parts[parts.index("locale") + 1]
        with path.open("rb") as file:
            entries = read_mo(file)
        for entry in (entry for entry in entries if entry.id):
            english, text = _plain(_first(entry.id)), _plain(_first(entry.string))
            usable = re.search(r"[a-z]{3}", english) and text and normalise(english) not in known
            if usable and not english.endswith("_FORMAT"):
                found.setdefault((english, "en"), Message(f"django:{app}", english, "en", english))
                if locale != "en":
                    found.setdefault((english, locale), Message(f"django:{app}", english, locale, text))
    return list(found.values())


def _first(value) -> str:
    return (value[0] if isinstance(value, (tuple, list)) else value) or ""


def _plain(text: str) -> str:
    """A message without markup; a named field becomes its name, '%(user_name)s' -> 'user name'."""
    text = re.sub(r"%\((\w+)\)[.\d]*[a-z]|\{(\w+)\}", lambda match: (match[1] or match[2]).replace("_", " "), text)
    return " ".join(re.sub(r"%[sd]|<[^>]+>|&nbsp;", " ", text).split())


# Home Assistant's interface ---------------------------------------------------------------------


def home_messages(held_out, elsewhere: set[str]) -> tuple[tuple[list, list], tuple[list, list]]:
    """(training, held-out) messages and pairs (name, explanation), without messages that are `elsewhere`.

    A concept is the integration, or "several", a slash and the English text.
    """
    found, sides, concepts = interface(), ([], []), ({}, {})
    integrations = defaultdict(set)  # of texts that differ in case and punctuation alone
    for text, names in found.integrations.items():
        integrations[normalise(text)] |= names
    for text, by_locale in found.texts.items():
        if normalise(text) in elsewhere:
            continue
        of = sorted(integrations[normalise(text)])
        side, concept = all(map(held_out, of)), f"{of[0] if len(of) == 1 else 'several'}/{text}"
        concepts[side][text] = concept
        domain = f"home:{found.kinds[text]}"
        sides[side].extend(Message(domain, concept, locale, known) for locale, known in by_locale.items())
    explained = tuple(
        [(known[name], known[text]) for name, text in found.explained if name in known and text in known]
        for known in concepts
    )
    return sides, explained


# Python documentation ---------------------------------------------------------------------------


def python_functions(per_package: int = 700) -> list[Function]:
    """Documented functions and classes, at most `per_package` of each package, whole modules in a fixed order."""
    found, seen = [], set()
    for package in PACKAGES:
        fresh = (f for path in _modules(package) for f in _functions_of(package, path))
        fresh = (f for f in fresh if not (normalise(f.summary) in seen or seen.add(normalise(f.summary))))
        found.extend(islice(fresh, per_package))
    return found


def _modules(package: str) -> list[Path]:
    """Source files of a package in an order that depends on their names only, so that a sample is a fair one."""
    root = _root(package)
    skip = {
        "site-packages",
        "dist-packages",
        "tests",
        "test",
        "testing",
        "idlelib",
        "lib2to3",
        "_vendor",
        "__pycache__",
    }
    paths = [path for path in root.rglob("*.py") if not skip & set(path.relative_to(root).parts)]
    return sorted(paths, key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).hexdigest())


def _root(package: str) -> Path:
    if package == "stdlib":
        return Path(sysconfig.get_paths()["stdlib"])
    if find_spec(package) is None:
        raise ValueError(
            f"package '{package}' is not installed, and the embedded corpus reads its docstrings; "
            "remedy: pip install -e '.[embedded,pipeline,eval]' -c constraints.txt"
        )
    return Path(find_spec(package).origin).parent


def _functions_of(package: str, path: Path):
    """The documented functions and classes of one module; a file that is not Python 3 has none."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
            tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    lines, module = source.split("\n"), f"{package}/{path.relative_to(_root(package)).as_posix()}"
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", ast.get_docstring(node) or "")]
        summary = paragraphs[0]
        if not (15 <= len(summary) <= 300 and len(summary.split()) >= 3):
            continue
        body = " ".join(part for part in paragraphs[1:] if not re.match(r"-{3,}|={3,}|>>>", part))[:500]
        is_class = isinstance(node, ast.ClassDef)
        yield Function(package, module, is_class, summary, body, "" if is_class else _code_of(node, lines))


def _code_of(node, lines: list[str]) -> str:
    """Source of a function without its docstring, at most 600 characters; empty where it only raises or passes."""
    rest = node.body[1:]
    if not rest or (len(rest) == 1 and isinstance(rest[0], (ast.Pass, ast.Raise))):
        return ""
    kept = lines[node.lineno - 1 : node.body[0].lineno - 1] + lines[rest[0].lineno - 1 : node.end_lineno]
    return re.sub(r"[ \t]+", " ", "\n".join(kept))[:600]
