"""The check of local files: a good file, every kind of problem and warning, and what a row becomes in training."""

import csv
import json
import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from f2llm.data.inspect import (
    PROBLEMS,
    SAMPLE,
    SHOWN,
    WARNINGS,
    ComparableRows,
    Findings,
    _repeated,
    _typed_row,
    check_file,
    script_of,
)
from f2llm.data.local import layout_of, local_records
from f2llm.data.readers import open_table

GOOD = [
    {"query": "Where do birds sleep?", "passage": "Birds sleep in trees.", "negatives": ["Fish swim.", "Cats purr."]},
    {
        "query": "Где спят птицы?",
        "passage": "Птицы спят на деревьях.",
        "negatives": ["Рыбы плавают.", "Кошки мурлычут."],
    },
    {"query": "What is two and two?", "passage": "It is four, always.", "negatives": ["It is five.", "Who knows."]},
    {"query": "Why?", "passage": "Because.", "negatives": ["No.", "Yes."]},
]
LABELLED = [{"query": f"text {number}", "label": f"label {number % 3}"} for number in range(9)]


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def model(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def checked(tmp_path, model):
    """checked(rows, name, ...): the report on a file of these rows, lengths in tokens of the tests' tokenizer."""

    def check(rows, name="t.jsonl", **options):
        return check_file(write(tmp_path / name, rows), **({"max_tokens": 12, "model": model} | options))

    return check


# A good file ------------------------------------------------------------------------------------


def test_a_good_file_is_usable_and_its_report_is_the_golden_one(checked, tmp_path, tokenizer, model):
    report = checked([row | {"lang": "ru" if number == 1 else "en"} for number, row in enumerate(GOOD)])
    assert report.usable and report.counts == {}
    assert report.scripts == {"LATIN": 3, "CYRILLIC": 1} and report.languages == {"en": 3, "ru": 1}
    lines = str(report).replace(str(tmp_path), "").splitlines()
    assert lines[:5] == [
        "/t.jsonl: 4 rows, task retrieval",
        "columns: query, passage, negatives, lang",
        "languages: en 3, ru 1",
        "scripts: LATIN 3, CYRILLIC 1 (queries of 4 rows)",
        "lengths in tokens of /model, with prompt and EOS, of 4 rows and the longest:",
    ]
    assert lines[6].split()[0] == "query" and lines[7].split()[0] == "passage" and lines[8].split()[0] == "negatives"
    assert lines[9:12] == ["problems: 0", "warnings: 0", "as the model sees them:"]
    assert len(lines) == 12 + 3 * 2 + 1 and lines[-1] == "usable"


def test_lengths_are_those_of_the_tokenizer(checked, tokenizer):
    rows = [{"query": "fox " * number, "passage": "dog"} for number in range(1, 102)]
    report = checked(rows, instruction="Jump.", max_tokens=60)
    prompt = "Instruct: Jump.\nQuery: "
    slow = [len(tokenizer(prompt + row["query"], add_special_tokens=False)["input_ids"]) + 1 for row in rows]
    slow.append(max(slow))  # the longest is looked at once more
    found = report.lengths["query"]
    assert found["longest"] == max(slow) and found["median"] == np.median(slow)
    assert found["beyond"] == sum(length > 60 for length in slow) / len(slow) > 0.1
    assert report.lengths["passage"]["beyond"] == 0
    assert report.lengths["passage"]["longest"] == len(tokenizer("dog", add_special_tokens=False)["input_ids"]) + 1


def test_shown_rows_are_what_the_model_gets_prompted_cut_and_with_eos(checked, embedder):
    report = checked(GOOD, instruction="Answer.", max_tokens=embedder.max_tokens)
    (ids,) = embedder.tokenize(["Instruct: Answer.\nQuery: Where do birds sleep?"])
    pieces = [embedder.tokenizer.decode([token]) for token in ids]
    assert ids[-1] == embedder.tokenizer.eos_token_id and len(ids) == 24, "vacuous: the text is not cut"
    assert report.shown[0] == f"  query: {'|'.join([*pieces[:-1], '<EOS>'])!r}, 24 tokens"
    assert report.shown[1].startswith("  passage: 'B") and report.shown[1].endswith("tokens")


def test_without_a_tokenizer_lengths_are_in_characters(checked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = checked(GOOD, model=None)
    assert "lengths in characters (no tokenizer)" in str(report)
    assert report.lengths["query"]["longest"] == max(len(row["query"]) for row in GOOD)
    assert report.shown[0] == "  query: 'Where do birds sleep?'"
    with pytest.raises(ValueError, match=r"none holds no tokenizer\.json; remedy: the folder of a model"):
        checked(GOOD, model=tmp_path / "none")


def test_all_kinds_of_files_give_the_same_report(checked):
    flat = [row | {"negatives": json.dumps(row["negatives"])} for row in GOOD]
    numbered = [{f"negative_{n}": row["negatives"][n - 1] for n in (2, 1)} | row for row in GOOD]
    numbered = [{key: row[key] for key in ("query", "passage", "negative_2", "negative_1")} for row in numbered]
    reports = [checked(GOOD), checked(GOOD, "t.parquet"), checked(flat, "t.csv"), checked(numbered, "t.csv")]
    assert [report.lengths for report in reports[1:]] == [reports[0].lengths] * 3
    assert all(report.usable and not report.counts for report in reports)


def test_more_rows_than_the_sample_are_all_counted(checked):
    rows = [{"query": f"q {number}", "passage": f"p {number}"} for number in range(SAMPLE + 500)]
    rows[-1]["passage"] = ""
    rows[-2]["query"] = "long " * 200
    report = checked(rows)
    assert report.num_rows == SAMPLE + 500 and report.num_sampled == SAMPLE
    assert report.counts == {"empty text": 1} and report.lengths["query"]["longest"] > 200


# Tasks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "task", "expected"),
    [
        (GOOD, None, "retrieval"),
        (GOOD, "clustering", "clustering"),
        (LABELLED, None, "clustering"),
        ([row | {"label": row["label"][:7] == "label 0"} for row in LABELLED], None, "classification"),
        (
            [row | {"label": "abcdefghi".index("abcdefghi"[n]) % 2} for n, row in enumerate(LABELLED)],
            None,
            "classification",
        ),
        (LABELLED, "clustering", "clustering"),
    ],
)
def test_the_task_is_read_off_the_columns_unless_it_is_given(checked, rows, task, expected):
    report = checked(rows, task=task)
    assert report.task == expected and report.usable


# Problems and warnings --------------------------------------------------------------------------


def good(**changed):
    return [GOOD[0], GOOD[1] | changed, GOOD[2]]


FINDINGS = [
    (good(query=""), "empty text", "t.jsonl, row 2, query: ''"),
    (good(query="  \n"), "empty text", "row 2, query: '  \\n'"),
    (good(passage=None), "empty text", "row 2, passage: ''"),
    (good(negatives=["a", ""]), "empty text", "row 2, negatives: ''"),
    (good(negatives=["a", None]), "empty text", "row 2, negatives: ''"),
    ([{"query": "a", "passage": "b"}, {"query": "c"}], "empty text", "row 2, passage: ''"),
    ([*LABELLED, {"query": "a", "label": None}], "empty text", "row 10, label: ''"),
    (good(query=3), "wrong type", "row 2, query: 3 is of type int, not text; remedy: text in every row"),
    (good(passage=["x"]), "wrong type", "row 2, passage: ['x'] is of type list, not text"),
    (good(passage={"a": 1}), "wrong type", "is of type dict, not text"),
    (good(query=True), "wrong type", "row 2, query: True is of type bool, not text"),
    (good(negatives="a text"), "wrong type", "row 2, negatives: 'a text' is no list; remedy: a list of texts"),
    (good(negatives='{"a": 1}'), "wrong type", "row 2, negatives: '{\"a\": 1}' is no list"),
    (good(negatives=7), "wrong type", "row 2, negatives: 7 is no list"),
    (good(negatives=["a", 7]), "wrong type", "row 2, negatives: 7 is of type int, not text; remedy: a list of texts"),
    (good(negatives=[["a"], "b"]), "wrong type", "row 2, negatives: ['a'] is of type list, not text"),
    ([row | {"lang": 5} for row in GOOD], "wrong type", "row 1, lang: 5 is of type int, not text"),
    ([*LABELLED, {"query": "a", "label": 0.5}], "wrong type", "row 10, label: 0.5 is of type float, not text"),
    ([{"query": str(n), "passage": f"p{n}"} for n in range(100)] + GOOD[:1], "wrong type", "row 101, negatives: "),
    (good(query="half \ud83d"), "not Unicode", "row 2, query: 'half \\ud83d'"),
    (good(passage="\ud83d b"), "not Unicode", "row 2, passage: '\\ud83d b'"),
    ([{"query": "\ud83d", "passage": "b"}], "not Unicode", "row 1, query: '\\ud83d'"),
    (good(negatives=["BIRDS", "птицы спят на деревьях"]), "passage among its negatives", "row 2, negatives: 'птицы"),
    (
        [row | {"label": "same"} for row in LABELLED],
        "labels",
        "label: 1 values ['same'], but clustering needs two or more",
    ),
    (good(passage="..."), "nothing but punctuation", "row 2, passage: '...'"),
    (good(passage="где спят ПТИЦЫ"), "query equals passage", "row 2, passage: 'где спят ПТИЦЫ'"),
    ([*LABELLED, {"query": "Label 1.", "label": "label 1"}], "query equals passage", "row 10, label: 'label 1'"),
    ([*GOOD, GOOD[1]], "repeated row", "row 5: as row 2"),
    ([*LABELLED, LABELLED[3]], "repeated row", "row 10: as row 4"),
    ([*GOOD, GOOD[3] | {"query": "WHY"}], "repeated row, but for case and punctuation", "row 5: as row 4"),
    (good(negatives=["one"]), "fewer negatives than most rows", "row 2: 1 instead of 2"),
    (good(negatives=None), "fewer negatives than most rows", "row 2: 0 instead of 2"),
    ([*LABELLED, {"query": "x", "label": "rare"}], "label of a single text", "row 10, label: 'rare'"),
    ([*LABELLED, {"query": "Text 0", "label": "label 1"}], "text of several labels", "row 1: other rows give it"),
    ([row | {"topic": "t"} for row in GOOD], "column without a use", "t.jsonl: topic"),
]


ALONG = {"fewer negatives than most rows", "nothing but punctuation"}  # what the rows above bring with them


@pytest.mark.parametrize(("rows", "kind", "message"), FINDINGS)
def test_every_finding_is_counted_and_named(checked, rows, kind, message):
    report = checked(rows)
    assert any(message in sample for sample in report.samples[kind]), report.samples
    assert report.counts.keys() <= {kind, *ALONG}, report.counts
    assert report.usable == (kind in WARNINGS)
    assert f"  {kind}: " in str(report)
    assert str(report).endswith("usable" if report.usable else "not usable as it is")


def test_every_kind_of_finding_has_a_test():
    assert {kind for _, kind, _ in FINDINGS} | {"unreadable row"} == {*PROBLEMS, *WARNINGS}


@pytest.mark.parametrize("num", [7, SHOWN + 3])
def test_unreadable_rows_are_all_counted_and_named_up_to_a_limit(checked, tmp_path, model, num):
    path = write(tmp_path / "t.jsonl", GOOD)
    path.write_text(path.read_text() + "no JSON\n" * num + json.dumps(GOOD[0]) + "\n")
    report = check_file(path, max_tokens=12, model=model)
    assert not report.usable and report.num_rows == 5 + num
    assert report.counts == {"unreadable row": num, "repeated row": 1}
    named = [int(re.search(r"row (\d+) \(line", line).group(1)) for line in report.samples["unreadable row"]]
    assert named == list(range(5, 5 + min(num, SHOWN)))
    assert report.samples["repeated row"] == [f"{path}, row {5 + num}: as row 1"]
    assert str(report).count("invalid JSON") == min(num, SHOWN) and f"  unreadable row: {num}\n" in str(report)
    assert ("    and 3 more\n" in str(report)) == (num > SHOWN)


def test_a_file_that_is_damaged_in_the_middle_is_reported_as_far_as_it_goes(tmp_path, model):
    rows = [{"query": f"text {number}", "passage": f"other {number}"} for number in range(3000)]
    path = tmp_path / "t.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1000)
    whole = bytearray(path.read_bytes())
    third = pq.ParquetFile(path).metadata.row_group(2).column(0)
    start = third.dictionary_page_offset or third.data_page_offset
    whole[start : start + 64] = bytes(64)
    path.write_bytes(whole)
    report = check_file(path, max_tokens=12, model=model)
    assert report.counts == {"unreadable row": 1} and report.num_rows == 2000 and not report.usable
    assert "after row 2000: damaged" in report.samples["unreadable row"][0]


@pytest.mark.parametrize(
    ("columns", "task", "message"),
    [
        (["question", "passage"], None, "has no column 'query', only: question, passage; remedy"),
        (["query", "text"], None, "has no column 'passage', only: query, text; remedy"),
        (["query", "label"], "retrieval", "has no column 'passage', only: query, label; remedy"),
        (["query", "text"], "clustering", "has no column 'passage'"),
        (["query", "passage"], "clustering", "clustering from passages needs negatives; remedy: a column"),
        (["query", "passage"], "classification", "classification from passages needs negatives"),
        (["query", "passage", "negatives", "negative_1"], None, "has columns 'negatives' and 'negative_1'; remedy"),
    ],
)
def test_columns_that_do_not_make_a_task_are_an_error(checked, tmp_path, columns, task, message):
    row = {column: column for column in columns}
    with pytest.raises(ValueError, match=r"t\.csv.*" + re.escape(message)):
        checked([row], "t.csv", task=task)
    with pytest.raises(ValueError, match=r"t\.csv.*" + re.escape(message)):
        list(local_records(open_table(tmp_path / "t.csv"), task))


def test_three_labels_are_no_two_way_classification(checked):
    report = checked(LABELLED, task="classification")
    assert report.counts == {"labels": 1} and not report.usable
    assert "3 values ['label 0', 'label 1', 'label 2'], but classification needs exactly two" in str(report)


def test_repeats_are_those_that_slow_python_finds():
    draw, num_found = np.random.default_rng(0), 0
    for size, kinds in ((0, 1), (1, 1), (40, 12), (40, 1000)):
        hashes, numbers = draw.integers(-kinds, kinds, size), np.cumsum(draw.integers(1, 4, size))
        firsts = [int(numbers[list(hashes).index(value)]) for value in hashes]
        slow = [[number, first] for number, first in zip(numbers.tolist(), firsts) if number != first]
        found = _repeated(pd.DataFrame({"row": numbers, "exact": hashes}), "exact")
        assert found.to_numpy().tolist() == slow
        num_found += len(slow)
    assert num_found > 10, "vacuous: nothing is repeated"


def test_rows_are_compared_by_few_bytes_each(tmp_path):
    table = open_table(write(tmp_path / "t.jsonl", GOOD[:1]))
    layout, rows = layout_of(table, None), ComparableRows()
    for number, record in table.rows():
        rows.add(_typed_row(table, number, record, layout, Findings()))
    assert rows.as_frame().to_dict("records")[0].items() >= {"row": 1, "num_negatives": 2, "complete": 1}.items()
    assert len(rows.values) * rows.values.itemsize <= 60


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Hello", "LATIN"),
        ("12 ...", "NONE"),
        ("", "NONE"),
        ("дом a", "CYRILLIC"),
        ("敏捷的", "CJK"),
        ("الكلب", "ARABIC"),
    ],
)
def test_the_script_is_that_of_most_letters(text, script):
    assert script_of(text) == script


# Records ----------------------------------------------------------------------------------------


def records(path, rows, task=None):
    return list(local_records(open_table(write(path, rows)), task))


def test_local_records_are_the_rows_with_their_negatives_and_languages(tmp_path):
    assert records(tmp_path / "t.jsonl", GOOD) == GOOD
    assert records(tmp_path / "t.parquet", GOOD, "retrieval") == GOOD
    numbers = [f"negative_{number}" for number in (1, 10, 2)]
    row = {"query": "q", "passage": "p", **dict(zip(numbers, ["a", "c", "b"])), "lang": "en", "other": "x"}
    expected = {"query": "q", "passage": "p", "negatives": ["a", "b", "c"], "language": "en"}
    assert records(tmp_path / "t.csv", [row]) == [expected]
    assert records(tmp_path / "t.csv", [row | {"negative_2": ""}]) == [expected | {"negatives": ["a", "c"]}]
    assert records(tmp_path / "t.csv", [{"query": "q", "passage": "p", "negatives": '["a", "b"]'}])[0]["negatives"] == [
        "a",
        "b",
    ]
    assert records(tmp_path / "t.csv", [{"query": "q", "passage": "p", "negatives": ""}])[0]["negatives"] == []


def test_local_labels_may_be_numbers_and_a_passage_beside_them_is_refused(tmp_path):
    rows = [{"query": text, "label": label} for text, label in zip("abcde", (1, 1.0, "1", None, float("nan")))]
    labels = [record["label"] for record in records(tmp_path / "t.jsonl", rows, "clustering")]
    assert labels == ["1", "1", "1", "", ""]
    rows = [{"query": "a", "passage": "p", "label": "x", "negatives": ["n"]}]
    with pytest.raises(ValueError, match=r"'label' beside query and passage, .*converter: duplicates"):
        records(tmp_path / "t.jsonl", rows, "clustering")


@pytest.mark.parametrize(("rows", "kind", "message"), [finding for finding in FINDINGS if finding[1] == "wrong type"])
def test_a_wrong_type_is_an_error_of_local_records(tmp_path, rows, kind, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        records(tmp_path / "t.jsonl", rows)


@pytest.mark.parametrize(("rows", "kind", "message"), [finding for finding in FINDINGS if finding[1] == "empty text"])
def test_empty_texts_are_passed_on_for_the_store_to_count(tmp_path, rows, kind, message):
    found = records(tmp_path / "t.jsonl", rows)
    texts = [
        text for record in found for value in record.values() for text in ([value] if isinstance(value, str) else value)
    ]
    assert len(found) == len(rows) and any(not text.strip() for text in texts)


def test_a_null_label_is_no_label_of_its_own(checked):
    rows = [{"query": f"text {number}", "label": ["yes", "no", None][number % 3]} for number in range(9)]
    report = checked(rows)
    assert report.task == "classification" and report.counts == {"empty text": 3}
