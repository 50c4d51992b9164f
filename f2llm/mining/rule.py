"""Hard negatives by the papers' rule: similar to the query, but clearly less similar than its positive.

Q queries, N documents, B queries of a block, W candidates of a query, S queries of the sample, D dimensions.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pyarrow as pa

from ..config import Mine
from ..store.progress import Progress
from .search import nearest

SAMPLE = 1000  # queries of a part whose candidates are kept for the audit


@dataclass
class Mined:
    """What was mined, and what an audit needs.

    negatives: column list<int32>, document rows per query, nearest first. dropped: candidates that each rule removed.
    queries, candidates, candidate_scores: rows of at most SAMPLE queries, spread evenly, and the documents that
    were near to each after the first `range_min`, nearest first; scores of positives are nan.
    """

    negatives: pa.ChunkedArray  # (Q)
    positive_scores: np.ndarray  # (Q) of each query's own passage
    negative_scores: np.ndarray  # of all negatives that were kept, one after the other
    queries: np.ndarray  # (S)
    candidates: np.ndarray  # (S, W)
    candidate_scores: np.ndarray  # (S, W)
    dropped: dict[str, int]
    short: int  # queries with fewer negatives than `num_negatives`


def mine(
    queries: Iterable, documents: Sequence, positives: Sequence, rules: Mine, progress: Progress | None = None
) -> Mined:
    """Hard negatives of each query among the documents.

    queries: blocks (B, D), documents: blocks (n, D), dense or sparse, all rows of unit length. positives[i]: all
    rows that answer query i, the passage that it is trained with first.
    Of the `range_max` nearest the first `range_min` are passed over (`limits`: of those that stay);
    a candidate stays when its score is below `max_score` and below (1 - relative_margin) of the passage's; the nearest
    `num_negatives` are kept, all or, with drop_short, none. Equal scores are ordered by row.
    progress: of several such calls, in scores, one for each pair of query and document.
    Source: arXiv 2510.02294, hard-negative mining; `limits`: mine_hard_negatives of sentence-transformers.
    """
    every, start, parts, dropped = -(-len(positives) // SAMPLE), 0, [], Counter()
    passed = rules.range_min if rules.range_min_after == "ranking" else 0
    num_documents = sum(block.shape[0] for block in documents)
    progress = progress or Progress("mine", "scores", len(positives) * num_documents)
    for block in queries:
        with progress.work(block.shape[0] * num_documents):
            answers = [np.asarray(list(positives[row])) for row in range(start, start + block.shape[0])]
            passages = np.array([own[0] for own in answers])
            scores, near, best = nearest(block, documents, passages, rules.range_max)
            dropped["skipped"] += near[:, :passed].size
            scores, near = scores[:, passed:], near[:, passed:]
            is_answer = np.stack([np.isin(row, own) for row, own in zip(near, answers)])
            kept, counts = _select(scores, best, is_answer, rules)
            dropped.update(counts)
            chosen = np.arange(-start % every, len(near), every)
            sample = (start + chosen, near[chosen], np.where(is_answer, np.float32(np.nan), scores)[chosen])
            parts.append((_lists(near, kept), best, scores[kept], *sample))
            start += len(near)
    negatives, *arrays = zip(*parts)
    short = dropped.pop("short")
    return Mined(pa.chunked_array(negatives), *map(np.concatenate, arrays), dropped=dict(dropped), short=short)


def _lists(near: np.ndarray, kept: np.ndarray) -> pa.ListArray:
    offsets = np.concatenate([[0], kept.sum(axis=1).cumsum()]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, near[kept].astype(np.int32))


def _select(scores: np.ndarray, best: np.ndarray, is_answer: np.ndarray, rules: Mine) -> tuple[np.ndarray, dict]:
    """(mask (B, W) of kept candidates, counts of what each rule removed and of queries with too few left)."""
    share = np.where(best < 0, 1 + rules.relative_margin, 1 - rules.relative_margin)
    limit = (best * share.astype(np.float32))[:, None]
    too_near = ~is_answer & (scores >= rules.max_score)
    too_close = ~is_answer & ~too_near & (scores >= limit)
    left = ~is_answer & ~too_near & ~too_close
    skipped = left & (left.cumsum(axis=1) <= (rules.range_min if rules.range_min_after == "limits" else 0))
    left &= ~skipped
    kept = left & (left.cumsum(axis=1) <= rules.num_negatives)
    short = kept.sum(axis=1) < rules.num_negatives
    lost = kept & short[:, None] if rules.drop_short else np.zeros_like(kept)
    removed = {
        "skipped": skipped,
        "positive": is_answer,
        "max_score": too_near,
        "relative_margin": too_close,
        "beyond_num_negatives": left & ~kept,
        "drop_short": lost,
        "short": short,
    }
    return kept & ~lost, {name: int(mask.sum()) for name, mask in removed.items()}


def sweep(mined: Mined, rules: Mine, max_scores: Sequence[float], margins: Sequence[float]) -> list[dict]:
    """How many sampled candidates other thresholds would keep: one row per pair of thresholds.

    Each row: max_score, relative_margin, queries, negatives, complete (queries with `num_negatives` negatives).
    """
    is_answer, best = np.isnan(mined.candidate_scores), mined.positive_scores[mined.queries]
    rows = []
    for max_score, margin in product(max_scores, margins):
        other = replace(rules, max_score=max_score, relative_margin=margin)
        kept, counts = _select(mined.candidate_scores, best, is_answer, other)
        row = {"max_score": max_score, "relative_margin": margin, "queries": len(best)}
        rows.append(row | {"negatives": int(kept.sum()), "complete": len(best) - counts["short"]})
    return rows


def filled_up(given: pa.ChunkedArray, mined: Mined, rules: Mine) -> Mined:
    """Given negatives first, then the nearest mined ones, `num_negatives` in all.

    Source: arXiv 2510.02294, on NLI: neutral and contradicted hypotheses, the remainder by mining.
    """
    rows = []
    for own, found in zip(given.to_pylist(), mined.negatives.to_pylist()):
        row = list(dict.fromkeys([*own, *found]))[: rules.num_negatives]
        rows.append(row if len(row) == rules.num_negatives or not rules.drop_short else [])
    short = sum(len(row) < rules.num_negatives for row in rows)
    return replace(mined, negatives=pa.chunked_array([pa.array(rows, type=pa.list_(pa.int32()))]), short=short)
