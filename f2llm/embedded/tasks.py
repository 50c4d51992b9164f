"""Evaluation tasks of the embedded corpus: plain dictionaries, which `f2llm.evaluation` hands to mteb.

Every task uses held-out texts only: messages, modules, integrations or whole languages that are in no training source.
The tasks were fixed before any model was trained, by one rule. Every type of MTEB's has a task, and so has every kind
of text. Most tasks are across languages, which a multilingual model is for, some are within English. Bitext is asked
for between languages in Latin letters and between scripts, apart.
A task is {name, type, instruction, languages, data}; `data` has one entry per subset.
"""

import random
from collections import defaultdict
from collections.abc import Callable
from functools import partial

from ..text import normalise
from .records import LABELS
from .texts import NUMBERS, Message, Texts, language_of

LATIN = {"fr": "fra", "de": "deu", "es": "spa", "pl": "pol", "fi": "fin", "tr": "tur", "vi": "vie", "sw": "swh"}
LATIN = {locale: f"{code}-Latn" for locale, code in LATIN.items()}  # mteb's codes: ISO 639-3 and script
OTHER_SCRIPTS = {"ru": "rus-Cyrl", "el": "ell-Grek", "ka": "kat-Geor", "he": "heb-Hebr", "ar": "arb-Arab"}
OTHER_SCRIPTS |= {"hi": "hin-Deva", "th": "tha-Thai", "ko": "kor-Hang", "ja": "jpn-Jpan", "zh": "zho-Hans"}
ZERO_SHOT = {"fo": "fao", "lb": "ltz", "oc": "oci", "tk": "tuk", "rm": "roh", "szl": "szl", "dsb": "dsb", "ia": "ina"}
ZERO_SHOT = {locale: f"{code}-Latn" for locale, code in ZERO_SHOT.items()}  # of texts.ZERO_SHOT, those with enough text
NAMES = ("territory", "language", "city", "currency", "unit", "script", "timezone")
TRANSLATE = "Find the translation."


PHRASES = ("list:", "relative:", "quantity:")


def tasks(texts: Texts, seed: int) -> list[dict]:
    """All tasks, in the order of the report."""
    draw = random.Random(f"evaluation:{seed}")
    return [make(name, texts, draw) for name, make in _makers().items()]


def _makers() -> dict[str, Callable[[str, Texts, random.Random], dict]]:
    """{name of a task: what makes it}."""
    return {
        "CldrNamesBitext": partial(_bitext, domains=NAMES, locales=LATIN),
        "CldrNamesCrossScriptBitext": partial(_bitext, domains=NAMES, locales=OTHER_SCRIPTS),
        "CldrPhrasesBitext": partial(_bitext, domains=PHRASES, locales=LATIN),
        "CldrPhrasesCrossScriptBitext": partial(_bitext, domains=PHRASES, locales=OTHER_SCRIPTS),
        "DjangoBitext": partial(_bitext, domains=("django:",), locales=LATIN),
        "DjangoCrossScriptBitext": partial(_bitext, domains=("django:",), locales=OTHER_SCRIPTS),
        "HomeAssistantBitext": partial(_bitext, domains=("home:",), locales=LATIN),
        "HomeAssistantCrossScriptBitext": partial(_bitext, domains=("home:",), locales=OTHER_SCRIPTS),
        "ZeroShotLanguagesBitext": partial(_bitext, domains=(*NAMES, "django:"), locales=ZERO_SHOT),
        "DocstringToCodeRetrieval": partial(_retrieval, field="code", instruction="Find the code."),
        "SummaryToBodyRetrieval": partial(_retrieval, field="body", instruction="Find the details."),
        "NameToExplanationRetrieval": partial(_explanations, locales=("en",)),
        "CrossLingualExplanationRetrieval": partial(_explanations, locales=(*LATIN, *OTHER_SCRIPTS)),
        "DjangoMessageReranking": partial(_reranking, domain="django:", group_of=lambda message: message.domain),
        "IntegrationMessageReranking": partial(_reranking, domain="home:", group_of=LABELS["integration"]),
        "TenseClassification": _tense,
        "NameKindClassification": _kinds,
        "MessagePurposeClassification": _purposes,
        "LanguageClassification": _languages,
        "PackageClustering": _packages,
        "QuantityClustering": _units,
        "IntegrationClustering": _integrations,
        "TranslationPairClassification": _pairs,
        "ListOverlapSTS": _overlap,
    }


def names_of_tasks() -> list[str]:
    """The names of all tasks, known before they are made."""
    return list(_makers())


def _task(name: str, kind: str, instruction: str, languages: dict[str, list[str]], data: dict) -> dict:
    return {"name": name, "type": kind, "instruction": instruction, "languages": languages, "data": data}


def _translations(by_concept: dict[str, dict[str, str]], locale: str) -> list[tuple[str, str, str]]:
    """(concept, text, English text), without those that are written alike and without repeats."""
    found, seen = [], set()
    for concept, known in sorted(by_concept.items()):
        if "en" not in known or locale not in known:
            continue
        text, english = known[locale], known["en"]
        keys = {normalise(text), "en:" + normalise(english)}
        if normalise(text) != normalise(english) and not keys & seen:
            seen |= keys
            found.append((concept, text, english))
    return found


def _bitext(name: str, texts: Texts, draw: random.Random, domains, locales, pairs: int = 80) -> dict:
    """Find the English of each text among the English of all: one subset per language."""
    languages, data = {}, {}
    by_concept = texts.by_concept(domains)
    for locale, code in locales.items():
        found = _translations(by_concept, locale)
        chosen = draw.sample(found, min(pairs, len(found)))
        if len(chosen) >= 40:
            subset = f"{code[:3]}-eng"
            languages[subset] = [code, "eng-Latn"]
            data[subset] = {"sentence1": [t for _, t, _ in chosen], "sentence2": [e for _, _, e in chosen]}
    return _task(name, "BitextMining", TRANSLATE, languages, data)


def _english(name: str, kind: str, instruction: str, data: dict) -> dict:
    return _task(name, kind, instruction, {"default": ["eng-Latn"]}, {"default": data})


def _retrieval(name: str, texts: Texts, _, field: str, instruction: str, queries: int = 400) -> dict:
    """One relevant passage per summary, among the passages of all summaries."""
    usable = [f for f in texts.functions if len(getattr(f, field)) >= 60]
    first = {getattr(f, field): f for f in reversed(usable)}  # equal passages: one is enough
    chosen = sorted(first.values())
    random.Random(name).shuffle(chosen)
    passages = [getattr(f, field) for f in chosen]
    relevant = [[index] for index in range(min(queries, len(chosen)))]
    data = {"queries": [f.summary for f in chosen[:queries]], "corpus": passages, "relevant": relevant}
    return _english(name, "Retrieval", instruction, data)


def _explanations(
    name: str, texts: Texts, draw: random.Random, locales: tuple, queries: int = 400, passages: int = 1000
) -> dict:
    """The English explanation of a name in one of `locales`; no two names or explanations are alike."""
    by_concept, known = texts.by_concept(("home:",)), defaultdict(set)
    for of, text in texts.explained:
        known["name", normalise(by_concept[of]["en"])].add(text)
        known["text", normalise(by_concept[text]["en"])].add(of)
    usable = [
        (by_concept[of], by_concept[text]["en"])
        for of, text in sorted(texts.explained)
        if len(known["name", normalise(by_concept[of]["en"])])
        == len(known["text", normalise(by_concept[text]["en"])])
        == 1
    ]
    draw.shuffle(usable)
    chosen = [
        (translated[draw.choice(here)], text)
        for translated, text in usable[:passages]
        if (here := [locale for locale in locales if locale in translated])
    ][:queries]
    corpus = [text for _, text in chosen]
    corpus += [text for _, text in usable[:passages] if text not in set(corpus)]
    relevant = [[index] for index in range(len(chosen))]
    data = {"queries": [of for of, _ in chosen], "corpus": corpus, "relevant": relevant}
    return _english(name, "Retrieval", "Find the explanation.", data)


def _reranking(
    name: str, texts: Texts, draw: random.Random, domain: str, group_of, queries: int = 200, candidates: int = 20
) -> dict:
    """The English of a translated message among messages of the same group."""
    by_group = defaultdict(dict)
    for message in texts.messages:
        if message.domain.startswith(domain):
            by_group[group_of(message)].setdefault(message.locale, {})[message.concept] = message.text
    usable = []
    for known in (by_group[group] for group in sorted(by_group) if len(by_group[group]["en"]) > 8):
        english = sorted(known["en"].values())
        usable += [
            (text, known["en"][concept], english)
            for locale in (*LATIN, *OTHER_SCRIPTS)
            for concept, text in sorted(known.get(locale, {}).items())
            if normalise(text) != normalise(known["en"][concept])
        ]
    corpus, rows = [], draw.sample(usable, min(queries, len(usable)))
    relevant, shown = [], []
    for _, own, english in rows:
        others = [other for other in english if other != own]
        offered = [own, *draw.sample(others, min(candidates - 1, len(others)))]
        relevant.append([len(corpus)])
        shown.append(list(range(len(corpus), len(corpus) + len(offered))))
        corpus += offered
    data = {"queries": [text for text, _, _ in rows], "corpus": corpus, "relevant": relevant, "candidates": shown}
    return _english(name, "Reranking", TRANSLATE, data)


def _labelled(rows: list[tuple[str, str]], draw: random.Random, per_label: int) -> list[tuple[str, str]]:
    """At most `per_label` different texts of each label, in random order; a text of two labels is left out."""
    labels_of, by_label = defaultdict(set), defaultdict(dict)
    for text, label in rows:
        labels_of[normalise(text)].add(label)
    for text, label in sorted(rows):
        if len(labels_of[normalise(text)]) == 1:
            by_label[label].setdefault(normalise(text), text)
    chosen = []
    for label, found in sorted(by_label.items()):
        chosen += [(text, label) for text in draw.sample(sorted(found.values()), min(per_label, len(found)))]
    draw.shuffle(chosen)
    return chosen


def _classification(name: str, rows: list[tuple[str, str]], instruction: str) -> dict:
    """Half of the rows train mteb's logistic regression, the other half is scored."""
    half, labels = len(rows) // 2, sorted({label for _, label in rows})
    train, test = (
        {"text": [text for text, _ in part], "label": [labels.index(label) for _, label in part]}
        for part in (rows[:half], rows[half:])
    )
    return _english(name, "Classification", instruction, {"train": train, "test": test})


def _tense(name: str, texts: Texts, draw: random.Random) -> dict:
    held_numbers = {str(number) for number in NUMBERS}
    rows = [
        (m.text, m.domain.split(":")[1])
        for m in texts.messages
        if m.domain.startswith("relative:") and not held_numbers.isdisjoint(m.text.split())
    ]
    instruction = "Future or past?"
    return _classification(name, _labelled(rows, draw, per_label=300), instruction)


def _kinds(name: str, texts: Texts, draw: random.Random) -> dict:
    kinds = ("territory", "language", "currency", "unit", "script", "timezone")
    rows = [(m.text, m.domain) for m in texts.messages if m.domain in kinds]
    return _classification(name, _labelled(rows, draw, per_label=160), "Identify the kind of name.")


def _purposes(name: str, texts: Texts, draw: random.Random) -> dict:
    """What a message of an interface is for, in many languages."""
    rows = [(m.text, m.domain) for m in _of_home(texts) if m.domain != "home:other"]
    return _classification(name, _labelled(rows, draw, per_label=160), "Identify the purpose of the message.")


def _languages(name: str, texts: Texts, draw: random.Random) -> dict:
    """The language of a message of an interface."""
    labels = ("en", *LATIN, *OTHER_SCRIPTS)
    domains = ("django:", "home:")
    rows = [(m.text, m.locale) for m in texts.messages if m.domain.startswith(domains) and m.locale in labels]
    return _classification(name, _labelled(rows, draw, per_label=60), "Identify the language.")


def _integrations(name: str, texts: Texts, draw: random.Random, labels: int = 16) -> dict:
    """The integration that a message belongs to, in many languages."""
    by_label = defaultdict(list)
    for message in _of_home(texts):
        if (label := LABELS["integration"](message)) != "several":
            by_label[label].append((message.text, label))
    largest = sorted(by_label, key=lambda label: (-len(by_label[label]), label))[:labels]
    rows = [row for label in largest for row in by_label[label]]
    return _clustering(name, _labelled(rows, draw, per_label=40), "Identify the integration.")


def _of_home(texts: Texts) -> list[Message]:
    return [m for m in texts.messages if m.domain.startswith("home:") and m.locale in ("en", *LATIN, *OTHER_SCRIPTS)]


def _clustering(name: str, rows: list[tuple[str, str]], instruction: str) -> dict:
    data = {"sentences": [text for text, _ in rows], "labels": [label for _, label in rows]}
    return _english(name, "Clustering", instruction, data)


def _packages(name: str, texts: Texts, draw: random.Random) -> dict:
    rows = [(f.summary, f.package) for f in texts.functions]
    return _clustering(name, _labelled(rows, draw, per_label=60), "Identify the package.")


def _units(name: str, texts: Texts, draw: random.Random) -> dict:
    rows = [(m.text, m.concept.split("/")[1].split("-")[0]) for m in texts.messages if m.domain == "unit"]
    return _clustering(name, _labelled(rows, draw, per_label=40), "Identify the quantity.")


def _pairs(name: str, texts: Texts, draw: random.Random, pairs: int = 600) -> dict:
    """Is the second text the translation of the first, or of another message?"""
    by_concept = texts.by_concept(("django:",))
    found = [pair for locale in (*LATIN, *OTHER_SCRIPTS) for pair in _translations(by_concept, locale)]
    chosen = draw.sample(found, min(pairs, len(found)))
    first, second, labels = [], [], []
    for position, (concept, text, english) in enumerate(chosen):
        if translated := position % 2 == 0:
            offered = english
        else:
            offered = draw.choice([other for other_concept, _, other in chosen if other_concept != concept])
        first.append(text)
        second.append(offered)
        labels.append(int(translated))
    data = {"sentence1": first, "sentence2": second, "labels": labels}
    return _english(name, "PairClassification", TRANSLATE, data)


def _overlap(name: str, texts: Texts, draw: random.Random, pairs: int = 600) -> dict:
    """How many members do two lists in different languages share? The score is their Jaccard index."""
    lists = sorted(
        m for m in texts.messages if m.domain.startswith("list:") and m.locale in ("en", *LATIN, *OTHER_SCRIPTS)
    )
    sharing = defaultdict(list)
    for message in lists:
        for member in message.concept.split("+"):
            sharing[member].append(message)
    first, second, scores = [], [], []
    for _ in range(pairs):
        one = draw.choice(lists)
        members = one.concept.split("+")
        pool = lists if draw.random() < 0.3 else sharing[draw.choice(members)]
        others = [message for message in pool if language_of(message.locale) != language_of(one.locale)]
        if not others:
            continue
        other = draw.choice(others)
        shared, union = set(members) & set(other.concept.split("+")), set(members) | set(other.concept.split("+"))
        first.append(one.text)
        second.append(other.text)
        scores.append(round(len(shared) / len(union), 4))
    data = {"sentence1": first, "sentence2": second, "score": scores}
    return _english(name, "STS", "Find similar text.", data)
