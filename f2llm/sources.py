"""The registry of sources, and one source as a table of records."""

from dataclasses import dataclass, fields
from pathlib import Path

from datasets import Dataset

from .config import TASKS, Data, read_yaml
from .embedded.records import BUILDERS
from .embedded.tasks import tasks
from .embedded.texts import Texts, texts

COLUMNS = {  # what a record of each task has
    "retrieval": {"query", "passage", "group", "language", "to"},
    "clustering": {"query", "label", "language"},
    "classification": {"query", "label", "language"},
}


@dataclass(frozen=True)
class Source:
    """One entry of data/sources.yaml, which says what the fields mean."""

    name: str
    family: str
    task: str
    recipes: list
    stage1: bool
    published_rows: int | None
    files: list
    hub_id: str | None
    licence: str
    instruction: str
    symmetric: bool
    rows: int
    builder: str
    fields: dict


def load_registry(path: Path = Path("data/sources.yaml")) -> list[Source]:
    """All sources, checked; a ValueError names the entry, the rule and the remedy."""
    entries = read_yaml(path).get("sources")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} has no list 'sources'; remedy: restore it with git checkout -- {path}")
    names = set()
    known = {field.name for field in fields(Source)}
    for number, entry in enumerate(entries, start=1):
        where = f"{path}, source {number} ({entry.get('name') if isinstance(entry, dict) else entry!r})"
        if not isinstance(entry, dict) or entry.keys() != known:
            wrong = sorted(known ^ set(entry)) if isinstance(entry, dict) else entry
            raise ValueError(f"{where}: missing or unknown keys {wrong}; every entry has exactly {sorted(known)}")
        if entry["task"] not in TASKS:
            raise ValueError(f"{where}: task is {entry['task']!r}, but must be one of: {', '.join(TASKS)}")
        if entry["builder"] not in BUILDERS:
            raise ValueError(f"{where}: builder is {entry['builder']!r}, but must be one of: {', '.join(BUILDERS)}")
        if entry["stage1"] and entry["task"] != "retrieval":
            raise ValueError(f"{where}: stage1 is true, but stage 1 takes retrieval sources only")
        if entry["name"] in names or not str(entry["name"]).isidentifier():
            raise ValueError(f"{where}: the name must be unique, of letters, digits and underscores")
        names.add(entry["name"])
    return [Source(**entry) for entry in entries]


def choose_sources(registry: list[Source], data: Data) -> list[Source]:
    """The sources of data.from, without those that data.leave_out names."""
    chosen = [source for source in registry if data.source in source.recipes]
    names = [source.name for source in chosen]
    if unknown := sorted(set(data.leave_out) - set(names)):
        raise ValueError(f"data.leave_out names {unknown}, but the sources are: {', '.join(names)}")
    chosen = [source for source in chosen if source.name not in data.leave_out]
    if not any(source.stage1 for source in chosen):
        raise ValueError("data.leave_out leaves no source for stage 1; remedy: keep at least one with stage1: true")
    return chosen


def embedded_texts(data: Data) -> tuple[Texts, Texts]:
    """(training, evaluation) texts of the embedded corpus."""
    return texts(held_out_percent=data.held_out_percent, salt=data.split)


def load_source(source: Source, data: Data, seed: int) -> Dataset:
    """The records of one source, at most `source.rows`; its draw depends on no other source."""
    training, _ = embedded_texts(data)
    records = BUILDERS[source.builder](training, source.fields, source.rows, f"{seed}:{source.name}")
    if not records:
        raise ValueError(f"source '{source.name}' has no rows; fields {source.fields} select nothing that is installed")
    dataset = Dataset.from_list(records)
    if missing := COLUMNS[source.task] - set(dataset.column_names):
        raise ValueError(f"source '{source.name}', task {source.task}: columns {sorted(missing)} are missing")
    return dataset


def evaluation_tasks(data: Data, seed: int) -> list[dict]:
    """The held-out tasks that belong to the data."""
    _, held_out = embedded_texts(data)
    return tasks(held_out, seed)
