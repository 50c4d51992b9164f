"""The registry of data sources: data/sources.yaml, read and checked, and the choice of sources for a run."""

import difflib
import re
from collections import defaultdict
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path

from .config import TASKS, Data, read_yaml

RECIPES = ("v1", "v2", "embedded", "local")
EMBEDDED_CONVERTERS = ("message_pairs", "function_pairs", "message_labels", "function_labels")
CONVERTER_NAMES = (
    *("pairs", "bitext", "nli", "sts", "duplicates", "conversation", "qrels", "labels"),
    *EMBEDDED_CONVERTERS,
)
PUBLISHED = {  # the papers' totals: sources, rows, rows of stage 1
    "v2": (157, 60_147_938, 26_693_280),
    "v1": (60, 5_933_988, 0),
}


MARKS = ("<!-- registry: written by `f2llm readme` -->", "<!-- end of registry -->")  # in data/README.md
OF_LOCAL_FILES = {  # what an entry of local files need not say: it is about published sets
    "title": None,
    "family": "Local",
    "stage1": False,
    "published_rows": None,
    "file_rows": None,
    "hub_id": None,
    "hub_revision": None,
    "hub_files": [],
    "certainty": "certain",
    "languages": None,
    "commercial": "unknown",
    "overlap": [],
    "instruction_from": "ours",
    "converter": None,
    "fields": {},
    "rows": None,
}


@dataclass(frozen=True)
class Source:
    """One entry of data/sources.yaml, whose header says what each key means."""

    name: str
    title: str
    family: str
    task: str
    recipes: list[str]
    stage1: bool
    published_rows: int | None
    files: list[str]
    file_rows: list[int] | None
    hub_id: str | None
    hub_revision: str | None
    hub_files: list[str]
    certainty: str
    languages: list[str] | int | None
    licence: str
    commercial: bool | str
    overlap: list[str]
    instruction: str
    instruction_from: str
    symmetric: bool
    converter: str | None
    fields: dict
    rows: int | None


def load_registry(path: Path = Path("data/sources.yaml")) -> list[Source]:
    """All sources, checked; a ValueError names file, entry, key, value and the rule that is broken."""
    entries = read_yaml(path).get("sources")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} has no list 'sources'; remedy: restore it with git checkout -- {path}")
    sources = [_checked(entry, _where(path, number, entry)) for number, entry in enumerate(entries, start=1)]
    _check_names(sources, path)
    _check_files(sources, path)
    return sources


def choose_sources(registry: list[Source], data: Data, recipe: str) -> tuple[list[Source], dict[str, str]]:
    """(sources to train on, {name: why it is left out}) of one mixture, in the registry's order.

    The mixture is data.from where that is embedded or local, else `recipe`, v1 or v2. Of local sources all are in
    stage 1 where none is marked, so that it is never empty. A ValueError where
    data.only or data.leave_out name no source of it, or where nothing remains.
    """
    mixture = data.source if data.source in ("embedded", "local") else recipe
    sources = [source for source in registry if mixture in source.recipes]
    if not sources:
        raise ValueError(f"no source has recipe {mixture!r}; remedy: add one to data/sources.yaml")
    for key, names in (("only", data.only), ("leave_out", data.leave_out)):
        _check_known(names, [source.name for source in sources], f"data.{key}", mixture)
    left_out = {source.name: reason for source in sources if (reason := _reason(source, data))}
    chosen = [source for source in sources if source.name not in left_out]
    remedy = "remedy: relax data.only, data.leave_out or data.licences"
    if not chosen:
        raise ValueError(f"none of the {len(sources)} sources of {mixture} remain: {_counted(left_out)}; {remedy}")
    if mixture == "local" and not any(source.stage1 for source in chosen):
        return [replace(source, stage1=True) for source in chosen], left_out
    if mixture != "v1" and not any(source.stage1 for source in chosen):
        raise ValueError(
            f"no source for stage 1 of {mixture} remains, {len(chosen)} without stage1: true do: "
            f"{_counted(left_out)}; {remedy}"
        )
    return chosen, left_out


def registry_markdown(registry: list[Source]) -> str:
    """The registry as Markdown: its totals beside the papers', then one table of sources per family."""
    lines = ["| mixture | sources | papers | rows | papers | rows of stage 1 | papers |", "|---|" + "---:|" * 6]
    for mixture, published in PUBLISHED.items():
        ours = _totals(source for source in registry if mixture in source.recipes)
        cells = [f"{number:,}" for pair in zip(ours, published, strict=True) for number in pair]
        lines.append(f"| {mixture} | {' | '.join(cells)} |")
    families = defaultdict(list)
    for source in registry:
        families[source.family].append(source)
    for family, sources in families.items():
        lines += ["", f"### {family}", "", _HEADER, "|---|---|---|---|---:|---|---|---|---|"]
        lines += [_row(source) for source in sources]
    return "\n".join(lines)


# Checking ---------------------------------------------------------------------------------------


def _matches(pattern: str):
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _one_of(*choices):
    return lambda value: type(value) in map(type, choices) and value in choices


def _strings(value) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


def _count(value) -> bool:
    return type(value) is int and value > 0


def _range(value) -> bool:
    numbers = isinstance(value, list) and len(value) == 2 and all(type(number) is int for number in value)
    return numbers and 0 <= value[0] < value[1]


def _optional(test):
    return lambda value: value is None or test(value)


_TEXT = _matches(r"\S(.*\S)?")
_LICENCE = _matches(r"[A-Za-z0-9.+-]+( (AND|OR|WITH) [A-Za-z0-9.+-]+)*")
RULES = {  # key: (test of its value, the rule in words)
    "name": (_matches("[a-z0-9_]+"), "of letters a-z, digits and underscores"),
    "title": (_TEXT, "a line of text"),
    "family": (_TEXT, "a line of text"),
    "task": (_one_of(*TASKS), f"one of: {', '.join(TASKS)}"),
    "recipes": (lambda v: _strings(v) and v and set(v) <= set(RECIPES), f"a list of some of: {', '.join(RECIPES)}"),
    "stage1": (_one_of(True, False), "true or false"),
    "published_rows": (_optional(_count), "a number above 0, or null"),
    "files": (_strings, "a list of file stems"),
    "file_rows": (_optional(_range), "null, or [first, last) with 0 <= first < last"),
    "hub_id": (_optional(_TEXT), "the id of a dataset, github:owner/name, a URL, or null"),
    "hub_revision": (_optional(_matches("[0-9a-f]{40}")), "a commit sha of 40 hexadecimal digits, or null"),
    "hub_files": (_strings, "a list of globs"),
    "certainty": (_one_of("certain", "likely", "unknown"), "one of: certain, likely, unknown"),
    "languages": (
        _optional(lambda v: _count(v) or (_strings(v) and bool(v))),
        "a list of codes, their number, or null (counted at assembly)",
    ),
    "licence": (_LICENCE, "an SPDX expression, LicenseRef-<name>, or unknown"),
    "commercial": (_one_of(True, False, "unknown"), "true, false or unknown"),
    "overlap": (_strings, "a list of MTEB tasks"),
    "instruction": (_TEXT, "a line of text"),
    "instruction_from": (_one_of("v1", "mteb", "ours"), "one of: v1, mteb, ours"),
    "symmetric": (_one_of(True, False), "true or false"),
    "converter": (_optional(_one_of(*CONVERTER_NAMES)), f"null or one of: {', '.join(CONVERTER_NAMES)}"),
    "fields": (lambda v: isinstance(v, dict), "a table"),
    "rows": (_optional(_count), "a number above 0, or null"),
}


def _where(path: Path, number: int, entry) -> str:
    name = entry.get("name") if isinstance(entry, dict) else entry
    return f"{path}, source {number} ({name if isinstance(name, str) else repr(name)})"


def _checked(entry, where: str) -> Source:
    """One entry, every value alone and then those that must agree."""
    known = [field.name for field in fields(Source)]
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: is no table, but must have the keys {', '.join(known)}")
    if entry.get("recipes") == ["local"]:
        entry = OF_LOCAL_FILES | {"title": entry.get("name")} | entry
    for key in entry:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}{_closest(key, known)}; known keys: {', '.join(known)}")
    for key in known:
        if key not in entry:
            raise ValueError(f"{where}: key {key!r} is missing; remedy: add it, nothing has a default")
        test, rule = RULES[key]
        if not test(entry[key]):
            raise ValueError(f"{where}: {key} is {entry[key]!r}, but must be {rule}")
    source = Source(**entry)
    _check_agreement(source, where)
    return source


def _check_agreement(source: Source, where: str) -> None:
    """The rules that take two keys."""
    embedded = "embedded" in source.recipes
    if source.stage1 and source.task != "retrieval":
        raise ValueError(f"{where}: stage1 is true and task {source.task}, but stage 1 takes retrieval sources only")
    if source.file_rows and len(source.files) != 1:
        raise ValueError(f"{where}: file_rows is {source.file_rows}, but files has {len(source.files)} files, not one")
    if source.hub_revision and not source.hub_id:
        raise ValueError(f"{where}: hub_revision is {source.hub_revision}, but hub_id is null")
    if (source.converter is None) != (not source.fields):
        raise ValueError(
            f"{where}: fields is {source.fields} and converter {source.converter}, but fields are {{}} "
            "exactly where converter is null"
        )
    if (source.converter in EMBEDDED_CONVERTERS) != embedded:
        raise ValueError(
            f"{where}: converter is {source.converter} and recipes {source.recipes}, but the embedded sources "
            f"and no others use: {', '.join(EMBEDDED_CONVERTERS)}"
        )


def _check_names(sources: list[Source], path: Path) -> None:
    first = {}
    for number, source in enumerate(sources, start=1):
        if source.name in first:
            where = _where(path, number, {"name": source.name})
            raise ValueError(
                f"{where}: name is {source.name!r}, but must be unique, and source {first[source.name]} has it"
            )
        first[source.name] = number


def _check_files(sources: list[Source], path: Path) -> None:
    """Within a recipe a file belongs to one source, or to several that share out its rows."""
    taken = defaultdict(list)  # (recipe, file): sources
    for number, source in enumerate(sources, start=1):
        for recipe, file in product(source.recipes, source.files):
            for other in taken[recipe, file]:
                if not _apart(source.file_rows, other.file_rows):
                    raise ValueError(
                        f"{_where(path, number, {'name': source.name})}: files has {file!r}, rows {source.file_rows}, "
                        f"but in recipe {recipe} source '{other.name}' has its rows {other.file_rows} (null: all)"
                    )
            taken[recipe, file].append(source)


def _apart(rows: list[int] | None, others: list[int] | None) -> bool:
    return bool(rows and others) and (rows[1] <= others[0] or others[1] <= rows[0])


# Choosing ---------------------------------------------------------------------------------------


def _reason(source: Source, data: Data) -> str | None:
    """Why the source is left out, None where it is not."""
    if data.only and source.name not in data.only:
        return "not named in data.only"
    if source.name in data.leave_out:
        return "named in data.leave_out"
    if data.licences in ("known", "commercial") and source.licence == "unknown":
        return "licence unknown"
    if data.licences == "commercial" and source.commercial is not True:
        return "commercial use unknown" if source.commercial == "unknown" else "no commercial use"
    if data.source == "sources" and not (source.converter and source.hub_files):
        return "no converter, or no files of the original set, in the registry"
    return None


def _check_known(names: list[str], known: list[str], where: str, mixture: str) -> None:
    for name in names:
        if name not in known:
            raise ValueError(
                f"{where} names {name!r}, which is none of the {len(known)} sources of {mixture}"
                f"{_closest(name, known)}; remedy: take a name of data/sources.yaml"
            )


def _closest(name, known: list[str]) -> str:
    near = difflib.get_close_matches(str(name), known, n=3)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def _counted(left_out: dict[str, str]) -> str:
    reasons = list(left_out.values())
    return ", ".join(f"{reasons.count(reason)} {reason}" for reason in dict.fromkeys(reasons)) or "none left out"


# Showing ----------------------------------------------------------------------------------------

_HEADER = "| source | recipes | task | languages | rows | licence | original | converter | MTEB evaluates on it |"


def _totals(sources) -> tuple[int, int, int]:
    """(sources, published rows, published rows of stage 1)"""
    sources = list(sources)
    rows = [source.published_rows or 0 for source in sources]
    return len(sources), sum(rows), sum(n for n, source in zip(rows, sources, strict=True) if source.stage1)


def _row(source: Source) -> str:
    languages = ", ".join(source.languages) if isinstance(source.languages, list) else source.languages or ""
    rows = f"{source.published_rows:,}" if source.published_rows else f"up to {source.rows:,}" if source.rows else ""
    cells = [source.title, ", ".join(source.recipes), source.task, languages, rows, source.licence]
    cells += [source.hub_id or "", "yes" if source.converter else "no", ", ".join(source.overlap)]
    return f"| {' | '.join(str(cell) for cell in cells)} |".replace("  ", " ")
