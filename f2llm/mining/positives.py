"""Which documents answer a query: its positives, which are never its negatives.

Q queries, N documents.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from ..text import normalise


class Answers(Sequence):
    """All documents that answer a query, its own passage first.

    These are the passages of its group and of the groups of every query with the same normalised text, every
    document whose normalised text is that of such a passage, and the query's own text as a document. symmetric: a
    passage that is a query elsewhere is answered by the query that it answers here.
    queries (Q) and documents (N) are hashes of normalised texts, passages (Q) rows, groups (Q).
    """

    def __init__(
        self,
        queries: np.ndarray,
        documents: np.ndarray,
        passages: np.ndarray,
        groups: np.ndarray,
        symmetric: bool = False,
    ):
        self.queries, self.documents, self.passages, self.groups = queries, documents, passages, groups
        self.by_query, self.by_group, self.by_document = (_Index(keys) for keys in (queries, groups, documents))
        self.by_passage = _Index(documents[passages]) if symmetric else None

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, row: int) -> np.ndarray:
        alike = self.by_query.rows(self.queries[row : row + 1])
        rows = self.by_group.rows(np.unique(self.groups[alike]))
        texts = np.unique(np.append(self.documents[self.passages[rows]], self.queries[row]))
        if self.by_passage:
            asked = self.by_passage.rows(self.queries[row : row + 1])
            texts = np.union1d(texts, self.queries[asked])
        return np.append(self.passages[row], self.by_document.rows(texts))


class _Index:
    """Rows by key."""

    def __init__(self, keys: np.ndarray):
        self.order = np.argsort(keys, kind="stable")
        self.keys = keys[self.order]

    def rows(self, wanted: np.ndarray) -> np.ndarray:
        bounds = zip(np.searchsorted(self.keys, wanted), np.searchsorted(self.keys, wanted, side="right"))
        return np.concatenate([self.order[first:last] for first, last in bounds])


def text_hashes(blocks: Iterable[list[str]]) -> np.ndarray:
    """64-bit hashes of the normalised texts; a chance collision only removes one candidate."""
    return np.fromiter((text_hash(normalise(text)) for block in blocks for text in block), dtype=np.int64)


def text_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), signed=True)
