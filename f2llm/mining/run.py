"""Mining of a whole store, part by part; finished parts and embeddings stay on disk and are reused."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..config import Mine
from ..store.code import code_digest
from ..store.files import sha256, whole_folder
from ..store.progress import Progress
from ..store.tuples import TupleStore, read_arrow, write_arrow
from ..text import prompted
from .encoders import embedded_block, miner_of
from .positives import Answers, text_hash, text_hashes
from .rule import Mined, filled_up, mine
from .search import Blocks

ARRAYS = ("positive_scores", "negative_scores", "queries", "candidates", "candidate_scores")  # of `Mined`


def mine_store(store: TupleStore, rules: Mine, out: Path, scratch: Path = Path("scratch/mine")) -> dict[str, Mined]:
    """Mine every part whose negatives are to be mined among its own documents; writes `out`/<part>.arrow.

    With anchor `passage` a candidate is compared with the query's positive instead of the query. Deviation:
    the paper compares with the query, but TF-IDF sees nothing in common between two scripts.
    Embeddings and finished parts stay in `scratch`: an interrupted call resumes there, and other rules reuse
    the embeddings. It can be deleted at any time between two calls.
    """
    parts = [part for part, entry in store.sources.items() if entry["negatives"] == "mine"]
    num_texts = sum(map(len, store.documents.values()))
    miner = miner_of(rules, _distinct_texts(store), num_texts) if parts else None
    folders = {part: _mined_folder(store, part, rules, miner, Path(scratch)) for part in parts}
    missing = [part for part in parts if not _is_finished(folders[part])]
    progress = _progress_of(store, missing, rules)
    for part in missing:
        mined = _mine_part(store, part, rules, miner, Path(scratch) / f"embeddings-{miner.key[:16]}", progress)
        with whole_folder(folders[part]) as folder:
            _save(mined, folder)
    with whole_folder(out) as folder:
        for part in parts:
            shutil.copyfile(folders[part] / "negatives.arrow", folder / f"{part}.arrow")
    return {part: _load(folders[part]) for part in parts}


def _distinct_texts(store: TupleStore) -> Iterator[str]:
    """Every document of a store once, even if several parts have it."""
    seen = set()
    for text in store.texts():
        if (key := text_hash(text)) not in seen:
            seen.add(key)
            yield text


def _mined_folder(store: TupleStore, part: str, rules: Mine, miner, scratch: Path) -> Path:
    """The folder under `scratch` for the negatives of a part, which an earlier call may have mined."""
    facts = asdict(rules) | {"miner": miner.key, "instruction": _instruction(store, part, rules)}
    facts["inputs"] = [store.sha256(f"{kind}/{part}.arrow") for kind in ("documents", "tuples")]
    facts["code"] = code_digest("f2llm.mining.run")
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return scratch / f"{part}-{key[:16]}"


def _instruction(store: TupleStore, part: str, rules: Mine) -> str | None:
    return store.sources[part]["instruction"] if rules.instructions else None


def _progress_of(store: TupleStore, parts: list[str], rules: Mine) -> tuple[Progress, Progress]:
    """Of embedding and of searching all parts: their speeds differ, and each knows what is left of it."""
    texts = scores = 0
    for part in parts:
        queries, documents = len(store.tables[part]), len(store.documents[part])
        texts += documents + (queries if rules.anchor == "query" else 0)
        scores += queries * documents
    return Progress("mine, embedding", "texts", texts), Progress("mine, search", "scores", scores)


def _mine_part(store: TupleStore, part: str, rules: Mine, miner, cache: Path, progress: tuple) -> Mined:
    table, texts = store.tables[part], store.documents[part]
    if not len(table):
        raise ValueError(f"part '{part}' has no tuples to mine for; remedy: leave it out (data.leave_out)")
    passages, groups = (table[name].to_numpy().astype(np.int64) for name in ("passage", "group"))

    embedding, search = progress
    instruction = _instruction(store, part, rules)

    def encoded(block: list[str], role: str, encode):
        def compute(texts: list[str]):
            with embedding.work(len(texts)):
                return encode(texts)

        before = embedding.done
        rows = embedded_block(cache, f"{miner.key} {role}", block, compute) if miner.cached else compute(block)
        if embedding.done == before:  # by an earlier call
            embedding.skip(len(block))
        return rows

    documents = Blocks([encoded(block, "document", miner.encode_documents) for block in texts.blocks(miner.block)])
    if rules.anchor == "passage":
        starts = range(0, len(passages), miner.block)
        queries = (documents.take(passages[start : start + miner.block]) for start in starts)
    else:
        encode, prompt = partial(miner.encode_queries, instruction=instruction), prompted("", instruction)
        queries = Blocks([encoded(block, f"query {prompt}", encode) for block in _queries(table, miner.block)])
    hashes = text_hashes(_queries(table, miner.block)), text_hashes(texts.blocks(miner.block))
    answers = Answers(*hashes, passages, groups, store.sources[part]["symmetric"])
    if not len(table["negatives"].combine_chunks().flatten()):
        return mine(queries, documents, answers, rules, search)
    mined = mine(queries, documents, answers, replace(rules, drop_short=False), search)
    return filled_up(table["negatives"], mined, rules)


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
