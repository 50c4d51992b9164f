"""Exact search for the nearest documents, block by block: memory grows neither with queries nor with documents.

B queries, N documents, W documents that are near to a query, n documents of a block, D dimensions.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import sparse

from ..model import device_and_dtype
from ..store.progress import Progress


def nearest(queries, documents: Iterable, passages: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(scores (B, W), rows (B, W), scores of the passages (B)): the `num` nearest documents, or all if there are fewer.

    queries (B, D), documents: blocks (n, D), one after the other; exact, by descending score, equal ones by row.
    """
    best, first = np.full(len(passages), np.nan, dtype=np.float32), 0
    found, progress = _Nearest(queries.shape[0], num), Progress("search", "scores")
    for block in documents:
        if block.shape[1] != queries.shape[1]:
            raise ValueError(
                f"documents from row {first} on have {block.shape[1]} dimensions, but queries {queries.shape[1]}; "
                "remedy: one model for both"
            )
        with progress.work(queries.shape[0] * block.shape[0]):
            scores = _scores(queries, block)
            inside = np.flatnonzero((passages >= first) & (passages < first + block.shape[0]))
            best[inside] = scores[torch.from_numpy(inside), torch.from_numpy(passages[inside] - first)].cpu().numpy()
            found.add(scores, first)
        first += block.shape[0]
    if np.isnan(best).any():
        wrong = int(np.flatnonzero(np.isnan(best))[0])
        raise ValueError(f"the passage of query {wrong} of a block is row {passages[wrong]}, but there are {first}")
    found.merge()
    return *_from_keys(found.keys[:, :first]), best


def _scores(queries, documents) -> torch.Tensor:
    """All dot products (B, n), on the GPU if there is one."""
    if sparse.issparse(queries):
        return torch.from_numpy((queries @ documents.T.tocsr()).toarray())
    device = device_and_dtype()[0]
    queries, documents = (
        torch.from_numpy(np.asarray(rows, dtype=np.float32)).to(device) for rows in (queries, documents)
    )
    return queries @ documents.T


class _Nearest:
    """The best `num` documents so far of B queries, beside hits that are still to be merged into them.

    A document is one integer: its score's bits, turned so that the best is the smallest, before its row. So one
    sort puts the nearest first and equal scores in the order of rows.
    """

    def __init__(self, num_queries: int, num: int):
        self.keys = np.full((num_queries, num), _NONE)  # sorted
        self.worst = np.full(num_queries, -np.inf, dtype=np.float32)
        self.hits, self.num_hits = [], 0

    def add(self, scores: torch.Tensor, first: int) -> None:
        """Scores (B, n) of the documents from row `first` on, which comes after all rows before."""
        above = scores > torch.from_numpy(self.worst).to(scores.device)[:, None]  # an equal one of a later row is none
        if first == 0:  # nothing to compare with yet: at least the border of this block
            above = scores >= scores.topk(min(self.keys.shape[1], scores.shape[1]), dim=1).values[:, -1:]
        hits = np.flatnonzero(above.cpu().numpy())
        queries, rows = np.divmod(hits, scores.shape[1])
        found = scores.flatten()[torch.from_numpy(hits).to(scores.device)].cpu().numpy()
        self.hits.append((queries, _keys(found, rows + first)))
        self.num_hits += len(queries)
        if self.num_hits >= self.keys.size:  # sorting less often costs less
            self.merge()

    def merge(self) -> None:
        """Merge the hits into the best."""
        num_queries, num = self.keys.shape
        for queries, keys in self.hits:
            counts = np.bincount(queries, minlength=num_queries)
            places = np.arange(len(queries)) - np.repeat(counts.cumsum() - counts, counts)  # of each hit in its row
            table = np.full((num_queries, num + counts.max(initial=0)), _NONE)
            table[:, :num] = self.keys
            table[queries, num + places] = keys
            table.sort(axis=1)
            self.keys = table[:, :num].copy()
        self.worst = np.where(self.keys[:, -1] == _NONE, np.float32(-np.inf), _from_keys(self.keys[:, -1])[0])
        self.hits, self.num_hits = [], 0


_NONE = np.uint64(2**64 - 1)
_SIGN = np.uint32(2**31)


def _keys(scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Integers that sort by descending score (float32), then by row: the score in the high 32 bits, the row below.

    The bits of positive floats, read as integers, sort as the floats do; those of negative floats, whose sign bit is
    set, sort the other way round. Inverting all bits of the positive ones except the sign bit, and leaving negative
    ones as they are, puts both into one descending order.
    """
    bits = (scores + np.float32(0)).view(np.uint32)  # -0 becomes 0: they are equal
    descending = np.where(bits & _SIGN, bits, ~(bits | _SIGN))
    return descending.astype(np.uint64) << np.uint64(32) | rows.astype(np.uint64)


def _from_keys(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(scores, rows) of `_keys`."""
    descending = (keys >> np.uint64(32)).astype(np.uint32)
    bits = np.where(descending & _SIGN, descending, ~descending & ~_SIGN)
    return bits.view(np.float32), (keys & np.uint64(2**32 - 1)).astype(np.int64)


def unit_rows(rows, texts: list[str], miner: str):
    """`rows` unchanged; a ValueError names the first text whose embedding does not have length 1."""
    lengths = sparse.linalg.norm(rows, axis=1) if sparse.issparse(rows) else np.linalg.norm(rows, axis=1)
    wrong = np.flatnonzero(~(np.abs(lengths - 1) < 0.01))  # also where it is not a number
    if len(wrong):
        raise ValueError(
            f"miner {miner}: the embedding of text {texts[wrong[0]][:60]!r} has length {lengths[wrong[0]]}, but must "
            f"have 1 (the first of {len(wrong)} among {len(texts)}); remedy: another model, or leave the text out"
        )
    return rows


class Blocks(Sequence):
    """Rows (N, D) in blocks: sparse matrices, or files of dense rows that are memory-mapped when asked for."""

    def __init__(self, blocks: list):
        self.blocks = blocks
        self.starts = np.cumsum([0] + [self[number].shape[0] for number in range(len(blocks))])

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, number: int):
        block = self.blocks[number]
        return np.load(block, mmap_mode="c") if isinstance(block, Path) else block

    def take(self, rows: np.ndarray):
        """Some rows, in the order asked for."""
        numbers = np.searchsorted(self.starts, rows, side="right") - 1
        order = np.argsort(numbers, kind="stable")
        taken = []
        for number in np.unique(numbers):
            taken.append(self[number][rows[order][numbers[order] == number] - self.starts[number]])
        stacked = sparse.vstack(taken, format="csr") if sparse.issparse(taken[0]) else np.concatenate(taken)
        return stacked[np.argsort(order)]
