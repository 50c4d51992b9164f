"""Any model on any task: prompts, the command `f2llm evaluate`, and scores equal to sentence-transformers' own."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from helpers.mteb_data import PAIRS, add, record, task_of
from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS
from mteb.types import PromptType
from typer.testing import CliRunner

from f2llm.evaluation.benchmarks import instructions
from f2llm.evaluation.ledger import published, published_models
from f2llm.evaluation.library import mteb
from f2llm.evaluation.mirrored import read_from_mirror
from f2llm.evaluation.public import find_model, load_model, score_model
from f2llm.pipeline.cli import app
from f2llm.pipeline.export import check_submission

HUB_ID = "codefuse-ai/F2LLM-v2-80M"


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """With one retrieval set and one of pairs; copies of datasets go to a folder of the test."""
    monkeypatch.setattr("f2llm.evaluation.mirrored.root", lambda: tmp_path)
    words = [
        f"{first} {second}" for first in ("red", "blue", "old", "new") for second in ("fox", "house", "idea", "sea")
    ]
    words = words[:12]
    tables = {
        "queries": {"_id": [f"q{row}" for row in range(8)], "text": [f"where is the {text}?" for text in words[:8]]},
        "corpus": {"_id": [f"d{row}" for row in range(12)], "title": ["t"] * 12, "text": words},
        "default": {
            "query-id": [f"q{row}" for row in range(8)],
            "corpus-id": [f"d{row}" for row in range(8)],
            "score": [1] * 8,
        },
    }
    tables["default"]["score"] = [1] * 8
    configs = [{"name": name, "files": {"test": f"{name}.parquet"}} for name in tables]
    add(tmp_path / "mirror", "org/search", {f"{name}.parquet": rows for name, rows in tables.items()}, configs)
    pairs = {"sentence1": words, "sentence2": words[1:] + words[:1], "score": [float(row % 5) for row in range(12)]}
    add(tmp_path / "mirror", "org/pairs", {"test.parquet": pairs})
    return tmp_path / "mirror"


def tasks_from(mirror):
    tasks = [
        task_of(AbsTaskSTS, "STS", "cosine_spearman", "org/pairs"),
        task_of(AbsTaskRetrieval, "Retrieval", "ndcg_at_10", "org/search"),
    ]
    read_from_mirror(tasks, mirror)
    return tasks


@pytest.fixture
def folder(embedder, tmp_path):
    embedder.max_tokens = 90
    embedder.save(tmp_path / "model")
    return tmp_path / "model"


def put_on_hub(folder, mirror, hub_id, commit="c" * 40):
    shutil.copytree(folder, mirror / hub_id)
    record(mirror, hub_id, commit)
    return hub_id


# Prompts ----------------------------------------------------------------------------------------


def prompts_of(model, name="KorSTS", kind=None):
    return model.interface(model.encode).prompt_of(mteb().get_task(name).metadata, kind)


def test_a_released_f2llm_gets_the_instructions_of_its_family(folder, mirror):
    for hub_id, recipe in ((HUB_ID, "v2"), ("codefuse-ai/F2LLM-0.6B", "v1")):
        model = load_model(put_on_hub(folder, mirror, hub_id), mirror)
        expected = f"Instruct: {instructions(recipe)['Banking77Classification']}\nQuery: "
        assert prompts_of(model, "Banking77Classification") == (expected, None)
        assert prompts_of(model, "NFCorpus", PromptType.document) == (None, None)
        assert model.revision == "c" * 40 and model.max_tokens == 90 and recipe in model.prompts


def test_a_model_of_the_kit_gets_instructions_if_it_was_trained_with_them(folder, mirror):
    assert prompts_of(load_model(str(folder), mirror)) == (None, None)
    for instructed in (True, False):
        (folder / "train.json").write_text(json.dumps({"recipe": "v2", "instructions": instructed}))
        expected = "Instruct: Retrieve semantically similar text.\nQuery: " if instructed else None
        assert prompts_of(load_model(str(folder), mirror)) == (expected, None)


def test_a_model_of_mtebs_registry_gets_the_registrys_prompts(folder, mirror):
    model = load_model(put_on_hub(folder, mirror, "Qwen/Qwen3-Embedding-0.6B"), mirror)
    prompt, kind = prompts_of(model, "NFCorpus", PromptType.query)
    assert kind is None and "registry" in model.prompts
    assert prompt == "Instruct: Given a question, retrieve relevant documents that best answer the question\nQuery:"
    assert prompts_of(model, "NFCorpus", PromptType.document)[0] is None
    assert model.interface(model.encode).mteb_model_meta.similarity_fn_name.value == "cosine"


def test_any_other_model_gets_the_prompts_that_its_folder_declares(folder, mirror):
    settings = folder / "config_sentence_transformers.json"
    prompts = {"query": "q: ", "document": "d: ", "STS": "sts: ", "KorSTS": "korean: "}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"prompts": prompts}))
    model = load_model(str(folder), mirror)
    assert prompts_of(model) == ("korean: ", None) and prompts_of(model, "JSTS") == ("sts: ", None)
    assert prompts_of(model, "NFCorpus", PromptType.query) == ("q: ", "query")
    assert prompts_of(model, "NFCorpus", PromptType.document) == ("d: ", "document")


def test_prompts_by_name_of_mtebs_registry_win_over_the_folders(folder, mirror):
    """As of E5, whose folder declares none."""
    model = load_model(put_on_hub(folder, mirror, "intfloat/multilingual-e5-small"), mirror)
    assert prompts_of(model, "NFCorpus", PromptType.query) == ("query: ", "query")
    assert prompts_of(model, "NFCorpus", PromptType.document) == ("passage: ", "document")


def test_a_similarity_that_a_folder_declares_is_the_one_that_is_scored_with(folder, mirror):
    settings = folder / "config_sentence_transformers.json"
    for similarity in ("dot", "euclidean"):
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"similarity_fn_name": similarity}))
        if similarity == "dot":
            model = load_model(str(folder), mirror)
            assert model.interface(model.encode).mteb_model_meta.similarity_fn_name.value == "dot"
        else:
            with pytest.raises(ValueError, match="similarity 'euclidean', but only cosine, dot are known"):
                load_model(str(folder), mirror)


# Scores -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompts, default",
    [
        ({}, None),
        ({"query": "find this: ", "document": "text: ", "STS": "like: "}, None),
        ({"all": "some text: "}, "all"),
    ],
)
def test_scores_are_those_of_plain_mteb_on_sentence_transformers(folder, mirror, tmp_path, prompts, default):
    from sentence_transformers import SentenceTransformer

    settings = folder / "config_sentence_transformers.json"
    settings.write_text(
        json.dumps(json.loads(settings.read_text()) | {"prompts": prompts, "default_prompt_name": default})
    )
    scores, _ = score_model(load_model(str(folder), mirror), tasks_from(mirror), tmp_path / "kept")
    theirs = mteb().evaluate(SentenceTransformer(str(folder)), tasks_from(mirror), cache=None, co2_tracker=False)
    expected = {result.task_name: result.scores["test"][0]["main_score"] for result in theirs.task_results}
    assert scores.set_index("task")["score"].to_dict() == pytest.approx(expected, abs=1e-6)
    assert len(expected) == 2 and len(set(expected.values())) == 2


def test_scores_of_other_weights_prompts_and_dims_are_never_mixed(folder, mirror, tmp_path, embedder):
    kept, seen = tmp_path / "kept", []
    for change in ("nothing", "again", "weights", "prompts"):
        if change == "weights":
            with_other = embedder.model.layers[0].mlp.up_proj.weight
            with_other.data *= 3
            embedder.save(folder)
        if change == "prompts":
            (folder / "train.json").write_text(json.dumps({"recipe": "v2", "instructions": True}))
        scores, results = score_model(load_model(str(folder), mirror), tasks_from(mirror), kept, dims=[8])
        assert not results.failures and scores["dim"].tolist() == [32, 32, 8, 8]
        seen.append(tuple(scores["score"].round(4)))
    assert seen[0] == seen[1] and len(set(seen)) == 3
    assert len(list(kept.iterdir())) == 6, "three models, each at two dims"


def test_texts_are_embedded_once_for_all_dims_and_precisions(folder, mirror, tmp_path):
    model, texts = load_model(str(folder), mirror), []
    encode = model.encode.encode
    model.encode.encode = lambda asked, prompt: texts.extend(asked) or encode(asked, prompt)
    scores, _ = score_model(model, tasks_from(mirror), tmp_path / "kept", [8, 16], ["int8", "binary"])
    assert len(scores) == 2 * 5 and len(texts) == 12 + 8 + 12, "pairs, queries, documents"


# The command ------------------------------------------------------------------------------------


def run(*words):
    result = CliRunner().invoke(app, [*map(str, words)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def published_data(mirror):
    """KorSTS as mteb counts it cannot be made up; so its statistics are not there in this test."""
    rows = {key: (values * 4)[:12] for key, values in PAIRS.items()}
    data = mteb().get_task("KorSTS").metadata.dataset
    add(mirror, data["path"], {"test.parquet": rows}, revision=data["revision"])


def test_a_released_model_is_scored_beside_its_published_scores(folder, mirror, tmp_path, monkeypatch):
    published_data(mirror)
    monkeypatch.setattr("mteb.abstasks.task_metadata.TaskMetadata.descriptive_stats", property(lambda self: None))
    put_on_hub(folder, mirror, HUB_ID)
    result = run("evaluate", HUB_ID, "--tasks", "KorSTS", "--mirror", mirror, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    ledger = pd.read_csv(tmp_path / "out" / "codefuse-ai__F2LLM-v2-80M-ledger.csv")
    row = ledger[(ledger["task"] == "KorSTS") & (ledger["benchmark"] == "MTEB(kor, v1)")].iloc[0]
    theirs = published()[(published()["model"] == "F2LLM-v2-80M") & (published()["task"] == "KorSTS")]["score"].iloc[0]
    assert row["published"] == pytest.approx(theirs) and row["verdict"] == "DIFFERENT", "a random model is no F2LLM"
    assert np.isclose(row["difference"], row["ours"] - row["published"], atol=1e-6)
    assert (ledger["verdict"] == "not comparable: not run").sum() == len(ledger) - ledger["ours"].notna().sum()
    assert "DIFFERENT" in result.output and set(published_models().columns) == {"id", "revision"}
    submission = tmp_path / "out" / "mteb" / "results" / HUB_ID.replace("/", "__") / ("c" * 40)
    assert {path.name for path in submission.iterdir()} >= {"KorSTS.json", "model_meta.json"}
    assert check_submission(submission) == []


def test_what_is_wrong_is_one_line_before_the_model_is_loaded(folder, mirror, tmp_path, monkeypatch):
    monkeypatch.setattr("f2llm.pipeline.public.load_model", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "empty").mkdir()
    for words, message in (
        ((folder,), "--tasks or --benchmark are needed"),
        ((tmp_path / "empty", "--tasks", "KorSTS"), "empty is no model: it has no config.json"),
        (("org/unknown", "--tasks", "KorSTS"), r"holds no model of that id; remedy: f2llm fetch --model org/unknown"),
        ((folder, "--tasks", "KorST"), "no task 'KorST'; did you mean 'KorSTS'"),
        ((folder, "--benchmark", "MTEB(xyz)"), r"no task 'MTEB\(xyz\)'"),
        ((folder, "--tasks", "KorSTS", "--languages", "xx"), "language 'xx' is unknown"),
        ((folder, "--tasks", "KorSTS", "--splits", "dev"), "no split 'dev'"),
        ((folder, "--tasks", "KorSTS"), r"(?s)lacks 1 of 1 data sets.*fetch --benchmark \"KorSTS\""),
    ):
        with pytest.raises(ValueError, match=message):
            run("evaluate", *words, "--mirror", mirror, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words, message", [(("--dim", 64), "have 32 dimensions"), (("--precision", "int4"), "int8, binary")]
)
def test_a_dim_and_a_precision_that_cannot_be_are_refused(folder, mirror, tmp_path, words, message):
    published_data(mirror)
    with pytest.raises(ValueError, match=message):
        run("evaluate", folder, "--tasks", "KorSTS", "--mirror", mirror, "--out", tmp_path / "out", *words)


def test_a_task_that_fails_is_in_the_exit_code(folder, mirror, tmp_path):
    published_data(mirror)  # of which mteb's statistics count more rows
    result = run("evaluate", folder, "--tasks", "KorSTS", "--mirror", mirror, "--out", tmp_path / "out")
    assert result.exit_code == 1 and re.search(r"FAILED KorSTS: .*num_samples is 12, but mteb", result.output)


def test_a_truncated_model_of_the_mirror_is_named(folder, mirror):
    put_on_hub(folder, mirror, HUB_ID)
    weights = mirror / HUB_ID / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"model.safetensors has \d+ bytes, not \d+: truncated"):
        find_model(HUB_ID, mirror)


def test_benchmarks_are_listed_a_row_each():
    lines = run("benchmarks", "--csv").output.splitlines()
    assert lines[0] == "benchmark,task" and len(lines) == 609
    assert "430 different ones" in run("benchmarks").output
