"""The store of tuples, read where it lies, with the negatives that mining found; and its Arrow files."""

import numpy as np
import pyarrow as pa
import pytest
from conftest import SMALL_SOURCES, write_small_store

from f2llm.store.files import sha256
from f2llm.store.tuples import BATCH, ArrowWriter, Documents, TupleStore, load_tasks, read_arrow, take, write_arrow


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


# Arrow files -------------------------------------------------------------------------------------

SCHEMA = pa.schema({"text": pa.large_string(), "numbers": pa.list_(pa.int32())})
NUM_ROWS = BATCH + 1000  # two batches


@pytest.fixture(scope="module")
def rows():
    return [{"text": f"text {row} б字", "numbers": list(range(row % 4))} for row in range(NUM_ROWS)]


@pytest.fixture(scope="module")
def path(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("arrow") / "t.arrow"
    with ArrowWriter(path, SCHEMA) as writer:
        for row in rows:
            writer.write(row)
    assert writer.num_rows == NUM_ROWS
    return path


def test_a_written_table_has_batches_of_one_length_and_the_same_bytes_again(rows, path, tmp_path):
    pieces = pa.concat_tables([pa.Table.from_pylist(part, schema=SCHEMA) for part in (rows[:700], rows[700:])])
    for name in "ab":
        write_arrow(pieces, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    written = read_arrow(tmp_path / "a")
    assert written.equals(read_arrow(path))
    assert [len(chunk) for chunk in written["text"].chunks] == [BATCH, 1000]


def test_a_table_reads_back_without_being_loaded(rows, path):
    before = pa.total_allocated_bytes()
    table = read_arrow(path)
    assert len(table) == NUM_ROWS
    assert pa.total_allocated_bytes() == before
    assert table.to_pylist() == rows


def test_rows_are_taken_in_any_order_across_batches(rows, path):
    wanted = [*np.random.default_rng(0).permutation(NUM_ROWS)[:500].tolist(), BATCH - 1, BATCH, 0, 0, NUM_ROWS - 1]
    assert take(read_arrow(path), wanted) == [rows[row] for row in wanted]
    assert take(read_arrow(path), []) == []


def test_documents_are_texts_by_row_and_in_blocks(rows, path):
    documents = Documents(path)
    assert len(documents) == NUM_ROWS
    assert [documents[row] for row in (0, BATCH - 1, BATCH, NUM_ROWS - 1)] == [
        rows[row]["text"] for row in (0, BATCH - 1, BATCH, NUM_ROWS - 1)
    ]
    blocks = list(documents.blocks(num=7000))
    assert max(map(len, blocks)) == 7000 and [text for block in blocks for text in block] == [
        row["text"] for row in rows
    ]
    for row in (-1, NUM_ROWS):
        with pytest.raises(IndexError, match=f"document {row} of {NUM_ROWS}"):
            documents[row]


def test_a_file_without_rows_is_a_file(tmp_path):
    with ArrowWriter(tmp_path / "none.arrow", pa.schema({"text": pa.large_string()})):
        pass
    assert len(Documents(tmp_path / "none.arrow")) == 0
    assert list(Documents(tmp_path / "none.arrow").blocks()) == []


@pytest.mark.parametrize("left", [0, 5, 1000])
def test_a_truncated_file_is_named_with_a_remedy(path, tmp_path, left):
    (tmp_path / "cut.arrow").write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"cut\.arrow cannot be read \(.*remedy: dvc repro"):
        read_arrow(tmp_path / "cut.arrow")
    with pytest.raises(ValueError, match=r"absent\.arrow cannot be read"):
        read_arrow(tmp_path / "absent.arrow")
