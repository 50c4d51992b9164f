"""Character n-grams weighed by inverse document frequency: the embedded default's miner, and a baseline."""

import hashlib
from collections.abc import Iterable
from itertools import islice

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

from ..store.progress import Progress
from .search import unit_rows

MAX_CHARACTERS = 200  # of a text, for TF-IDF: what follows in a long docstring adds cost, not neighbours


class Tfidf:
    """Character n-grams weighed by inverse document frequency: the miner and the baseline of the embedded default."""

    block, cached = 1024, False

    def __init__(self, texts: Iterable[str], num_features: int = 2**14, num_texts: int | None = None):
        self.vectorizer = HashingVectorizer(analyzer="char_wb", ngram_range=(2, 4), n_features=num_features, norm=None)
        self.weights = TfidfTransformer(sublinear_tf=False)
        texts, number, frequencies = iter(texts), 0, np.zeros(num_features)
        progress = Progress("count n-grams", "texts", num_texts)
        while block := list(islice(texts, self.block)):
            with progress.work(len(block)):
                frequencies += np.bincount(self.vectorizer.transform(block).indices, minlength=num_features)
                number += len(block)
        self.weights.idf_ = np.log((number + 1) / (frequencies + 1)) + 1  # what its `fit` computes, block by block

    @property
    def key(self) -> str:
        settings = f"tfidf {self.vectorizer.get_params()} {MAX_CHARACTERS}"
        return hashlib.sha256(settings.encode() + self.weights.idf_.tobytes()).hexdigest()

    def encode(self, texts: list[str]) -> sparse.csr_matrix:
        """Unit-length rows (N, num_features)."""
        return self.weights.transform(self.vectorizer.transform(texts)).astype(np.float32).tocsr()

    def encode_queries(self, texts: list[str], instruction: str | None) -> sparse.csr_matrix:
        """Rows of the texts' beginnings; the instruction is ignored, since it would make all queries alike."""
        return self.encode_documents(texts)

    def encode_documents(self, texts: list[str]) -> sparse.csr_matrix:
        """Rows of the texts' beginnings."""
        return unit_rows(self.encode([text[:MAX_CHARACTERS] for text in texts]), texts, "tfidf")
