"""Assembled tuples, memory-mapped: opening them takes no time, and memory does not grow with their number.

A folder of tuples, which `f2llm.assembly` writes, holds
    documents/<part>.arrow  text (every passage and negative of the part once, in order of first appearance)
    tuples/<part>.arrow     query, passage (row), group, negatives (rows), language
    evaluation/<task>.json  the evaluation tasks that the tuples were kept apart from
    manifest.json           per part: where it came from, licence, rows in, kept, dropped and why, hashes
A part is a file of the released data (`webfaq_eng`) or, where the data come from elsewhere, a whole source.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from .arrow import Documents, read_arrow

SCHEMA = pa.schema(
    {
        "query": pa.large_string(),
        "passage": pa.int32(),
        "group": pa.int32(),
        "negatives": pa.list_(pa.int32()),
        "language": pa.string(),
    }
)
DOCUMENTS = pa.schema({"text": pa.large_string()})


def load_tasks(folder: Path = Path("data/assembled/evaluation")) -> list[dict]:
    """The evaluation tasks of a folder, in the order of their names."""
    paths = sorted(Path(folder).glob("*.json"))
    if not paths:
        raise ValueError(f"{folder} holds no evaluation tasks; remedy: dvc repro data")
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


class TupleStore:
    """Tuples of a folder that `assemble` wrote, by part, with the negatives that `mine` found."""

    def __init__(self, path: Path = Path("data/assembled"), mined: Path | None = Path("data/mined")):
        self.path = Path(path)
        if not (self.path / "manifest.json").exists():
            raise ValueError(f"{self.path} holds no assembled tuples; remedy: dvc repro data")
        manifest = json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))
        self.sources, self._hashes = manifest["sources"], manifest["sha256"]
        self.documents = {name: Documents(self.path / "documents" / f"{name}.arrow") for name in self.sources}
        self.tables = {name: read_arrow(self.path / "tuples" / f"{name}.arrow") for name in self.sources}
        for name, entry in self.sources.items():
            if mined is not None and entry["negatives"] == "mine":
                self.tables[name] = self._with_negatives(name, Path(mined) / f"{name}.arrow")

    def sha256(self, name: str) -> str:
        """Of a file of the folder, as the manifest has it."""
        return self._hashes[name]

    def hashes(self) -> dict[str, str]:
        """Of all files of the folder."""
        return dict(self._hashes)

    def texts(self) -> Iterator[str]:
        """All documents, part by part."""
        for documents in self.documents.values():
            for block in documents.blocks():
                yield from block

    def sample(self, num: int, seed: int, queries: bool = False) -> list[str]:
        """`num` documents, or queries, or all if there are fewer, drawn from all parts alike."""
        parts = list(self.documents.values())
        if queries:
            parts = [Documents(self.path / "tuples" / f"{name}.arrow", "query") for name in self.sources]
        first = np.cumsum([0, *map(len, parts)])  # row of each part's first document among all
        chosen = random.Random(seed).sample(range(int(first[-1])), min(num, int(first[-1])))
        owner = np.searchsorted(first, chosen, side="right") - 1
        return [parts[part][row - first[part]] for part, row in zip(owner, chosen)]

    def _with_negatives(self, name: str, path: Path) -> pa.Table:
        if not path.exists():
            raise ValueError(f"{path} is missing, the mined negatives of '{name}'; remedy: dvc repro mine")
        negatives = read_arrow(path)["negatives"]
        table = self.tables[name]
        if len(negatives) != len(table):
            raise ValueError(f"{path} has {len(negatives)} rows, but '{name}' has {len(table)}; remedy: dvc repro mine")
        return table.set_column(SCHEMA.get_field_index("negatives"), "negatives", negatives)
