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
from f2llm.evaluation import run as run_module
from f2llm.evaluation import stage
from f2llm.evaluation.benchmarks import EMBEDDED, tasks_of
from f2llm.evaluation.library import _own_cache, _WithoutProgressBars
from f2llm.evaluation.models import EvaluatedModel, RememberedRows, encoder_of
from f2llm.evaluation.results import by_dim, by_storage, mean_over_subsets, whole
from f2llm.evaluation.run import evaluate, own_instructions, part_of_processes, result_name, run_tasks
from f2llm.evaluation.stage import evaluate_all
from f2llm.evaluation.tasks import Encoder
from f2llm.store.progress import Progress

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
    expected = pd.concat([chance, scores], ignore_index=True)
    found = evaluate_all(models, folder)
    pd.testing.assert_frame_equal(whole(found).reset_index(drop=True), expected)
    pd.testing.assert_frame_equal(found, evaluate_all(models, folder, processes=2))
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first.startswith("random: mean 0.") and second.startswith("perfect: mean ")


def test_trained_models_are_scored_at_prefixes_below_their_own_dim(embedder, folder):
    encode = RememberedRows(encoder_of(embedder, instructions=True))
    models = {"start": EvaluatedModel(encode, embedder), "end": EvaluatedModel(encode, embedder, trained=True)}
    found = evaluate_all(models, folder, [8, 32, 64], ["int8", "binary"])
    scores, prefixes = mean_over_subsets(whole(found)), by_dim(found, models)
    assert list(prefixes.columns) == ["model", "dim", "task", "type", "score"]
    assert set(prefixes["model"]) == {"end"} and prefixes["dim"].tolist() == [32] * len(TASKS) + [8] * len(TASKS)
    full, short = (prefixes[prefixes["dim"] == dim]["score"].to_numpy() for dim in (32, 8))
    assert (full == scores[scores["model"] == "end"]["score"]).all()
    direct = mean_over_subsets(evaluate(encoder_of(embedder, instructions=True, dim=8), "end", folder))["score"]
    np.testing.assert_allclose(short, direct, atol=0.02)
    assert np.abs(full - short).max() > 0.05, "vacuous: a prefix scores as the whole"
    storage = by_storage(found, models).set_index(["dim", "precision"])
    assert storage["mb_per_million"].to_dict() == {(32, "float32"): 128, (8, "float32"): 32} | {
        (32, "int8"): 32,
        (32, "binary"): 4,
    }
    whole_score, int8, binary = (storage["score"][32, code] for code in ("float32", "int8", "binary"))
    assert abs(int8 - whole_score) < 0.02 and binary != whole_score


def test_without_a_trained_model_the_table_of_prefixes_is_empty(scores, folder):
    models = {"perfect": EvaluatedModel(perfect)}
    prefixes = by_dim(evaluate_all(models, folder, [8]), models)
    assert list(prefixes.columns) == ["model", "dim", "task", "type", "score"] and prefixes.empty


def test_a_task_that_fails_is_named_after_the_others_were_scored(folder):
    def fails_on_bitext(texts, instruction):
        if instruction == "Do Bitext.":
            raise OSError("no such thing\nmore")
        return random(texts, instruction)

    with pytest.raises(RuntimeError, match=r"^Bitext: no such thing$"):
        evaluate(fails_on_bitext, "m", folder)
    with pytest.raises(RuntimeError, match=r"1 tasks failed: Bitext, m: no such thing; the others"):
        evaluate_all({"m": EvaluatedModel(fails_on_bitext)}, folder)


def test_a_killed_evaluation_resumes_and_gives_the_same_numbers(folder, tmp_path):
    """Also split over two processes, in either order; a damaged result is computed again."""
    tasks, calls = tasks_of(EMBEDDED, own=folder), []
    instructions = own_instructions(tasks)

    def counting(texts, instruction):
        calls.append(instruction)
        return random(texts, instruction)

    def run(keep, part=(0, 1)):
        calls.clear()
        return run_tasks({"m": Encoder(counting, "m", instructions)}, tasks, {"m": keep}, part)

    whole_run = run(tmp_path / "one").table()
    assert calls
    pd.testing.assert_frame_equal(run(tmp_path / "one").table(), whole_run)
    assert not calls, "what is kept is not computed again"
    second = run(tmp_path / "two", (1, 2))
    assert 0 < len(second.table()) < len(whole_run) and len(second.elsewhere) == (len(tasks) + 1) // 2
    first = run(tmp_path / "two", (0, 2))
    assert not first.elsewhere
    pd.testing.assert_frame_equal(first.table(), whole_run)
    victim = sorted((tmp_path / "two").glob("Search*.json"))[0]
    victim.write_text(victim.read_text()[:50])
    pd.testing.assert_frame_equal(run(tmp_path / "two").table(), whole_run)
    assert set(calls) == {None, "Do Search."}, "only the damaged task is computed again"


def test_a_task_that_fails_in_another_process_is_known_and_is_tried_again(folder, tmp_path):
    tasks, broken = tasks_of(EMBEDDED, own=folder), [True]

    def encode(texts, instruction):
        if broken:
            raise OSError("no such thing")
        return random(texts, instruction)

    def run(part):
        return run_tasks({"m": Encoder(encode, "m", own_instructions(tasks))}, tasks, {"m": tmp_path}, part)

    second = run((1, 2))
    broken.clear()
    first = run((0, 2))
    assert first.failures == second.failures and set(second.failures.values()) == {"no such thing"}
    assert not first.elsewhere and len(first.failures) == len(tasks) // 2
    looking = run((-1, 2))
    assert looking.failures == first.failures and looking.table().equals(first.table()), "nothing is run to look"
    assert not run((1, 2)).failures and not run((0, 2)).failures
    assert run((-1, 2)).table()["task"].nunique() == len(tasks)


def test_results_that_cannot_be_kept_stop_the_run(folder, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    tasks = tasks_of(EMBEDDED, own=folder)
    monkeypatch.setattr("mteb.results.TaskResult.to_disk", full)
    with pytest.raises(RuntimeError, match=r"cannot write .*No space left.*remedy: free disk space"):
        run_tasks({"m": Encoder(random, "m", own_instructions(tasks))}, tasks, {"m": tmp_path})


def test_results_of_another_mteb_or_of_other_data_are_not_read(folder, monkeypatch):
    (task, *_) = tasks_of(EMBEDDED, own=folder)
    names = {result_name(task)}
    task.data_digest = "other files"
    names.add(result_name(task))
    task.filter_eval_splits(["train"])
    names.add(result_name(task))
    monkeypatch.setattr("mteb.__version__", "0.0")
    names.add(result_name(task))
    assert len(names) == 4


def test_a_task_of_ours_is_asked_for_by_its_name_and_its_results_follow_its_rows(folder, tmp_path):
    (task,) = tasks_of(["Search"], own=folder)
    assert task.metadata.name == "Search" and task.instruction == "Do Search."
    with pytest.raises(ValueError, match=r"no task 'Serch'; did you mean 'Search'"):
        tasks_of(["Serch"], own=folder)
    changed = json.loads((folder / "Search.json").read_text())
    changed["data"]["default"]["corpus"][0] += " more"
    (tmp_path / "Search.json").write_text(json.dumps(changed))
    (after,) = tasks_of(["Search"], own=tmp_path)
    assert result_name(after) != result_name(task)


def test_a_slurm_array_and_torchrun_say_which_part_is_whose(monkeypatch):
    assert part_of_processes() == (0, 1)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert part_of_processes() == (1, 4)
    for name, value in (("TASK_ID", "7"), ("TASK_COUNT", "3"), ("TASK_MIN", "5")):
        monkeypatch.setenv(f"SLURM_ARRAY_{name}", value)
    assert part_of_processes() == (2, 3)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_line_of_an_evaluation_counts_the_characters_of_all_models(folder, monkeypatch, processes):
    made = []
    monkeypatch.setattr(stage, "Progress", lambda *of, **keys: made.append(Progress(*of, **keys)) or made[-1])
    evaluate_all({"one": EvaluatedModel(random), "two": EvaluatedModel(perfect)}, folder, processes=processes)
    (progress,) = made
    assert progress.done == pytest.approx(progress.total) and progress.total > 2 * 7 * 40 * len("query 1")


def test_a_task_that_is_kept_already_is_no_work(folder, tmp_path, monkeypatch):
    made, tasks = [], tasks_of(EMBEDDED, own=folder)
    monkeypatch.setattr(run_module, "Progress", lambda *of: made.append(Progress(*of)) or made[-1])
    for _ in range(2):
        run_tasks({"m": Encoder(random, "m", own_instructions(tasks))}, tasks, {"m": tmp_path})
    first, second = made
    assert first.done == first.total > 1000 and (second.done, second.total) == (0, None)


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
