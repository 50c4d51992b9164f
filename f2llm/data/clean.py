"""Finds training rows that assembly must drop: duplicates, and texts of evaluation tasks (decontamination)."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from ..text import normalise

NGRAM = 13  # texts that share this many consecutive words count as copies; Brown et al., arXiv 2005.14165, app. C
# Scripts that write no spaces between words: every character counts as a word there.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def digest(text: str) -> bytes:
    """A 16-byte hash of a text; among 2**40 texts a collision has a probability of about 10**-15."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def texts_compared(record: dict) -> tuple[tuple[str, str], tuple[str, str]]:
    """Query and passage (or label) of a record as they are, and normalised."""
    pair = (record["query"], record["passage" if "passage" in record else "label"])
    return pair, (normalise(pair[0]), normalise(pair[1]))


def fault_of(record: dict) -> str | None:
    """Why a record cannot be used at all: a text that is empty, no Unicode, or nothing but punctuation."""
    pair, folded = texts_compared(record)
    for key, text in zip(("query", "passage" if "passage" in record else "label"), pair):
        if not text.strip():
            return f"empty {key}"
        if not is_unicode(text):
            return f"{key} is not valid Unicode"
    return None if all(folded) else "nothing but punctuation"


def is_unicode(text: str) -> bool:
    """Whether a text is valid Unicode: it has no lone surrogates, which escapes in JSON can produce."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def ngrams(text: str, num: int = NGRAM) -> Iterable[bytes]:
    """Digests of all sequences of `num` consecutive words of a normalised text."""
    words = _WORD.findall(text)
    return (digest(" ".join(words[start : start + num])) for start in range(len(words) - num + 1))


class EvaluationTexts:
    """Finds texts of evaluation tasks. rule: none, exact (equal once normalised), or ngram (or 13 words in common)."""

    def __init__(self, texts: Iterable[str], rule: str):
        folded = {normalise(text) for text in texts} if rule != "none" else set()
        self.exact = {digest(text) for text in folded}
        self.runs = {run for text in folded for run in ngrams(text)} if rule == "ngram" else set()

    def overlap(self, *folded: str) -> str | None:
        """Why normalised texts must not be used for training, None if they may be."""
        if any(digest(text) in self.exact for text in folded):
            return "in an evaluation task"
        if self.runs and any(run in self.runs for text in folded for run in ngrams(text)):
            return f"{NGRAM} words in common with an evaluation task"
        return None


class Positives:
    """The pairs of query and passage in all rows of a part, and the negatives of rows that repeat an earlier pair.

    A passage that answers a query in one row is no negative of that query in another; a repeated row is dropped, but
    not its negatives. rule: as for `Duplicates`. symmetric: a passage is answered by its query, too. others: `hashes`
    of all parts of the source, sorted. Deviation: the authors' released negatives are used without this.
    """

    def __init__(self, records: Iterable[dict], rule: str, symmetric: bool = False, others: np.ndarray | None = None):
        self.pairs, self.repeated, self.others = set(), defaultdict(list), others
        first = Duplicates(rule)
        for record in records:
            if "passage" in record:
                pair = (record["query"], record["passage"])
                folded = (normalise(pair[0]), normalise(pair[1]))
                self.pairs |= {_key(folded), _key(folded[::-1])} if symmetric else {_key(folded)}
                if first.repeated(pair, folded) and record.get("negatives"):
                    self.repeated[first.key(pair, folded)] += record["negatives"]

    def has(self, query: str, passage: str) -> bool:
        """Whether the normalised passage answers the normalised query."""
        key = _key((query, passage))
        if key in self.pairs or self.others is None:
            return key in self.pairs
        number = np.frombuffer(key[:8], np.uint64)[0]
        place = int(np.searchsorted(self.others, number))
        return place < len(self.others) and self.others[place] == number

    def hashes(self) -> np.ndarray:
        """64-bit hashes of the pairs, sorted; a chance collision only removes one negative."""
        return np.sort(np.frombuffer(b"".join(key[:8] for key in sorted(self.pairs)), np.uint64))


def _key(pair: tuple[str, str]) -> bytes:
    return digest("\0".join(pair))


class Duplicates:
    """Finds pairs that occurred before. rule: none, exact, or normalised (case, punctuation and width ignored)."""

    def __init__(self, rule: str):
        self.rule, self.seen = rule, set()

    def repeated(self, pair: tuple[str, str], folded: tuple[str, str]) -> bool:
        """Whether the pair, or its normalised form `folded`, occurred before; remembers it for later calls."""
        if self.rule == "none":
            return False
        key = self.key(pair, folded)
        known = key in self.seen
        self.seen.add(key)
        return known

    def key(self, pair: tuple[str, str], folded: tuple[str, str]) -> bytes:
        """The digest by which pairs are compared."""
        return _key(pair if self.rule == "exact" else folded)
