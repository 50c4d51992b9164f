"""Means of scores, and the files of results."""

import json

import pandas as pd
import pytest

from f2llm.evaluation.models import EvaluatedModel
from f2llm.evaluation.results import (
    COLUMNS,
    by_origin,
    judged,
    mean_by_language,
    mean_over_subsets,
    metrics,
    write_results,
)

BY_SUBSET = ["model", "task", "type", "subset", "score"]
ROWS = [("m", "B", "BitextMining", "deu-eng", 0.2), ("m", "B", "BitextMining", "fra-eng", 0.4)]
ROWS += [("m", "S", "STS", "default", 0.9)]


def test_subsets_are_averaged_within_their_task():
    means = mean_over_subsets(pd.DataFrame(ROWS, columns=BY_SUBSET))
    assert list(means.columns) == COLUMNS
    assert means["score"].tolist() == pytest.approx([0.3, 0.9])


@pytest.mark.parametrize("score", [-0.2, float("nan")])
def test_a_correlation_that_is_negative_or_undefined_counts_as_chance(score):
    means = mean_over_subsets(pd.DataFrame([("m", "S", "STS", "default", score)], columns=BY_SUBSET))
    assert means["score"].tolist() == [0]


def test_languages_are_the_first_of_a_bitext_subset():
    languages = mean_by_language(pd.DataFrame(ROWS, columns=BY_SUBSET))
    assert languages.values.tolist() == [["m", "B", "deu", 0.2], ["m", "B", "fra", 0.4]]


def test_metrics_are_means_over_tasks_and_of_each_type():
    rows = [("m", "B", "BitextMining", 0.2), ("m", "R", "Retrieval", 0.6)]
    rows += [("m", "S", "STS", 0.9), ("m", "T", "STS", 0.7)]
    means = metrics(pd.DataFrame(rows, columns=COLUMNS))
    assert means == {"m": {"mean": 0.6, "retrieval_and_bitext": 0.4, "BitextMining": 0.2, "Retrieval": 0.6, "STS": 0.8}}


def test_a_run_is_judged_by_its_own_held_out_rows_where_there_are_any():
    rows = [("m", "B", "BitextMining", 0.2), ("m", "mine-held-out", "Retrieval", 0.6), ("n", "B", "BitextMining", 0.1)]
    scores = pd.DataFrame([*rows, ("n", "mine-held-out", "Retrieval", 0.5)], columns=COLUMNS)
    assert judged(scores)["score"].tolist() == [0.6, 0.5]
    assert [part["task"].unique().tolist() for part in by_origin(scores).values()] == [["mine-held-out"], ["B"]]
    means = {"mean": 0.6, "retrieval_and_bitext": 0.6, "Retrieval": 0.6, "embedded": 0.2}
    assert metrics(scores)["m"] == means and metrics(scores)["n"]["embedded"] == 0.1
    embedded = scores[scores["task"] == "B"]
    assert judged(embedded).equals(embedded) and "embedded" not in metrics(embedded)["m"]


def test_the_files_of_results_hold_the_tables(tmp_path):
    rows = [(8, "float32", *row) for row in ROWS] + [(4, "float32", "m", "S", "STS", "default", 0.5)]
    rows += [(8, "int8", "m", "S", "STS", "default", 0.8)]
    scores = pd.DataFrame(rows, columns=["dim", "precision", *BY_SUBSET])
    models = {"m": EvaluatedModel(None, trained=True)}
    parameters = pd.DataFrame([("m", 10, 6)], columns=["model", "parameters", "without_embeddings"])
    write_results(scores, models, parameters, pd.DataFrame(columns=["model"]), tmp_path / "results")
    written = {path.name: path.read_text() for path in (tmp_path / "results").iterdir()}
    assert json.loads(written.pop("metrics.json"))["m"]["mean"] == 0.6
    assert written == {
        "scores.csv": "model,task,type,score\nm,B,BitextMining,0.3\nm,S,STS,0.9\n",
        "dims.csv": "model,dim,task,type,score\nm,8,B,BitextMining,0.3\nm,8,S,STS,0.9\nm,4,S,STS,0.5\n",
        "storage.csv": "model,dim,precision,mb_per_million,score\nm,8,float32,32,0.6\nm,4,float32,16,0.5\n"
        "m,8,int8,8,0.8\n",
        "ledger.csv": "model\n",
        "languages.csv": "model,task,language,score\nm,B,deu,0.2\nm,B,fra,0.4\n",
        "parameters.csv": "model,parameters,without_embeddings\nm,10,6\n",
    }
