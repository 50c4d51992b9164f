"""Files of training data in odd dialects, encodings and layouts."""

import gzip
import io
import json
import zipfile

import pandas as pd
from registry import reads, refused

from f2llm.data.inspect import check_file
from f2llm.data.local import local_records
from f2llm.data.readers import open_table

ROWS = [{"query": f"question {n}", "passage": f"answer {n}"} for n in range(30)]
TABLE = pd.DataFrame(ROWS)
CSV = TABLE.to_csv(index=False)
PAIRS = [(row["query"], row["passage"]) for row in ROWS]


def written(tmp_path, name: str, content: str | bytes):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(rows) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def pairs_of(path):
    """A function that reads the pairs of a file."""
    return lambda: [(record["query"], record.get("passage", record.get("label"))) for record in reading(path)()]


def reading(path):
    return lambda: list(local_records(open_table(path)))


def checking(path):
    """A function that raises the first problem of `f2llm check`."""

    def act():
        report = check_file(path, max_tokens=48)
        if not report.usable:
            raise ValueError(next(samples[0] for kind, samples in report.samples.items() if samples))

    return act


# Separators, quotes, line ends ------------------------------------------------------------------


@refused(r"separated by (semicolons|tabs|vertical bars), but \.csv means commas", ";", "\t", "|")
def a_separator_that_the_suffix_does_not_say(tmp_path, separator):
    return reading(written(tmp_path, "t.csv", TABLE.to_csv(index=False, sep=separator)))


@refused(r"separated by commas, but \.tsv means tabs")
def commas_in_a_tsv(tmp_path):
    return checking(written(tmp_path, "t.tsv", CSV))


@refused(r"remove the first line, which is for spreadsheets")
def a_first_line_for_spreadsheets(tmp_path):
    return reading(written(tmp_path, "t.csv", "sep=;\n" + TABLE.to_csv(index=False, sep=";")))


def with_open_quote(separator: str, closed_at: int | None) -> str:
    """Thirty rows, the fourth of which begins with a quote; a later one may close it."""
    text = TABLE.to_csv(index=False, sep=separator).splitlines()
    text[4] = f'"said{separator}an answer'
    if closed_at:
        text[closed_at] = f'so" end{separator}x' if separator == "\t" else f'so"{separator}x'
    return "\n".join(text) + "\n"


@refused(r"row 4 \(line 5\): .*joins \d+ lines", None, 6, 7, 20, 30)
def a_quote_in_a_tsv_that_swallows_rows(tmp_path, closed_at):
    return checking(written(tmp_path, "t.tsv", with_open_quote("\t", closed_at)))


@refused(r"row 4 \(line 5\): .*joins \d+ lines", None, 7, 20, 30)
def a_quote_in_a_csv_that_swallows_rows(tmp_path, closed_at):
    return reading(written(tmp_path, "t.csv", with_open_quote(",", closed_at)))


@reads([('He said "hi"', 'a 5" disk'), ("a", "b")])
def quotes_within_cells_of_a_tsv(tmp_path):
    return pairs_of(written(tmp_path, "t.tsv", 'query\tpassage\nHe said "hi"\ta 5" disk\na\tb\n'))


@reads([("first\nsecond, third\n", "a\n\nb"), ("x", "y")])
def line_breaks_within_quoted_cells(tmp_path):
    return pairs_of(written(tmp_path, "t.csv", 'query,passage\n"first\nsecond, third\n","a\n\nb"\nx,y\n'))


@refused(r"a backslash stands before a quote, as if to escape it", "csv", "tsv")
def quotes_that_a_backslash_escapes_in_cells_without_quotes(tmp_path, suffix):
    separator = "," if suffix == "csv" else "\t"
    text = TABLE.to_csv(index=False, sep=separator) + f'he said \\"hi\\"{separator}so\n'
    return checking(written(tmp_path, f"t.{suffix}", text))


@refused(r"backslashes stand in pairs or before separators alone")
def backslashes_that_a_backslash_escapes(tmp_path):
    text = pd.DataFrame([("C:\\dir", "a path"), ("x", "y")], columns=["query", "passage"])
    return reading(written(tmp_path, "t.csv", text.to_csv(index=False, escapechar="\\", quoting=1)))


@reads([("C:\\dir\\", 'a \\"quoted\\" \\d+'), ("\\\\server", "y\\\\")])
def backslashes_of_the_text_itself(tmp_path):
    rows = [("C:\\dir\\", 'a \\"quoted\\" \\d+'), ("\\\\server", "y\\\\")]
    return pairs_of(written(tmp_path, "t.csv", pd.DataFrame(rows, columns=["query", "passage"]).to_csv(index=False)))


@refused(r"line 2.*',' expected after '\"'")
def quotes_that_a_backslash_escapes(tmp_path):
    table = pd.DataFrame([{"query": 'a "word", then', "passage": "p"}])
    return checking(written(tmp_path, "t.csv", table.to_csv(index=False, doublequote=False, escapechar="\\")))


@reads(PAIRS, "\r\n", "\n\n", "\r\n\r\n")
def line_ends(tmp_path, end):
    return pairs_of(written(tmp_path, "t.csv", CSV.replace("\n", end)))


@refused(r"carriage returns alone")
def line_ends_of_old_computers(tmp_path):
    return reading(written(tmp_path, "t.csv", CSV.replace("\n", "\r")))


@refused(r"row 31 \(line 32\): \d cells, but the header has 2", "one cell\n", "a,b,c\n")
def a_row_of_another_width(tmp_path, row):
    return checking(written(tmp_path, "t.csv", CSV + row))


@refused(r"no column 'query'")
def no_header(tmp_path):
    return reading(written(tmp_path, "t.csv", CSV.partition("\n")[2]))


# Encodings and other kinds of files -------------------------------------------------------------


@reads(PAIRS, "utf-8", "utf-8-sig")
def utf8(tmp_path, encoding):
    return pairs_of(written(tmp_path, "t.csv", CSV.encode(encoding)))


@refused(r"is in UTF-(16|32)", "utf-16", "utf-16-le", "utf-16-be", "utf-32")
def other_unicode_encodings(tmp_path, encoding):
    return reading(written(tmp_path, "t.csv", CSV.encode(encoding)))


@refused(r"line 2: byte 16 of the file is not UTF-8 \(0xfc\)", "latin-1", "cp1252")
def western_encodings(tmp_path, encoding):
    return checking(written(tmp_path, "t.csv", CSV.replace("question", "qüestion").encode(encoding)))


def archive() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("t.csv", CSV)
    return content.getvalue()


def parquet() -> bytes:
    content = io.BytesIO()
    TABLE.to_parquet(content)
    return content.getvalue()


@refused(
    r"is (a Parquet file|compressed by gzip|a ZIP archive|a Git LFS pointer|a web page)",
    ("t.csv", parquet()),
    ("t.jsonl", parquet()),
    ("t.csv", gzip.compress(CSV.encode())),
    ("t.csv", archive()),
    ("t.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    ("t.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    ("t.csv", b"<!DOCTYPE html><html>Not found</html>"),
    ("t.jsonl", b"\n<html></html>"),
)
def a_file_of_another_kind(tmp_path, file):
    return reading(written(tmp_path, *file))


@refused(r"damaged gzip", CSV.encode(), gzip.compress(CSV.encode())[:-30])
def damaged_gzip(tmp_path, content):
    return reading(written(tmp_path, "t.csv.gz", content))


@refused(r"no whole Parquet file", parquet()[:-50], parquet()[:100], b"PAR1")
def half_of_a_parquet_file(tmp_path, content):
    return reading(written(tmp_path, "t.parquet", content))


@reads(PAIRS)
def gzip_in_two_parts(tmp_path):
    whole = CSV.encode()
    return pairs_of(written(tmp_path, "t.csv.gz", gzip.compress(whole[:99]) + gzip.compress(whole[99:])))


# JSON -------------------------------------------------------------------------------------------


@reads(PAIRS, json.dumps(ROWS), json.dumps(ROWS, indent=2), "\n " + json.dumps(ROWS), TABLE.to_json(orient="records"))
def an_array(tmp_path, content):
    return pairs_of(written(tmp_path, "t.json", content))


@reads(PAIRS)
def an_array_called_lines(tmp_path):
    return pairs_of(written(tmp_path, "t.jsonl", json.dumps(ROWS)))


@refused(r"orient=\"records\", lines=True", "columns", "index")
def objects_of_columns(tmp_path, orient):
    return reading(written(tmp_path, "t.json", TABLE.to_json(orient=orient)))


@refused(r"no column 'query', only|not an object but", "split", "table", "values")
def other_layouts_of_pandas(tmp_path, orient):
    return reading(written(tmp_path, "t.json", TABLE.to_json(orient=orient)))


@refused(
    r"invalid JSON.*remedy: one JSON object per line",
    ",\n".join(json.dumps(row) for row in ROWS),
    "".join(json.dumps(row) for row in ROWS),
    "\n".join(json.dumps(row, indent=1) for row in ROWS),
    lines(ROWS)[:-9],
    "{'query': 'a', 'passage': 'b'}\n",
)
def broken_lines(tmp_path, content):
    return reading(written(tmp_path, "t.jsonl", content))


@refused(r"t\.json: invalid JSON")
def half_an_array(tmp_path):
    return reading(written(tmp_path, "t.json", json.dumps(ROWS)[:-5]))


@refused(r"the key 'query' occurs twice", "t.jsonl", "t.json")
def a_key_twice(tmp_path, name):
    row = '{"query": "a", "passage": "p", "query": "b"}'
    return reading(written(tmp_path, name, f"[{row}]" if name == "t.json" else row))


@reads([("a\u2028b", "c\u0085d")])
def line_separators_of_unicode(tmp_path):
    return pairs_of(written(tmp_path, "t.jsonl", '{"query": "a\u2028b", "passage": "c\u0085d"}\n'))


# Columns ----------------------------------------------------------------------------------------

NEGATIVES = ["negative", "Negatives", "negativs", "neg", "hard_negatives", "negative1", "neg_1", "negative_passages"]


@refused(r"did you mean 'negative(s|_1)'\?", *NEGATIVES)
def negatives_of_another_name(tmp_path, name):
    return reading(written(tmp_path, "t.jsonl", lines(row | {name: "another answer"} for row in ROWS)))


@refused(r"did you mean 'language'\?", "Language", "languages", " language", "langauge")
def languages_of_another_name(tmp_path, name):
    return reading(written(tmp_path, "t.jsonl", lines(row | {name: "en"} for row in ROWS)))


@refused(r"rename '.*' to 'query'", "Query", " query", "QUERY", "querys", "queries", "qeury")
def queries_of_another_name(tmp_path, name):
    return checking(written(tmp_path, "t.csv", TABLE.rename(columns={"query": name}).to_csv(index=False)))


@refused(
    r"here every pair is a positive; remedy: converter: (duplicates|sts)", "label", "Label", "is_duplicate", "score"
)
def a_column_that_says_which_pairs_match(tmp_path, name):
    return reading(written(tmp_path, "t.jsonl", lines(row | {name: 0} for row in ROWS)))


@refused(
    r"remedy: converter: (pairs|sts|duplicates|labels), fields: \{.*\}",
    ("query", "pos", "neg"),
    ("query", "positive_passages", "negative_passages"),
    ("anchor", "positive", "negative"),
    ("anchor", "positive"),
    ("sentence1", "sentence2", "score"),
    ("sentence1", "sentence2", "label"),
    ("text", "label"),
    ("question", "answer"),
)
def the_layout_of_another_tool(tmp_path, columns):
    return checking(written(tmp_path, "t.jsonl", lines([dict.fromkeys(columns, "text")] * 3)))


@refused(r"columns twice")
def a_column_twice(tmp_path):
    return reading(written(tmp_path, "t.csv", "query,passage,query\na,b,c\n"))


# Values -----------------------------------------------------------------------------------------


@reads([("text 0", "1"), ("text 1", "1"), ("text 2", "1"), ("text 3", ""), ("text 4", "")])
def labels_as_numbers(tmp_path):
    values = [1, 1.0, "1", None, float("nan")]
    return pairs_of(
        written(tmp_path, "t.jsonl", lines({"query": f"text {n}", "label": v} for n, v in enumerate(values)))
    )


@reads([("text 0", "1"), ("text 1", "0"), ("text 2", "")])
def labels_that_pandas_made_floats(tmp_path):
    table = pd.DataFrame({"query": [f"text {n}" for n in range(3)], "label": [1, 0, None]})
    table.to_parquet(tmp_path / "t.parquet")
    return pairs_of(tmp_path / "t.parquet")


@refused(r"label: 0\.5 is of type float")
def a_label_that_is_a_share(tmp_path):
    return reading(written(tmp_path, "t.jsonl", lines([{"query": "a", "label": 0.5}])))


@refused(r"negatives: .* is no list", "one text", {"a": 1}, 5, "['a', 'b']")
def negatives_that_are_no_list(tmp_path, value):
    return reading(written(tmp_path, "t.jsonl", lines(row | {"negatives": value} for row in ROWS)))


@refused(r"(query|passage): .* is of type \w+, not text", 5, ["a"], {"a": "b"}, True)
def texts_of_another_type(tmp_path, value):
    return reading(written(tmp_path, "t.jsonl", lines([ROWS[0] | {"passage": value}])))


@refused(r"passage: ' *'", None, "", "  ", float("nan"))
def an_empty_text(tmp_path, value):
    return checking(written(tmp_path, "t.jsonl", lines([*ROWS, ROWS[0] | {"query": "x", "passage": value}])))
