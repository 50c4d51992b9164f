"""A model folder that can be published: card, description for mteb, contract; and the checks of a submission."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from helpers.closeness import assert_close
from pipeline.test_cli import f2llm
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from f2llm.contract import contract_of, read_contract, write_contract
from f2llm.evaluation.library import mteb as library
from f2llm.pipeline.export import check_submission, export, num_parameters, sha1_of_weights

mteb = library()
TRAIN = {"stage": "distill pico", "recipe": "v2", "size_name": "nano", "seed": 7, "steps": 130, "tokens": 12345}
TRAIN |= {"inputs": ["models/pruned/pico", "models/stage2"], "python": "3.11.9", "versions": {"torch": "2.13.0"}}
SOURCE = {"task": "retrieval", "kept": 1000, "licence": "MIT", "commercial": True, "overlap": ["STS12"]}
PAIRS = SOURCE | {"title": "Pairs", "source": "pairs", "hub_id": "lab/pairs"}
SOURCES = {
    "pairs": SOURCE
    | {"title": "Pairs", "source": "pairs", "hub_id": "lab/pairs", "languages": {"de": 9, "zh_Hant": 1}},
    "pairs_2": PAIRS | {"languages": {"unknown": 1000}},
    "web": SOURCE | {"title": "A|B", "source": "web", "hub_id": None, "licence": "unknown", "commercial": "unknown"},
}
SCORES = """model,task,type,score
stage2,One,STS,0.9
pico-distilled,One,STS,0.5
pico-distilled,Two,Retrieval,0.1
pico-distilled,Three,Retrieval,0.3
"""


@pytest.fixture
def folder(embedder, tmp_path):
    """A distilled model of the pipeline."""
    embedder.matryoshka_dims = [32, 16, 8]
    embedder.save(tmp_path / "pico")
    (tmp_path / "pico" / "train.json").write_text(json.dumps(TRAIN))
    return tmp_path / "pico"


@pytest.fixture
def exported(folder, tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"sources": SOURCES}))
    (tmp_path / "scores.csv").write_text(SCORES)
    files = {"manifest": tmp_path / "manifest.json", "scores": tmp_path / "scores.csv"}
    export(folder, tmp_path / "out", "lab/tiny-f2llm", base="Qwen/Qwen3-0.6B", **files)
    return tmp_path / "out"


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


# The card ---------------------------------------------------------------------------------------


def test_the_card_begins_with_what_the_hub_reads(exported):
    found = front_matter((exported / "README.md").read_text())
    assert (found["license"], found["base_model"], found["language"]) == ("apache-2.0", "Qwen/Qwen3-0.6B", ["de", "zh"])
    assert found["datasets"] == ["lab/pairs"] and "sentence-transformers" in found["tags"]
    assert (found["library_name"], found["pipeline_tag"]) == ("sentence-transformers", "feature-extraction")


@pytest.mark.parametrize(
    "line",
    [
        "# tiny-f2llm",
        "| context length | 24 tokens; longer texts are cut, EOS is kept |",
        "| dimensions | 32 |",
        "| matryoshka dimensions | 8, 16, 32 |",
        "2,000 rows".replace("2,000", "3,000")
        + " of 2 sources. The licence of the weights does not change the licences of",
        "| Pairs | retrieval | 2,000 | MIT | yes | lab/pairs |",
        "| A\\|B | retrieval | 1,000 | unknown | unknown |  |",
        "| all 3 tasks | 30.0 |",
        "| Retrieval | 20.0 |",
        "They cannot be compared with the leaderboard",
        "| seed | 7 |",
        "| tokens | 12,345 |",
        "| versions | python 3.11.9, torch 2.13.0 |",
        "| inputs | models/pruned/pico, models/stage2 |",
        "There is no ONNX file: the package `optimum`",
    ],
)
def test_the_card_answers(exported, line):
    assert line in (exported / "README.md").read_text()


def test_the_commit_of_the_code_is_in_the_card(exported):
    assert re.search(r"\| exported by the code at \| [0-9a-f]{40}", (exported / "README.md").read_text())


def test_the_code_of_the_card_runs_and_both_ways_give_the_same(exported, embedder, capsys):
    card = (exported / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    first, second = ({}, {})
    for code, names in zip(snippets, (first, second), strict=True):
        exec(code.replace('"lab/tiny-f2llm"', repr(str(exported))), names)
    assert capsys.readouterr().out.count("tensor(") == 2
    similarity = first["model"].similarity(first["queries"], first["documents"])[0, 0]
    assert_close(second["embeddings"][0] @ second["embeddings"][1], similarity, eps=1e-6)
    assert_close(second["embeddings"], embedder.encode(second["texts"]), eps=1e-6)


def test_without_data_scores_and_log_the_card_says_so(embedder, tmp_path):
    embedder.save(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out", "lab/tiny")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Not recorded in this export" in card and "## Scores" not in card
    assert "matryoshka dimensions | none recorded" in card and "base_model" not in front_matter(card)


# The folder -------------------------------------------------------------------------------------


def test_the_exported_model_is_the_model(exported, folder, embedder):
    for file in folder.rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (exported / file.relative_to(folder)).read_bytes()
    new = {str(file.relative_to(exported)) for file in exported.rglob("*") if file.is_file()}
    new -= {str(file.relative_to(folder)) for file in folder.rglob("*")}
    assert new == {"README.md", "model_meta.json", "model_meta.py"}
    assert num_parameters(exported) == (embedder.num_parameters()[0], 320 * 32)


def test_embeddings_that_a_contract_lacks_are_added(folder, embedder, tmp_path):
    whole = read_contract(folder)
    write_contract(folder, contract_of(folder, embedder, vectors=False))
    export(folder, tmp_path / "out", "lab/tiny")
    found = read_contract(tmp_path / "out")
    assert replace(found, probes=[]) == replace(whole, probes=[]) and len(found.probes) == len(whole.probes) > 3
    for one, other in zip(found.probes, whole.probes):  # the last of six digits may be rounded the other way
        assert replace(one, embedding=None) == replace(other, embedding=None)
        assert one.embedding == pytest.approx(other.embedding, abs=2e-6)
    assert read_contract(folder).computed_in is None, "the model itself stays as it was"


def test_a_faulty_model_is_not_exported(folder, tmp_path):
    path = folder / "1_Pooling" / "config.json"
    path.write_text(path.read_text().replace("32", "48"))
    with pytest.raises(ValueError, match=r"not fit to be published\. WRONG: pooling dimension: found 48.*f2llm doctor"):
        export(folder, tmp_path / "out", "lab/tiny")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "a b/c", "/c", ""])
def test_a_name_that_the_hub_does_not_take_is_an_error(folder, tmp_path, name):
    with pytest.raises(ValueError, match=r"name is .*, but must be organisation/model; remedy: "):
        export(folder, tmp_path / "out", name)


def test_a_licence_that_mteb_does_not_know_is_one_line(folder, tmp_path):
    with pytest.raises(ValueError, match=r"mteb does not take license 'Foo': Input should be .*; remedy: ") as error:
        export(folder, tmp_path / "out", "lab/tiny", licence="Foo")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_an_export_replaces_only_an_export(folder, exported, tmp_path):
    export(folder, exported, "lab/other")
    assert "# other" in (exported / "README.md").read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="has files that no export wrote"):
        export(folder, tmp_path / "mine", "lab/tiny")
    for place in (folder, tmp_path):
        with pytest.raises(ValueError, match="is the model itself or holds it"):
            export(folder, place, "lab/tiny")
    assert (tmp_path / "mine" / "thesis.tex").exists() and (folder / "model.safetensors").exists()


def test_scores_of_another_model_are_an_error(folder, tmp_path):
    (tmp_path / "scores.csv").write_text(SCORES.replace("pico", "atto"))
    with pytest.raises(ValueError, match="has no scores of 'pico-distilled'; remedy: one of atto-distilled, stage2"):
        export(folder, tmp_path / "out", "lab/tiny", scores=tmp_path / "scores.csv")


def test_the_command_exports(folder, tmp_path):
    done = f2llm("export", folder, tmp_path / "out", "--name", "lab/tiny", "--licence", "mit", cwd=tmp_path)
    assert done.returncode == 0 and "README.md is the card" in done.stdout, done.stderr
    assert front_matter((tmp_path / "out" / "README.md").read_text())["license"] == "mit"


# mteb -------------------------------------------------------------------------------------------


def test_mteb_reads_the_description(exported, embedder):
    names = {}
    exec((exported / "model_meta.py").read_text(), names)
    meta = names["model"]
    assert (meta.name, meta.max_tokens, meta.embed_dim) == ("lab/tiny-f2llm", 24, [8, 16, 32])
    assert meta.revision == sha1_of_weights(exported) and re.fullmatch("[0-9a-f]{40}", meta.revision)
    assert meta.languages == ["deu-Latn", "zho-Hans"] and meta.training_datasets == {"STS12"}
    assert (meta.n_parameters, meta.adapted_from) == (embedder.num_parameters()[0], "Qwen/Qwen3-0.6B")
    written = json.loads((exported / "model_meta.json").read_text())
    assert written["loader"] == "InstructSentenceTransformerModel" and written["revision"] == meta.revision
    assert mteb.models.ModelMeta(**{**written, "loader": None}).revision == meta.revision


def test_mteb_s_loader_gives_the_model_s_embeddings(exported, embedder):
    names = {}
    exec((exported / "model_meta.py").read_text(), names)
    meta = names["model"]
    model = meta.loader(str(exported), revision=None, device="cpu", **meta.loader_kwargs)
    task, texts = mteb.get_task("NFCorpus").metadata, ["a fox", "fox " * 40]
    embedder.max_tokens = 24
    for kind in (mteb.types.PromptType.query, mteb.types.PromptType.document):
        inputs = DataLoader(Dataset.from_dict({"text": texts}), batch_size=2)
        found = model.encode(inputs, task_metadata=task, hf_split="test", hf_subset="default", prompt_type=kind)
        instruction = model.get_task_instruction(task, kind) if kind == mteb.types.PromptType.query else ""
        assert_close(np.asarray(found), embedder.encode([instruction + text for text in texts]), eps=1e-6)


def test_the_revision_follows_the_weights(exported):
    before = sha1_of_weights(exported)
    path = exported / "model.safetensors"
    save_file({name: tensor + torch.tensor(1e-3) for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    assert sha1_of_weights(exported) != before


# A submission -----------------------------------------------------------------------------------

BENCHMARK, NAME, REVISION = "MTEB(kor, v1)", "codefuse-ai/F2LLM-0.6B", "a" * 40


def result_of(task):
    """A result file's content, with a score for every split and subset of the task."""
    rows = [{"main_score": 0.5, "hf_subset": subset, "languages": ["kor-Hang"]} for subset in task.hf_subsets]
    content = {"dataset_revision": task.metadata.revision, "mteb_version": "2.26.24", "task_name": task.metadata.name}
    return content | {"scores": dict.fromkeys(task.eval_splits, rows), "evaluation_time": 1.0}


@pytest.fixture
def submission(tmp_path):
    """Results of a whole benchmark in the layout of the repository."""
    folder = tmp_path / "results" / NAME.replace("/", "__") / REVISION
    folder.mkdir(parents=True)
    for task in mteb.get_benchmark(BENCHMARK).tasks:
        (folder / f"{task.metadata.name}.json").write_text(json.dumps(result_of(task)))
    (folder / "model_meta.json").write_text(json.dumps({"name": NAME, "revision": REVISION}))
    (folder / "run_settings.jsonl").write_text("{}\n")
    return folder


def test_nothing_is_said_of_a_whole_submission(submission):
    assert check_submission(submission, BENCHMARK) == []


def edited(file, /, **values):
    def change(folder):
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "KLUE-STS.json").unlink(), r"MTEB\(kor, v1\): KLUE-STS was not run"),
        (lambda folder: (folder / "KLUE-STS.json").rename(folder / "STS.json"), "STS.json has the results of KLUE-STS"),
        (lambda folder: (folder / "KLUE-STS.json").write_text("{"), r"KLUE-STS\.json is no result of mteb"),
        (lambda folder: (folder / "run_settings.jsonl").unlink(), r"run_settings\.jsonl is missing"),
        (lambda folder: (folder / "notes.txt").write_bytes(b"x" * 11 * 2**20), r"notes\.txt has 11\.0 MiB"),
        (edited("KLUE-STS.json", dataset_revision="b" * 40), "KLUE-STS was run on data at bbbbbbbb, but MTEB"),
        (edited("KLUE-STS.json", scores={}), r"MTEB\(kor, v1\): KLUE-STS lacks"),
        (edited("KLUE-STS.json", mteb_version=None), r"KLUE-STS\.json does not say which mteb"),
        (edited("model_meta.json", name="lab/model"), "the folder is 'codefuse-ai__F2LLM-0.6B', but the model's name"),
        (edited("model_meta.json", name="lab/model"), "lab/model is not in the registry"),
        (edited("model_meta.json", name="model"), "must have organisation/model"),
        (edited("model_meta.json", revision="main"), "the revision is 'main', but must have 40"),
        (edited("model_meta.json", revision="c" * 40), "but model_meta.json has the revision 'cccc"),
        (lambda folder: (folder / "model_meta.json").unlink(), "has no model_meta.json"),
    ],
)
def test_what_the_repository_would_refuse_is_said(submission, change, message):
    change(submission)
    assert any(re.search(message, problem) for problem in check_submission(submission, BENCHMARK))


def test_a_task_under_two_revisions_is_said(submission):
    other = submission.parent / ("b" * 40)
    other.mkdir()
    (other / "KLUE-STS.json").write_text((submission / "KLUE-STS.json").read_text())
    assert check_submission(submission) == [
        f"KLUE-STS has results under revision {'b' * 40} as well; remedy: one revision for each task"
    ]


def test_a_folder_without_results_is_said(submission):
    for file in submission.glob("*.json"):
        if file.name != "model_meta.json":
            file.unlink()
    (problem,) = check_submission(submission)
    assert problem.endswith("has no results")
