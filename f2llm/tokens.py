"""Token ids of documents, memory-mapped: computed once by all cores, then read by every process in every epoch.

A training reads a document many times, as a passage and as a negative. Queries, whose prompt depends on the stage, are
a twentieth of the tokens and are tokenised at each step.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from .model import Embedder
from .store.files import whole_file
from .store.progress import Progress
from .store.tuples import BATCH, Documents, TupleStore, read_arrow

SCHEMA = pa.schema({"tokens": pa.list_(pa.int32())})


class Tokens(Sequence):
    """Token ids by row, each text cut and ended as `Embedder.tokenize` does; int32 views into a file."""

    def __init__(self, path: Path):
        chunks = read_arrow(path)["tokens"].chunks
        self.ends = [chunk.offsets.to_numpy() for chunk in chunks]
        self.ids = [chunk.values.to_numpy() for chunk in chunks]
        self.num_rows = sum(len(ends) - 1 for ends in self.ends)

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, row: int) -> np.ndarray:
        if not 0 <= row < len(self):
            raise IndexError(f"document {row} of {len(self)}")
        number, offset = divmod(int(row), BATCH)
        start, end = self.ends[number][offset : offset + 2]
        return self.ids[number][start:end]


def tokenise(store: TupleStore, parts: list[str], model: Embedder, scratch: Path, quiet: bool = False) -> dict:
    """{part: Tokens} of the documents of some parts; files of earlier calls are reused.

    The files' names contain hashes of tokenizer, longest text and documents. Each is complete or not there.
    """
    folder = Path(scratch) / hashlib.sha256(_settings(model).encode()).hexdigest()[:12]
    files = {part: folder / f"{part}-{store.sha256(f'documents/{part}.arrow')[:12]}.arrow" for part in parts}
    absent = [part for part, path in files.items() if not path.exists()]
    total = sum(len(store.documents[part]) for part in absent)
    progress = Progress("tokenise", "documents", total, quiet)
    for part in absent:
        _write(store.documents[part], model, files[part], progress)
    return {part: Tokens(path) for part, path in files.items()}


def _settings(model: Embedder) -> str:
    model.tokenizer.backend_tokenizer.no_truncation()  # set by the last call, and no part of what the tokenizer is
    return f"{model.max_tokens} {model.tokenizer.eos_token_id} {model.tokenizer.backend_tokenizer.to_str()}"


def _write(documents: Documents, model: Embedder, path: Path, progress: Progress) -> None:
    """Write the token ids of all documents; the tokenizer divides each block among all cores."""
    found = []
    with whole_file(path) as new, pa.OSFile(str(new), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        for texts in documents.blocks(1024):  # a divisor of BATCH
            with progress.work(len(texts)):
                found += [np.asarray(ids, dtype=np.int32) for ids in model.tokenize(texts)]
            if len(found) == BATCH:
                writer.write_batch(_batch(found))
                found = []
        if found:
            writer.write_batch(_batch(found))


def _batch(token_ids: list[np.ndarray]) -> pa.RecordBatch:
    ends = np.cumsum([0, *map(len, token_ids)], dtype=np.int32)
    return pa.record_batch([pa.ListArray.from_arrays(ends, np.concatenate(token_ids))], schema=SCHEMA)
