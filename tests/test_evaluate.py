"""Scores of encoders whose result is known: perfect, random, or scored by scipy."""

import json
import os

import numpy as np
import pandas as pd
import pytest
from conftest import SENTENCES
from scipy.stats import spearmanr

from f2llm.config import root
from f2llm.evaluate import (
    COLUMNS,
    KINDS,
    at_dim,
    cached,
    encoder_of,
    evaluate,
    mean_over_subsets,
    metrics,
    tfidf_encoder,
)
from f2llm.miners import Tfidf

pytestmark = pytest.mark.filterwarnings("ignore:To copy construct:UserWarning")  # of mteb
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


def test_the_small_tasks_are_of_every_type():
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
    assert list(scores.columns) == ["model", "task", "type", "subset", "score"]
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


# Encoders ---------------------------------------------------------------------------------------


def test_a_prefix_of_whole_embeddings_is_what_encoding_at_that_dim_gives(embedder):
    shortened = at_dim(encoder_of(embedder, instructions=True), 8)
    direct = encoder_of(embedder, instructions=True, dim=8)
    for instruction in (None, "Find it."):
        np.testing.assert_allclose(shortened(SENTENCES, instruction), direct(SENTENCES, instruction), atol=1e-5)
    assert np.abs(direct(SENTENCES, None) - direct(SENTENCES, "Find it.")).max() > 0.01, "vacuous: no effect"


def test_a_model_that_never_saw_an_instruction_gets_none(embedder):
    raw = encoder_of(embedder, instructions=False)
    np.testing.assert_array_equal(raw(SENTENCES, "Find it."), embedder.encode(SENTENCES))


def test_a_cached_encoder_computes_every_text_once_per_instruction():
    asked = []

    def encode(texts, instruction):
        asked.extend((text, instruction) for text in texts)
        return random(texts, instruction) + len(instruction or "")

    lookup = cached(encode)
    for texts, instruction in ((["a", "b", "a"], None), (["b", "c"], None), (["b"], "x"), (["c", "a"], None)):
        np.testing.assert_array_equal(lookup(texts, instruction), random(texts, None) + len(instruction or ""))
    assert asked == [("a", None), ("b", None), ("c", None), ("b", "x")]


def test_tfidf_takes_no_notice_of_instructions():
    encode = tfidf_encoder(Tfidf(SENTENCES))
    np.testing.assert_array_equal(encode(SENTENCES, None), encode(SENTENCES, "Find it."))
    np.testing.assert_allclose(np.linalg.norm(encode(SENTENCES, None), axis=1), 1, atol=1e-5)


# Tables -----------------------------------------------------------------------------------------


def test_subsets_are_averaged_within_their_task():
    rows = [("m", "B", "BitextMining", "a", 0.2), ("m", "B", "BitextMining", "b", 0.4)]
    rows += [("m", "S", "STS", "default", 0.9)]
    means = mean_over_subsets(pd.DataFrame(rows, columns=["model", "task", "type", "subset", "score"]))
    assert list(means.columns) == COLUMNS
    assert means["score"].tolist() == pytest.approx([0.3, 0.9])


def test_metrics_are_means_over_tasks_and_of_each_type():
    rows = [("m", "B", "BitextMining", 0.2), ("m", "R", "Retrieval", 0.6)]
    rows += [("m", "S", "STS", 0.9), ("m", "T", "STS", 0.7)]
    found = metrics(pd.DataFrame(rows, columns=COLUMNS))
    assert found == {"m": {"mean": 0.6, "retrieval_and_bitext": 0.4, "BitextMining": 0.2, "Retrieval": 0.6, "STS": 0.8}}


def test_evaluation_writes_nothing_into_the_users_home():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert os.environ["MTEB_CACHE"].startswith(str(root()))
