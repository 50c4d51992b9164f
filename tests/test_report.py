"""Tables of the report and their place in README."""

import matplotlib
import pandas as pd
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from f2llm.report import (
    README_MARKS,
    ablations_markdown,
    label,
    markdown,
    plot_differences,
    plot_dims,
    plot_sizes,
    read_scores,
    readme_with_results,
    smoothed,
    summary_lines,
    table_by_task,
    table_by_type,
    table_of_students,
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


def test_the_table_by_task_has_every_task_in_order(folder):
    table = table_by_task(read_scores(folder))
    assert list(table.columns) == ["Mean", *TASKS]
    assert table.loc["stage 2"].tolist() == pytest.approx([50.0, 70.0, 50.0, 60.0, 20.0])


def test_markdown_has_the_best_of_each_column_in_bold():
    table = pd.DataFrame({"a": [1.0, 2.0], "b": [3.0, 3.0]}, index=["one", "two"])
    assert markdown(table).splitlines() == [
        "| model | a | b |",
        "|---|---|---|",
        "| one | 1.0 | **3.0** |",
        "| two | **2.0** | **3.0** |",
    ]


def test_results_go_between_the_marks_and_nothing_else_changes(folder):
    start, end = README_MARKS
    once = readme_with_results(f"# Title\n\n{start}\nold\n{end}\n\nText.\n", folder)
    assert once.startswith(f"# Title\n\n{start}\n") and once.endswith(f"{end}\n\nText.\n")
    assert "old" not in once
    assert markdown(table_by_type(read_scores(folder))) in once
    assert readme_with_results(once, folder) == once


@pytest.mark.parametrize("readme", ["no marks", "".join(README_MARKS) * 2, README_MARKS[0]])
def test_a_readme_without_its_two_marks_is_an_error(folder, readme):
    with pytest.raises(ValueError, match="must have each of the two marks"):
        readme_with_results(readme, folder)


def test_missing_scores_or_columns_are_an_error(folder):
    path = folder / "results" / "scores.csv"
    path.write_text("model,score\na,1\n")
    with pytest.raises(ValueError, match=r"has columns \['model', 'score'\], not model, task, type, score; remedy"):
        read_scores(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"scores\.csv is missing; remedy: make repro"):
        read_scores(folder)


def test_the_summary_names_the_report_and_the_time(folder):
    lines = summary_lines(folder, seconds=125)
    assert any(line.startswith("Time:   2 min 5 s") for line in lines)
    assert any(line.endswith("report.html") for line in lines)
    assert "stage 2" in "\n".join(lines)
    assert not any(line.startswith("Time:") for line in summary_lines(folder, seconds=0))


def test_smoothing_is_the_mean_of_the_last_steps():
    log = pd.DataFrame({"loss": [4.0, 2.0, 0.0, 1.0]})
    assert smoothed(log, window=2).tolist() == [4.0, 3.0, 1.0, 0.5]


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


def test_a_type_is_drawn_as_the_mean_of_its_tasks_at_every_dim():
    rows = [("A", "a", 16, 0.4), ("A", "a", 8, 0.2), ("A", "b", 8, 0.4), ("A", "b", 16, 0.8), ("B", "c", 8, 0.1)]
    figure, axes = plt.subplots()
    plot_dims(axes, pd.DataFrame(rows, columns=["type", "task", "dim", "score"]))
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}
    assert lines["A"] == ([8, 16], pytest.approx([30, 60])) and lines["B"] == ([8], pytest.approx([10]))
    plt.close(figure)


def test_sizes_and_dims_are_drawn_once_per_dim_and_once_per_model():
    sizes = {"stage2": (1000, (8, 16)), "pico-distilled": (500, (8, 12)), "femto-distilled": (250, (4, 8))}
    rows = [
        {"model": model, "without_embeddings": size, "dim": dim, "score": dim / 100}
        for model, (size, dims) in sizes.items()
        for dim in dims
    ]
    figure, axes = plt.subplots(1, 2)
    plot_sizes(axes, pd.DataFrame(rows))
    left, right = ([line.get_label() for line in one.get_lines()] for one in axes)
    assert left == ["all dimensions", "8 dimensions"], "one line for each number that several models have"
    assert right == ["stage 2", "pico, distilled", "femto, distilled"], "largest first"
    assert axes[0].get_lines()[0].get_ydata().tolist() == [8, 12, 16], "by size, each with all its dimensions"
    plt.close(figure)


def test_differences_have_a_panel_per_model_and_a_line_per_arm():
    facts = {"group": "g", "against": "default", "low": -1, "high": 3, "difference": 1, "verdict": "within noise"}
    rows = [facts | {"arm": arm, "model": model} for arm in ("less", "more") for model in ("stage2", "pico-distilled")]
    other = {"group": "h", "against": "v2", "arm": "less", "model": "pico-distilled", "verdict": "higher"}
    rows.append(facts | other)
    figure, axes = plt.subplots(1, 2, sharey=True)
    plot_differences(axes, pd.DataFrame(rows), ("stage2", "pico-distilled"))
    assert [tick.get_text() for tick in axes[0].get_yticklabels()] == ["less (against v2)", "more", "less"], (
        "first on top"
    )
    intervals = [[line for line in panel.get_lines() if list(line.get_xdata()) == [-1, 3]] for panel in axes]
    assert [len(lines) for lines in intervals] == [2, 3]
    found = {line.get_ydata()[0]: line.get_color() for line in intervals[1]}
    assert found == {0: "C2", 1: "grey", 2: "grey"}
    plt.close(figure)


def test_the_table_of_ablations_marks_what_is_outside_the_noise():
    rows = [
        {"group": "g", "arm": "default", "model": "stage2", "seeds": 3},
        {"group": "g", "arm": "less", "model": "stage2", "seeds": 3, "difference": -1.26, "low": -2, "high": -0.5}
        | {"verdict": "lower"},
        {"group": "g", "arm": "other", "model": "stage2", "seeds": 2, "difference": 0.2, "low": -1, "high": 1.4}
        | {"verdict": "within noise"},
    ]
    rows += [
        {
            "group": "h",
            "arm": "more",
            "model": model,
            "seeds": 3,
            "difference": 2,
            "low": 1,
            "high": 3,
            "verdict": verdict,
        }
        for model, verdict in (("stage2", "higher"), ("stage2@8", "within noise"))
    ]
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
