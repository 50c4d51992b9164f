"""Tables of the report."""

import re

import pandas as pd
import pytest

from f2llm.embedded.tasks import names_of_tasks
from f2llm.reporting import tables
from f2llm.reporting.tables import (
    goals,
    label,
    language_name,
    read_scores,
    run_summary,
    styled,
    table_by_task,
    table_by_type,
    table_of_students,
    table_of_trainings,
)

TASKS = {"NamesBitext": "BitextMining", "NamesCrossScriptBitext": "BitextMining"}
TASKS |= {"CodeRetrieval": "Retrieval", "ListSTS": "STS"}
SCORES = {"tfidf": (0.5, 0.1, 0.9, 0.3), "stage2": (0.7, 0.5, 0.6, 0.2), "pico-pruned": (0.1, 0.1, 0.1, 0.1)}


@pytest.fixture
def folder(tmp_path):
    """A repository with scores of three models on four tasks."""
    rows = [
        {"model": model, "task": task, "type": kind, "score": score}
        for model, scores in SCORES.items()
        for (task, kind), score in zip(TASKS.items(), scores)
    ]
    (tmp_path / "results").mkdir()
    pd.DataFrame(rows).to_csv(tmp_path / "results" / "scores.csv", index=False)
    return tmp_path


def test_models_keep_their_order_and_get_names_for_readers(folder):
    names = [label(model) for model in SCORES]
    assert names[1:] == ["stage 2", "pico, pruned"]
    scores = read_scores(folder)
    assert list(table_by_type(scores).index) == list(table_by_task(scores).index) == names


def test_the_table_by_type_has_means_over_tasks_times_100(folder):
    table = table_by_type(read_scores(folder))
    assert list(table.columns) == ["Mean", "Bitext", "Bitext between scripts", "Retrieval", "STS"]
    assert table.loc["stage 2"].tolist() == pytest.approx([50.0, 60.0, 50.0, 60.0, 20.0])
    assert table.iloc[0].tolist() == pytest.approx([45.0, 30.0, 10.0, 90.0, 30.0])


def test_the_table_by_task_has_every_task_in_words_and_those_of_a_type_together():
    rows = [("DjangoBitext", "BitextMining", 0.7), ("ListOverlapSTS", "STS", 0.2), ("OwnBitext", "BitextMining", 0.6)]
    scores = pd.DataFrame([("stage2", *row) for row in rows], columns=["model", "task", "type", "score"])
    table = table_by_task(scores)
    assert table.loc["stage 2"].to_dict() == pytest.approx(
        {
            "Mean": 50.0,
            "Bitext: Django's messages, Latin script": 70.0,
            "Bitext: OwnBitext": 60.0,
            "STS: overlap of lists": 20.0,
        }
    )
    assert list(table.columns)[1:3] == ["Bitext: Django's messages, Latin script", "Bitext: OwnBitext"]


def test_every_task_of_the_embedded_corpus_has_words():
    names = names_of_tasks()
    assert len(names) == 24 and set(names) == set(tables.TASKS)
    assert len(set(tables.TASKS.values())) == 24, "one name for one task"


def test_missing_scores_or_columns_are_an_error(folder):
    path = folder / "results" / "scores.csv"
    path.write_text("model,score\na,1\n")
    with pytest.raises(ValueError, match=r"has columns \['model', 'score'\], not model, task, type, score; remedy"):
        read_scores(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"scores\.csv is missing; remedy: make repro"):
        read_scores(folder)


def test_the_table_of_students_has_shares_of_the_teachers_mean_and_gain():
    means = {"untrained": 0.1, "stage2": 0.5, "pico-pruned": 0.2, "pico-distilled": 0.4}
    scores = pd.DataFrame(
        [{"model": model, "task": task, "score": score} for model, score in means.items() for task in "ab"]
    )
    sizes = {"untrained": 80, "stage2": 80, "pico-pruned": 20, "pico-distilled": 20}
    parameters = pd.DataFrame({"model": sizes.keys(), "without_embeddings": sizes.values()})
    (row,) = table_of_students(scores, parameters).to_dict("records")
    assert row["share of parameters"] == 0.25
    assert (row["pruned"], row["distilled"], row["teacher"]) == pytest.approx((20, 40, 50))
    assert row["share of teacher's mean"] == pytest.approx(0.8)
    assert (row["share of gain, pruned"], row["share of gain, distilled"]) == pytest.approx((0.25, 0.75))


# Goals ------------------------------------------------------------------------------------------

REACHED = {"untrained": 0.1, "tfidf": 0.2, "stage1": 0.35, "stage2": 0.4, "pico-pruned": 0.3, "pico-distilled": 0.38}
SIZES = {"stage2": 100, "pico-pruned": 50, "pico-distilled": 50, "atto-pruned": 10, "atto-distilled": 10}


def goals_of(means: dict[str, float]) -> pd.DataFrame:
    """The goals where every task of a model has the same score, but STS, which counts in no goal but the mean."""
    kinds = {"DjangoBitext": "BitextMining", "DjangoCrossScriptBitext": "BitextMining", "Code": "Retrieval"}
    rows = [(model, task, kind, score) for model, score in means.items() for task, kind in kinds.items()]
    scores = pd.DataFrame(rows, columns=["model", "task", "type", "score"])
    parameters = pd.DataFrame({"model": SIZES.keys(), "without_embeddings": SIZES.values()})
    return goals(scores, parameters).set_index("goal")


def test_goals_that_are_met_are_shown_with_their_numbers():
    reached = goals_of(REACHED)
    assert list(reached.index) == list(tables.GOALS)
    assert reached["measured"].tolist() == [
        "4.00 times: 40.0 against 10.0",
        "40.0 against 20.0 and 35.0",
        "points: pico +8.0",
        "pico keeps 95.0%",
    ]
    assert reached["met"].tolist() == [True] * 4


@pytest.mark.parametrize(
    "goal, changed",
    [
        (0, {"untrained": 0.15}),
        (1, {"tfidf": 0.41}),
        (1, {"stage1": 0.41}),
        (2, {"atto-pruned": 0.2, "atto-distilled": 0.2}),
        (3, {"pico-distilled": 0.35}),
    ],
)
def test_a_goal_is_missed_alone(goal, changed):
    assert goals_of(REACHED | changed)["met"].tolist() == [number != goal for number in range(4)]


def test_retrieval_and_bitext_alone_decide_the_first_goal_and_all_tasks_the_second():
    rows = [("untrained", "List", "STS", 0.4), ("untrained", "Code", "Retrieval", 0.1)]
    rows += [("stage2", "List", "STS", 0.1), ("stage2", "Code", "Retrieval", 0.4)]
    rows += [("tfidf", "List", "STS", 0.1), ("stage1", "Code", "Retrieval", 0.2)]
    rows += [("untrained", "X", "BitextMining", 0.1), ("stage2", "X", "BitextMining", 0.2)]
    scores = pd.DataFrame(rows, columns=["model", "task", "type", "score"])
    reached = goals(scores, pd.DataFrame({"model": [], "without_embeddings": []}))
    assert reached["measured"].tolist() == ["3.00 times: 30.0 against 10.0", "23.3 against 10.0 and 20.0"]


@pytest.mark.parametrize(
    "models, expected",
    [
        (["stage1"], []),
        (["untrained", "stage2"], [0]),
        (["tfidf", "untrained", "stage2"], [0]),
        (["tfidf", "stage1", "stage2"], [1]),
        (["pico-pruned", "pico-distilled"], [2]),
        (["stage2", "pico-distilled"], []),
    ],
)
def test_goals_about_models_that_were_not_scored_are_left_out(models, expected):
    reached = goals_of({model: REACHED.get(model, 0.1) for model in models})
    assert list(reached.index) == [tables.GOALS[number] for number in expected]
    assert reached["met"].dtype == bool


# What was run -----------------------------------------------------------------------------------


def fact(seconds: float, steps: int = 10) -> dict:
    common = {"threads": 1, "processes": 1, "device": "a CPU", "peak_memory_mib": 700, "python": "3.11.7"}
    return common | {"steps": steps, "tokens": 1000 * steps, "seconds": seconds, "versions": {"torch": "2.13.0"}}


def test_the_summary_adds_up_the_times_of_the_stages_and_counts_tuples_and_languages(folder):
    facts = {"stage1": fact(0.0, steps=0), "stage2": fact(46.5)}
    facts |= {"pico-distilled": fact(3600), "femto-distilled": fact(20)}
    sources = {
        "a": {"kept": 1000, "languages": {"en": 3, "python": 3}},
        "b": {"kept": 234, "languages": {"en": 1, "de": 1}},
    }
    summary = run_summary(facts, {"sources": sources}, read_scores(folder), commit="")
    assert summary == {
        "Data": "1,234 tuples of 2 sources in 2 languages",
        "Evaluation": "4 held-out tasks of 3 types; models scored: 3",
        "Trained on": "a CPU, threads: 1, processes: 1",
        "Training time": "1:01:06 (h:mm:ss): stage 2 0:00:46, distillation 1:00:20",
        "Versions": "Python 3.11.7, torch 2.13.0",
        "Commit": "unknown",
    }


def test_a_training_without_steps_has_no_row():
    facts = {"stage1": fact(0.0, steps=0), "stage2": fact(0.0), "pico-distilled": fact(20)}
    parameters = pd.DataFrame({"model": ["stage2"], "parameters": [9], "without_embeddings": [5]})
    table = table_of_trainings(facts, parameters)
    assert list(table.index) == ["stage 2", "pico, distilled"]
    assert table["tokens per second"].tolist() == [100_000, 500]
    assert table["non-embedding parameters"].tolist()[0] == 5 and table["parameters"].isna().tolist() == [False, True]


# For readers ------------------------------------------------------------------------------------


def test_languages_have_names_whatever_the_length_of_their_code():
    names = {"deu": "German", "de": "German", "szl": "Silesian", "zho": "Chinese", "arb": "Arabic", "xyz": "xyz"}
    assert {code: language_name(code) for code in names} == names


def test_the_lowest_languages_are_ordered_and_none_without_a_bitext_task(tmp_path):
    header, rows = (
        "model,task,language,score\n",
        "stage2,A,fra,0.3\nstage2,B,fra,0.5\nstage2,A,deu,0.2\nother,A,zul,0.1\n",
    )
    for text, expected in ((header + rows, [("German", 20), ("French", 40)]), (header, [])):
        (tmp_path / "languages.csv").write_text(text)
        found = tables.lowest_languages(pd.read_csv(tmp_path / "languages.csv"), "stage2")
        assert [(row[1], pytest.approx(row[3])) for row in found.itertuples()] == expected


def test_a_table_has_its_numbers_formatted_and_the_best_bold():
    table = pd.DataFrame({"name": ["x", "y"], "a": [1.04, 2.0], "b": [3.0, None]}, index=["one", "two"])
    html = styled(table, best=0).to_html()
    assert all(f">{text}</td>" in html for text in ("x", "1.0", "2.0", "3.0", ""))
    (bold,) = re.findall(r"([^{}]*) \{\s*font-weight: bold", html)
    assert re.findall(r"row(\d)_col(\d)", bold) == [("0", "2"), ("1", "1")]
    assert re.search(r"td\.col0 \{\s*text-align: left", html) and "td.col1" not in html
