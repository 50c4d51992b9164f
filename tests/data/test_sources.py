"""Where records come from: installed packages, released tuples, original sets, local files; what is missing is named.

Published data are small local copies in the layout of the real ones, which the tests write themselves.
"""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from f2llm.data import sources
from f2llm.data.assemble import assemble
from f2llm.data.fetch import adopt
from f2llm.data.sources import fetch_command, files_needed, load_source, parts_of

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def of(registry):
    """Sources by name."""
    by_name = {source.name: source for source in registry}
    return lambda *names: [by_name[name] for name in names]


def columns_of(count, num_negatives, name="s", **more):
    """Rows in the authors' layout."""
    columns = {
        "query": [f"{name} query {n}" for n in range(count)],
        "passage": [f"{name} passage {n}" for n in range(count)],
    }
    for k in range(1, num_negatives + 1):
        columns[f"negative_{k}"] = [f"{name} negative {n}.{k}" for n in range(count)]
    return columns | more


@pytest.fixture
def released(config, tmp_path):
    """released(stem=columns, ...): data from a mirror that has these files."""

    def write(cap=0, **files):
        folder = tmp_path / "theirs"
        folder.mkdir(exist_ok=True)
        for stem, columns in files.items():
            pq.write_table(pa.table(columns), folder / f"{stem}.parquet")
        adopt(tmp_path / "mirror", "codefuse-ai/F2LLM-v2", folder, SHA)
        changes = {"source": "released", "revision": SHA, "mirror": str(tmp_path / "mirror"), "cap_per_source": cap}
        return replace(config.data, **changes)

    return write


# Installed packages -----------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["retrieval", "clustering", "classification"])
def test_embedded_records_have_what_their_task_takes_and_at_most_the_rows_asked_for(registry, config, texts, task):
    source = next(source for source in registry if source.task == task and "embedded" in source.recipes)
    (part,) = parts_of([replace(source, rows=300)], config.data)
    records = list(load_source(part, config.data, seed=0))
    assert 200 <= len(records) <= 300
    keys = {"query", "passage", "group", "language", "to"} if task == "retrieval" else {"query", "label", "language"}
    assert all(record.keys() == keys and all(record.values()) for record in records)
    assert part.ready_made == (task == "retrieval")


def test_a_draw_depends_on_seed_and_name_only(of, config, texts):
    def drawn(name, seed):
        (part,) = parts_of([replace(of("summary_body")[0], rows=50, name=name)], config.data)
        return list(load_source(part, config.data, seed))

    assert drawn("a", 0) == drawn("a", 0) != drawn("a", 1)
    assert drawn("a", 0) != drawn("b", 0)


# The released tuples ----------------------------------------------------------------------------


def test_released_files_become_parts_with_their_negatives_in_order(of, released):
    files = {"squad": columns_of(5, 24, "squad"), "imdb": columns_of(3, 1, "imdb", lang=["en", "en", None])}
    data = released(**files, paq=columns_of(2, 24), paq_part2=columns_of(4, 24))
    parts = parts_of(of("squad", "imdb", "paq"), data)
    assert [part.name for part in parts] == ["squad", "imdb", "paq", "paq_part2"]
    assert all(part.ready_made and part.revision == SHA and len(*part.inputs.values()) == 64 for part in parts)
    squad, imdb, *_ = (list(load_source(part, data, seed=0)) for part in parts)
    assert squad[3] == {
        "query": "squad query 3",
        "passage": "squad passage 3",
        "negatives": [f"squad negative 3.{k}" for k in range(1, 25)],
    }
    assert [record.get("language") for record in imdb] == ["en", "en", None]
    assert [len(record["negatives"]) for record in imdb] == [1, 1, 1]


def test_stage_1_files_are_read_whole_and_others_capped_by_a_draw_of_their_own(of, released):
    files = {"squad": columns_of(50, 1), "ocgi": columns_of(50, 1), "ocgi_part2": columns_of(5, 1)}
    data = released(cap=20, **files)
    parts = parts_of(of("ocgi", "squad"), data)
    counts = {part.name: [record["query"] for record in load_source(part, data, seed=0)] for part in parts}
    assert {name: len(queries) for name, queries in counts.items()} == {"ocgi": 50, "ocgi_part2": 5, "squad": 20}
    numbers = [int(query.split()[-1]) for query in counts["squad"]]
    assert numbers == sorted(set(numbers)) and numbers != list(range(20))
    (alone,) = parts_of(of("squad"), data)
    assert [record["query"] for record in load_source(alone, data, seed=0)] == counts["squad"]
    assert [record["query"] for record in load_source(alone, data, seed=1)] != counts["squad"]


def test_sources_that_share_a_file_take_their_own_rows(of, released):
    mela, scala, dala = of("mela", "scala", "dala")
    small = [replace(mela, file_rows=[0, 4]), replace(scala, file_rows=[4, 9]), replace(dala, file_rows=[9, 11])]
    data = released(mela=columns_of(11, 1, "mela"))
    parts = parts_of(small, data)
    assert [part.name for part in parts] == ["mela", "scala", "dala"]
    rows = [[int(record["query"].split()[-1]) for record in load_source(part, data, seed=0)] for part in parts]
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7, 8], [9, 10]]
    (short,) = parts_of([replace(dala, file_rows=[9, 12])], data)
    with pytest.raises(ValueError, match=r"mela\.parquet has 11 rows, but .* counts rows 9 to 12 as 'dala'; remedy"):
        list(load_source(short, data, seed=0))


def test_a_prompt_that_stands_before_a_released_query_is_taken_off(of, released):
    columns = columns_of(2, 1) | {"query": ["Instruct: Find it.\nQuery: where?", "Instruct: me"]}
    data = released(squad=columns)
    (part,) = parts_of(of("squad"), data)
    assert [record["query"] for record in load_source(part, data, seed=0)] == ["where?", "Instruct: me"]


def test_a_missing_text_is_passed_on_empty_to_be_counted(of, released):
    columns = columns_of(2, 2) | {"passage": [None, "p"], "negative_2": ["n", None]}
    data = released(squad=columns)
    (part,) = parts_of(of("squad"), data)
    records = list(load_source(part, data, seed=0))
    assert (records[0]["passage"], records[1]["negatives"]) == ("", ["s negative 1.1", ""])


def test_all_missing_files_are_named_before_any_work_with_the_command(of, released):
    data = replace(released(squad=columns_of(2, 1)), only=["squad", "snli", "paq"])
    message = (
        r"(?s)snli\.parquet is missing.*; remedy: fetch with: f2llm fetch --set data.from=released --set 'data.only"
    )
    with pytest.raises(ValueError, match=message):
        parts_of(of("squad", "snli", "paq"), data)
    with pytest.raises(ValueError, match=f"holds codefuse-ai/F2LLM-v2 at revision {SHA}, but {'f' * 40} is asked for"):
        parts_of(of("squad"), replace(data, revision="f" * 40))
    with pytest.raises(ValueError, match=r"squad\.parquet is missing"):
        parts_of(of("squad"), replace(data, mirror="nowhere"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"query": ["q"], "negative_1": ["n"]},
            "squad.parquet has no column 'passage', only: query, negative_1; remedy",
        ),
        ({"query": ["q"], "passage": ["p"]}, "has no column 'negative_1', only: query, passage"),
        ({"query": [3], "passage": ["p"], "negative_1": ["n"]}, "squad.parquet, row 1: 3 is not text; remedy"),
        ({"query": ["q", "r"], "passage": [["p"], None], "negative_1": ["n", "n"]}, "row 1: ['p'] is not text"),
    ],
)
def test_a_file_of_another_layout_is_named(of, released, columns, message):
    data = released(squad=columns)
    (part,) = parts_of(of("squad"), data)
    with pytest.raises(ValueError, match=re.escape(message)):
        list(load_source(part, data, seed=0))


def test_a_file_that_was_cut_after_it_was_fetched_is_named_before_any_work(of, released, tmp_path):
    data = released(squad=columns_of(500, 1))
    path = tmp_path / "mirror" / "codefuse-ai" / "F2LLM-v2" / "squad.parquet"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"squad\.parquet has \d+ bytes, not \d+: truncated or changed, fetch again"):
        parts_of(of("squad"), data)


def test_what_is_needed_is_what_the_sources_name(of, config):
    data = replace(config.data, source="released")
    ((repo_id, files, revision),) = files_needed(of("squad", "paq"), data)
    assert (repo_id, revision) == ("codefuse-ai/F2LLM-v2", config.data.revision)
    assert files == ["squad.parquet", "paq.parquet", "paq_part2.parquet"]
    needed = files_needed(of("squad", "snli"), replace(data, source="sources"))
    assert [repo_id for repo_id, _, _ in needed] == ["rajpurkar/squad", "stanfordnlp/snli"]
    assert files_needed(of("summary_body"), config.data) == []
    assert fetch_command(data) == "f2llm fetch --set data.from=released"


# The original sets ------------------------------------------------------------------------------


def test_an_original_set_is_read_through_its_converter_and_drawn_to_the_published_number(of, config, tmp_path):
    (squad,) = of("squad")
    pattern = squad.hub_files[0]
    folder = tmp_path / "theirs"
    file = folder / pattern.replace("*", "00000-of-00001")
    file.parent.mkdir(parents=True)
    rows = [{"id": str(n), "title": "t", "context": f"context {n}", "question": f"question {n}"} for n in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), file)
    adopt(tmp_path / "mirror", squad.hub_id, folder, SHA)
    data = replace(config.data, source="sources", mirror=str(tmp_path / "mirror"), cap_per_source=0)
    (part,) = parts_of([squad], data)
    assert (part.name, part.revision, part.ready_made) == ("squad", SHA, True)
    records = list(load_source(part, data, seed=0))
    assert records == [{"query": f"question {n}", "passage": f"context {n}"} | only(records[n]) for n in range(40)]
    (fewer,) = parts_of([replace(squad, published_rows=10)], data)
    drawn = list(load_source(fewer, data, seed=0))
    assert len(drawn) == 10 and all(record in records for record in drawn)
    assert drawn == list(load_source(fewer, data, seed=0)) != list(load_source(fewer, data, seed=1))
    assert len(list(load_source(part, replace(data, cap_per_source=7), seed=0))) == 7


def only(record):
    """The languages of a record, which the registry may or may not name."""
    return {key: record[key] for key in ("language", "to") if key in record}


# Local files ------------------------------------------------------------------------------------


@pytest.fixture
def local(of, config, tmp_path, monkeypatch):
    """local(task, {file: content}, ...): (source, data) of files in the folder for local files."""
    folder = tmp_path / "data" / "local"
    folder.mkdir(parents=True)
    monkeypatch.setattr(sources, "LOCAL", folder)

    def write(task, contents, **changes):
        for name, content in contents.items():
            (folder / name).write_text(content)
        entry = {"name": "own", "task": task, "recipes": ["local"], "files": list(contents), "rows": None}
        entry |= {"converter": None, "fields": {}, "published_rows": None}
        source = replace(of("squad")[0], **entry | changes)
        return source, replace(config.data, source="local", cap_per_source=0)

    return write


def test_a_local_file_needs_no_more_than_its_columns(local):
    rows = [{"query": f"q{n}", "passage": f"p{n}", "negatives": ["a", "b"], "language": "de"} for n in range(3)]
    source, data = local("retrieval", {"own.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    (part,) = parts_of([source], data)
    assert list(load_source(part, data, seed=0)) == rows
    assert len(part.inputs["own.jsonl"]) == 64


def test_several_local_files_of_several_kinds_are_one_source(local):
    source, data = local("clustering", {"a.csv": "query,label\nx,1\ny,2\n", "b.tsv": "query\tlabel\nz\t1\n"})
    (part,) = parts_of([source], data)
    assert [(row["query"], row["label"]) for row in load_source(part, data, seed=0)] == [
        ("x", "1"),
        ("y", "2"),
        ("z", "1"),
    ]
    assert not part.ready_made


def test_a_local_file_of_another_layout_takes_a_converter(local):
    fields = {"text": "text", "label": "category"}
    source, data = local("clustering", {"a.csv": "text,category\nx,1\n"}, converter="labels", fields=fields)
    (part,) = parts_of([source], data)
    assert [(row["query"], row["label"]) for row in load_source(part, data, seed=0)] == [("x", "1")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": ["../secret.jsonl"]}, "secret.jsonl lies outside"),
        ({"files": ["/etc/passwd"]}, "/etc/passwd lies outside"),
        ({"files": ["absent.jsonl"]}, "absent.jsonl missing; remedy: put the file into"),
        ({"files": []}, "source 'own' names no files; remedy: files: [name of a file in"),
    ],
)
def test_local_files_must_lie_in_their_folder(local, changes, message):
    source, data = local("retrieval", {"own.csv": "query,passage\na,b\n"}, **changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        parts_of([source], data)


def test_files_with_labels_and_files_with_passages_do_not_mix(local):
    files = {"a.csv": "query,label\nx,1\n", "b.csv": 'query,passage,negatives\nx,y,"[""z""]"\n'}
    source, data = local("clustering", files)
    with pytest.raises(ValueError, match="source 'own': some files have labels, others passages; remedy: two sources"):
        parts_of([source], data)


def test_rows_limits_a_local_source_by_a_draw(local):
    content = "query,passage\n" + "".join(f"q{n},p{n}\n" for n in range(100))
    source, data = local("retrieval", {"own.csv": content}, rows=30)
    (part,) = parts_of([source], data)
    queries = [record["query"] for record in load_source(part, data, seed=0)]
    assert len(queries) == 30 and np.all(np.diff([int(query[1:]) for query in queries]) > 0)


# Rows that a converter passes over ---------------------------------------------------------------

CONVERTED = {  # converter: (fields, rows of the file, reasons and how often)
    "sts": (
        {"first": "a", "second": "b", "score": "s", "minimum": 4},
        [{"a": f"one {n}", "b": f"two {n}", "s": n % 6} for n in range(60)],
        {"score below 4": 40},
    ),
    "duplicates": (
        {"first": "a", "second": "b", "label": "s", "duplicate": 1},
        [{"a": f"one {n}", "b": f"two {n}", "s": n % 3} for n in range(60)],
        {"labelled as no duplicate": 40},
    ),
    "nli": (
        {"premise": "a", "hypothesis": "b", "label": "s", "entailment": 0},
        [{"a": f"premise {n // 3}", "b": f"hypothesis {n}", "s": (n % 3, -1, 1)[n // 3 % 3]} for n in range(60)],
        {"no gold label": 21, "premise without an entailed hypothesis": 6},
    ),
    "pairs": (
        {"query": "a", "passage": "b", "where": {"s": "train"}},
        [{"a": f"one {n}", "b": f"two {n}", "s": "train" if n % 4 else "test"} for n in range(60)],
        {"not selected by where: s": 15},
    ),
}


@pytest.mark.parametrize("limit", [None, 5])
@pytest.mark.parametrize("converter", CONVERTED)
def test_rows_that_a_converter_passes_over_are_counted_and_do_not_change_a_sample(
    registry, config, tmp_path, monkeypatch, converter, limit
):
    fields, rows, reasons = CONVERTED[converter]
    monkeypatch.chdir(tmp_path)
    path = Path("data/local/rows.jsonl")
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = next(source for source in registry if source.task == "retrieval" and not source.stage1)
    source = replace(source, name="mine", converter=converter, fields=fields, files=["rows.jsonl"], rows=limit)
    data = replace(config.data, source="local", decontaminate="none", deduplicate="none", cap_per_source=0)
    parts, load = parts_of([source], data), partial(load_source, data=data, seed=0)
    (entry,) = assemble(parts, load, [], data, 0, tmp_path / "out").values()
    dropped = {reason: num for reason, num in entry["dropped"].items() if reason in reasons}
    assert dropped == reasons
    assert entry["drawn"] == entry["kept"] + sum(entry["dropped"].values())
    records = [record for record in load(parts[0]) if "left_out" not in record]
    assert len(records) == (limit or entry["kept"])
    if limit:
        every = replace(parts[0], source=replace(source, rows=None))
        whole = [record for record in load(every) if "left_out" not in record]
        assert len(whole) > limit and all(record in whole for record in records)
