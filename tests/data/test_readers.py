"""Files of rows against the same rows read by slow Python, and one error for each way in which a file can be wrong."""

import csv
import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from f2llm.data.readers import open_table, require_columns

ROWS = [
    {"query": "plain", "passage": "one"},
    {"query": 'with "quotes", a comma\tand a tab', "passage": "two\nlines\r\nand a third"},
    {"query": "naïve 敏捷 😀", "passage": ""},
    {"query": "\u2028 a line separator of Unicode is no line break", "passage": "\x85 nor is this"},
    {"query": " spaces stay ", "passage": "five"},
]


def write(path, rows):
    """A file of any kind, by other code than what reads it."""
    opened = gzip.open if path.suffix == ".gz" else open
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    elif ".json" in path.name:
        with opened(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=len(row["query"]) % 2 == 0) + "\n" for row in rows)
    else:
        with opened(path, "wt", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t" if ".tsv" in path.name else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


KINDS = ["t.jsonl", "t.json", "t.csv", "t.tsv", "t.parquet", "t.jsonl.gz", "t.json.gz", "t.csv.gz", "t.tsv.gz"]


@pytest.mark.parametrize("name", KINDS)
def test_rows_come_back_as_they_were_written_with_their_numbers(tmp_path, name):
    table = open_table(write(tmp_path / name, ROWS))
    assert table.columns == ["query", "passage"]
    assert table.num_rows == len(ROWS)
    assert list(table.rows()) == list(enumerate(ROWS, start=1))
    assert list(table.rows()) == list(enumerate(ROWS, start=1)), "a second reading differs from the first"


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("numbers", [[], [0], [4], [0, 4], [1, 2, 3], [0, 1, 2, 3, 4]])
def test_chosen_rows_are_those_of_the_whole_file(tmp_path, name, numbers):
    table = open_table(write(tmp_path / name, ROWS))
    assert list(table.rows(np.array(numbers, dtype=np.int64))) == [(row + 1, ROWS[row]) for row in numbers]


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.parquet"])
@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([1, 5], "has 5 rows, but row 6 is asked for"),
        ([7], "has 5 rows, but row 8 is asked for"),
        ([2, 1], "must be sorted"),
        ([1, 1], "must be sorted"),
        ([-1, 1], "must be sorted, different and from 0"),
    ],
)
def test_row_numbers_that_a_file_does_not_have_are_errors(tmp_path, name, numbers, message):
    table = open_table(write(tmp_path / name, ROWS))
    with pytest.raises(ValueError, match=re.escape(name) + ".*" + re.escape(message)):
        list(table.rows(np.array(numbers)))


def test_rows_that_are_not_chosen_are_not_parsed(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"query": "a"}\nno JSON\n{"query": "c"}\n')
    assert [row["query"] for _, row in open_table(path).rows(np.array([0, 2]))] == ["a", "c"]
    with pytest.raises(ValueError, match="row 2"):
        list(open_table(path).rows(np.array([1])))


def test_parquet_reads_only_the_columns_that_are_asked_for_and_nested_values_stay_nested(tmp_path):
    rows = [{"id": number, "answers": {"text": [f"a{number}"]}, "translation": {"en": "x"}} for number in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=3)
    found = list(open_table(tmp_path / "t.parquet").rows(np.array([3]), columns=["answers"]))
    assert found == [(4, {"answers": {"text": ["a3"]}})]


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path):
    for name, text in (("t.jsonl", '{"a": "1"}\n\n   \n{"a": "2"}\n\n'), ("t.csv", "a,b\n\n1,x\n\n2,y\n")):
        (tmp_path / name).write_text("\ufeff" + text, encoding="utf-8")
        table = open_table(tmp_path / name)
        assert [(number, row["a"]) for number, row in table.rows()] == [(1, "1"), (2, "2")]
        assert table.columns[0] == "a" and table.num_rows == 2


def test_columns_of_json_lines_are_gathered_from_the_first_hundred_rows(tmp_path):
    rows = [{"a": 1}] * 98 + [{"b": 1}, {"c": 1}, {"d": 1}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert open_table(tmp_path / "t.jsonl").columns == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.parquet"])
def test_rows_of_megabytes_are_read(tmp_path, name):
    rows = [{"query": "q" * 3_000_000, "passage": "p" * 2_000_000}, {"query": "a", "passage": "b"}]
    assert list(open_table(write(tmp_path / name, rows)).rows()) == list(enumerate(rows, start=1))


# Memory -----------------------------------------------------------------------------------------

PEAK = """
import sys
from f2llm.data.readers import open_table

def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024

table = open_table(sys.argv[1])
before = peak = anonymous()
characters = 0
for number, row in table.rows():
    characters += len(row["query"]) + len(row["passage"])
    if number % 250 == 0:
        peak = max(peak, anonymous())
print(peak - before, characters / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_parquet_file_of_one_large_row_group_is_read_in_little_memory(tmp_path, compression):
    draw = np.random.default_rng(0)
    texts = [draw.bytes(1200).hex() for _ in range(50_000)]
    table = pa.table({"query": [text[:100] for text in texts], "passage": texts})
    path = tmp_path / "t.parquet"
    pq.write_table(table, path, row_group_size=len(texts), compression=compression)
    assert pq.ParquetFile(path).num_row_groups == 1, "vacuous: several row groups"
    del table, texts
    root = Path(__file__).parents[2]
    command, env = [sys.executable, "-c", PEAK, str(path)], {**os.environ, "PYTHONPATH": str(root)}
    found = subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout
    peak, mebibytes = map(float, found.split())
    assert mebibytes > 110, f"vacuous: {mebibytes} MiB of text"
    assert peak < 80, f"{peak} MiB of memory for {mebibytes} MiB of text"


# Errors -----------------------------------------------------------------------------------------


def parquet(rows, tmp_path):
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "source")
    return (tmp_path / "source").read_bytes()


BAD_FILES = {
    "an empty file": ("t.jsonl", b"", "is empty; remedy: a file with rows"),
    "an empty Parquet file": ("t.parquet", b"", "is empty"),
    "an unknown suffix": ("t.xlsx", b"x", "unknown suffix '.xlsx'; remedy: a file of one of the kinds .jsonl"),
    "no suffix": ("t", b"x", "unknown suffix ''"),
    "a zip": ("t.zip", b"x", "unknown suffix '.zip'"),
    "compressed Parquet": ("t.parquet.gz", b"x", "unknown suffix '.gz'"),
    "blank lines only": ("t.jsonl", b"\n \n\n", "holds no rows"),
    "objects without keys": ("t.jsonl", b"{}\n{}\n", "holds no rows with columns"),
    "an array of numbers": ("t.json", b"[1, 2]", "row 1: not an object but 1; remedy: an array of objects"),
    "half an array": ("t.json", b'[{"a": 1},\n', "invalid JSON"),
    "UTF-16": ("t.csv", "a,b\n1,2\n".encode("utf-16"), "in UTF-16 or UTF-32; remedy: save it as UTF-8"),
    "indented JSON": ("t.json", b'{\n  "a": 1\n}\n', "row 1 (line 1): invalid JSON"),
    "a blank header": ("t.csv", b",,\n1,2,3\n", "the header is missing"),
    "a header in which a quote stays open": ("t.csv", b'"a,b\n1,2\n', "the header is missing"),
    "a blank CSV file": ("t.csv", b"\n\n", "the header is missing"),
    "a column twice": ("t.csv", b"query,passage,query\na,b,c\n", "names columns twice: ['query']"),
    "text called Parquet": ("t.parquet", b"query,passage\n" * 9, "is no whole Parquet file"),
    "text called gzip": ("t.jsonl.gz", b'{"a": 1}\n', "damaged gzip"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_cannot_be_opened_is_named_with_the_reason(tmp_path, case):
    name, content, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / name)) + ".*" + re.escape(message)) as error:
        open_table(tmp_path / name)
    assert "remedy: " in str(error.value) and "\n" not in str(error.value)


BAD_ROWS = {
    "cut JSON": ("t.jsonl", b'{"a": "x"}\n{"a": "y\n', "row 2 (line 2): invalid JSON (Unterminated string"),
    "blank lines before": ("t.jsonl", b'{"a": "x"}\n\n\n{"a": }\n', "row 2 (line 4): invalid JSON"),
    "two objects in a line": ("t.jsonl", b'{"a": 1}\n{"a": 1}{"a": 2}\n', "row 2 (line 2): invalid JSON (Extra data"),
    "a list": ("t.jsonl", b'{"a": 1}\n[1, 2]\n', "row 2 (line 2): not an object but '[1, 2]'"),
    "a text": ("t.jsonl", b'{"a": 1}\n"x"\n', "row 2 (line 2): not an object"),
    "null": ("t.jsonl", b'{"a": 1}\nnull\n', "row 2 (line 2): not an object but 'null'"),
    "brackets without end": ("t.jsonl", b'{"a": 1}\n' + b"[" * 200_000, "row 2 (line 2): "),
    "a number without end": ("t.jsonl", b'{"a": 1}\n{"a": ' + b"9" * 5000 + b"}", "row 2 (line 2): Exceeds the limit"),
    "Latin-1": ("t.jsonl", b'{"a": "x"}\n{"a": "\xe9"}\n', "line 2: byte 19 of the file is not UTF-8 (0xe9)"),
    "Latin-1 in CSV": ("t.csv", b"a,b\nx,y\nna\xefve,z\n", "line 3: byte 11 of the file is not UTF-8 (0xef)"),
    "bytes of Latin-1": ("t.csv", "a,b\n1,é\n".encode("latin-1"), "line 2: byte 7 of the file is not UTF-8 (0xe9)"),
    "a cell too few": ("t.csv", b"a,b\n1,2\n3\n", "row 2 (line 3): 1 cells, but the header has 2: '3'"),
    "a cell too many": ("t.csv", b'a,b\n"1\n1",2\n\n3,4,5\n', "row 2 (line 5): 3 cells, but the header has 2"),
    "a bare quote": ("t.csv", b'a,b\n"1\n2",2\n"x"y,3\n', "row 2 (line 4): ',' expected after '\"'"),
    "a quote left open": (
        "t.tsv",
        b'a\tb\n1\t2\n"x\t3\n4\t5\n',
        "row 2 (line 3): a quote opened in line 3 joins 2 lines",
    ),
    "a cut gzip": ("t.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 3, mtime=0)[:-9], "damaged gzip"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_with_its_place_and_the_reason(tmp_path, case):
    name, content, message = BAD_ROWS[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / name)) + ".*" + re.escape(message)) as error:
        list(open_table(tmp_path / name).rows())
    assert len(str(error.value)) < 400 + len(str(tmp_path)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "good"),
    [
        ("t.jsonl", b'{"a": 1}\nx\n{"a": 3}\n[]\n{"a": 5}\n', [1, 3, 5]),
        ("t.csv", b'a,b\n1,x\n2\n3,x\n"4"4,x\n5,x\n', [1, 3, 5]),
    ],
)
def test_bad_rows_are_reported_one_by_one_and_the_others_keep_their_numbers(tmp_path, name, content, good):
    (tmp_path / name).write_bytes(content)
    messages = []
    found = list(open_table(tmp_path / name).rows(bad=messages.append))
    assert [number for number, _ in found] == [int(row["a"]) for _, row in found] == good
    assert [re.search(r"row (\d)", message).group(1) for message in messages] == ["2", "4"]


def test_missing_files_folders_empty_and_truncated_parquet_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"none\.csv does not exist; remedy"):
        open_table(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="is a folder, not a file; remedy"):
        open_table(tmp_path)
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"t\.parquet holds no rows; remedy"):
        open_table(tmp_path / "t.parquet")
    pq.write_table(pa.table([pa.array(["x"]), pa.array(["y"])], names=["a", "a"]), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"columns of the same name: \['a'\]"):
        open_table(tmp_path / "t.parquet")
    whole = parquet(ROWS, tmp_path)
    (tmp_path / "t.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"t\.parquet is no whole Parquet file \(.*; remedy: fetch it again"):
        open_table(tmp_path / "t.parquet")


def test_a_parquet_file_that_is_damaged_inside_is_an_error_that_names_it(tmp_path):
    whole = bytearray(parquet([{"a": f"text {number}"} for number in range(2000)], tmp_path))
    whole[10:3000] = bytes(2990)
    (tmp_path / "t.parquet").write_bytes(whole)
    table = open_table(tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"t\.parquet, after row \d+: damaged .*remedy: fetch it again"):
        list(table.rows())


def test_parquet_text_that_is_not_utf_8_is_an_error(tmp_path):
    column = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 1], np.int32)), pa.py_buffer(b"\xe9")]
    )
    pq.write_table(pa.table({"a": column}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"t\.parquet, after row 0: not UTF-8"):
        list(open_table(tmp_path / "t.parquet").rows())


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path):
    table = open_table(write(tmp_path / "t.csv", ROWS))
    require_columns(table, ["passage", "query"])
    with pytest.raises(ValueError, match=r"t\.csv has no column 'label', only: query, passage; remedy"):
        require_columns(table, ["query", "label"])
