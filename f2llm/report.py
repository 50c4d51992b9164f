"""Tables and figures of the report, from results/*.csv and the logs beside the models."""

import json
from pathlib import Path

import pandas as pd

ABLATION_MARKS = ("<!-- ablations: written by `f2llm readme` -->", "<!-- end of ablations -->")
README_MARKS = ("<!-- results: written by `f2llm readme` -->", "<!-- end of results -->")
SHORT = {"BitextMining": "Bitext", "PairClassification": "Pair", "Classification": "Class."}
LABELS = {
    "tfidf": "TF-IDF (character n-grams)",
    "untrained": "untrained",
    "backbone": "backbone",
    "stage1": "stage 1",
    "stage2": "stage 2",
}


def label(model: str) -> str:
    """A model's name for readers: 'pico-pruned' -> 'pico, pruned', 'stage2@8' -> 'stage 2 at 8 dimensions'."""
    name, _, dim = model.partition("@")
    return LABELS.get(name, name.replace("-", ", ")) + (f" at {dim} dimensions" if dim else "")


def read_scores(folder: Path) -> pd.DataFrame:
    """results/scores.csv, checked."""
    path = Path(folder) / "results" / "scores.csv"
    if not path.exists():
        raise ValueError(f"{path} is missing; remedy: make repro")
    scores = pd.read_csv(path)
    if list(scores.columns) != ["model", "task", "type", "score"]:
        raise ValueError(
            f"{path} has columns {list(scores.columns)}, not model, task, type, score; remedy: dvc repro -f evaluate"
        )
    return scores


def table_by_type(scores: pd.DataFrame) -> pd.DataFrame:
    """One row per model: the mean over all tasks, bitext between scripts, and the mean of each type; times 100."""
    order = list(dict.fromkeys(scores["model"]))
    types = scores.pivot_table(index="model", columns="type", values="score", aggfunc="mean").rename(columns=SHORT)
    between_scripts = scores[scores["task"].str.contains("CrossScript")].groupby("model")["score"].mean()
    table = types.assign(mean=scores.groupby("model")["score"].mean(), between=between_scripts)
    first = ["mean", "Bitext", "between", "Retrieval"]
    table = table[first + [column for column in types.columns if column not in first]].loc[order]
    return (100 * table).round(1).rename(columns={"mean": "Mean", "between": "Bitext between scripts"}, index=label)


def table_by_task(scores: pd.DataFrame) -> pd.DataFrame:
    """The report's first table: one row per model, the mean and each task; times 100."""
    order, tasks = list(dict.fromkeys(scores["model"])), list(dict.fromkeys(scores["task"]))
    table = scores.pivot(index="model", columns="task", values="score").loc[order, tasks]
    table.insert(0, "Mean", table.mean(axis=1))
    return (100 * table).round(1).rename(index=label)


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown, the best value of each column in bold."""
    best = table.max()
    lines = ["| model | " + " | ".join(table.columns) + " |", "|---" * (len(table.columns) + 1) + "|"]
    for name, row in table.iterrows():
        cells = [f"**{value:.1f}**" if value == best[column] else f"{value:.1f}" for column, value in row.items()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary_lines(folder: Path, seconds: int) -> list[str]:
    """What `make repro` ends with."""
    table = table_by_type(read_scores(folder)).iloc[:, :4]
    lines = ["", "Scores, times 100 (held-out tasks of the embedded corpus):", table.to_string(), ""]
    lines.append(f"Report: {Path(folder) / 'results' / 'report.html'}")
    if seconds:
        lines.append(f"Time:   {seconds // 60} min {seconds % 60} s, installation not counted")
    return lines


def readme_with_results(readme: str, folder: Path) -> str:
    """README's text with the table of results of `folder` between the marks."""
    return put_between(readme, README_MARKS, markdown(table_by_type(read_scores(folder))))


def by_models(compared: pd.DataFrame) -> list[tuple[tuple[str, ...], pd.DataFrame]]:
    """(models, rows with a difference) of `ablations.compare`'s table: groups with the same models together."""
    rows = compared.dropna(subset="difference")
    models_of = {group: tuple(dict.fromkeys(part["model"])) for group, part in rows.groupby("group", sort=False)}
    return [(models, rows[rows["group"].map(models_of) == models]) for models in dict.fromkeys(models_of.values())]


def ablations_markdown(compared: pd.DataFrame) -> str:
    """Of `ablations.compare`'s table, for each set of models one with a row per arm: difference (low to high).

    Bold: outside the noise. Differences of mean scores, times 100.
    """
    tables = []
    for models, rows in by_models(compared):
        names = [label(model).removesuffix(", distilled") for model in models]
        lines = ["| changed | against | seeds | " + " | ".join(names) + " |", "|---" * (len(models) + 3) + "|"]
        for (_, arm), of_arm in rows.groupby(["group", "arm"], sort=False):
            cells, against = {}, of_arm["against"].iloc[0]
            for row in of_arm.itertuples():
                bold = "**" if row.verdict in ("lower", "higher") else ""
                cells[row.model] = f"{bold}{row.difference:+.1f} ({row.low:+.1f} to {row.high:+.1f}){bold}"
            shown = " | ".join(cells.get(model, "") for model in models)
            lines.append(f"| {arm} | {against} | {of_arm['seeds'].min()} | {shown} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def put_between(text: str, marks: tuple[str, str], content: str) -> str:
    """A text with `content` between two marks, each of which it must have once."""
    start, end = marks
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"the text must have each of the two marks {start!r} and {end!r} exactly once")
    before, rest = text.split(start)
    _, after = rest.split(end)
    return f"{before}{start}\n\n{content}\n\n{end}{after}"


# Figures ----------------------------------------------------------------------------------------


def smoothed(log: pd.DataFrame, column: str = "loss", window: int = 20) -> pd.Series:
    """Mean over the last `window` steps: a homogeneous batch's loss depends on its source more than on the step."""
    return log[column].rolling(window, min_periods=1).mean()


def plot_losses(axes, logs: dict[str, pd.DataFrame]) -> None:
    """Loss against optimizer step, one line per training."""
    for name, log in logs.items():
        axes.plot(log["step"], smoothed(log), label=f"{name}, mean of 20 steps")
    axes.set(xlabel="optimizer step", ylabel="loss (nats, all parts)")
    axes.legend()


def plot_dims(axes, dims: pd.DataFrame) -> None:
    """Mean score against matryoshka dim, one line per kind of task. dims: dim, task, type, score."""
    for kind, rows in dims.groupby("type", sort=False):
        means = rows.groupby("dim")["score"].mean()
        axes.plot(means.index, 100 * means, marker="o", label=kind)
    axes.set(xlabel="dimensions kept", ylabel="score x 100")
    _log_axis(axes, dims["dim"].unique())
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def plot_sizes(axes, points: pd.DataFrame) -> None:
    """Quality over parameters and over dimensions, on two axes: model, without_embeddings, dim, score.

    Left: one line per number of dimensions kept, over models; right: one line per model, over dimensions.
    """
    left, right = axes
    full = points.loc[points.groupby("model")["dim"].idxmax()].sort_values("without_embeddings")
    lines = {"all": full} | {f"{dim}": rows for dim, rows in points.groupby("dim") if len(rows) > 1}
    for name, rows in lines.items():
        rows = rows.sort_values("without_embeddings")
        left.plot(rows["without_embeddings"] / 1e3, 100 * rows["score"], marker="o", label=f"{name} dimensions")
    for row in full.itertuples():
        place = (row.without_embeddings / 1e3, 100 * row.score)
        left.annotate(label(row.model).split(",")[0], place, xytext=(0, 6), textcoords="offset points", ha="center")
    left.set(xlabel="thousand parameters outside embeddings", ylabel="mean score x 100")
    _log_axis(left, (full["without_embeddings"] / 1e3).round().astype(int).unique())
    left.margins(x=0.12, y=0.12)
    for model in full["model"][::-1]:
        rows = points[points["model"] == model].sort_values("dim")
        right.plot(rows["dim"], 100 * rows["score"], marker="o", label=label(model))
    right.set(xlabel="dimensions kept")
    _log_axis(right, points["dim"].unique())
    for one in axes:
        one.legend()


def plot_differences(axes, rows: pd.DataFrame, models: tuple[str, ...]) -> None:
    """One panel per model, one line per arm: the difference and its interval, grey where that holds 0.

    What an arm is compared with stands beside it where it is not the first group's first arm.

    axes: as many as models, with one y axis in common; rows as `by_models` gives them.
    """
    arms = list(dict.fromkeys(rows[["group", "arm"]].itertuples(index=False, name=None)))[::-1]
    colors = {"lower": "C3", "higher": "C2"}
    for panel, model in zip(axes, models, strict=True):
        for row in rows[rows["model"] == model].itertuples():
            place, color = arms.index((row.group, row.arm)), colors.get(row.verdict, "grey")
            panel.plot([row.low, row.high], [place, place], color=color)
            panel.plot(row.difference, place, "o", color=color)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_title(label(model).removesuffix(", distilled"))
    against = dict(zip(rows["group"], rows["against"]))
    common = against[arms[-1][0]]  # of the first group: said once, by whoever draws
    names = [arm if against[group] == common else f"{arm} (against {against[group]})" for group, arm in arms]
    axes[0].set_yticks(range(len(arms)), names, fontsize=8)


def _log_axis(axes, ticks) -> None:
    axes.set_xscale("log")
    axes.set_xticks(sorted(ticks), [f"{tick:,}" for tick in sorted(ticks)])
    axes.minorticks_off()


def table_of_students(scores: pd.DataFrame, parameters: pd.DataFrame) -> pd.DataFrame:
    """What each student keeps: mean scores times 100 of pruned, distilled, teacher, and shares of the teacher's.

    parameters: model, without_embeddings. share of gain: (student - untrained) / (teacher - untrained).
    """
    mean, size = scores.groupby("model")["score"].mean(), parameters.set_index("model")["without_embeddings"]
    names = [name.removesuffix("-distilled") for name in scores["model"].unique() if name.endswith("-distilled")]
    names = [name for name in names if f"{name}-pruned" in mean]
    gain = mean["stage2"] - mean["untrained"]
    rows = {
        name: {
            "share of parameters": size[f"{name}-distilled"] / size["stage2"],
            "pruned": 100 * mean[f"{name}-pruned"],
            "distilled": 100 * mean[f"{name}-distilled"],
            "teacher": 100 * mean["stage2"],
            "share of teacher's mean": mean[f"{name}-distilled"] / mean["stage2"],
            "share of gain, pruned": (mean[f"{name}-pruned"] - mean["untrained"]) / gain,
            "share of gain, distilled": (mean[f"{name}-distilled"] - mean["untrained"]) / gain,
        }
        for name in names
    }
    return pd.DataFrame(rows).T


def plot_languages(axes, languages: pd.DataFrame, models: dict[str, str]) -> None:
    """Score per language, one marker per model. languages: model, language, score."""
    order = languages[languages["model"] == list(models)[-1]].sort_values("score")["language"].tolist()
    for model, marker in models.items():
        rows = languages[languages["model"] == model].set_index("language")["score"].reindex(order)
        axes.plot(range(len(order)), 100 * rows, marker, linestyle="none", label=label(model))
    axes.set_xticks(range(len(order)), order, rotation=90)
    axes.set(xlabel="language", ylabel="bitext F1 x 100")
    axes.legend()


def read_train_facts(folder: Path) -> dict:
    """train.json of a trained model."""
    return json.loads((Path(folder) / "train.json").read_text())
