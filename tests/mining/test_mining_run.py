"""Mining of a store: what its negatives may and may not be, and a mining that was interrupted."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import ROOT
from helpers.closeness import assert_close
from helpers.mining import RULES

from f2llm.mining.encoders import EmbedderMiner
from f2llm.mining.run import mine_store
from f2llm.store.files import sha256
from f2llm.store.progress import Progress
from f2llm.store.tuples import DOCUMENTS, SCHEMA, TupleStore, read_arrow, write_arrow


@pytest.fixture
def rules(config):
    return replace(config.mine, **RULES)


def write_store(folder: Path, **parts) -> TupleStore:
    """parts: name -> (negatives, documents, [(query, passage row, group)])."""
    (folder / "documents").mkdir(parents=True)
    (folder / "tuples").mkdir()
    for name, (_, documents, rows) in parts.items():
        records = [dict(zip(SCHEMA.names, (*row, [], "en"))) for row in rows]
        write_arrow(pa.table({"text": documents}, schema=DOCUMENTS), folder / "documents" / f"{name}.arrow")
        write_arrow(pa.Table.from_pylist(records, schema=SCHEMA), folder / "tuples" / f"{name}.arrow")
    entries = {
        name: {"negatives": part[0], "instruction": f"Find {name}.", "symmetric": False} for name, part in parts.items()
    }
    hashes = {str(path.relative_to(folder)): sha256(path) for path in folder.rglob("*.arrow")}
    (folder / "manifest.json").write_text(json.dumps({"sources": entries, "sha256": hashes}))
    return TupleStore(folder, mined=None)


def sentences(count, seed=0):
    """Distinct texts that share words."""
    draw = np.random.default_rng(seed)
    words = ["red", "green", "blue", "old", "new", "house", "tree", "river", "stone", "bird", "walks", "sings"]
    return [" ".join(draw.choice(words, size=6)) + f" {number}" for number in range(count)]


@pytest.fixture
def some_store(tmp_path):
    first, second = sentences(60), sentences(40, seed=1)
    return write_store(
        tmp_path / "assembled",
        first=("mine", first, [(text.upper() + " really", row, row // 2) for row, text in enumerate(first)]),
        given=("given", ["a", "b"], [("c", 0, 0)]),
        second=("mine", second, [(f"what {text}", row, row) for row, text in enumerate(second)]),
    )


@pytest.fixture
def mine_it(some_store, rules, tmp_path):
    """mine_it(out name, scratch name, **rules) -> (found, {file: bytes})."""

    def mine_it(out="out", scratch="scratch", **changed):
        found = mine_store(some_store, replace(rules, **changed), tmp_path / out, scratch=tmp_path / scratch)
        return found, {path.name: path.read_bytes() for path in (tmp_path / out).iterdir()}

    return mine_it


def test_only_parts_to_be_mined_are_mined_among_their_own_documents(mine_it, some_store, tmp_path):
    found, files = mine_it(range_min=0, max_score=1.0, relative_margin=0.0, anchor="query")
    assert sorted(files) == ["first.arrow", "second.arrow"] and set(found) == {"first", "second"}
    for name, mined in found.items():
        column = read_arrow(tmp_path / "out" / f"{name}.arrow")["negatives"]
        assert column.type == pa.list_(pa.int32())
        assert column.to_pylist() == mined.negatives.to_pylist()
        assert len(column) == len(some_store.tables[name]) and len(mined.negative_scores) > 100
    answered = some_store.tables["first"]["group"].to_pylist()
    for row, negatives in enumerate(found["first"].negatives.to_pylist()):
        assert negatives and not any(answered[negative] == answered[row] for negative in negatives)
    assert TupleStore(tmp_path / "assembled", mined=tmp_path / "out").tables["first"]["negatives"][3].as_py()


def test_equal_texts_of_a_store_are_no_negatives(rules, tmp_path):
    documents = ["the red house", "The red house!", "a red house", "find a house", "the red mouse", "blue"]
    rows = [("Find a house", 0, 0), ("find a house?", 4, 1), ("a colour", 5, 2)]
    store = write_store(tmp_path / "assembled", part=("mine", documents, rows))
    everything = {"range_min": 0, "max_score": 1.0, "relative_margin": 0.0, "range_max": 6, "num_negatives": 6}
    loose = replace(rules, **everything, anchor="passage")
    mined = mine_store(store, loose, tmp_path / "out", scratch=tmp_path / "scratch")["part"]
    kept = [sorted(rows) for rows in mined.negatives.to_pylist()]
    assert kept[:2] == [[2, 5], [2, 5]], "all but the answers of 'find a house', and its own text"
    assert mined.dropped["positive"] == 4 + 4 + 1


def test_a_store_with_nothing_to_mine_gives_an_empty_folder(rules, tmp_path):
    store = write_store(tmp_path / "assembled", given=("given", ["a", "b"], [("c", 0, 0)]))
    assert mine_store(store, rules, tmp_path / "out", scratch=tmp_path / "scratch") == {}
    assert list((tmp_path / "out").iterdir()) == []


def test_the_anchor_decides_whose_neighbours_are_taken(mine_it):
    loose = {"range_min": 0, "max_score": 1.0, "relative_margin": 0.0}
    by_query, by_passage = (mine_it(anchor=anchor, **loose)[0]["second"] for anchor in ("query", "passage"))
    assert by_passage.positive_scores.min() == pytest.approx(1, rel=1e-5), "a passage is its own nearest"
    assert by_query.positive_scores.max() < 0.99
    assert by_query.negatives.to_pylist() != by_passage.negatives.to_pylist()


@pytest.mark.parametrize("instructions", [True, False])
def test_scores_are_the_models_own_with_or_without_instruction(instructions, mine_it, some_store, embedder, tmp_path):
    embedder.save(tmp_path / "model")
    changed = {"miner": f"embedder:{tmp_path / 'model'}", "max_tokens": 24, "instructions": instructions}
    loose = {"anchor": "query", "range_min": 0, "max_score": 1.0}
    mined = mine_it(f"out {instructions}", **changed, **loose)[0]["second"]
    texts = [some_store.documents["second"][row] for row in range(40)]
    asked = some_store.tables["second"]["query"].to_pylist()
    scores = embedder.encode(asked, "Find second." if instructions else None) @ embedder.encode(texts).T
    assert_close(mined.positive_scores, np.diag(scores), scale=1, name="cosines")
    found = [scores[row, negative] for row, own in enumerate(mined.negatives.to_pylist()) for negative in own]
    assert len(found) > 10, "vacuous: hardly anything is kept"
    assert_close(mined.negative_scores, found, scale=1, name="cosines")


def test_a_part_without_tuples_is_named(rules, tmp_path):
    store = write_store(tmp_path / "assembled", void=("mine", ["a"], [("b", 0, 0)]))
    store.tables["void"] = store.tables["void"].slice(0, 0)
    with pytest.raises(ValueError, match="part 'void' has no tuples to mine for; remedy: leave it out"):
        mine_store(store, rules, tmp_path / "out", scratch=tmp_path / "scratch")


def test_queries_with_fewer_negatives_are_dropped_on_request(mine_it):
    strict = {"range_min": 0, "num_negatives": 12, "range_max": 20, "max_score": 0.5}
    short, whole = (mine_it(drop_short=drop, **strict)[0]["first"] for drop in (False, True))
    lengths = [len(negatives) for negatives in short.negatives]
    assert 0 < short.short == sum(length < 12 for length in lengths) < 60, "vacuous: all or none"
    assert [len(negatives) for negatives in whole.negatives] == [12 * (length == 12) for length in lengths]
    assert len(whole.negative_scores) == 12 * (60 - short.short)


# Going on ---------------------------------------------------------------------------------------


def test_finished_parts_are_not_mined_again_and_a_broken_one_is(mine_it, tmp_path):
    _, first = mine_it()
    kept = {path.parent.name: path.stat().st_mtime_ns for path in (tmp_path / "scratch").glob("*/counts.json")}
    broken = next(path for path in (tmp_path / "scratch").glob("second-*/negatives.arrow"))
    broken.write_bytes(broken.read_bytes()[:-9])
    _, second = mine_it()
    again = {path.parent.name: path.stat().st_mtime_ns for path in (tmp_path / "scratch").glob("*/counts.json")}
    assert first == second and len(first) == 2
    assert {name for name in kept if kept[name] != again[name]} == {broken.parent.name}


def test_other_rules_are_mined_anew(mine_it, tmp_path):
    mine_it()
    mine_it(max_score=0.4)
    assert len(list((tmp_path / "scratch").glob("*/counts.json"))) == 4


WORKER = """
import json, sys
from pathlib import Path
from f2llm.config import Mine
import torch
from f2llm.mining.encoders import EmbedderMiner
from f2llm.mining.run import mine_store
from f2llm.store.tuples import TupleStore

torch.set_num_threads(1)  # as in the tests: other numbers of threads may round differently
folder, rules = Path(sys.argv[1]), Mine(**json.loads(sys.argv[2]))
EmbedderMiner.block = 16
encode = EmbedderMiner.encode_queries
def announced(self, texts, instruction):
    print("block", flush=True)
    return encode(self, texts, instruction)
EmbedderMiner.encode_queries = announced
mine_store(TupleStore(folder / "assembled", mined=None), rules, folder / "killed", scratch=folder / "scratch")
"""


def test_mining_that_was_killed_goes_on_with_the_same_result(mine_it, rules, embedder, tmp_path, monkeypatch):
    embedder.save(tmp_path / "model")
    monkeypatch.setattr(EmbedderMiner, "block", 16)
    changed = {"miner": f"embedder:{tmp_path / 'model'}", "anchor": "query", "max_tokens": 24}
    changed |= {"range_min": 0, "num_negatives": 3, "max_score": 1.0}
    mined, whole = mine_it("whole", "other", **changed)
    command = [sys.executable, "-c", WORKER, str(tmp_path), json.dumps(asdict(replace(rules, **changed)))]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    for _ in range(6):  # four blocks of documents and four of queries are the first part's
        assert killed.stdout.readline() == "block\n"
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed").exists()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "scratch").rglob("*.npy")}
    _, rest = mine_it("killed", "scratch", **changed)
    blocks = {path.name for path in (tmp_path / "other").glob("embeddings-*/*.npy")}
    assert 5 <= len(done) < len(blocks) == 14, "vacuous: nothing or everything was done when it was killed"
    assert {path.name for path in (tmp_path / "scratch").glob("embeddings-*/*.npy")} == blocks
    assert all(path.stat().st_mtime_ns == when for path, when in done.items()), "a block was computed again"
    assert rest == whole and sum(map(len, mined["first"].negatives)) > 10


def test_the_lines_of_mining_count_what_is_computed_and_not_what_an_earlier_call_did(
    some_store, embedder, rules, tmp_path, monkeypatch
):
    made = {}
    monkeypatch.setattr(
        "f2llm.mining.run.Progress",
        lambda what, *of: made.setdefault(what, []).append(Progress(what, *of)) or made[what][-1],
    )
    embedder.save(tmp_path / "model")
    rules = replace(rules, miner=f"embedder:{tmp_path / 'model'}", anchor="query", max_tokens=24)
    mine_store(some_store, rules, tmp_path / "out", scratch=tmp_path / "scratch")
    mine_store(some_store, replace(rules, num_negatives=1), tmp_path / "out", scratch=tmp_path / "scratch")
    texts, scores = 2 * (60 + 40), 60 * 60 + 40 * 40
    counts = {what: [(one.done, one.total) for one in several] for what, several in made.items()}
    assert counts == {"mine, embedding": [(texts, texts), (0, None)], "mine, search": [(scores, scores)] * 2}
