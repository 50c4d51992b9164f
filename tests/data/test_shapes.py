"""Files of other tools: what `f2llm check` recognises trains as the same texts, and what is ambiguous is asked for."""

import gzip
import json

import pandas as pd
import pytest
from conftest import ROOT
from datasets import Dataset, DatasetDict
from typer.testing import CliRunner

from f2llm.config import load_config
from f2llm.data.registry import choose_sources, load_registry
from f2llm.data.shapes import shape_of
from f2llm.data.sources import load_source, parts_of
from f2llm.pipeline import cli

Q, P, N = (["first question", "second question"], ["its answer", "another answer"], ["wrong one", "wrong two"])
TRIPLES = [(query, passage, [negative]) for query, passage, negative in zip(Q, P, N)]
PAIRS = [(query, passage, []) for query, passage in zip(Q, P)]


def write_rows(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif path.suffix in (".tsv", ".csv"):
        pd.DataFrame(rows).to_csv(path, sep="\t" if path.suffix == ".tsv" else ",", index=False)
    else:
        path.write_text(text)


def flag_embedding(folder):
    rows = [{"query": q, "pos": [p], "neg": [n], "prompt": "Find."} for q, p, n in zip(Q, P, N)]
    rows[0]["pos"].append("a second answer")
    write_rows(folder / "mine.jsonl", rows)
    return "mine.jsonl", [(Q[0], P[0], [N[0]]), (Q[0], "a second answer", [N[0]]), TRIPLES[1]]


def flag_embedding_without_lists(folder):
    write_rows(folder / "mine.csv", [{"query": q, "pos": p, "neg": n} for q, p, n in zip(Q, P, N)])
    return "mine.csv", TRIPLES


def tevatron(folder):
    def passages(text):
        return [{"docid": "1", "title": f"about {text}", "text": text}]

    rows = [{"query_id": "1", "query": q, "positive_passages": passages(p), "negative_passages": passages(n)}
            for q, p, n in zip(Q, P, N)]  # fmt: skip
    write_rows(folder / "train.jsonl.gz", rows)
    return "train.jsonl.gz", [(q, f"about {p}\n{p}", [f"about {n}\n{n}"]) for q, p, n in zip(Q, P, N)]


def triplets(folder):
    rows = [{"anchor": q, "positive": p, "negative_1": n, "negative_2": "w"} for q, p, n in zip(Q, P, N)]
    write_rows(folder / "mine.parquet", rows)
    return "mine.parquet", [(q, p, [*n, "w"]) for q, p, n in TRIPLES]


def anchors(folder):
    write_rows(folder / "mine.tsv", [{"anchor": q, "positive": p} for q, p in zip(Q, P)])
    return "mine.tsv", PAIRS


def ms_marco_triples(folder):
    (folder / "triples.train.small.tsv").write_text("".join(f"{q}\t{p}\t{n}\n" for q, p, n in zip(Q, P, N)))
    return "triples.train.small.tsv", TRIPLES


def questions(folder):
    write_rows(folder / "faq.jsonl", [{"question": q, "answer": p, "id": 1} for q, p in zip(Q, P)])
    return "faq.jsonl", PAIRS


def beir(folder, suffix=".jsonl", id="_id"):
    write_rows(folder / f"set/queries{suffix}", [{id: f"q{k}", "text": q} for k, q in enumerate(Q)])
    write_rows(folder / f"set/corpus{suffix}", [{id: f"d{k}", "title": "T", "text": p} for k, p in enumerate(P)])
    for split, shift in (("train", 0), ("test", 1)):
        rows = [{"query-id": f"q{k}", "corpus-id": f"d{(k + shift) % 2}", "score": 1} for k in range(2)]
        write_rows(folder / f"set/qrels/{split}.tsv", rows)
    return "set", [(q, f"T\n{p}", []) for q, p in zip(Q, P)]


def mteb_folder(folder):
    """Parquet files in folders, ids in `id`, judgements without a score."""
    write_rows(
        folder / "set/queries/train-00000-of-00001.parquet", [{"id": f"q{k}", "text": q} for k, q in enumerate(Q)]
    )
    for k, p in enumerate(P):
        write_rows(folder / f"set/corpus/train-0000{k}-of-00002.parquet", [{"id": f"d{k}", "text": p}])
    rows = [{"query-id": f"q{k}", "corpus-id": f"d{k}"} for k in range(2)]
    write_rows(folder / "set/qrels/train-00000-of-00001.parquet", rows)
    return "set", PAIRS


def saved_by_datasets(folder):
    data = Dataset.from_dict({"anchor": Q, "positive": P, "negative": N})
    data.save_to_disk(folder / "saved", num_shards=2)
    return "saved", TRIPLES


def saved_with_our_columns(folder):
    data = Dataset.from_dict({"query": Q, "passage": P, "negatives": [[n] for n in N]})
    DatasetDict(train=data, test=data.select([0])).save_to_disk(folder / "saved")
    return "saved", TRIPLES


KNOWN = [flag_embedding, flag_embedding_without_lists, tevatron, triplets, anchors, ms_marco_triples, questions, beir,
         mteb_folder, saved_by_datasets, saved_with_our_columns]  # fmt: skip


def check(path, *options):
    done = CliRunner().invoke(cli.app, ["check", str(path), *options], catch_exceptions=True)
    return done.output, done.exception


def records_by_the_printed_entry(output, folder, monkeypatch):
    """(query, passage or label, negatives) of the source whose entry the command printed, as stage `data` reads it."""
    entry = output.partition("entry for data/sources.yaml")[2].partition("\n")[2]
    (folder / "sources.yaml").write_text(f"sources:\n{entry}")
    config = load_config("nano", data={"from": "local"})
    sources, _ = choose_sources(load_registry(folder / "sources.yaml"), config.data, "v2")
    monkeypatch.chdir(folder)
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "local").symlink_to(folder / "in")
    return [
        (record["query"], record.get("passage", record.get("label")), record.get("negatives", []))
        for part in parts_of(sources, config.data)
        for record in load_source(part, config.data, seed=0)
        if "left_out" not in record
    ], sources[0]


@pytest.fixture
def at_home(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("write", KNOWN, ids=lambda write: write.__name__)
def test_what_is_recognised_trains_as_the_same_texts(write, tmp_path, monkeypatch, at_home):
    (tmp_path / "in").mkdir()
    name, expected = write(tmp_path / "in")
    output, error = check(tmp_path / "in" / name, "--instruction", "Find the answer.")
    assert not error or isinstance(error, SystemExit), error
    assert "\nusable" in output and f"holds {shape_of(tmp_path / 'in' / name).what}" in output
    found, source = records_by_the_printed_entry(output, tmp_path, monkeypatch)
    assert sorted(found) == sorted(expected)
    assert source.instruction == "Find the answer."


def test_what_is_not_read_is_named(tmp_path, at_home):
    name, _ = flag_embedding(tmp_path)
    assert "not read: prompt" in check(tmp_path / name)[0]


def test_without_an_instruction_the_entry_has_to_be_filled_in(tmp_path, at_home):
    name, _ = anchors(tmp_path)
    output, _ = check(tmp_path / name)
    entry = output.partition("entry for data/sources.yaml")[2].partition("\n")[2]
    (tmp_path / "sources.yaml").write_text(f"sources:\n{entry}")
    with pytest.raises(ValueError, match="instruction is None"):
        load_registry(tmp_path / "sources.yaml")


def test_a_file_of_our_own_columns_has_an_entry_without_converter(tmp_path, monkeypatch, at_home):
    write_rows(tmp_path / "in/my tickets.jsonl", [{"query": q, "passage": p} for q, p in zip(Q, P)])
    output, _ = check(tmp_path / "in/my tickets.jsonl", "--instruction", "Find: the 'answer'.")
    found, source = records_by_the_printed_entry(output, tmp_path, monkeypatch)
    assert found == PAIRS and source.name == "my_tickets" and source.converter is None
    assert source.instruction == "Find: the 'answer'."


# What the files do not tell ---------------------------------------------------------------------

SCORED = [{"sentence1": q, "sentence2": p, "score": score} for q, p, score in zip(Q, P, (4.5, 1.0))]
LABELLED = [{"sentence1": q, "sentence2": p, "label": label} for q, p, label in zip(Q, P, (0, 1))]


def test_a_score_needs_a_minimum(tmp_path, monkeypatch, at_home):
    write_rows(tmp_path / "in/sts.jsonl", SCORED)
    _, error = check(tmp_path / "in/sts.jsonl")
    assert "from which score on is a pair a positive (they are 1 to 4.5" in str(error)
    assert "remedy: --set minimum=..." in str(error)
    output, _ = check(tmp_path / "in/sts.jsonl", "--set", "minimum=4", "--instruction", "Find similar text.")
    found, source = records_by_the_printed_entry(output, tmp_path, monkeypatch)
    assert found == [(Q[0], P[0], []), (P[0], Q[0], [])] and source.symmetric
    with pytest.raises(ValueError, match="minimum=high: must be a number"):
        shape_of(tmp_path / "in/sts.jsonl", {"minimum": "high"})


@pytest.mark.parametrize("positive", ["0", "1"])
def test_a_label_of_pairs_needs_its_meaning(tmp_path, monkeypatch, at_home, positive):
    write_rows(tmp_path / "in/pairs.csv", LABELLED)
    _, error = check(tmp_path / "in/pairs.csv")
    assert "which label says that the second text answers the first (there is 0 1 times, 1 1 times)" in str(error)
    output, _ = check(tmp_path / "in/pairs.csv", "--set", f"duplicate={positive}", "--instruction", "Find.")
    found, _ = records_by_the_printed_entry(output, tmp_path, monkeypatch)
    assert found == [PAIRS[int(positive)]]


@pytest.mark.parametrize("names, task", [(["a", "b"], "classification"), (["a", "b", "c"], "clustering")])
def test_labelled_texts_are_of_a_task_by_their_number_of_labels(tmp_path, monkeypatch, at_home, names, task):
    rows = [{"text": f"text {k} of {name}", "label": name} for name in names for k in range(2)]
    write_rows(tmp_path / "in/intents.jsonl", rows)
    output, _ = check(tmp_path / "in/intents.jsonl", "--instruction", "Identify the intent.")
    found, source = records_by_the_printed_entry(output, tmp_path, monkeypatch)
    assert source.task == task and found == [(row["text"], row["label"], []) for row in rows]


def test_judgements_for_training_are_asked_for_where_none_is_named_train(tmp_path, at_home):
    beir(tmp_path)
    (tmp_path / "set/qrels/train.tsv").rename(tmp_path / "set/qrels/dev.tsv")
    with pytest.raises(ValueError, match=r"which of dev, test is for training\? remedy: --set split="):
        shape_of(tmp_path / "set")
    assert shape_of(tmp_path / "set", {"split": "dev"}).fields["qrels"] == "qrels/dev.tsv"
    with pytest.raises(ValueError, match=r"split=train: .*set has dev, test; remedy"):
        shape_of(tmp_path / "set", {"split": "train"})


def test_an_answer_without_a_value_is_refused(tmp_path, at_home):
    write_rows(tmp_path / "sts.jsonl", SCORED)
    _, error = check(tmp_path / "sts.jsonl", "--set", "minimum")
    assert str(error) == "--set minimum: must be name=value; remedy: as in --set minimum=4"


def test_an_answer_without_a_question_is_refused(tmp_path, at_home):
    name, _ = anchors(tmp_path)
    with pytest.raises(ValueError, match=r"--set minimum: .* asks for nothing; remedy: leave it out"):
        shape_of(tmp_path / name, {"minimum": "4"})


def test_ids_without_texts_and_unknown_folders_are_refused(tmp_path, at_home):
    (tmp_path / "ids.tsv").write_text("1\t2\t3\n4\t5\t6\n")
    with pytest.raises(ValueError, match="names texts by their ids; remedy: a file of texts, or a folder"):
        shape_of(tmp_path / "ids.tsv")
    with pytest.raises(ValueError, match=r"folder of no known kind \(in it: ids.tsv\); remedy: a file"):
        shape_of(tmp_path)


def test_a_damaged_arrow_file_is_one_error(tmp_path, at_home):
    name, _ = saved_by_datasets(tmp_path)
    (victim, _) = sorted((tmp_path / name).glob("*.arrow"))
    victim.write_bytes(victim.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"is no whole Arrow stream .*; remedy: save it again"):
        shape_of(tmp_path / name)
