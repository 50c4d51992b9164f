"""Assembled tuples: documents stored once, referred to by integer row, memory-mapped.

A folder of tuples holds
    documents.arrow        text (every passage and negative once, in order of first appearance)
    tuples/<source>.arrow  query, passage (row), group, negatives (rows), language
    manifest.json          per source: task, instruction, counts, what was dropped and why
"""

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa

from .checkpoint import whole_folder
from .text import normalise

SCHEMA = pa.schema(
    {
        "query": pa.string(),
        "passage": pa.int32(),
        "group": pa.int32(),
        "negatives": pa.list_(pa.int32()),
        "language": pa.string(),
    }
)


def assemble(
    sources: list, records_of: Callable, evaluation: list[dict], num_negatives: int, seed: int, out: Path
) -> dict[str, dict]:
    """Write the tuples of `sources` and the evaluation tasks under `out`; returns the manifest's sources.

    records_of(source) gives the records of one `f2llm.sources.Source`. Rows are dropped, and counted, when
    query or passage is also an evaluation text, when both are equal, and when the pair is there already.
    num_negatives: of other labels, per row of a clustering source. Same inputs, same bytes.
    """
    forbidden = {normalise(text) for text in texts_of(evaluation)}
    documents, manifest = {}, {}
    with whole_folder(out) as folder:
        (folder / "tuples").mkdir()
        (folder / "evaluation").mkdir()
        for source in sources:
            records = records_of(source)
            kept, dropped = _keep(records, source.task, forbidden)
            rows = _rows(kept, source, num_negatives, f"{seed}:{source.name}", documents)
            write_arrow(pa.Table.from_pylist(rows, schema=SCHEMA), folder / "tuples" / f"{source.name}.arrow")
            languages = {row["language"] for row in kept} | {row["to"] for row in kept if "to" in row}
            manifest[source.name] = asdict(source) | {
                "drawn": len(records),
                "kept": len(rows),
                "dropped": dict(sorted(dropped.items())),
                "languages": sorted(languages),
            }
        write_arrow(pa.table({"text": list(documents)}), folder / "documents.arrow")
        for task in evaluation:
            path = folder / "evaluation" / f"{task['name']}.json"
            path.write_text(json.dumps(task, ensure_ascii=False, indent=1), encoding="utf-8")
        _write_manifest(folder, manifest)
    return manifest


def texts_of(value):
    """Every string among the data of evaluation tasks."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key in value.keys() - {"name", "type", "instruction", "languages", "label", "labels"}:
            yield from texts_of(value[key])
    elif isinstance(value, list):
        for item in value:
            yield from texts_of(item)


def _keep(records, task: str, forbidden: set[str]) -> tuple[list[dict], Counter]:
    kept, dropped, seen = [], Counter(), set()
    other = "passage" if task == "retrieval" else "label"
    for record in records:
        pair = (record["query"], record[other])
        folded = {normalise(record["query"]), normalise(record[other])}
        if not all(folded):
            dropped["nothing but punctuation"] += 1
        elif folded & forbidden:
            dropped["in an evaluation task"] += 1
        elif len(folded) == 1:
            dropped["query equals passage"] += 1
        elif pair in seen:
            dropped["seen before"] += 1
        else:
            seen.add(pair)
            kept.append(record)
    if task == "clustering":  # a positive is another text of the same label
        different = defaultdict(set)
        for record in kept:
            different[record["label"]].add(normalise(record["query"]))
        alone = {label for label, texts in different.items() if len(texts) == 1}
        dropped["only text of its label"] = sum(record["label"] in alone for record in kept)
        kept = [record for record in kept if record["label"] not in alone]
    return kept, dropped


def _rows(records: list[dict], source, num_negatives: int, seed: str, documents: dict) -> list[dict]:
    """Records as rows of SCHEMA; new documents are appended to `documents`, {text: row}."""
    draw, groups, by_label = random.Random(seed), {}, defaultdict(list)
    for record in records:
        by_label[record.get("label")].append(record["query"])
    _check_labels(source, by_label)
    rows = []
    for record in records:
        label = record.get("label")
        others = [other for other in by_label if other != label]
        if source.task == "retrieval":
            passage, negatives, group = record["passage"], [], record["group"]
        elif source.task == "classification":
            passage, negatives, group = label, others, label
        else:
            own = normalise(record["query"])
            passage, group = record["query"], label
            while normalise(passage) == own:
                passage = draw.choice(by_label[label])
            drawn = draw.sample(others, min(num_negatives, len(others)))
            drawn += draw.choices(others, k=num_negatives - len(drawn))
            negatives = [draw.choice(by_label[other]) for other in drawn]
        rows.append(
            {
                "query": record["query"],
                "passage": documents.setdefault(passage, len(documents)),
                "group": groups.setdefault(group, len(groups)),
                "negatives": [documents.setdefault(text, len(documents)) for text in negatives],
                "language": record["language"],
            }
        )
    return rows


def _check_labels(source, by_label: dict) -> None:
    """What label-based tuples need: another label to draw negatives from."""
    if source.task == "clustering" and len(by_label) < 2:
        raise ValueError(f"source '{source.name}': clustering needs two labels or more, found {sorted(by_label)}")
    if source.task == "classification" and len(by_label) != 2:
        raise ValueError(f"source '{source.name}': two-way classification needs two labels, found {sorted(by_label)}")


def write_arrow(table: pa.Table, path: Path) -> None:
    """One Arrow IPC file with a single record batch per column chunk, the same bytes for the same table."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table.combine_chunks())


def read_arrow(path: Path) -> pa.Table:
    """A memory-mapped table; its columns are read from the disk when they are asked for."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def load_tasks(folder: Path = Path("data/assembled/evaluation")) -> list[dict]:
    """The evaluation tasks of a folder, in the order of their names."""
    paths = sorted(Path(folder).glob("*.json"))
    if not paths:
        raise ValueError(f"{folder} holds no evaluation tasks; remedy: dvc repro data")
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def _write_manifest(folder: Path, sources: dict) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (folder / "manifest.json").write_text(
        json.dumps({"sources": sources, "sha256": hashes}, indent=1), encoding="utf-8"
    )


class TupleStore:
    """Tuples of a folder that `assemble` wrote, with the negatives that `mine` found."""

    def __init__(self, path: Path = Path("data/assembled"), mined: Path | None = Path("data/mined")):
        self.path = Path(path)
        if not (self.path / "manifest.json").exists():
            raise ValueError(f"{self.path} holds no assembled tuples; remedy: dvc repro data")
        self.sources = json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))["sources"]
        self.documents = read_arrow(self.path / "documents.arrow")["text"]
        self.tables = {name: read_arrow(self.path / "tuples" / f"{name}.arrow") for name in self.sources}
        for name in self.sources:
            if mined is not None and self.sources[name]["task"] == "retrieval":
                self.tables[name] = self._with_negatives(name, Path(mined) / f"{name}.arrow")

    def _with_negatives(self, name: str, path: Path) -> pa.Table:
        if not path.exists():
            raise ValueError(f"{path} is missing, the mined negatives of '{name}'; remedy: dvc repro mine")
        negatives = read_arrow(path)["negatives"]
        table = self.tables[name]
        if len(negatives) != len(table):
            raise ValueError(f"{path} has {len(negatives)} rows, but '{name}' has {len(table)}; remedy: dvc repro mine")
        return table.set_column(SCHEMA.get_field_index("negatives"), "negatives", negatives)
