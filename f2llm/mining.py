"""Hard negatives by the papers' rule: near the query, but clearly less near than its positive.

Q queries, N documents, B queries of a block, W candidates of a query, S queries of the sample, D dimensions.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from .arrow import read_arrow, write_arrow
from .checkpoint import sha256, whole_folder
from .config import Mine
from .miners import embedded_block, miner_of
from .search import Blocks, nearest
from .text import normalise, prompted
from .tuples import TupleStore

CODE = ("miners", "mining", "search", "text")  # modules that decide what is mined, beside the miner's own
SAMPLE = 1000  # queries of a part whose candidates are kept for the audit
ARRAYS = ("positive_scores", "negative_scores", "queries", "candidates", "candidate_scores")  # of `Mined`


@dataclass
class Mined:
    """What was mined, and what an audit needs.

    negatives: column list<int32>, document rows per query, nearest first. dropped: candidates that each rule removed.
    queries, candidates, candidate_scores: rows of at most SAMPLE queries, spread evenly, and the documents that
    were near to each after the first `skip`, nearest first; scores of positives are nan.
    """

    negatives: pa.ChunkedArray  # (Q)
    positive_scores: np.ndarray  # (Q) of each query's own passage
    negative_scores: np.ndarray  # of all negatives that were kept, one after the other
    queries: np.ndarray  # (S)
    candidates: np.ndarray  # (S, W)
    candidate_scores: np.ndarray  # (S, W)
    dropped: dict[str, int]
    short: int  # queries with fewer negatives than `keep`


# The rule ---------------------------------------------------------------------------------------


def mine(queries: Iterable, documents: Sequence, positives: Sequence, rules: Mine) -> Mined:
    """Hard negatives of each query among the documents.

    queries: blocks (B, D), documents: blocks (n, D), dense or sparse, all rows of unit length. positives[i]: all
    rows that answer query i, the passage that it is trained with first.
    Of the `range_max` nearest the first `skip` are passed over (with skip_after `limits`: the first `skip` of those
    that stay); a candidate stays when its score is below `max_score` and below (1 - relative_margin) of the passage's;
    the nearest `keep` are kept, all or, with drop_short, none. Equal scores are ordered by row.
    Source: arXiv 2510.02294, hard-negative mining; `limits`: mine_hard_negatives of sentence-transformers.
    """
    every, start, parts, dropped = -(-len(positives) // SAMPLE), 0, [], Counter()
    passed = rules.skip if rules.skip_after == "ranking" else 0
    with tqdm(total=len(positives), unit="query", delay=10, mininterval=5) as bar:
        for block in queries:
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
            bar.update(len(near))
    negatives, *arrays = zip(*parts)
    short = dropped.pop("short")
    return Mined(pa.chunked_array(negatives), *map(np.concatenate, arrays), dropped=dict(dropped), short=short)


def _lists(near: np.ndarray, kept: np.ndarray) -> pa.ListArray:
    offsets = np.concatenate([[0], kept.sum(axis=1).cumsum()]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, near[kept].astype(np.int32))


def _select(scores: np.ndarray, best: np.ndarray, is_answer: np.ndarray, rules: Mine) -> tuple[np.ndarray, dict]:
    """Which candidates (B, W) are kept, how many each rule removed, and how many queries came out short."""
    share = np.where(best < 0, 1 + rules.relative_margin, 1 - rules.relative_margin)
    limit = (best * share.astype(np.float32))[:, None]
    too_near = ~is_answer & (scores >= rules.max_score)
    too_close = ~is_answer & ~too_near & (scores >= limit)
    left = ~is_answer & ~too_near & ~too_close
    skipped = left & (left.cumsum(axis=1) <= (rules.skip if rules.skip_after == "limits" else 0))
    left &= ~skipped
    kept = left & (left.cumsum(axis=1) <= rules.keep)
    short = kept.sum(axis=1) < rules.keep
    lost = kept & short[:, None] if rules.drop_short else np.zeros_like(kept)
    removed = {
        "skipped": skipped,
        "positive": is_answer,
        "max_score": too_near,
        "relative_margin": too_close,
        "beyond_keep": left & ~kept,
        "drop_short": lost,
        "short": short,
    }
    return kept & ~lost, {name: int(mask.sum()) for name, mask in removed.items()}


def sweep(mined: Mined, rules: Mine, max_scores: Sequence[float], margins: Sequence[float]) -> list[dict]:
    """What other thresholds would keep of the sampled candidates: one row per pair of thresholds.

    Each row: max_score, relative_margin, queries, negatives, complete (queries with `keep` negatives).
    """
    is_answer, best = np.isnan(mined.candidate_scores), mined.positive_scores[mined.queries]
    rows = []
    for max_score, margin in product(max_scores, margins):
        other = replace(rules, max_score=max_score, relative_margin=margin)
        kept, counts = _select(mined.candidate_scores, best, is_answer, other)
        row = {"max_score": max_score, "relative_margin": margin, "queries": len(best)}
        rows.append(row | {"negatives": int(kept.sum()), "complete": len(best) - counts["short"]})
    return rows


# Positives --------------------------------------------------------------------------------------


class Answers(Sequence):
    """All documents that answer a query, its own passage first.

    These are the passages of its group and of the groups of every query with the same normalised text, every
    document whose normalised text is that of such a passage, and the query's own text as a document.
    queries (Q) and documents (N) are hashes of normalised texts, passages (Q) rows, groups (Q).
    """

    def __init__(self, queries: np.ndarray, documents: np.ndarray, passages: np.ndarray, groups: np.ndarray):
        self.queries, self.documents, self.passages, self.groups = queries, documents, passages, groups
        self.by_query, self.by_group, self.by_document = (_Index(keys) for keys in (queries, groups, documents))

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, row: int) -> np.ndarray:
        alike = self.by_query.rows(self.queries[row : row + 1])
        rows = self.by_group.rows(np.unique(self.groups[alike]))
        texts = np.unique(np.append(self.documents[self.passages[rows]], self.queries[row]))
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
    """64 bits of each normalised text; two texts that share them by chance only cost a candidate."""
    return np.fromiter((_hash(normalise(text)) for block in blocks for text in block), dtype=np.int64)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), signed=True)


# Stores -----------------------------------------------------------------------------------------


def mine_store(store: TupleStore, rules: Mine, out: Path, scratch: Path = Path("scratch/mine")) -> dict[str, Mined]:
    """Mine every part whose negatives are to be mined among its own documents; writes `out`/<part>.arrow.

    With anchor `passage` a candidate is compared with the query's positive instead of the query. Deviation:
    the paper compares with the query, but TF-IDF sees nothing in common between two scripts.
    Embeddings and finished parts stay in `scratch`: an interrupted call goes on there, and other rules find the
    embeddings again. It can be deleted at any time between two calls.
    """
    parts = [part for part, entry in store.sources.items() if entry["negatives"] == "mine"]
    miner = miner_of(rules, _distinct_texts(store)) if parts else None
    folders = {part: _mined_folder(store, part, rules, miner, Path(scratch)) for part in parts}
    with whole_folder(out) as folder:
        for part in parts:
            shutil.copyfile(folders[part] / "negatives.arrow", folder / f"{part}.arrow")
    return {part: _load(folders[part]) for part in parts}


def _distinct_texts(store: TupleStore) -> Iterator[str]:
    """Every document of a store once, also where several parts have it."""
    seen = set()
    for text in store.texts():
        if (key := _hash(text)) not in seen:
            seen.add(key)
            yield text


def _mined_folder(store: TupleStore, part: str, rules: Mine, miner, scratch: Path) -> Path:
    """The folder under `scratch` with what was mined for a part, now or by an earlier call."""
    instruction = store.sources[part]["instruction"] if rules.instructions else None
    facts = asdict(rules) | {"miner": miner.key, "instruction": instruction}
    facts["inputs"] = [store.sha256(f"{kind}/{part}.arrow") for kind in ("documents", "tuples")]
    facts["code"] = [sha256(Path(__file__).with_name(f"{name}.py")) for name in CODE]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    path = scratch / f"{part}-{key[:16]}"
    if not _is_finished(path):
        mined = _mine_part(store, part, rules, miner, instruction, scratch / f"embeddings-{miner.key[:16]}")
        with whole_folder(path) as folder:
            _save(mined, folder)
    return path


def _mine_part(store: TupleStore, part: str, rules: Mine, miner, instruction: str | None, cache: Path) -> Mined:
    table, texts = store.tables[part], store.documents[part]
    if not len(table):
        raise ValueError(f"part '{part}' has no tuples to mine for; remedy: leave it out (data.leave_out)")
    passages, groups = (table[name].to_numpy().astype(np.int64) for name in ("passage", "group"))

    def encoded(block: list[str], role: str, encode):
        return embedded_block(cache, f"{miner.key} {role}", block, encode) if miner.cached else encode(block)

    documents = Blocks([encoded(block, "document", miner.encode_documents) for block in texts.blocks(miner.block)])
    if rules.anchor == "passage":
        starts = range(0, len(passages), miner.block)
        queries = (documents.take(passages[start : start + miner.block]) for start in starts)
    else:
        encode, prompt = partial(miner.encode_queries, instruction=instruction), prompted("", instruction)
        queries = Blocks([encoded(block, f"query {prompt}", encode) for block in _queries(table, miner.block)])
    hashes = text_hashes(_queries(table, miner.block)), text_hashes(texts.blocks(miner.block))
    answers = Answers(*hashes, passages, groups)
    if not len(table["negatives"].combine_chunks().flatten()):
        return mine(queries, documents, answers, rules)
    mined = mine(queries, documents, answers, replace(rules, drop_short=False))
    return filled_up(table["negatives"], mined, rules)


def filled_up(given: pa.ChunkedArray, mined: Mined, rules: Mine) -> Mined:
    """The negatives that came with the data first, then the nearest mined ones, `keep` in all.

    Source: arXiv 2510.02294, on NLI: neutral and contradicted hypotheses, the remainder by mining.
    """
    rows = []
    for own, found in zip(given.to_pylist(), mined.negatives.to_pylist()):
        row = list(dict.fromkeys([*own, *found]))[: rules.keep]
        rows.append(row if len(row) == rules.keep or not rules.drop_short else [])
    short = sum(len(row) < rules.keep for row in rows)
    return replace(mined, negatives=pa.chunked_array([pa.array(rows, type=pa.list_(pa.int32()))]), short=short)


def _queries(table: pa.Table, num: int) -> Iterator[list[str]]:
    for start in range(0, len(table), num):
        yield table["query"].slice(start, num).to_pylist()


def _save(mined: Mined, folder: Path) -> None:
    write_arrow(pa.table({"negatives": mined.negatives}), folder / "negatives.arrow")
    for name in ARRAYS:
        np.save(folder / f"{name}.npy", getattr(mined, name))
    files = {file.name: sha256(file) for file in folder.iterdir()}
    counts = {"dropped": mined.dropped, "short": mined.short, "sha256": files}
    (folder / "counts.json").write_text(json.dumps(counts, indent=1))


def _is_finished(folder: Path) -> bool:
    try:
        files = json.loads((folder / "counts.json").read_text())["sha256"]
        return all(sha256(folder / name) == found for name, found in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _load(folder: Path) -> Mined:
    """What `_save` wrote; its arrays are memory-mapped."""
    counts = json.loads((folder / "counts.json").read_text())
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
    negatives = read_arrow(folder / "negatives.arrow")["negatives"]
    return Mined(negatives, dropped=counts["dropped"], short=counts["short"], **arrays)
