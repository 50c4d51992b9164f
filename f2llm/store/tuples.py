"""Assembled tuples, memory-mapped: opening them takes no time, and memory does not grow with their number.

A folder of tuples, which `f2llm.data.assemble` writes, holds
    documents/<part>.arrow  text (every passage and negative of the part once, in order of first appearance)
    tuples/<part>.arrow     query, passage (row), group, negatives (rows), language
    evaluation/<task>.json  the evaluation tasks that the tuples were kept apart from
    manifest.json           per part: where it came from, licence, rows in, kept, dropped and why, hashes
A part is a file of the released data (`webfaq_eng`) or, where the data come from elsewhere, a whole source.

Arrow files consist of record batches that all have `BATCH` rows but the last: row r is row r % BATCH of batch
r // BATCH, so there is no index to load, and memory is the pages that were touched.
"""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

BATCH = 2**16  # rows
OWN = "-held-out"  # ends the names of evaluation tasks that are made from rows of local data
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


# Arrow files -------------------------------------------------------------------------------------


class ArrowWriter:
    """Writes rows one by one, in full batches: equal rows give equal bytes."""

    def __init__(self, path: Path, schema: pa.Schema):
        self.schema, self.rows, self.num_rows = schema, [], 0
        self.file = pa.OSFile(str(path), "wb")
        self.writer = pa.ipc.new_file(self.file, schema)

    def write(self, row: dict) -> None:
        self.rows.append(row)
        self.num_rows += 1
        if len(self.rows) == BATCH:
            self._flush()

    def _flush(self) -> None:
        self.writer.write_batch(pa.RecordBatch.from_pylist(self.rows, schema=self.schema))
        self.rows = []

    def __enter__(self) -> "ArrowWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None and self.rows:
            self._flush()
        self.writer.close()
        self.file.close()


def write_arrow(table: pa.Table, path: Path) -> None:
    """A table as one Arrow file, the same bytes for the same table."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        for batch in table.combine_chunks().to_batches(max_chunksize=BATCH):
            writer.write_batch(batch)


def read_arrow(path: Path) -> pa.Table:
    """A memory-mapped table; rows are read from disk on access."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path} cannot be read ({error}); remedy: dvc repro") from None


def take(table: pa.Table, rows: Sequence[int]) -> list[dict]:
    """Some rows of a table of `read_arrow`, in the given order; pyarrow's own take would copy whole columns."""
    rows = np.asarray(rows, dtype=np.int64)
    batches = {number: _batch(table, number) for number in np.unique(rows // BATCH)}
    found = [None] * len(rows)
    for number, batch in batches.items():
        places = np.flatnonzero(rows // BATCH == number)
        for place, row in zip(places, batch.take(pa.array(rows[places] % BATCH)).to_pylist()):
            found[place] = row
    return found


def _batch(table: pa.Table, number: int) -> pa.RecordBatch:
    columns = [column.chunk(int(number)) for column in table.columns]
    return pa.RecordBatch.from_arrays(columns, names=table.column_names)


class Documents(Sequence):
    """The texts of a file's column by row, memory-mapped."""

    def __init__(self, path: Path, column: str = "text"):
        self.chunks = read_arrow(path)[column].chunks
        self.num_rows = sum(map(len, self.chunks))

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, row: int) -> str:
        if not 0 <= row < self.num_rows:
            raise IndexError(f"document {row} of {self.num_rows}")
        number, offset = divmod(int(row), BATCH)
        return self.chunks[number][offset].as_py()

    def blocks(self, num: int = BATCH) -> Iterator[list[str]]:
        """All texts in order, at most `num` at a time."""
        for chunk in self.chunks:
            for start in range(0, len(chunk), num):
                yield chunk.slice(start, num).to_pylist()
