"""The store of tuples: read where it lies, with the negatives that mining found."""

import pyarrow as pa
import pytest
from conftest import SMALL_SOURCES, write_small_store

from f2llm.arrow import write_arrow
from f2llm.checkpoint import sha256
from f2llm.tuples import TupleStore, load_tasks


def test_a_folder_without_tuples_is_named_with_a_remedy(tmp_path):
    with pytest.raises(ValueError, match="holds no assembled tuples; remedy: dvc repro data"):
        TupleStore(tmp_path)
    with pytest.raises(ValueError, match="holds no evaluation tasks; remedy: dvc repro data"):
        load_tasks(tmp_path)


def test_documents_of_all_parts_are_read_in_order_and_drawn_alike(small_store):
    texts = list(small_store.texts())
    assert texts[0] == "pairs document 0" and texts[-1] == "tense document 23"
    assert len(texts) == sum(rows + 10 for rows, *_ in SMALL_SOURCES.values())
    drawn = small_store.sample(40, seed=0)
    assert len(set(drawn)) == 40 and set(drawn) <= set(texts)
    assert {text.split()[0] for text in drawn} == set(SMALL_SOURCES), "all parts"
    assert small_store.sample(40, seed=0) == drawn != small_store.sample(40, seed=1)
    assert sorted(small_store.sample(10_000, seed=0)) == sorted(texts)


def test_queries_of_all_parts_are_drawn_alike_and_without_their_instruction(small_store):
    everything = [f"{name} query {row}" for name, (rows, *_) in SMALL_SOURCES.items() for row in range(rows)]
    assert sorted(small_store.sample(10_000, seed=0, queries=True)) == sorted(everything)
    drawn = small_store.sample(40, seed=0, queries=True)
    assert len(set(drawn)) == 40 and set(drawn) <= set(everything)
    assert {text.split()[0] for text in drawn} == set(SMALL_SOURCES), "all parts"
    assert small_store.sample(40, seed=0, queries=True) == drawn != small_store.sample(40, seed=1, queries=True)


def test_the_hashes_are_those_of_all_files_and_a_copy(small_store):
    hashes = small_store.hashes()
    assert hashes.keys() == {f"{kind}/{name}.arrow" for kind in ("documents", "tuples") for name in SMALL_SOURCES}
    assert all(hashes[name] == small_store.sha256(name) == sha256(small_store.path / name) for name in hashes)
    hashes.clear()
    assert small_store.hashes()


def test_mined_negatives_must_be_there_and_of_the_same_length(tmp_path):
    write_small_store(tmp_path / "assembled")
    mined = tmp_path / "mined"
    mined.mkdir()
    with pytest.raises(ValueError, match=r"pairs\.arrow is missing, the mined negatives of 'pairs'; remedy"):
        TupleStore(tmp_path / "assembled", mined)
    column = pa.array([[1, 2]] * SMALL_SOURCES["pairs"][0], type=pa.list_(pa.int32()))
    write_arrow(pa.table({"negatives": column}), mined / "pairs.arrow")
    write_arrow(pa.table({"negatives": column}), mined / "code.arrow")
    with pytest.raises(ValueError, match="has 60 rows, but 'code' has 26; remedy: dvc repro mine"):
        TupleStore(tmp_path / "assembled", mined)
    write_arrow(pa.table({"negatives": column[:26]}), mined / "code.arrow")
    store = TupleStore(tmp_path / "assembled", mined)
    assert store.tables["pairs"]["negatives"].to_pylist() == [[1, 2]] * 60
    assert store.tables["kinds"]["negatives"][0].as_py() != [1, 2], "labelled sources keep their own"
