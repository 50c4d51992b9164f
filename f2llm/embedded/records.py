"""Training records of the embedded sources: one function per kind, each a pure function of texts and seed.

Retrieval records have query, passage and group (records of one group answer each other's queries);
clustering and classification records have query and label. All have language.
"""

import random
from collections import defaultdict

from ..text import normalise
from .texts import Message, Texts, language_of, script_of

ENGLISH_SHARE = 0.5  # of the bitext pairs with a choice of partner have English on one side


def message_pairs(texts: Texts, fields: dict, rows: int, seed: str) -> list[dict]:
    """Pairs of one message in two languages, spread evenly over locales. fields: domains, partner."""
    draw = random.Random(seed)
    by_concept = texts.by_concept(fields["domains"])
    records = []
    for concept, locale in _spread([(c, locale) for c, known in by_concept.items() for locale in known], draw):
        known = by_concept[concept]
        others = [other for other in known if language_of(other) != language_of(locale)]
        if fields["partner"] == "english":
            others = ["en"] if "en" in others else []
        if not others:
            continue
        other = "en" if "en" in others and draw.random() < ENGLISH_SHARE else draw.choice(others)
        pair = [(locale, known[locale]), (other, known[other])]
        draw.shuffle(pair)
        (query_locale, query), (passage_locale, passage) = pair
        if normalise(query) != normalise(passage):
            record = {"query": query, "passage": passage, "group": concept}
            records.append(record | {"language": language_of(query_locale), "to": language_of(passage_locale)})
        if len(records) == rows:
            break
    return records


def explained_pairs(texts: Texts, fields: dict, rows: int, seed: str) -> list[dict]:
    """A name and the text that explains it, in one language or in two, spread evenly over locales. fields: across."""
    draw = random.Random(seed)
    by_concept = texts.by_concept(("home:",))
    pairs = [((name, text), locale) for name, text in texts.explained for locale in by_concept[name]]
    records = []
    for (name, text), locale in _spread(pairs, draw):
        known = by_concept[text]
        others = [other for other in known if (language_of(other) != language_of(locale)) == fields["across"]]
        if fields["across"] and "en" in others and draw.random() < ENGLISH_SHARE:
            others = ["en"]
        if not others:
            continue
        other = draw.choice(others)
        record = {"query": by_concept[name][locale], "passage": known[other], "group": name}
        records.append(record | {"language": language_of(locale), "to": language_of(other)})
        if len(records) == rows:
            break
    return records


def function_pairs(texts: Texts, fields: dict, rows: int, seed: str) -> list[dict]:
    """Docstring summary -> the function's code, or -> the rest of its docstring. fields: passage, to."""
    usable = [f for f in texts.functions if len(getattr(f, fields["passage"])) >= 60]
    random.Random(seed).shuffle(usable)
    return [
        {"query": f.summary, "passage": getattr(f, fields["passage"]), "group": f.summary}
        | {"language": "en", "to": fields["to"]}
        for f in usable[:rows]
    ]


def message_labels(texts: Texts, fields: dict, rows: int, seed: str) -> list[dict]:
    """Messages with a label that is read off them. fields: domains, label, a key of LABELS."""
    draw = random.Random(seed)
    label_of = LABELS[fields["label"]]
    messages = [m for m in texts.messages if m.domain.startswith(tuple(fields["domains"])) and len(m.text) >= 4]
    messages = [m for m in messages if label_of(m) != "several"]
    chosen = _spread([(message, message.locale) for message in messages], draw)
    records, count = [], defaultdict(int)
    ceiling = max(4, 2 * rows // max(1, len({label_of(message) for message in messages})))
    for message, _ in chosen:
        label = label_of(message)
        if count[label] < ceiling:
            count[label] += 1
            records.append({"query": message.text, "label": label, "language": language_of(message.locale)})
        if len(records) == rows:
            break
    return records


def function_labels(texts: Texts, fields: dict, rows: int, seed: str) -> list[dict]:
    """Docstring summaries with their package, or whether they document a class or a function. fields: label."""
    functions = list(texts.functions)
    random.Random(seed).shuffle(functions)
    label_of = LABELS[fields["label"]]
    return [{"query": f.summary, "label": label_of(f), "language": "en"} for f in functions[:rows]]


LABELS = {
    "kind": lambda message: message.domain.split(":")[0],
    "subkind": lambda message: message.domain.split(":")[1],
    "language": lambda message: language_of(message.locale),
    "script": lambda message: script_of(message.text),
    "tense": lambda message: {"future": "in the future", "past": "in the past"}[message.domain.split(":")[1]],
    "integration": lambda message: message.concept.split("/")[0],
    "package": lambda function: function.package,
    "construct": lambda function: "a class" if function.is_class else "a function",
}
BUILDERS = {
    build.__name__: build for build in (message_pairs, explained_pairs, function_pairs, message_labels, function_labels)
}


def _spread(pairs: list[tuple[str | Message, str]], draw: random.Random) -> list[tuple]:
    """The pairs (thing, locale) in random order, one of each locale before the second of any."""
    pairs = sorted(pairs)
    draw.shuffle(pairs)
    seen, ranked = defaultdict(int), []
    for position, (_thing, locale) in enumerate(pairs):
        ranked.append((seen[locale], position))
        seen[locale] += 1
    return [pairs[position] for _, position in sorted(ranked)]
