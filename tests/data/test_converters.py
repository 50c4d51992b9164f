"""Converters on small copies of real sets' files, in their own layouts, against records written out by hand."""

import csv
import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from f2llm.data.converters import CONVERTERS, check_fields, convert
from f2llm.data.readers import open_table
from f2llm.data.registry import load_registry


@pytest.fixture
def records(tmp_path):
    """records(converter, fields, {file name: rows or text}): what `convert` makes of files that it writes."""

    def read(converter, fields, files):
        paths = [tmp_path / name for name in files]
        for path, rows in zip(paths, files.values()):
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, rows)
        return list(convert(converter, fields, [open_table(path) for path in paths], where="source"))

    return read


def _write(path, rows):
    if isinstance(rows, str):
        path.write_text(rows, encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def pair(query, passage, **other):
    return {"query": query, "passage": passage, **other}


# Pairs ------------------------------------------------------------------------------------------


def test_squad_questions_meet_their_context_and_nested_answers_can_be_reached(records):
    rows = [
        {
            "id": "1",
            "question": "Who?",
            "context": "It was Ada.",
            "answers": {"text": ["Ada", "ada"], "answer_start": [7]},
        },
        {"id": "2", "question": "When?", "context": "Nobody knows.", "answers": {"text": [], "answer_start": []}},
    ]
    files = {"plain_text/train-00000-of-00001.parquet": rows}
    found = records("pairs", {"query": "question", "passage": "context"}, files)
    assert found == [pair("Who?", "It was Ada."), pair("When?", "Nobody knows.")]
    found = records("pairs", {"query": "question", "passage": "answers.text.0"}, files)
    assert found == [pair("Who?", "Ada"), pair("When?", "")]


def test_stackexchange_title_and_body_meet_the_answer(records):
    rows = [{"texts": ["Title", "Body", "Answer"], "tags": ["a"]}, {"texts": ["T2", "", "A2"], "tags": []}]
    found = records("pairs", {"query": ["texts.0", "texts.1"], "passage": "texts.2"}, {"music.jsonl.gz": rows})
    assert found == [pair("Title\nBody", "Answer"), pair("T2", "A2")]


def test_stackexchange_title_and_body_may_be_one_text(records):
    rows = [{"title_body": "How? I tried.", "upvoted_answer": "So."}]
    found = records("pairs", {"query": "title_body", "passage": "upvoted_answer"}, {"cooking.jsonl.gz": rows})
    assert found == [pair("How? I tried.", "So.")]


def test_cnn_dailymail_highlights_meet_the_article(records):
    rows = [{"article": "(CNN) Long\ntext.", "highlights": "Short .\nText .", "id": "f00"}]
    found = records(
        "pairs", {"query": "highlights", "passage": "article"}, {"3.0.0/train-00000-of-00003.parquet": rows}
    )
    assert found == [pair("Short .\nText .", "(CNN) Long\ntext.")]


def test_codesearchnet_docstrings_meet_code_with_its_language_as_the_passage_s(records):
    rows = [
        {
            "func_documentation_string": "Adds.",
            "func_code_string": "def add(): ...",
            "language": "python",
            "text": "en",
        },
        {"func_documentation_string": "Geht.", "func_code_string": "func f() {}", "language": "go", "text": "go"},
    ]
    fields = {"query": "func_documentation_string", "passage": "func_code_string", "language": "text", "to": "language"}
    found = records("pairs", fields, {"python.jsonl": rows})
    assert found == [
        pair("Adds.", "def add(): ...", language="en", to="python"),
        pair("Geht.", "func f() {}", language="go"),
    ]


def test_several_files_follow_one_another(records):
    files = {"b.jsonl": [{"q": "1", "p": "one"}], "a.csv": [{"q": "2", "p": "two"}]}
    assert records("pairs", {"query": "q", "passage": "p"}, files) == [pair("1", "one"), pair("2", "two")]


@pytest.mark.parametrize("negatives", ["negative", "negative.*"])
def test_reranking_lists_give_a_record_per_positive_with_all_negatives(records, negatives):
    rows = [
        {"query": "q1", "positive": ["p1", "p2"], "negative": ["n1", None, "n2"]},
        {"query": "q2", "positive": [], "negative": []},
    ]
    fields = {"query": "query", "passage": "positive.*", "negatives": negatives}
    assert records("pairs", fields, {"train.jsonl": rows}) == [
        pair("q1", "p1", negatives=["n1", "n2"]),
        pair("q1", "p2", negatives=["n1", "n2"]),
        pair("q2", "", negatives=[]),
    ]


def test_miracl_passages_are_titles_and_texts_of_lists_of_objects(records):
    passages = [{"docid": "1", "title": "T1", "text": "one"}, {"docid": "2", "title": "", "text": "two"}]
    rows = [{"query": "q", "positive_passages": passages, "negative_passages": passages[::-1]}]
    of = {side: [f"{side}_passages.*.title", f"{side}_passages.*.text"] for side in ("positive", "negative")}
    found = records(
        "pairs", {"query": "query", "passage": of["positive"], "negatives": [of["negative"]]}, {"t.jsonl": rows}
    )
    assert found == [pair("q", "T1\none", negatives=["two", "T1\none"]), pair("q", "two", negatives=["two", "T1\none"])]


def test_triplets_have_their_negative_in_a_column(records):
    rows = [{"anchor": "a", "positive": "p", "negative_1": "n", "negative_2": ""}]
    fields = {"query": "anchor", "passage": "positive", "negatives": ["negative_1", "negative_2"]}
    assert records("pairs", fields, {"t.csv": rows}) == [pair("a", "p", negatives=["n"])]


def test_null_and_absent_values_are_empty_texts_for_the_store_to_count(records):
    rows = [{"q": "a", "p": None}, {"q": None, "p": "b"}, {"p": "c"}, {"q": "", "p": "d"}]
    found = records("pairs", {"query": "q", "passage": "p"}, {"t.jsonl": rows})
    assert found == [pair("a", ""), pair("", "b"), pair("", "c"), pair("", "d")]


@pytest.mark.parametrize("spelled", [1, "1", 1.0, [1, 7], ["1"]])
@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.parquet"])
def test_where_chooses_rows_however_the_value_is_spelled(records, name, spelled):
    rows = [{"q": "a", "p": "b", "best": 1, "lang": "en"}, {"q": "c", "p": "d", "best": 0, "lang": "en"}]
    rows.append({"q": "e", "p": "f", "best": 1, "lang": "de"})
    fields = {"query": "q", "passage": "p", "where": {"best": spelled, "lang": "en"}}
    assert records("pairs", fields, {name: rows}) == [pair("a", "b")]


# Bitext -----------------------------------------------------------------------------------------


def test_un_pc_translations_go_one_way_or_both(records):
    files = {"en-fr/train.parquet": [{"translation": {"en": "Peace", "fr": "Paix"}}]}
    fields = {"first": "translation.en", "second": "translation.fr", "first_language": "en", "second_language": "fr"}
    forth, back = pair("Peace", "Paix", language="en", to="fr"), pair("Paix", "Peace", language="fr", to="en")
    assert records("bitext", fields | {"both_ways": True}, files) == [forth, back]
    assert records("bitext", fields | {"both_ways": False}, files) == [forth]


# NLI --------------------------------------------------------------------------------------------

NLI = {"premise": "premise", "hypothesis": "hypothesis", "label": "label", "entailment": 0}


def nli_rows(*triples):
    return [{"premise": premise, "hypothesis": text, "label": label} for premise, text, label in triples]


def test_multi_nli_gives_a_record_per_premise_that_entails(records):
    rows = nli_rows(("P", "yes", 0), ("Q", "maybe", 1), ("P", "maybe", 1), ("P", "no", 2), ("R", "sure", 0))
    found = records("nli", NLI, {"data/train-00000-of-00001.parquet": rows})
    assert [record["query"] for record in found] == ["P", "R"]
    assert found[0]["passage"] == "yes" and sorted(found[0]["negatives"]) == ["maybe", "no"]
    assert found[1] == pair("R", "sure", negatives=[])


def test_snli_pairs_without_a_gold_label_are_neither_positive_nor_negative(records):
    rows = nli_rows(("P", "unclear", -1), ("P", "yes", 0), ("P", "no", 2), ("Q", "unclear", -1))
    assert records("nli", NLI, {"train.parquet": rows}) == [pair("P", "yes", negatives=["no"])]
    rows = nli_rows(("P", "unclear", "-"), ("P", "yes", "entailment"), ("P", "no", "contradiction"))
    found = records("nli", NLI | {"entailment": ["entailment"]}, {"train.tsv": rows})
    assert found == [pair("P", "yes", negatives=["no"])]


def test_a_hypothesis_that_is_entailed_is_no_negative_of_its_premise(records):
    rows = nli_rows(("P", "both", 0), ("P", "both", 1), ("P", "no", 2), ("P", "no", 2))
    assert records("nli", NLI, {"t.jsonl": rows}) == [pair("P", "both", negatives=["no"])]


def test_the_drawn_hypothesis_depends_on_the_premise_and_not_on_the_order_of_the_rows(records):
    rows = nli_rows(*((f"P{p}", f"h{h}", h % 3) for p in range(20) for h in range(12)))
    found = records("nli", NLI, {"t.jsonl": rows})
    turned = records("nli", NLI, {"t.jsonl": rows[::-1]})
    assert sorted(found, key=lambda r: r["query"]) == sorted(turned, key=lambda r: r["query"])
    assert len({record["passage"] for record in found}) > 1, "vacuous: every premise draws the same"
    assert len({tuple(record["negatives"]) for record in found}) > 1


def test_premises_are_grouped_by_another_column_if_one_is_named(records):
    rows = [
        row | {"promptID": number // 2}
        for number, row in enumerate(nli_rows(*[("P", f"h{n}", n % 2) for n in range(4)]))
    ]
    found = records("nli", NLI | {"group_by": "promptID"}, {"t.jsonl": rows})
    assert found == [pair("P", "h0", negatives=["h1"]), pair("P", "h2", negatives=["h3"])]


def test_records_are_the_same_with_another_hash_seed(tmp_path):
    rows = nli_rows(*((f"P{p}", f"h{h}", h % 2) for p in range(9) for h in range(9)))
    _write(tmp_path / "t.jsonl", rows)
    code = (
        "import sys; from f2llm.data.converters import convert; from f2llm.data.readers import open_table\n"
        f"print(list(convert('nli', {NLI}, [open_table(sys.argv[1])], where='s')))"
    )
    printed = set()
    for seed in "12":
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-c", code, str(tmp_path / "t.jsonl")]
        printed.add(subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout)
    assert len(printed) == 1 and "negatives" in printed.pop()


# STS and duplicates -----------------------------------------------------------------------------


def test_stsb_pairs_of_the_highest_scores_go_both_ways(records):
    rows = [("A plane.", "An air plane.", "5.00"), ("A man.", "A cat.", "3.999"), ("One.", "Two, three.", "4")]
    rows = [{"sentence1": first, "sentence2": second, "score": score} for first, second, score in rows]
    fields = {"first": "sentence1", "second": "sentence2", "score": "score", "minimum": 4}
    assert records("sts", fields, {"train.csv": rows}) == [
        pair("A plane.", "An air plane."),
        pair("An air plane.", "A plane."),
        pair("One.", "Two, three."),
        pair("Two, three.", "One."),
    ]


def test_paws_x_paraphrases_are_chosen_by_their_label(records):
    rows = [
        {"id": 1, "sentence1": "a b", "sentence2": "b a", "label": 1},
        {"id": 2, "sentence1": "c d", "sentence2": "d c", "label": 0},
    ]
    fields = {"first": "sentence1", "second": "sentence2", "label": "label", "duplicate": 1}
    assert records("duplicates", fields, {"de/train.parquet": rows}) == [pair("a b", "b a")]


def test_qqp_duplicates_of_a_tsv_go_one_way(records):
    text = (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
        '0\t1\t2\t"What is ""it""?"\tWhat is it?\t1\n'
        "1\t3\t4\tWhy?\tHow?\t0\n"
        '2\t5\t6\t"Two\nlines?"\tOne line?\t1\n'
    )
    fields = {"first": "question1", "second": "question2", "label": "is_duplicate", "duplicate": "1"}
    found = records("duplicates", fields, {"quora_duplicate_questions.tsv": text})
    assert found == [pair('What is "it"?', "What is it?"), pair("Two\nlines?", "One line?")]


# Conversations ----------------------------------------------------------------------------------

TALK = {"messages": "messages", "role": "role", "content": "content", "user": "user", "assistant": "assistant"}


def test_the_first_question_meets_the_first_answer_after_it(records):
    def said(*turns):
        return [{"role": role, "content": content} for role, content in turns]

    rows = [
        {
            "messages": said(("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "q2"), ("assistant", "a2")),
            "lang": "en",
        },
        {"messages": said(("assistant", "hello"), ("user", "q"), ("user", "q2"), ("assistant", "a")), "lang": "de"},
        {"messages": said(("user", "alone")), "lang": "fr"},
        {"messages": [], "lang": "fr"},
    ]
    assert records("conversation", TALK | {"language": "lang"}, {"train.parquet": rows}) == [
        pair("q", "a", language="en"),
        pair("q", "a", language="de"),
        pair("alone", "", language="fr"),
        pair("", "", language="fr"),
    ]


def test_oasst_like_turns_have_other_names(records):
    rows = [{"conversations": [{"from": "prompter", "value": "q"}, {"from": "gpt", "value": "a"}]}]
    fields = {
        "messages": "conversations",
        "role": "from",
        "content": "value",
        "user": ["human", "prompter"],
        "assistant": "gpt",
    }
    assert records("conversation", fields, {"t.jsonl": rows}) == [pair("q", "a")]


# Judgements -------------------------------------------------------------------------------------


def test_a_beir_folder_is_joined(records):
    files = {
        "queries.jsonl": [{"_id": q, "text": f"query {q}", "metadata": {}} for q in ("q1", "q2", "q3")],
        "corpus.jsonl": [
            {"_id": d, "title": title, "text": f"text {d}"} for d, title in (("1", "One"), ("2", ""), ("3", "T"))
        ],
        "qrels/train.tsv": "query-id\tcorpus-id\tscore\nq2\t2\t1\nq1\t1\t2\nq1\t3\t0\nq1\t2\t1\n",
        "qrels/test.tsv": "query-id\tcorpus-id\tscore\nq3\t3\t1\n",
    }
    fields = {"queries": "queries.jsonl", "corpus": "corpus.jsonl", "qrels": "qrels/train.tsv"}
    fields |= {"query_id": "query-id", "passage_id": "corpus-id"}
    assert records("qrels", fields, files) == [
        pair("query q2", "text 2"),
        pair("query q1", "One\ntext 1"),
        pair("query q1", "text 2"),
    ]
    assert records("qrels", fields | {"minimum": 2}, files) == [pair("query q1", "One\ntext 1")]
    assert len(records("qrels", fields | {"score": None}, files)) == 4


def test_the_parquet_layout_of_mteb_is_joined_over_several_files(records):
    files = {
        "corpus/corpus-00000-of-00002.parquet": [{"_id": "7", "text": "seven", "title": ""}],
        "corpus/corpus-00001-of-00002.parquet": [{"_id": "8", "text": "eight", "title": "8"}],
        "queries/queries-00000-of-00001.parquet": [{"_id": "1", "text": "which?"}],
        "data/train-00000-of-00001.parquet": [{"query-id": 1, "corpus-id": 8, "score": 1.0}],
    }
    fields = {"queries": "queries/*.parquet", "corpus": "corpus/*.parquet", "qrels": "data/train-*.parquet"}
    assert records("qrels", fields, files) == [pair("which?", "8\neight")]
    assert records("qrels", fields | {"passage": "text"}, files) == [pair("which?", "eight")]


# Groups of files --------------------------------------------------------------------------------


def fields_of(name):
    (found,) = [source.fields for source in load_registry(ROOT / "data" / "sources.yaml") if source.name == name]
    return found


def test_un_pc_has_a_folder_and_two_columns_per_pair_of_languages(records):
    files = {
        "un_pc/en-fr/train-00000-of-00001.parquet": [{"translation": {"en": "peace", "fr": "paix"}}],
        "un_pc/ar-en/train-00000-of-00002.parquet": [{"translation": {"ar": "سلام", "en": "peace"}}],
        "un_pc/ar-en/train-00001-of-00002.parquet": [{"translation": {"ar": "حرب", "en": "war"}}],
    }
    assert records("bitext", fields_of("unpc"), files) == [
        {"query": "سلام", "passage": "peace", "language": "ar", "to": "en"},
        {"query": "peace", "passage": "سلام", "language": "en", "to": "ar"},
        {"query": "حرب", "passage": "war", "language": "ar", "to": "en"},
        {"query": "war", "passage": "حرب", "language": "en", "to": "ar"},
        {"query": "peace", "passage": "paix", "language": "en", "to": "fr"},
        {"query": "paix", "passage": "peace", "language": "fr", "to": "en"},
    ]


@pytest.mark.parametrize("name", ["csn", "csn_ccr"])
def test_codesearchnet_joins_each_language_alone_though_ids_repeat(records, name):
    files = {}
    for language in ("python", "go"):
        files |= {
            f"CSN/{language}-queries/queries-00000-of-00001.parquet": [{"_id": "1", "text": f"{language} query"}],
            f"CSN/{language}-corpus/corpus-00000-of-00001.parquet": [{"_id": "1", "text": f"{language} text"}],
            f"CSN/{language}-qrels/train-00000-of-00001.parquet": [{"query-id": "1", "corpus-id": "1", "score": 1}],
        }
    assert records("qrels", fields_of(name), files) == [
        pair("go query", "go text"),
        pair("python query", "python text"),
    ]


def test_a_file_that_is_not_named_as_the_groups_are_is_an_error(records):
    fields = {"query": "{a}", "passage": ["x.{a}", "{b}"], "per": "{a}_{b}.jsonl"}
    rows = [{"one": "q", "x": {"one": "p"}, "two": "r"}]
    assert records("pairs", fields, {"one_two.jsonl": rows}) == [pair("q", "p\nr")]
    with pytest.raises(ValueError, match=r"source 'source': .*other\.jsonl is not named as fields.per says, '\{a\}_"):
        records("pairs", fields, {"one_two.jsonl": rows, "other.jsonl": rows})


# Labels -----------------------------------------------------------------------------------------


def test_amazon_massive_labels_keep_their_language(records):
    rows = [
        {"id": 1, "label": "alarm", "text": "wake me", "lang": "en"},
        {"id": 2, "label": "play", "text": "spiel", "lang": "de"},
    ]
    found = records("labels", {"text": "text", "label": "label", "language": "lang"}, {"train.jsonl": rows})
    assert found == [
        {"query": "wake me", "label": "alarm", "language": "en"},
        {"query": "spiel", "label": "play", "language": "de"},
    ]


@pytest.mark.parametrize("name", ["t.csv", "t.parquet", "t.jsonl"])
def test_labels_get_the_names_that_stand_for_them(records, name):
    rows = [{"text": "bad", "label": 0}, {"text": "good", "label": 1}]
    found = records("labels", {"text": "text", "label": "label", "names": {0: "negative", 1: "positive"}}, {name: rows})
    assert found == [{"query": "bad", "label": "negative"}, {"query": "good", "label": "positive"}]
    assert [record["label"] for record in records("labels", {"text": "text", "label": "label"}, {name: rows})] == [
        "0",
        "1",
    ]


def test_labels_may_be_numbers_truth_values_and_null(records):
    rows = [{"t": "a", "l": 3.0}, {"t": "b", "l": True}, {"t": "c", "l": None}, {"t": "d", "l": 0.5}]
    found = records("labels", {"text": "t", "label": "l"}, {"t.jsonl": rows})
    assert [record["label"] for record in found] == ["3", "True", "", "0.5"]


# Errors -----------------------------------------------------------------------------------------

GOOD = {
    "pairs": {"query": "q", "passage": "p"},
    "bitext": {"first": "q", "second": "p", "first_language": "en", "second_language": "de", "both_ways": False},
    "nli": {"premise": "q", "hypothesis": "p", "label": "n", "entailment": 4},
    "sts": {"first": "q", "second": "p", "score": "n", "minimum": 4},
    "duplicates": {"first": "q", "second": "p", "label": "n", "duplicate": 4},
    "conversation": {"messages": "turns", "role": "role", "content": "said", "user": "u", "assistant": "a"},
    "qrels": {"queries": "t.jsonl", "corpus": "t.jsonl", "qrels": "t.jsonl", "query_id": "q", "passage_id": "q"}
    | {"score": "n", "id": "q", "query": "q", "passage": "p"},
    "labels": {"text": "q", "label": "n"},
}
ROW = {"q": "query", "p": "passage", "n": 4, "turns": [{"role": "u", "said": "x"}, {"role": "a", "said": "y"}]}
BAD_VALUES = [
    ("pairs", {}, {"q": 7}, "row 2, field 'q': 7 is of type int, not text; remedy: the path of a text"),
    ("pairs", {}, {"p": ["a"]}, "row 2, field 'p': ['a'] is of type list, not text"),
    ("pairs", {}, {"p": {"a": "b"}}, "field 'p': {'a': 'b'} is of type dict, not text"),
    ("pairs", {}, {"q": True}, "field 'q': True is of type bool, not text"),
    ("pairs", {"passage": ["q", "n"]}, {}, "row 1, field 'n': 4 is of type int, not text"),
    ("pairs", {"passage": "p.en"}, {}, "row 1, field 'p.en': 'passage' is of type str, where 'en' leads nowhere"),
    ("pairs", {"passage": "turns.0.text"}, {}, "is an object with ['role', 'said'], where 'text' leads nowhere"),
    (
        "pairs",
        {"passage": "turns.first"},
        {},
        "is of type list, where 'first' leads nowhere; remedy: a path that is there",
    ),
    ("pairs", {"negatives": "n"}, {}, "field 'n.*': 4 is of type int, where '*' leads nowhere"),
    ("pairs", {"negatives": "p"}, {}, "field 'p.*': 'passage' is of type str, where '*' leads nowhere"),
    ("pairs", {"language": "n"}, {}, "field 'n': 4 is of type int, not text"),
    ("bitext", {}, {"p": 1.5}, "row 2, field 'p': 1.5 is of type float, not text"),
    ("nli", {}, {"n": ["a"]}, "row 2, field 'n': ['a'] is of type list, not text"),
    ("nli", {}, {"p": 3}, "row 2, field 'p': 3 is of type int, not text"),
    ("sts", {}, {"n": "high"}, "row 2, field 'n': 'high' is no number; remedy"),
    ("sts", {}, {"n": None}, "row 2, field 'n': None is no number; remedy"),
    ("sts", {}, {"n": [4]}, "row 2, field 'n': [4] is no number"),
    ("duplicates", {}, {"n": {"a": 1}}, "row 2, field 'n': {'a': 1} is of type dict, not text"),
    ("conversation", {}, {"turns": "hello"}, "field 'turns.*.role': 'hello' is of type str, where '*' leads nowhere"),
    (
        "conversation",
        {},
        {"turns": ["hello"]},
        "field 'turns.*.role': 'hello' is of type str, where 'role' leads nowhere",
    ),
    ("conversation", {"content": "text"}, {}, "field 'turns.*.text'"),
    (
        "conversation",
        {},
        {"turns": [{"role": "u", "said": 1}]},
        "row 2, field 'turns.*.said': 1 is of type int, not text",
    ),
    (
        "labels",
        {"names": {3: "three"}},
        {},
        "row 1, field 'n': '4' has no text among the names {3: 'three'}; remedy",
    ),
    ("labels", {"names": {4: True}}, {}, "has no text among the names {4: True}; remedy: add it, in quotes"),
    ("labels", {}, {"n": ["a", "b"]}, "row 2, field 'n': ['a', 'b'] is of type list, not text"),
    ("qrels", {"passage_id": "p"}, {}, "row 1, field 'p': 'passage' is the id of no row of t.jsonl; remedy"),
    (
        "qrels",
        {"query_id": "p", "passage_id": "q"},
        {},
        "row 1, field 'p': 'passage' is the id of no row of t.jsonl",
    ),
    ("qrels", {}, {"n": "much"}, "row 2, field 'n': 'much' is no number"),
]


@pytest.mark.parametrize(("converter", "fields", "values", "message"), BAD_VALUES)
def test_a_wrong_value_is_named_with_file_row_field_and_rule(records, tmp_path, converter, fields, values, message):
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "t.jsonl")) + ".*" + re.escape(message)):
        records(converter, GOOD[converter] | fields, {"t.jsonl": [ROW, ROW | values]})


@pytest.mark.parametrize("converter", GOOD)
def test_every_converter_takes_the_good_row_and_names_a_column_that_is_missing(records, converter):
    assert len(records(converter, GOOD[converter], {"t.jsonl": [ROW]})) > 0, "vacuous: no record"
    for key, value in GOOD[converter].items():
        if value in ROW:
            with pytest.raises(ValueError, match=r"t\.jsonl has no column 'gone', only: q, p, n, turns; remedy"):
                records(converter, GOOD[converter] | {key: "gone.en"}, {"t.jsonl": [ROW]})
    if converter != "qrels":
        with pytest.raises(ValueError, match=r"t\.csv has no column"):
            records(converter, GOOD[converter], {"t.jsonl": [ROW], "t.csv": [{"other": "x"}]})
        with pytest.raises(ValueError, match=r"has no column 'split'"):
            records(converter, GOOD[converter] | {"where": {"split": "train"}}, {"t.jsonl": [ROW]})


@pytest.mark.parametrize("converter", GOOD)
def test_every_converter_knows_its_fields(converter):
    assert GOOD.keys() == CONVERTERS.keys()
    check_fields(converter, GOOD[converter] | {"where": {}}, "source")
    first = next(iter(GOOD[converter]))
    with pytest.raises(ValueError, match=f"source 'source', fields: missing a required argument: '{first}'; remedy"):
        check_fields(converter, {key: value for key, value in GOOD[converter].items() if key != first}, "source")
    with pytest.raises(
        ValueError, match=f"unexpected keyword argument 'colour'; remedy: converter '{converter}' takes"
    ):
        check_fields(converter, GOOD[converter] | {"colour": "q"}, "source")


def test_an_unknown_converter_and_globs_without_files_are_errors(records):
    with pytest.raises(ValueError, match=r"source 'source': converter is 'crawl', but must be one of: pairs, bitext"):
        records("crawl", {}, {"t.jsonl": [ROW]})
    with pytest.raises(ValueError, match=r"source 'source': 'none/\*' matches no file of .*t\.jsonl; remedy"):
        records("qrels", GOOD["qrels"] | {"corpus": "none/*"}, {"t.jsonl": [ROW]})
    with pytest.raises(ValueError, match="files that are joined take none of the fields"):
        records("qrels", GOOD["qrels"] | {"where": {"n": 4}}, {"t.jsonl": [ROW]})
