"""The registry of data sources: data/sources.yaml, read and checked, and the choice of sources for a run."""

from collections import defaultdict
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import PositiveInt, model_validator

from ..config import Commit, Data, Task, read_yaml
from ..store.checked import build, checked, closest, matches, must_be, require

EmbeddedConverter = Literal["message_pairs", "explained_pairs", "function_pairs", "message_labels", "function_labels"]
Converter = Literal["pairs", "bitext", "nli", "sts", "duplicates", "conversation", "qrels", "labels", EmbeddedConverter]
Recipe = Literal["v1", "v2", "embedded", "local"]
RECIPES, EMBEDDED_CONVERTERS, CONVERTER_NAMES = get_args(Recipe), get_args(EmbeddedConverter), get_args(Converter)
PUBLISHED = {  # the papers' totals: sources, rows, rows of stage 1
    "v2": (157, 60_147_938, 26_693_280),
    "v1": (60, 5_933_988, 0),
}

LOCAL = Path("data/local")  # the folder of local files: a stage depends on it
OF_LOCAL_FILES = {  # defaults for entries of local files, of keys that describe published sets
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


Line = Annotated[str, must_be("a line of text", matches(r"\S(.*\S)?"))]
Flag = Annotated[bool, must_be("true or false")]
Rows = Annotated[PositiveInt | None, must_be("a number above 0, or null")]
Languages = Annotated[
    Annotated[list[str], must_be("", lambda codes: codes and all(codes))] | PositiveInt | None,
    must_be("a list of codes, their number, or null (counted at assembly)"),
]
_LICENCE = r"[A-Za-z0-9.+-]+( (AND|OR|WITH) [A-Za-z0-9.+-]+)*"


def _is_range(rows: list[int] | None) -> bool:
    return rows is None or (len(rows) == 2 and 0 <= rows[0] < rows[1])


def _names(rule: str):
    """A list of names, none of them empty."""
    return Annotated[list[str], must_be(rule, all)]


@checked
class Source:
    """One entry of data/sources.yaml, whose header says what each key means."""

    name: Annotated[str, must_be("of letters a-z, digits and underscores", matches("[a-z0-9_]+"))]
    title: Line
    family: Line
    task: Task
    recipes: Annotated[list[Recipe], must_be(f"a list of some of: {', '.join(RECIPES)}", len)]
    stage1: Flag
    published_rows: Rows
    files: _names("a list of file stems")
    file_rows: Annotated[list[int] | None, must_be("null, or [first, last) with 0 <= first < last", _is_range)]
    hub_id: Annotated[Line | None, must_be("the id of a dataset, github:owner/name, a URL, or null")]
    hub_revision: Annotated[Commit | None, must_be("a commit sha of 40 hexadecimal digits, or null")]
    hub_files: _names("a list of globs")
    certainty: Literal["certain", "likely", "unknown"]
    languages: Languages
    licence: Annotated[str, must_be("an SPDX expression, LicenseRef-<name>, or unknown", matches(_LICENCE))]
    commercial: Annotated[bool | Literal["unknown"], must_be("true, false or unknown")]
    overlap: _names("a list of MTEB tasks")
    instruction: Line
    instruction_from: Literal["v1", "mteb", "ours"]
    symmetric: Flag
    converter: Annotated[Converter | None, must_be(f"null or one of: {', '.join(CONVERTER_NAMES)}")]
    fields: Annotated[dict[str, Any], must_be("a table")]
    rows: Rows

    @model_validator(mode="after")
    def _agrees(self):
        require(
            not self.file_rows or len(self.files) == 1,
            f"file_rows is {self.file_rows}, but files has {len(self.files)} files, not one",
        )
        require(
            not self.hub_revision or self.hub_id is not None, f"hub_revision is {self.hub_revision}, but hub_id is null"
        )
        require(
            (self.converter is None) == (not self.fields),
            f"fields is {self.fields} and converter {self.converter}, but fields are {{}} exactly where converter is "
            "null",
        )
        require(
            (self.converter in EMBEDDED_CONVERTERS) == ("embedded" in self.recipes),
            f"converter is {self.converter} and recipes {self.recipes}, but the embedded sources and no others use: "
            f"{', '.join(EMBEDDED_CONVERTERS)}",
        )
        return self


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

    The mixture is data.from if that is embedded or local, otherwise `recipe` (v1 or v2). If no local source is marked
    with stage1: true, all of them are used in stage 1, so that it is never empty. ValueError if data.only or
    data.leave_out name a source that the mixture does not have, or if no source remains.
    """
    mixture = data.source if data.source in ("embedded", "local") else recipe
    sources = [source for source in registry if mixture in source.recipes]
    if not sources:
        raise ValueError(
            f"no source has recipe {mixture!r}; remedy: add one to data/sources.yaml, as its first lines show"
        )
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


# Files ------------------------------------------------------------------------------------------


def files_needed(sources: list[Source], data: Data) -> list[tuple[str, list[str], str | None]]:
    """(repository, names or globs, commit or None) of all files that the mirror must hold for these sources."""
    if data.source == "released":
        return [(data.released, [f"{stem}.parquet" for source in sources for stem in source.files], data.revision)]
    if data.source == "sources":
        return [(source.hub_id, source.hub_files, source.hub_revision) for source in sources]
    return []


def fetch_command(data: Data) -> str:
    """The command that downloads the missing files of a configuration."""
    names = [f" --set 'data.{key}=[{', '.join(getattr(data, key))}]'" for key in ("only", "leave_out")]
    chosen = [option for key, option in zip(("only", "leave_out"), names) if getattr(data, key)]
    return f"f2llm fetch --set data.from={data.source}{''.join(chosen)}"


def local_paths(source: Source, *folders: Path) -> list[Path]:
    """The files of a local source, each in the first of the folders that has it; ValueError if one is in none."""
    if not source.files:
        raise ValueError(f"source '{source.name}' names no files; remedy: files: [name of a file in {LOCAL}]")
    paths, missing = [], []
    for name in source.files:
        path = next((folder / name for folder in folders if (folder / name).is_file()), folders[0] / name)
        folder = next((folder for folder in folders if path == folder / name), folders[0])
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"source '{source.name}': {path} lies outside {folder}; remedy: move the file there")
        paths.append(path)
        missing += [] if path.is_file() else [name]
    if missing:
        there = [path.relative_to(folders[-1]).as_posix() for path in folders[-1].rglob("*") if path.is_file()]
        names = ", ".join(str(folders[0] / name) for name in missing)
        raise ValueError(
            f"source '{source.name}': {names} missing{closest(missing[0], there)}; "
            f"remedy: put the file into {folders[0]}, or correct files in data/sources.yaml"
        )
    return paths


# Checking ---------------------------------------------------------------------------------------


def _where(path: Path, number: int, entry) -> str:
    name = entry.get("name") if isinstance(entry, dict) else entry
    return f"{path}, source {number} ({name if isinstance(name, str) else repr(name)})"


def _checked(entry, where: str) -> Source:
    """One entry, checked; an entry of local files may leave out the keys of OF_LOCAL_FILES."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: is no table, but must have the keys {', '.join(Source.__dataclass_fields__)}")
    if entry.get("recipes") == ["local"]:
        entry = OF_LOCAL_FILES | {"title": entry.get("name")} | entry
    source = build(Source, entry, where)
    require(
        not source.stage1 or source.task == "retrieval",
        f"{where}: stage1 is true and task {source.task}, but stage 1 takes retrieval sources only",
    )
    return source


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
    """ValueError if two sources of the same recipe use the same rows of a file."""
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
    """Why the source is left out, None if it is not."""
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
                f"{closest(name, known, most=3)}; remedy: take a name of data/sources.yaml"
            )


def _counted(left_out: dict[str, str]) -> str:
    reasons = list(left_out.values())
    return ", ".join(f"{reasons.count(reason)} {reason}" for reason in dict.fromkeys(reasons)) or "none left out"
