"""Public data sets read from a mirror: the layouts of the hub, changed and missing files, another revision."""

import json
import re

import datasets
import pandas as pd
import pytest
from helpers.mteb_data import ONE, PAIRS, TWO, add, record, task_of
from mteb.abstasks import AbsTaskBitextMining, AbsTaskClassification, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata

from f2llm.data.mirror import Mirror, write_manifest
from f2llm.evaluation.mirrored import num_characters, read_from_mirror, repositories, require_data
from f2llm.evaluation.run import run_tasks
from f2llm.evaluation.tasks import Encoder


def rows_of(split) -> dict:
    return {name: list(split[name]) for name in split.column_names}


@pytest.fixture(autouse=True)
def copies_of_datasets(monkeypatch, tmp_path):
    monkeypatch.setattr("f2llm.evaluation.mirrored.root", lambda: tmp_path / "root")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "never")
    yield
    assert not (tmp_path / "never").exists(), "datasets wrote to its own cache"


@pytest.fixture
def mirror(tmp_path):
    (tmp_path / "mirror").mkdir()
    return tmp_path / "mirror"


def loaded(task, mirror):
    read_from_mirror([task], mirror)
    task.load_data()
    return task


# Layouts ----------------------------------------------------------------------------------------


def test_files_named_by_their_split(mirror):
    add(mirror, "org/plain", {"test.parquet": PAIRS})
    task = loaded(task_of(AbsTaskSTS, "STS", "cosine_spearman", "org/plain"), mirror)
    assert rows_of(task.dataset["test"]) == PAIRS
    assert task.metadata.dataset["revision"] == ONE, "results name the pinned revision"


def test_a_named_config_among_others(mirror):
    other = PAIRS | {"score": [0.0, 0.0, 0.0]}
    configs = [{"name": name, "files": {"test": f"{name}.parquet"}} for name in ("sts", "other")]
    add(mirror, "org/named", {"sts.parquet": PAIRS, "other.parquet": other}, configs)
    task = task_of(AbsTaskSTS, "STS", "cosine_spearman", "org/named", extra={"name": "sts"})
    assert rows_of(loaded(task, mirror).dataset["test"]) == PAIRS


def test_one_config_per_language(mirror):
    tables = {
        f"{code}/test.parquet": {"text": [f"{code} {row}" for row in range(4)], "label": [0, 1, 0, 1]} for code in "ab"
    }
    tables |= {f"{code}/train.parquet": rows for code, rows in zip("ab", tables.values())}
    configs = [
        {"name": code, "files": {"train": f"{code}/train.parquet", "test": f"{code}/test.parquet"}} for code in "ab"
    ]
    add(mirror, "org/languages", tables, configs)
    languages = {"a": ["deu-Latn"], "b": ["fra-Latn"]}
    task = loaded(task_of(AbsTaskClassification, "Classification", "accuracy", "org/languages", languages), mirror)
    assert [rows_of(task.dataset[code]["test"])["text"][0] for code in "ab"] == ["a 0", "b 0"]


def test_a_default_config_with_a_language_column(mirror):
    rows = {"sentence1": ["eins", "un"], "sentence2": ["one", "one"], "lang": ["deu-eng", "fra-eng"]}
    add(mirror, "org/column", {"test.parquet": rows}, [{"name": "default", "files": {"test": "test.parquet"}}])
    languages = {"deu-eng": ["deu-Latn", "eng-Latn"], "fra-eng": ["fra-Latn", "eng-Latn"]}
    task = task_of(AbsTaskBitextMining, "BitextMining", "f1", "org/column", languages, fast_loading=True)
    task = loaded(task, mirror)
    assert {code: rows_of(part["test"])["sentence1"] for code, part in task.dataset.items()} == {
        "deu-eng": ["eins"],
        "fra-eng": ["un"],
    }


QUERIES = {"_id": ["q1", "q2"], "text": ["first?", "second?"]}
CORPUS = {"_id": ["d1", "d2", "d3"], "title": ["t", "", ""], "text": ["one", "two", "three"]}
QRELS = {"query-id": ["q1", "q2"], "corpus-id": ["d1", "d3"], "score": [1, 1]}


def search_tables(prefix=""):
    parts = {f"{prefix}queries": QUERIES, f"{prefix}corpus": CORPUS, f"{prefix}qrels" if prefix else "default": QRELS}
    return parts, [{"name": name, "files": {"test": f"{name}.parquet"}} for name in parts]


@pytest.mark.parametrize("languages", [None, {"de": ["deu-Latn"], "fr": ["fra-Latn"]}])
def test_retrieval_triples_also_by_language(mirror, languages):
    tables, configs = {}, []
    for prefix in [f"{code}-" for code in languages or ()] or [""]:
        some, more = search_tables(prefix)
        tables, configs = tables | some, configs + more
    add(mirror, "org/search", {f"{name}.parquet": rows for name, rows in tables.items()}, configs)
    kind = (AbsTaskRetrieval, "Retrieval", "ndcg_at_10", "org/search")
    task = loaded(task_of(*kind, languages or ("eng-Latn",)), mirror)
    for subset in languages or ["default"]:
        data = task.dataset[subset]["test"]
        assert data["relevant_docs"] == {"q1": {"d1": 1}, "q2": {"d3": 1}} and data["top_ranked"] is None
        assert list(data["corpus"]["text"]) == CORPUS["text"] and list(data["queries"]["text"]) == QUERIES["text"]


def test_reranking_keeps_its_candidates_and_its_instructions(mirror):
    tables, configs = search_tables()
    tables |= {"top_ranked": {"query-id": ["q1", "q2"], "corpus-ids": [["d1", "d2"], ["d2", "d3"]]}}
    tables |= {"instruction": {"query-id": ["q1", "q2"], "instruction": ["only old", "only new"]}}
    configs += [{"name": name, "files": {"test": f"{name}.parquet"}} for name in ("top_ranked", "instruction")]
    add(mirror, "org/rank", {f"{name}.parquet": rows for name, rows in tables.items()}, configs)
    task = loaded(task_of(AbsTaskRetrieval, "Reranking", "map_at_1000", "org/rank"), mirror)
    data = task.dataset["default"]["test"]
    assert data["top_ranked"] == {"q1": ["d1", "d2"], "q2": ["d2", "d3"]}
    assert list(data["queries"]["instruction"]) == ["only old", "only new"]


def test_a_loader_of_its_own_reads_the_mirror_and_never_the_hub(mirror):
    def load_data(self, num_proc=None, **keywords):
        self.dataset = datasets.load_dataset(**self.metadata.dataset)
        self.data_loaded = True

    add(mirror, "org/own", {"test.parquet": PAIRS})
    task = loaded(task_of(AbsTaskSTS, "STS", "cosine_spearman", "org/own", load_data=load_data), mirror)
    assert rows_of(task.dataset["test"]) == PAIRS

    def from_hub(self, num_proc=None, **keywords):
        datasets.load_dataset("org/elsewhere")

    task = task_of(AbsTaskSTS, "STS", "cosine_spearman", "org/own", load_data=from_hub)
    read_from_mirror([task], mirror)
    with pytest.raises(ConnectionError, match="OfflineModeIsEnabled"):
        task.load_data()


def test_two_revisions_of_one_repository_lie_side_by_side(mirror):
    newer = PAIRS | {"score": [0.5, 0.6, 0.7]}
    add(mirror, "org/twice", {"test.parquet": PAIRS})
    add(mirror, "org/twice", {"test.parquet": newer}, revision=TWO, folder=f"org/twice@{TWO}")
    kind = (AbsTaskSTS, "STS", "cosine_spearman", "org/twice")
    tasks = [task_of(*kind, name="Old"), task_of(*kind, revision=TWO, name="New")]
    require_data(tasks, mirror, "fetch")
    assert [rows_of(loaded(task, mirror).dataset["test"])["score"] for task in tasks] == [
        PAIRS["score"],
        newer["score"],
    ]


def test_a_second_repository_of_a_loader_is_asked_for_too():
    from f2llm.evaluation.benchmarks import tasks_of

    asked = repositories(tasks_of("GermanQuAD-Retrieval"))
    assert [repo for repo, _ in asked] == ["mteb/germanquad-retrieval", "mteb/germanquad-retrieval-qrels"]
    assert len(repositories(tasks_of(["STS22", "STS22.v2"]))) == 2, "two revisions of one repository"


# Changed, missing and wrong data ----------------------------------------------------------------


def test_changed_files_never_give_the_old_rows(mirror):
    """datasets itself finds its copy of a local folder by name and configs, and would give the old rows."""
    configs = [{"name": "default", "files": {"test": "test.parquet"}}]
    add(mirror, "org/changing", {"test.parquet": PAIRS}, configs)
    kind = (AbsTaskSTS, "STS", "cosine_spearman", "org/changing")
    first = loaded(task_of(*kind), mirror)
    changed = PAIRS | {"sentence1": ["z one", "b two", "c three"]}
    pd.DataFrame(changed).to_parquet(mirror / "org/changing/test.parquet")
    with pytest.raises(ValueError, match=r"test.parquet.*(was changed|truncated or changed)"):
        loaded(task_of(*kind), mirror)
    record(mirror, "org/changing")
    second = loaded(task_of(*kind), mirror)
    assert rows_of(second.dataset["test"]) == changed != rows_of(first.dataset["test"])
    assert first.data_digest != second.data_digest


def test_two_folders_of_one_name_are_not_mixed(mirror, tmp_path):
    (tmp_path / "other").mkdir()
    newer = PAIRS | {"score": [0.5, 0.6, 0.7]}
    for folder, rows in ((mirror, PAIRS), (tmp_path / "other", newer)):
        add(folder, "org/same", {"test.parquet": rows}, [{"name": "default", "files": {"test": "test.parquet"}}])
        task = loaded(task_of(AbsTaskSTS, "STS", "cosine_spearman", "org/same"), folder)
        assert rows_of(task.dataset["test"]) == rows


def test_all_that_is_missing_is_listed_before_any_work(mirror):
    from f2llm.evaluation.benchmarks import tasks_of

    add(mirror, "dkoterwa/kor-sts", {"test.parquet": PAIRS}, revision=TWO)
    tasks = tasks_of(["KorSTS", "JSTS", "Banking77Classification"])
    with pytest.raises(ValueError) as caught:
        require_data(tasks, mirror, "f2llm fetch --benchmark some")
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("lacks 3 of 3 data sets:") and lines[-1].startswith("remedy: f2llm fetch --benchmark some")
    assert f"holds dkoterwa/kor-sts at revision {TWO}" in lines[1]
    assert re.search(r"mteb/JSTS at [0-9a-f]{40}: 0\.\d million characters, not there", lines[2])


@pytest.mark.parametrize("harm", ["truncated", "gone", "half fetched"])
def test_a_file_that_is_not_whole_is_refused(mirror, harm):
    add(mirror, "org/plain", {"test.parquet": PAIRS})
    file = mirror / "org/plain/test.parquet"
    if harm == "truncated":
        file.write_bytes(file.read_bytes()[:100])
    elif harm == "gone":
        file.unlink()
    else:
        manifest = json.loads((mirror / "manifest.json").read_text())
        manifest["org/plain"]["listing"] = ["test.parquet", "train.parquet", "script.py", ".gitattributes"]
        write_manifest(mirror, manifest)
    with pytest.raises(ValueError, match=r"org/plain at 1+: .*(truncated|is missing)"):
        require_data([task_of(AbsTaskSTS, "STS", "cosine_spearman", "org/plain")], mirror, "fetch")


def test_rows_are_counted_against_mtebs_statistics(mirror, monkeypatch):
    add(mirror, "org/plain", {"test.parquet": PAIRS})
    counted = {
        "test": {
            "num_samples": 3,
            "number_of_characters": sum(len(text) for key in list(PAIRS)[:2] for text in PAIRS[key]),
        }
    }
    monkeypatch.setattr(TaskMetadata, "descriptive_stats", property(lambda self: counted))
    kind = (AbsTaskSTS, "STS", "cosine_spearman", "org/plain")
    assert num_characters(loaded(task_of(*kind), mirror)) == counted["test"]["number_of_characters"]
    counted["test"]["num_samples"] = 4
    with pytest.raises(ValueError, match=r"Taskplain, split test: num_samples is 3, but mteb .* counted 4; remedy"):
        loaded(task_of(*kind), mirror)


def test_a_data_set_that_cannot_be_read_does_not_stop_the_others(mirror, capsys):
    add(mirror, "org/good", {"test.parquet": PAIRS})
    add(mirror, "org/bad", {"test.parquet": {"other": ["x"]}})
    tasks = [task_of(AbsTaskSTS, "STS", "cosine_spearman", f"org/{name}") for name in ("bad", "good")]
    read_from_mirror(tasks, mirror)
    encoder = Encoder(lambda texts, _: [[len(text), ord(text[0])] for text in texts], "m", {"STS": "Do it."})
    encoder.function = lambda texts, _: pd.DataFrame([[len(text), ord(text[0])] for text in texts]).to_numpy(float)
    results = run_tasks({"m": encoder}, tasks)
    assert list(results.failures) == ["Taskbad"] and results.table()["task"].tolist() == ["Taskgood"]
    assert "Taskbad failed: " in capsys.readouterr().out


def test_a_mirror_knows_under_which_name_a_revision_lies(mirror):
    add(mirror, "org/twice", {"test.parquet": PAIRS})
    assert Mirror(mirror).folder_of("org/twice", TWO) == "org/twice" and "org/twice" in Mirror(mirror)
    add(mirror, "org/twice", {"test.parquet": PAIRS}, revision=TWO, folder=f"org/twice@{TWO}")
    assert Mirror(mirror).folder_of("org/twice", TWO) == f"org/twice@{TWO}"
