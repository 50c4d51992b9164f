"""Figures of the report: what their lines and labels hold."""

import matplotlib
import pandas as pd
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from f2llm.reporting.figures import plot_claims, plot_dims, plot_languages, plot_losses, plot_sizes, smoothed


def test_smoothing_is_the_mean_of_the_last_steps():
    log = pd.DataFrame({"loss": [4.0, 2.0, 0.0, 1.0]})
    assert smoothed(log, window=2).tolist() == [4.0, 3.0, 1.0, 0.5]


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


def test_claims_have_a_line_each_in_the_colour_of_their_verdict():
    rows = [("it helps", "stage2", 2.0, "yes"), ("it helps", "stage2@8", 0.1, "within noise")]
    rows += [("so does this", "pico-distilled", -2.0, "no")]
    facts = [{"claim": claim, "model": model, "gain": gain, "shown": shown} for claim, model, gain, shown in rows]
    claimed = pd.DataFrame([fact | {"low": fact["gain"] - 1, "high": fact["gain"] + 1} for fact in facts])
    figure, axes = plt.subplots()
    plot_claims(axes, claimed)
    names = [tick.get_text() for tick in axes.get_yticklabels()][::-1]
    assert names == ["it helps: stage 2", "it helps: stage 2 at 8 dimensions", "so does this: pico"], "first on top"
    lines = [line for line in axes.get_lines() if len(set(line.get_xdata())) == 2]
    intervals = {line.get_ydata()[0]: line for line in lines}
    assert [intervals[place].get_color() for place in (2, 1, 0)] == ["C2", "grey", "C3"]
    assert list(intervals[2].get_xdata()) == [1.0, 3.0]
    plt.close(figure)


def test_losses_have_a_line_per_training_and_start_at_zero():
    figure, axes = plt.subplots()
    plot_losses(axes, {"stage 1": pd.DataFrame({"step": [1, 2], "loss": [4.0, 2.0]})})
    (line,) = axes.get_lines()
    assert line.get_label() == "stage 1" and line.get_ydata().tolist() == [4.0, 3.0]
    assert axes.get_ylim()[0] == 0
    plt.close(figure)


def test_languages_stand_by_name_and_by_the_lead_over_the_other_model():
    scores = {"fra": (0.1, 0.6, 0.4), "kat": (0.0, 0.1, 0.3), "deu": (0.2, 0.4, 0.4)}
    models = {"untrained": "x", "tfidf": "s", "stage2": "o"}
    rows = [
        {"model": model, "language": language, "score": score}
        for language, values in scores.items()
        for model, score in zip(models, values)
    ]
    figure, axes = plt.subplots()
    plot_languages(axes, pd.DataFrame(rows), models)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["French", "German", "Georgian"]
    lines = {line.get_label(): line.get_xdata().tolist() for line in axes.get_lines()}
    assert lines["stage 2"] == pytest.approx([40, 40, 30]) and lines["TF-IDF"] == pytest.approx([60, 40, 10])
    plt.close(figure)
