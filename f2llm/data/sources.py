"""Where the records of a source come from: installed packages, the released tuples, the original sets, local files."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ..config import Data
from ..embedded.records import BUILDERS
from ..embedded.tasks import tasks
from ..embedded.texts import texts
from ..store.progress import Progress
from ..text import without_prompt
from .converters import convert
from .local import layout_of, local_records
from .mirror import Mirror
from .readers import excerpt, open_table, require_columns
from .registry import LOCAL, Source, fetch_command, files_needed, local_paths

COUNTED = 100  # rows between two counts, which other processes wait for


@dataclass(frozen=True)
class Part:
    """The unit of assembly: a file of the released data, or a whole source. Its output files have its name."""

    name: str
    source: Source
    paths: tuple[Path, ...]
    revision: str | None
    inputs: dict[str, str]  # file -> sha256
    ready_made: bool  # rows have a passage; otherwise a label


def parts_of(sources: list[Source], data: Data) -> list[Part]:
    """The parts of all sources; ValueError if files that they need are missing."""
    if data.source == "embedded":
        return [Part(source.name, source, (), None, {}, source.task == "retrieval") for source in sources]
    if data.source == "local":
        return [_local_part(source) for source in sources]
    mirror = Mirror(Path(data.mirror))
    find = _released_parts if data.source == "released" else _original_parts
    return find(sources, data, mirror)


def load_source(part: Part, data: Data, seed: int) -> Iterator[dict]:
    """Yields the records of one part. Their number depends on the part alone, the selection on (seed, part)."""
    source = part.source
    if data.source == "embedded":
        training, _ = texts(data.held_out_percent, data.split)
        yield from BUILDERS[source.converter](training, source.fields, source.rows, f"{seed}:{source.name}")
    elif data.source == "released":
        yield from _released_records(part, data, seed)
    else:
        limit = min(_caps(source, data), default=None)
        yield from _draw(partial(_records, part, data), limit, seed, part.name)


def counted(records_of: Callable, progress: Progress, part: Part) -> Iterator[dict]:
    """The records of a part, each counted in `progress` as it is read."""
    number = 0
    for number, record in enumerate(records_of(part), start=1):
        if number % COUNTED == 0:
            progress.add(COUNTED)
        yield record
    progress.add(number % COUNTED)


def num_records(part: Part, data: Data) -> int | None:
    """At most so many records `load_source` yields, as far as it is known before they are read; None if it is not."""
    if data.source in ("embedded", "local"):
        return part.source.rows
    counts = _caps(part.source, data)
    if data.source == "released":
        first, last = part.source.file_rows or (0, sum(open_table(path).num_rows for path in part.paths))
        counts = [last - first, *([] if part.source.stage1 else [data.cap_per_source or last])]
    return min(counts, default=None)


def _caps(source: Source, data: Data) -> list[int]:
    caps = [source.rows, source.published_rows if data.source == "sources" else None]
    return [cap for cap in (*caps, 0 if source.stage1 else data.cap_per_source) if cap]


def _records(part: Part, data: Data) -> Iterator[dict]:
    source, names = part.source, part.source.fields.get("columns")
    opened = [open_table(path, names) for path in part.paths]
    if data.source == "local" and source.converter is None:
        for table in opened:
            yield from local_records(table, source.task)
    else:
        left_out: list[dict] = []  # since the last record
        for record in convert(
            source.converter,
            source.fields,
            opened,
            where=source.name,
            left_out=lambda reason, row: left_out.append({"left_out": reason, "query": excerpt(row.values, 200)}),
        ):
            yield from left_out
            left_out.clear()
            yield record
        yield from left_out


def _draw(records: Callable[[], Iterable[dict]], limit: int | None, seed: int, name: str) -> Iterator[dict]:
    """All records, or a random sample of `limit` in their order; for a sample they are read twice, to save memory.

    Rows that a converter left out are no records, but come along, to be counted.
    """
    count = sum("left_out" not in record for record in records()) if limit else 0
    if not limit or count <= limit:
        yield from records()
        return
    chosen = set(_choose(count, limit, seed, name).tolist())
    number = -1
    for record in records():
        number += "left_out" not in record
        if "left_out" in record or number in chosen:
            yield record


def _choose(count: int, limit: int, seed: int, name: str) -> np.ndarray:
    """`limit` random row numbers below `count`, ascending, seeded by (seed, name).

    Adding a source therefore does not change the rows of another.
    """
    draw = np.random.default_rng(list(repr((seed, "rows", name)).encode()))
    return np.sort(draw.choice(count, size=limit, replace=False))


# Installed packages -----------------------------------------------------------------------------


def evaluation_tasks(data: Data, seed: int) -> list[dict]:
    """The evaluation tasks, made from the held-out part of the embedded corpus."""
    _, held_out = texts(data.held_out_percent, data.split)
    return tasks(held_out, seed)


# The released tuples ----------------------------------------------------------------------------


def _released_parts(sources: list[Source], data: Data, mirror: Mirror) -> list[Part]:
    """One part per file; a file that several sources share is one part per source."""
    named = [(source, stem) for source in sources for stem in source.files]
    ((repo_id, files, revision),) = files_needed(sources, data)
    paths = mirror.require(repo_id, files, revision=revision, command=fetch_command(data), hashed=True)
    by_name = {path.name: path for path in paths}
    return [
        Part(
            name=source.name if source.file_rows else stem,
            source=source,
            paths=(by_name[file],),
            revision=data.revision,
            inputs={file: mirror.sha256(data.released, file)},
            ready_made=True,
        )
        for (source, stem), file in zip(named, files)
    ]


def _released_records(part: Part, data: Data, seed: int) -> Iterator[dict]:
    """Records of one Parquet file in the authors' layout; prompts are removed from texts, since f2llm adds its own.

    Sources of stage 1 are used whole, of others at most data.cap_per_source rows.
    Source: arXiv 2603.19223, section on data.
    """
    source, table = part.source, open_table(part.paths[0])
    require_columns(table, ["query", "passage", "negative_1"])
    columns = sorted((name for name in table.columns if re.fullmatch(r"negative_\d+", name)), key=_number)
    first, last = source.file_rows or (0, table.num_rows)
    if last > table.num_rows:
        raise ValueError(
            f"{table.path} has {table.num_rows} rows, but data/sources.yaml counts rows {first} to {last} as "
            f"'{source.name}'; remedy: the revision {data.revision} of {data.released}"
        )
    rows = np.arange(first, last)
    cap = 0 if source.stage1 else data.cap_per_source
    if cap and len(rows) > cap:
        rows = rows[_choose(len(rows), cap, seed, part.name)]
    for number, row in table.rows(rows):
        texts = [row["query"], row["passage"], *(row[name] for name in columns)]
        if wrong := [text for text in texts if text is not None and not isinstance(text, str)]:
            raise ValueError(f"{table.path}, row {number}: {wrong[0]!r} is not text; remedy: the released layout")
        query, passage, *negatives = (without_prompt(text or "") for text in texts)
        record = {"query": query, "passage": passage, "negatives": negatives}
        yield record | ({"language": row["lang"]} if row.get("lang") else {})


def _number(column: str) -> int:
    return int(column.rpartition("_")[2])


# The original sets and local files --------------------------------------------------------------


def _original_parts(sources: list[Source], data: Data, mirror: Mirror) -> list[Part]:
    found = []
    for source in sources:
        paths = mirror.require(
            source.hub_id, source.hub_files, revision=source.hub_revision, command=fetch_command(data), hashed=True
        )
        names = [path.relative_to(Path(data.mirror) / source.hub_id).as_posix() for path in paths]
        inputs = {name: mirror.sha256(source.hub_id, name) for name in names}
        revision = mirror.revision(source.hub_id)
        found.append(Part(source.name, source, tuple(paths), revision, inputs, source.task == "retrieval"))
    return found


def _local_part(source: Source) -> Part:
    paths = tuple(local_paths(source, LOCAL))
    ready_made = source.task == "retrieval"
    if not ready_made and source.converter is None:
        others = {layout_of(open_table(path), source.task).other for path in paths}
        if len(others) > 1:
            raise ValueError(f"source '{source.name}': some files have labels, others passages; remedy: two sources")
        ready_made = others == {"passage"}
    inputs = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in zip(source.files, paths)}
    return Part(source.name, source, paths, None, inputs, ready_made)
