"""Scores of encoders whose result is known: perfect, random, or scored by scipy."""

import json
import os
import socket
import subprocess
import sys
import warnings
from io import StringIO

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from huggingface_hub import constants
from scipy.stats import spearmanr
from tqdm import tqdm

from f2llm.config import root
from f2llm.evaluation.library import _own_cache, _WithoutProgressBars
from f2llm.evaluation.models import EvaluatedModel, encoder_of
from f2llm.evaluation.results import mean_over_subsets
from f2llm.evaluation.run import evaluate, evaluate_all, evaluate_prefixes

ENGLISH = ["eng-Latn"]


def task(name, kind, data, languages=None):
    languages = languages or {"default": ENGLISH}
    data = data if "default" not in languages else {"default": data}
    return {"name": name, "type": kind, "instruction": f"Do {name}.", "languages": languages, "data": data}


def numbered(kind, count=40):
    return [f"{kind} {number}" for number in range(count)]


QUERIES, ANSWERS = numbered("query"), numbered("answer")
BITEXT = {"sentence1": QUERIES, "sentence2": ANSWERS}
SEARCH = {"queries": QUERIES[:30], "corpus": ANSWERS, "relevant": [[row] for row in range(30)]}
CANDIDATES = [[row, *((row + step) % 40 for step in range(1, 10))] for row in range(30)]
PAIRS = {"sentence1": QUERIES, "sentence2": [f"answer {(row + row % 2) % 40}" for row in range(40)]}  # every other fits
CLASSES = [row % 2 for row in range(60)]
PARTS = {part: [f"{part} {row} of {label}" for row, label in enumerate(CLASSES)] for part in ("train", "test")}
CLUSTERS = [str(row % 4) for row in range(40)]
TASKS = [
    task(
        "Bitext",
        "BitextMining",
        {"deu-eng": BITEXT, "fra-eng": BITEXT},
        {"deu-eng": ["deu-Latn", *ENGLISH], "fra-eng": ["fra-Latn", *ENGLISH]},
    ),
    task("Search", "Retrieval", SEARCH),
    task("Rank", "Reranking", SEARCH | {"candidates": CANDIDATES}),
    task("Similar", "STS", PAIRS | {"score": [row % 5 / 5 for row in range(40)]}),
    task("Pairs", "PairClassification", PAIRS | {"labels": [1 - row % 2 for row in range(40)]}),
    task("Classes", "Classification", {part: {"text": texts, "label": CLASSES} for part, texts in PARTS.items()}),
    task(
        "Clusters",
        "Clustering",
        {
            "sentences": [f"text {row} of {label}" for row, label in enumerate(CLUSTERS)],
            "labels": CLUSTERS,
        },
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for each in TASKS:
        (folder / f"{each['name']}.json").write_text(json.dumps(each))
    return folder


def perfect(texts, instruction):
    """Same number or same class, same direction."""
    return np.eye(60)[[int(text.split()[-1]) for text in texts]]


def random(texts, instruction):
    """A fixed random direction per text."""
    return np.stack([np.random.default_rng(list(text.encode())).normal(size=16) for text in texts])


@pytest.fixture(scope="module")
def scores(folder):
    return evaluate(perfect, "perfect", folder)


@pytest.fixture(scope="module")
def chance(folder):
    return evaluate(random, "random", folder)


def test_the_small_tasks_are_of_every_type(scores):
    from f2llm.evaluation.tasks import KINDS  # imports mteb: only after `evaluate` has chosen its cache

    assert {each["type"] for each in TASKS} == set(KINDS)


def test_a_perfect_encoder_scores_1_and_a_random_one_much_less(scores, chance):
    by_task = mean_over_subsets(scores).set_index("task")["score"]
    by_chance = mean_over_subsets(chance).set_index("task")["score"]
    known = ["Bitext", "Search", "Rank", "Pairs", "Classes", "Clusters"]
    assert by_task[known].tolist() == [1.0] * 6
    assert by_chance[["Bitext", "Search"]].max() < 0.35
    assert by_chance["Rank"] < 0.6 and by_chance["Pairs"] < 0.85 and by_chance["Classes"] < 0.75
    assert by_chance["Clusters"] < 0.5


def test_sts_is_the_rank_correlation_of_scipy(chance):
    data = TASKS[3]["data"]["default"]
    one, other = random(data["sentence1"], None), random(data["sentence2"], None)
    cosines = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    score = chance.set_index("task")["score"]["Similar"]
    assert score == pytest.approx(spearmanr(cosines, data["score"])[0], abs=1e-4)
    assert abs(score) > 0.01, "vacuous: no correlation to compare"


def test_scores_have_one_row_per_task_and_subset(scores):
    assert list(scores.columns) == ["model", "task", "type", "split", "subset", "score"]
    assert len(scores) == len(TASKS) + 1
    assert scores[scores["task"] == "Bitext"]["subset"].tolist() == ["deu-eng", "fra-eng"]
    assert dict(zip(scores["task"], scores["type"])) == {each["name"]: each["type"] for each in TASKS}
    assert set(scores["model"]) == {"perfect"}


def test_the_same_encoder_gets_the_same_scores_again(chance, folder):
    assert chance["score"].nunique() > 4, "vacuous: all scores are alike"
    pd.testing.assert_frame_equal(evaluate(random, "random", folder), chance)


def test_instructions_reach_every_text_but_documents(folder):
    seen = {}

    def spy(texts, instruction):
        for text in texts:
            seen.setdefault(instruction, set()).add(text.split()[0])
        return random(texts, instruction)

    evaluate(spy, "spy", folder)
    assert seen[None] == {"answer"}
    assert seen["Do Search."] == seen["Do Rank."] == {"query"}
    assert seen["Do Bitext."] == seen["Do Similar."] == {"query", "answer"}
    assert set(seen) == {None, *(each["instruction"] for each in TASKS)}


# Many models, and prefixes ----------------------------------------------------------------------


def test_all_models_are_scored_in_their_order(scores, chance, folder, capsys):
    models = {"random": EvaluatedModel(random), "perfect": EvaluatedModel(perfect)}
    pd.testing.assert_frame_equal(evaluate_all(models, folder), pd.concat([chance, scores]))
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("random: mean 0.") and second.startswith("perfect: mean ")


def test_trained_models_are_scored_at_prefixes_below_their_own_dim(embedder, folder):
    encode = encoder_of(embedder, instructions=True)
    models = {"start": EvaluatedModel(encode, embedder), "end": EvaluatedModel(encode, embedder, trained=True)}
    scores = mean_over_subsets(evaluate_all(models, folder))
    by_dim = evaluate_prefixes(models, scores, [8, 32, 64], folder)
    assert list(by_dim.columns) == ["model", "dim", "task", "type", "score"]
    assert set(by_dim["model"]) == {"end"} and by_dim["dim"].tolist() == [32] * len(TASKS) + [8] * len(TASKS)
    full, short = (by_dim[by_dim["dim"] == dim]["score"].to_numpy() for dim in (32, 8))
    assert (full == scores[scores["model"] == "end"]["score"]).all()
    direct = mean_over_subsets(evaluate(encoder_of(embedder, instructions=True, dim=8), "end", folder))["score"]
    np.testing.assert_allclose(short, direct, atol=0.02)
    assert np.abs(full - short).max() > 0.05, "vacuous: a prefix scores as the whole"


def test_without_a_trained_model_the_table_of_prefixes_is_empty(scores, folder):
    means = mean_over_subsets(scores)
    by_dim = evaluate_prefixes({"perfect": EvaluatedModel(perfect)}, means, [8], folder)
    assert list(by_dim.columns) == ["model", "dim", "task", "type", "score"] and by_dim.empty


# What evaluation leaves alone -------------------------------------------------------------------


def test_importing_evaluation_loads_no_heavy_library_and_sets_no_variable():
    code = "import os, sys; before = dict(os.environ); import f2llm.evaluation; assert os.environ == before; "
    code += "print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "f2llm.evaluation.run" in loaded, "vacuous: nothing was imported"
    assert not loaded & {"mteb", "datasets", "torch", "transformers", "sklearn"}


def test_mtebs_cache_is_in_the_repository_only_while_mteb_is_imported(monkeypatch):
    monkeypatch.delenv("MTEB_CACHE", raising=False)
    with _own_cache():
        assert os.environ["MTEB_CACHE"].startswith(str(root()))
    assert "MTEB_CACHE" not in os.environ
    monkeypatch.setenv("MTEB_CACHE", "/elsewhere")
    with _own_cache():
        assert os.environ["MTEB_CACHE"] == "/elsewhere"
    assert os.environ["MTEB_CACHE"] == "/elsewhere"


def test_local_tasks_need_no_network_also_when_the_hub_is_not_switched_off(folder, chance, monkeypatch):
    asked = []

    def look_up(host, *arguments, **kwargs):
        asked.append(host)
        raise socket.gaierror(f"no network, but {host} was asked for")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    pd.testing.assert_frame_equal(evaluate(random, "random", folder), chance)
    assert not asked
    with pytest.raises(OSError):
        socket.create_connection(("example.org", 80))
    assert asked == ["example.org"], "vacuous: look-ups are not seen"


def test_warnings_and_messages_are_seen_but_no_progress_bars(folder, capsys):
    def noisy(texts, instruction):
        warnings.warn("a warning of the encoder", stacklevel=2)
        print("a message of the encoder", file=sys.stderr)
        return random(texts, instruction)

    with pytest.warns(UserWarning, match="a warning of the encoder") as seen:
        evaluate(noisy, "noisy", folder)
    assert not [warning for warning in seen if "To copy construct" in str(warning.message)]
    error = capsys.readouterr().err
    assert set(error.splitlines()) == {"a message of the encoder"}


def test_a_bar_leaves_no_trace_in_a_stream_without_bars():
    plain, stream = StringIO(), StringIO()
    without = _WithoutProgressBars(stream)
    for file in (plain, without):
        print("before", file=file)
        for _ in tqdm(range(3), file=file):
            pass
        print("after\n\nthe end", file=file)
    assert "3/3" in plain.getvalue(), "vacuous: there is no bar"
    assert stream.getvalue() == "before\nafter\n\nthe end\n"
