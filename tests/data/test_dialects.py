"""Whatever pandas writes, in any of its dialects and encodings, comes back equal or is refused in one line."""

import csv
import string

import pandas as pd
import pytest

from f2llm.data.local import local_records
from f2llm.data.readers import open_table

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

PIECES = [*string.ascii_letters, *"0123456789", *" ,;\t|'\"\\/.:-_#{}[]()", "\n", "\r\n", "\r", '""', "é", "ß", "€"]
PIECES += ["日本", "हिन्दी", "👩\u200d🚀", "\u2028", "\u0085", "\u200b", "\ufeff", "\x00", "\x1a", "NA", "null", "007"]
TEXT = st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.sampled_from(
    ["", " ", "NaN", "None", "true", "1e5", "-0", "0x10", "2024-01-01", "[]", '["a"]', "=1+1", "a,b", "a\tb", "nan"]
)
TABLE = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8)
FEW = settings(
    max_examples=150,
    database=None,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def equal_or_refused(path, rows) -> bool:
    """Whether the rows came back; False if they were refused with a remedy. All else is a failure.

    pandas does not quote a carriage return at the end of a row, where it is half of a line end for every reader.
    """
    try:
        records = list(local_records(open_table(path)))
    except ValueError as error:
        assert "remedy: " in str(error) and "\n" not in str(error), repr(str(error))
        return False
    found = [(record["query"], record["passage"]) for record in records]
    assert found == rows or found == [(query, passage.removesuffix("\r")) for query, passage in rows], found
    return True


@FEW
@given(
    rows=TABLE,
    sep=st.sampled_from([",", ";", "\t", "|"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC, csv.QUOTE_NONE]),
    doublequote=st.booleans(),
    lineterminator=st.sampled_from(["\n", "\r\n", "\r"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252", "latin-1"]),
    index=st.booleans(),
    header=st.booleans(),
    suffix=st.sampled_from(["csv", "tsv"]),
)
def test_delimited_files(tmp_path, rows, sep, quoting, doublequote, lineterminator, encoding, index, header, suffix):
    path, table = tmp_path / f"table.{suffix}", pd.DataFrame(rows, columns=["query", "passage"])
    dialect = {"sep": sep, "quoting": quoting, "doublequote": doublequote, "lineterminator": lineterminator}
    try:
        table.to_csv(path, encoding=encoding, index=index, header=header, escapechar="\\", **dialect)
    except (UnicodeEncodeError, csv.Error):
        return  # pandas cannot write it
    equal_or_refused(path, rows)


@FEW
@given(rows=TABLE, plain=st.sampled_from([(",", "csv"), ("\t", "tsv")]), quoting=st.sampled_from([0, 1, 2]))
def test_a_plain_file_is_read_unless_a_text_holds_what_csv_cannot(tmp_path, rows, plain, quoting):
    """The defaults of pandas in UTF-8: refused only where a cell has line ends, quotes, backslashes or NUL."""
    sep, suffix = plain
    path = tmp_path / f"table.{suffix}"
    pd.DataFrame(rows, columns=["query", "passage"]).to_csv(path, sep=sep, quoting=quoting, index=False)
    odd = any(character in text for row in rows for text in row for character in '\r\n\x00\x1a"\\')
    assert equal_or_refused(path, rows) or odd


@FEW
@given(
    rows=TABLE,
    orient=st.sampled_from(["records", "lines", "columns", "index", "split", "table", "values"]),
    force_ascii=st.booleans(),
    indent=st.sampled_from([None, 2]),
    suffix=st.sampled_from(["json", "jsonl"]),
)
def test_json_files(tmp_path, rows, orient, force_ascii, indent, suffix):
    path, table = tmp_path / f"table.{suffix}", pd.DataFrame(rows, columns=["query", "passage"])
    options = {"orient": "records", "lines": True} if orient == "lines" else {"orient": orient, "indent": indent}
    table.to_json(path, force_ascii=force_ascii, **options)
    read = equal_or_refused(path, rows)
    assert read or (orient, suffix) not in (("lines", "jsonl"), ("records", "json"))


@FEW
@given(
    rows=TABLE, compression=st.sampled_from(["snappy", "gzip", "zstd", None]), kind=st.sampled_from(["str", "category"])
)
def test_parquet_files(tmp_path, rows, compression, kind):
    path, table = tmp_path / "table.parquet", pd.DataFrame(rows, columns=["query", "passage"])
    table.astype(kind).to_parquet(path, compression=compression)
    assert equal_or_refused(path, rows)
