"""Assembling, tokenising and sampling tuples: rows per second, start-up, and memory that does not grow with the data.

python -m benchmarks.data [--quick]
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.harness import in_child, write

SIZES = [100_000, 1_000_000, 5_000_000]  # documents
NEGATIVES = 24  # per row: 25 documents a row, all different, the worst case
WORDS = 20  # of a document, at most
STEPS, BATCH = 100, 64
ROUNDS = 3
REMARKS = """\
Documents of 5 to 20 made-up words, 25 a row, none twice. memory_growth_mb: private memory (RssAnon, highest of samples
every 10 ms) that opening the data and drawing 100 batches of 64 rows with 7 negatives adds to a process that has
imported everything, at 5 million documents less the same at 100 thousand. Pages of mapped files are the system's cache,
which it takes back at will: rss_file_mb. startup_s: from nothing open to the token ids of the first batch.
authors_*: the layout of the authors' code, written anew: a corpus with string ids in memory, a dict from id to row,
queries with 25 string ids in memory; batches drawn alike. rows_per_s: rows of 26 texts that one process reads from
Parquet, cleans and stores. documents_per_s: tokenising, by all cores. All wall time; three rounds of start-up, files in
the cache."""


def documents(first: int, count: int) -> list[str]:
    """Texts that all differ; deterministic."""
    draw = np.random.default_rng(first)
    lengths, words = draw.integers(5, WORDS, size=count), draw.integers(0, 50_000, size=(count, WORDS))
    return [f"d{first + n} " + " ".join(f"w{word}" for word in words[n, : lengths[n]]) for n in range(count)]


def write_released(num: int, path: Path) -> None:
    """`num` documents in the layout of the released data, one row group."""
    columns = {"query": [], "passage": []} | {f"negative_{k}": [] for k in range(1, NEGATIVES + 1)}
    for first in range(0, num, 25 * 4000):
        texts = documents(first, min(25 * 4000, num - first))
        columns["query"] += [f"query {first + row}" for row in range(0, len(texts), 25)]
        for place, name in enumerate(list(columns)[1:]):
            columns[name] += texts[place::25]
    pq.write_table(pa.table(columns), path, row_group_size=num)


# Legs, each a process of its own ----------------------------------------------------------------


class Peak:
    """Private memory now and at its highest, and mapped pages: MB of this process, sampled every 10 ms."""

    def __enter__(self) -> "Peak":
        self.start = self.highest = _status("RssAnon")
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.stop.wait(0.01):
            self.highest = max(self.highest, _status("RssAnon"))

    def __exit__(self, *_) -> None:
        self.stop.set()
        self.thread.join()
        self.added = max(self.highest, _status("RssAnon")) - self.start
        self.mapped = _status("RssFile")


def _status(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def assemble_leg(num: int, folder: Path) -> dict:
    """Write the store and its tokens; rows and documents per second."""
    from f2llm.config import load_config
    from f2llm.data.assemble import assemble
    from f2llm.data.registry import load_registry
    from f2llm.data.sources import Part, load_source
    from f2llm.store.tuples import TupleStore
    from f2llm.tokens import tokenise

    source = replace(next(source for source in load_registry() if source.name == "squad"), stage1=True)
    part = Part("part", source, (folder / "part.parquet",), None, {}, ready_made=True)
    data = replace(load_config().data, source="released", deduplicate="normalised", decontaminate="none")
    with Peak() as peak:
        start = time.perf_counter()
        assemble([part], partial(load_source, data=data, seed=0), [], data, 0, folder / "assembled")
        seconds = time.perf_counter() - start
    model, store = _model(folder), TupleStore(folder / "assembled", mined=None)
    start = time.perf_counter()
    tokenise(store, [part.name], model, folder / "tokens", quiet=True)
    tokenising = time.perf_counter() - start
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {
        "rows_per_s": num / 25 / seconds,
        "documents_per_s": num / tokenising,
        "assemble_s": seconds,
        "tokenise_s": tokenising,
        "assemble_mb": peak.added,
        "disk_mb": size / 2**20,
    }


def _model(folder: Path):
    """A small Embedder with a byte-level BPE tokenizer of 4,096 entries."""
    from benchmarks.legs import SMALL_SHAPE, new_model
    from f2llm.embedded.backbone import train_tokenizer
    from f2llm.model import Embedder

    return Embedder(new_model(SMALL_SHAPE), train_tokenizer(documents(0, 2000), vocab=4096), max_tokens=128)


def ours_leg(num: int, folder: Path) -> dict:
    """Open the store and draw batches with their token ids."""
    from f2llm.batches import HomogeneousBatches
    from f2llm.config import load_config
    from f2llm.step import token_ids_of
    from f2llm.store.tuples import TupleStore
    from f2llm.tokens import tokenise

    model, config = _model(folder), load_config()
    negatives = replace(config.stage1.hard_negatives, retrieval=7)
    training = replace(config.stage1, hard_negatives=negatives, global_batch_size=BATCH, validate_every=0, max_steps=0)
    with Peak() as peak:
        start = time.perf_counter()
        store = TupleStore(folder / "assembled", mined=None)
        tokens = tokenise(store, list(store.sources), model, folder / "tokens", quiet=True)
        batches = HomogeneousBatches(store, training, seed=0, stage1=True)
        ids = token_ids_of(batches[0], model, tokens)
        startup = time.perf_counter() - start
        drawing = time.perf_counter()
        for step in range(1, STEPS):
            ids = token_ids_of(batches[step % len(batches)], model, tokens)
        seconds = time.perf_counter() - drawing
    assert len(ids) > BATCH
    rate = (STEPS - 1) * BATCH / seconds
    return {"startup_s": startup, "added_mb": peak.added, "rss_file_mb": peak.mapped, "drawn_rows_per_s": rate}


def write_authors_layout(num: int, folder: Path) -> None:
    """The same tokens as a corpus with string ids and queries that name them, in Parquet."""
    from f2llm.tokens import Tokens

    (path,) = (folder / "tokens").rglob("*.arrow")
    tokens = Tokens(path)
    ids = pa.array([f"{'s'}_{row:032x}" for row in range(num)])
    corpus = pa.table({"doc_id": ids, "input_ids": pa.array([tokens[row] for row in range(num)], pa.list_(pa.int64()))})
    pq.write_table(corpus, folder / "corpus.parquet")
    rows = np.arange(num).reshape(-1, 25)
    columns = {"query_input_ids": [[1, 2, 3, 4, 5, 6, 7, 8]] * len(rows), "passage_input_ids": ids.take(rows[:, 0])}
    columns |= {f"negative_{k}_input_ids": ids.take(rows[:, k]) for k in range(1, 25)}
    pq.write_table(pa.table(columns), folder / "query.parquet")


def authors_leg(num: int, folder: Path) -> dict:
    """Load that layout into memory and draw batches from it."""
    from datasets import Dataset

    draw = np.random.default_rng(0)
    with Peak() as peak:
        start = time.perf_counter()
        corpus = Dataset(pq.read_table(folder / "corpus.parquet"))
        queries = Dataset(pq.read_table(folder / "query.parquet"))
        row_of = {name: row for row, name in enumerate(corpus["doc_id"])}
        drawing = None
        for _ in range(STEPS):
            found = []
            for row in draw.choice(len(queries), size=BATCH, replace=len(queries) < BATCH).tolist():
                query = queries[row]
                names = [query["passage_input_ids"]]
                names += [query[f"negative_{k}_input_ids"] for k in draw.choice(NEGATIVES, size=7, replace=False) + 1]
                found += [query["query_input_ids"], *(corpus[row_of[name]]["input_ids"] for name in names)]
            if drawing is None:
                drawing = time.perf_counter()
                startup = drawing - start
        seconds = time.perf_counter() - drawing
    assert len(found) == 9 * BATCH
    rate = (STEPS - 1) * BATCH / seconds
    return {"startup_s": startup, "added_mb": peak.added, "rss_file_mb": peak.mapped, "drawn_rows_per_s": rate}


LEGS = {"assemble": assemble_leg, "ours": ours_leg, "authors": authors_leg}


def measure(sizes: list[int], rounds: int) -> dict:
    """{leg_size: figures}; of several rounds of start-up a list, of memory the highest."""
    found = {}
    for num in sizes:
        folder = Path(tempfile.mkdtemp(prefix="f2llm-data-"))
        try:
            write_released(num, folder / "part.parquet")  # here: what it frees would hide what assembly takes
            found[f"assemble_{num}"] = in_child("benchmarks.data", "--one", "assemble", str(num), str(folder))
            write_authors_layout(num, folder)
            for leg in ("ours", "authors"):
                runs = [in_child("benchmarks.data", "--one", leg, str(num), str(folder)) for _ in range(rounds)]
                best = {key: max(run[key] for run in runs) for key in ("added_mb", "rss_file_mb", "drawn_rows_per_s")}
                found[f"{leg}_{num}"] = best | {"startup_s": [run["startup_s"] for run in runs]}
        finally:
            shutil.rmtree(folder)
        print(f"{num:,} documents: " + json.dumps({key: found[key] for key in found if key.endswith(f"_{num}")}))
        sys.stdout.flush()
    return found


def figures(legs: dict, sizes: list[int]) -> dict:
    """What the legs say, goals beside it."""
    small, large = sizes[0], sizes[-1]

    def growth(leg: str) -> list[float]:
        return [legs[f"{leg}_{large}"]["added_mb"] - legs[f"{leg}_{small}"]["added_mb"]]

    rows = [legs[f"assemble_{num}"]["rows_per_s"] for num in sizes]
    return {
        "memory_growth_mb": _figure(growth("ours"), f"{small:,} to {large:,} documents", 50, at_most=True),
        "authors_memory_growth_mb": _figure(growth("authors"), "the same, in the authors' layout"),
        "startup_s": _figure(legs[f"ours_{large}"]["startup_s"], f"{large:,} documents", 3, at_most=True),
        "authors_startup_s": _figure(legs[f"authors_{large}"]["startup_s"], "the same, in the authors' layout"),
        "rows_per_s": _figure(rows, "assembled by one process, 26 texts a row"),
        "documents_per_s": _figure([legs[f"assemble_{num}"]["documents_per_s"] for num in sizes], "tokenised"),
    }


def _figure(values: list[float], against: str, goal: float | None = None, at_most: bool = False) -> dict:
    spread = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return spread | {"goal": goal, "against": against} | ({"at_most": True} if at_most else {})


def main(words: list[str] | None = None) -> dict:
    """The figures, also printed; the full run writes them to benchmarks/results/data_cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small and in seconds; writes nothing")
    parser.add_argument("--one", nargs=3, metavar=("LEG", "DOCUMENTS", "FOLDER"), help="one measurement, as JSON")
    arguments = parser.parse_args(words)
    if arguments.one:
        leg, num, folder = arguments.one
        print(json.dumps(LEGS[leg](int(num), Path(folder))))
        return {}
    sizes = [2_500, 10_000] if arguments.quick else SIZES
    legs = measure(sizes, 1 if arguments.quick else ROUNDS)
    found = figures(legs, sizes)
    print(json.dumps(found, indent=1))
    if not arguments.quick:
        settings = {"documents": sizes, "negatives": NEGATIVES, "steps": STEPS, "batch": BATCH, "cores": os.cpu_count()}
        print(write("data_cpu", {"settings": settings, "ratios": found, "legs": legs, "remarks": REMARKS}))
    return found


if __name__ == "__main__":
    main()
