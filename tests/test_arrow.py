"""Arrow files on disk: the same bytes for the same rows, and rows that are read where they lie."""

import numpy as np
import pyarrow as pa
import pytest

from f2llm.arrow import BATCH, ArrowWriter, Documents, read_arrow, take, write_arrow

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
