"""Tables on disk that are read where they lie: Arrow files of record batches that all have `BATCH` rows but the last.

So row r is row r % BATCH of batch r // BATCH: no index, nothing to load, and memory is the pages that were touched.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

BATCH = 2**16  # rows


class ArrowWriter:
    """Writes rows as they come, in full batches: the same bytes for the same rows, however they are handed over."""

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
    """A memory-mapped table; its rows are read from the disk when they are asked for."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path} cannot be read ({error}); remedy: dvc repro") from None


def take(table: pa.Table, rows: Sequence[int]) -> list[dict]:
    """Some rows of a table of `read_arrow`, in the order asked for; pyarrow's own take would copy whole columns."""
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
