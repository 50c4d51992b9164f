"""Tables in Markdown, and their place in README.md, docs/ablations.md and data/README.md."""

import shutil

import pandas as pd
import pytest
from conftest import ROOT

from f2llm.pipeline import cli
from f2llm.reporting.readme import (
    ABLATION_MARKS,
    CLAIM_MARKS,
    REGISTRY_MARKS,
    RESULT_MARKS,
    SMOLLM2_MARKS,
    WALKTHROUGH,
    ablations_markdown,
    claims_markdown,
    results_markdown,
    smollm2_markdown,
    summary_lines,
    write_badge,
    write_between,
)

WRITTEN = [
    ("README.md", RESULT_MARKS),
    ("README.md", CLAIM_MARKS),
    ("README.md", SMOLLM2_MARKS),
    ("docs/ablations.md", ABLATION_MARKS),
    ("data/README.md", REGISTRY_MARKS),
]
READ = ("dvc.yaml", "params.yaml", "ablations.yaml", "data/sources.yaml", "results/ablations.csv")
READ += ("results/smollm2.csv",)


def test_results_have_intervals_and_the_best_of_each_row_in_bold():
    means = pd.DataFrame({"tfidf": [0.41, 0.5], "stage2": [0.502, 0.49]}, index=["Mean", "Retrieval"])
    halves = pd.DataFrame({"tfidf": [0.011, 0.0], "stage2": [0.006, 0.02]}, index=["Mean", "Retrieval"])
    assert results_markdown(means, halves).splitlines() == [
        "| | TF-IDF | stage 2 |",
        "|---|---|---|",
        "| Mean | 41.0 ±1.1 | **50.2 ±0.6** |",
        "| Retrieval | **50.0 ±0.0** | 49.0 ±2.0 |",
    ]


def test_a_language_models_scores_are_means_over_splits_then_over_public_and_own_tasks():
    rows = [
        (model, task, split, score)
        for model, task, split, score in [
            ("backbone", "PackageClustering", "test", 0.1),
            ("backbone", "Banking77Classification", "test", 0.2),
            ("backbone", "XQuADRetrieval", "validation", 0.3),
            ("backbone", "XQuADRetrieval", "test", 0.5),
            ("half-distilled", "PackageClustering", "test", 0.4),
            ("half-distilled", "Banking77Classification", "test", 0.5),
            ("half-distilled", "XQuADRetrieval", "test", 0.6),
        ]
    ]
    table = pd.DataFrame(rows, columns=["model", "task", "split", "score"])
    assert smollm2_markdown(table).splitlines() == [
        "| | before | half, distilled |",
        "|---|---|---|",
        "| 2 tasks of MTEB, English | 30.0 | 55.0 |",
        "| 1 tasks of the kit | 10.0 | 40.0 |",
        "| Mean of all | 23.3 | 50.0 |",
    ]
    with pytest.raises(ValueError, match="not every model has every task"):
        smollm2_markdown(table.iloc[:-1])


# The badge --------------------------------------------------------------------------------------


def test_a_badge_is_written_once_and_the_walkthrough_knows_where_its_repository_is(tmp_path):
    (tmp_path / "notebooks").mkdir()
    for name in ("README.md", WALKTHROUGH):
        shutil.copy(ROOT / name, tmp_path / name)
    before = {name: (tmp_path / name).read_text(encoding="utf-8") for name in ("README.md", WALKTHROUGH)}
    for address in ("https://github.com/some-one/a.kit", "https://github.com/other/kit.git"):
        write_badge(tmp_path, address, "main")
    opened = f"https://colab.research.google.com/github/other/kit/blob/main/{WALKTHROUGH}"
    badge = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({opened})"
    title, empty, line, *rest = (tmp_path / "README.md").read_text(encoding="utf-8").splitlines()
    assert (empty, line) == ("", badge) and [title, *rest] == before["README.md"].splitlines()
    text = (tmp_path / WALKTHROUGH).read_text(encoding="utf-8")
    assert text.count(badge) == 1 and text.count('address = \\"https://github.com/other/kit\\"') == 1
    assert text.count("some-one") == 0 and len(text.splitlines()) == len(before[WALKTHROUGH].splitlines()) + 2


@pytest.mark.parametrize("address", ["", "https://gitlab.com/a/b", "https://github.com/a", "git@github.com:a/b"])
def test_a_badge_wants_a_repository_on_github(tmp_path, address):
    with pytest.raises(ValueError, match=r"is not a repository on GitHub; remedy: https://github.com/"):
        write_badge(tmp_path, address, "main")


# Between marks ----------------------------------------------------------------------------------


def test_a_table_goes_between_its_marks_and_nothing_else_changes(tmp_path):
    path, (start, end) = tmp_path / "README.md", RESULT_MARKS
    path.write_text(f"# Title é\n\n{start}\nold\n{end}\n\nText.\n", encoding="utf-8")
    for content in ("first", "second", "second"):
        write_between(path, RESULT_MARKS, content)
        assert path.read_text(encoding="utf-8") == f"# Title é\n\n{start}\n\n{content}\n\n{end}\n\nText.\n"


@pytest.mark.parametrize(
    "text", ["no marks", "".join(RESULT_MARKS) * 2, RESULT_MARKS[0], RESULT_MARKS[1], "".join(reversed(RESULT_MARKS))]
)
def test_a_text_without_its_two_marks_is_an_error_and_stays(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"README\.md must have each of the two marks .* in this order; remedy: put"):
        write_between(path, RESULT_MARKS, "table")
    assert path.read_text() == text


def test_the_verb_writes_every_table_into_its_own_file(tmp_path, monkeypatch):
    for name in (*READ, *(name for name, _ in WRITTEN)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name, marks in WRITTEN:
        write_between(tmp_path / name, marks, "stale")
    monkeypatch.chdir(tmp_path)
    cli.readme()
    for name, (start, end) in WRITTEN:
        written, committed = (folder.joinpath(name).read_text(encoding="utf-8") for folder in (tmp_path, ROOT))
        table = written.split(start)[1].split(end)[0].strip()
        assert table.startswith("|") and table.count("\n|") >= 4, name
        assert written == committed, f"{name} does not show the results; remedy: f2llm readme"


def test_claims_have_their_gain_and_interval():
    claimed = pd.DataFrame([["it helps", "pico-distilled", 1.25, 0.5, 2.0, 5, "yes"]])
    claimed.columns = ["claim", "model", "gain", "low", "high", "seeds", "shown"]
    assert claims_markdown(claimed).splitlines()[-1] == "| it helps | pico | +1.2 | +0.5 to +2.0 | 5 | yes |"


# What the tables show ---------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A repository with scores of two models on three tasks."""
    tasks = {"NamesCrossScript": "BitextMining", "Code": "Retrieval", "List": "STS"}
    rows = [
        (model, task, kind, score)
        for model, scores in {"tfidf": (0.1, 0.5, 0.3), "stage2": (0.4, 0.2, 0.6)}.items()
        for (task, kind), score in zip(tasks.items(), scores)
    ]
    (tmp_path / "results").mkdir()
    scores = pd.DataFrame(rows, columns=["model", "task", "type", "score"])
    scores.to_csv(tmp_path / "results" / "scores.csv", index=False)
    return tmp_path


def test_the_summary_names_the_report_and_the_time(folder):
    lines = summary_lines(folder, seconds=125)
    assert any(line.startswith("Time:   2 min 5 s") for line in lines)
    assert any(line.endswith("report.html") for line in lines)
    assert "stage 2" in "\n".join(lines)
    assert not any(line.startswith("Time:") for line in summary_lines(folder, seconds=0))


def test_the_table_of_ablations_marks_what_is_outside_the_noise():
    facts = {"low": -2, "high": -0.5, "difference": -1.26}
    rows = [
        {"group": "g", "arm": "less", "model": "stage2", "seeds": 3, **facts, "verdict": "lower"},
        {"group": "g", "arm": "other", "model": "stage2", "seeds": 2, "difference": 0.2, "low": -1, "high": 1.4}
        | {"verdict": "within noise"},
    ]
    facts = {"group": "h", "arm": "more", "seeds": 3, "difference": 2, "low": 1, "high": 3}
    rows += [facts | {"model": "stage2", "verdict": "higher"}, facts | {"model": "stage2@8", "verdict": "within noise"}]
    table = pd.DataFrame(rows)
    table["against"] = table["group"].map({"g": "default", "h": "v2"})
    assert ablations_markdown(table).splitlines() == [
        "| changed | against | seeds | stage 2 |",
        "|---|---|---|---|",
        "| less | default | 3 | **-1.3 (-2.0 to -0.5)** |",
        "| other | default | 2 | +0.2 (-1.0 to +1.4) |",
        "",
        "| changed | against | seeds | stage 2 | stage 2 at 8 dimensions |",
        "|---|---|---|---|---|",
        "| more | v2 | 3 | **+2.0 (+1.0 to +3.0)** | +2.0 (+1.0 to +3.0) |",
    ]
