"""Hard negatives by the papers' rule: near the query, but clearly less near than its positive.

Q queries, N documents.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from scipy import sparse
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

from .checkpoint import whole_folder
from .config import Mine
from .tuples import TupleStore, write_arrow

MAX_CHARACTERS = 200  # of a text, for TF-IDF: what follows in a long docstring adds cost, not neighbours


@dataclass
class Mined:
    """negatives: document rows per query, nearest first. dropped: candidates that each rule removed."""

    negatives: list[list[int]]
    positive_scores: np.ndarray  # (Q)
    negative_scores: np.ndarray  # of all negatives that were kept, one after the other
    dropped: dict[str, int] = field(default_factory=dict)


class Tfidf:
    """Character n-grams weighed by inverse document frequency: the miner and the baseline of the embedded default."""

    def __init__(self, texts: list[str], num_features: int = 2**14):
        self.vectorizer = HashingVectorizer(analyzer="char_wb", ngram_range=(2, 4), n_features=num_features, norm=None)
        self.weights = TfidfTransformer(sublinear_tf=False).fit(abs(self.vectorizer.transform(texts)))

    def encode(self, texts: list[str]) -> sparse.csr_matrix:
        """Unit-length rows (N, num_features)."""
        return self.weights.transform(self.vectorizer.transform(texts)).astype(np.float32).tocsr()


def mine(
    queries: sparse.csr_matrix | np.ndarray,
    documents: sparse.csr_matrix | np.ndarray,
    positives: list[set[int]],
    rules: Mine,
    block: int = 512,
) -> Mined:
    """Hard negatives of each query among the documents.

    queries (Q, D) and documents (N, D) have unit length; positives[i] are all rows that answer query i, its
    own first in score. Of the `range_max` nearest the first `skip` are passed over; a candidate stays
    when its score is below `max_score` and below (1 - relative_margin) of the positive's; the nearest `keep`
    are kept. Equal scores are ordered by row. Source: arXiv 2510.02294, hard-negative mining.
    """
    negatives, positive_scores, kept_scores = [], [], []
    dropped = {"positive": 0, "skipped": 0, "max_score": 0, "relative_margin": 0, "beyond_keep": 0}
    transposed = documents.T.tocsr() if sparse.issparse(documents) else documents.T
    for start in range(0, queries.shape[0], block):
        scores = queries[start : start + block] @ transposed
        scores = np.asarray(scores.todense() if sparse.issparse(scores) else scores)  # (block, N)
        for row, score in enumerate(scores):
            own = positives[start + row]
            best = max(score[list(own)])
            kept = _select(score, own, best, rules, dropped)
            negatives.append([int(document) for document in kept])
            positive_scores.append(best)
            kept_scores.append(score[kept])
    return Mined(negatives, np.array(positive_scores), np.concatenate(kept_scores), dropped)


def _select(score: np.ndarray, own: set[int], best: float, rules: Mine, dropped: dict[str, int]) -> np.ndarray:
    """The kept rows of one query, nearest first."""
    width = min(rules.range_max, len(score))
    threshold = np.partition(score, len(score) - width)[len(score) - width]
    near = np.flatnonzero(score >= threshold)  # ties at the border included, so that the order decides
    near = near[np.lexsort((near, -score[near]))][:width]
    candidates = near[rules.skip :]
    dropped["skipped"] += len(near) - len(candidates)
    answers = np.isin(candidates, list(own))
    too_near = score[candidates] >= rules.max_score
    too_close = score[candidates] >= (1 - rules.relative_margin) * best
    dropped["positive"] += int(answers.sum())
    dropped["max_score"] += int((~answers & too_near).sum())
    dropped["relative_margin"] += int((~answers & ~too_near & too_close).sum())
    kept = candidates[~answers & ~too_near & ~too_close]
    dropped["beyond_keep"] += max(0, len(kept) - rules.keep)
    return kept[: rules.keep]


def mine_store(store: TupleStore, rules: Mine, out: Path) -> dict[str, Mined]:
    """Mine every retrieval source of a store among its own passages; writes `out`/<source>.arrow.

    With anchor `passage` a candidate is compared with the query's positive instead of the query. Deviation:
    the paper compares with the query, but TF-IDF sees nothing in common between two scripts.
    """
    documents = store.documents.to_pylist()
    tfidf = Tfidf([text[:MAX_CHARACTERS] for text in documents])
    found = {}
    with whole_folder(out) as folder:
        for name, table in store.tables.items():
            if store.sources[name]["task"] != "retrieval":
                continue
            passages, groups = table["passage"].to_numpy(), table["group"].to_numpy()
            pool = np.unique(passages)
            answers: dict[int, set[int]] = defaultdict(set)
            for group, row in zip(groups, np.searchsorted(pool, passages)):
                answers[int(group)].add(int(row))
            pool_vectors = tfidf.encode([documents[row][:MAX_CHARACTERS] for row in pool])
            anchors = pool_vectors[np.searchsorted(pool, passages)]
            if rules.anchor == "query":
                anchors = tfidf.encode([text[:MAX_CHARACTERS] for text in table["query"].to_pylist()])
            mined = mine(anchors, pool_vectors, [answers[int(group)] for group in groups], rules)
            mined.negatives = [[int(pool[row]) for row in rows] for rows in mined.negatives]
            if rules.drop_short:
                mined.dropped["queries_with_fewer"] = sum(len(rows) < rules.keep for rows in mined.negatives)
                mined.negatives = [rows if len(rows) == rules.keep else [] for rows in mined.negatives]
            column = pa.array(mined.negatives, type=pa.list_(pa.int32()))
            write_arrow(pa.table({"negatives": column}), folder / f"{name}.arrow")
            found[name] = mined
    return found
