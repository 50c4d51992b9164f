"""Figures of the report: each function draws on the axes passed to it."""

import pandas as pd

from .tables import TYPES, label, language_name


def smoothed(log: pd.DataFrame, column: str = "loss", window: int = 20) -> pd.Series:
    """Mean over the last `window` steps, since the loss of a homogeneous batch depends mostly on its source."""
    return log[column].rolling(window, min_periods=1).mean()


def plot_losses(axes, logs: dict[str, pd.DataFrame]) -> None:
    """Loss against optimizer step, one line per training."""
    for name, log in logs.items():
        axes.plot(log["step"], smoothed(log), label=name)
    axes.set(xlabel="optimizer step", ylabel="loss (nats), mean of 20 steps", ylim=(0, None))
    axes.legend()


def plot_dims(axes, dims: pd.DataFrame) -> None:
    """Mean score against matryoshka dim, one line per type of task, highest first. dims: dim, task, type, score."""
    means = 100 * dims.groupby(["type", "dim"])["score"].mean().unstack("dim")
    for kind, row in means.sort_values(means.columns[-1], ascending=False).iterrows():
        row = row.dropna()
        axes.plot(row.index, row, marker="o", label=TYPES.get(kind, kind))
    axes.set(xlabel="dimensions kept", ylabel="mean score x 100", ylim=(0, None))
    _log_axis(axes, dims["dim"].unique())
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def plot_storage(axes, storage: pd.DataFrame) -> None:
    """Mean score against the bytes that a million embeddings take: matryoshka prefixes as a line, codes as points.

    storage: dim, precision, mb_per_million, score of one model.
    """
    floats = storage[storage["precision"] == "float32"].sort_values("mb_per_million")
    axes.plot(floats["mb_per_million"], 100 * floats["score"], marker="o", label="float32, first dimensions")
    codes = storage[storage["precision"] != "float32"]
    for number, row in enumerate(codes.itertuples(), start=1):
        axes.plot(
            row.mb_per_million, 100 * row.score, "s", color=f"C{number}", label=f"{row.precision}, all dimensions"
        )
    top = 110 * storage["score"].max()
    axes.set(xlabel="MB per million documents", ylabel="mean score x 100", ylim=(0, top))
    _log_axis(axes, sorted({round(size) for size in storage["mb_per_million"]}))
    axes.legend(loc="lower right")


def plot_ledger(axes, ledger: pd.DataFrame) -> None:
    """Our score against the published one, a point per task; on the diagonal they are equal."""
    rows = ledger.dropna(subset=["ours", "published"])
    for number, (kind, part) in enumerate(rows.groupby("type")):
        axes.plot(100 * part["published"], 100 * part["ours"], "o", color=f"C{number}", label=TYPES.get(kind, kind))
    axes.plot([0, 100], [0, 100], color="black", linewidth=0.8)
    axes.set(xlabel="published score x 100", ylabel="our score x 100", xlim=(0, 100), ylim=(0, 100))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def plot_sizes(axes, points: pd.DataFrame) -> None:
    """Mean score against non-embedding parameters (left axes) and against matryoshka dims (right axes).

    Left: one line per dim; right: one line per model. points: model, without_embeddings, dim, score.
    """
    left, right = axes
    full = points.loc[points.groupby("model")["dim"].idxmax()].sort_values("without_embeddings")
    lines = {"all": full} | {f"{dim}": rows for dim, rows in points.groupby("dim") if len(rows) > 1}
    for name, rows in lines.items():
        rows = rows.sort_values("without_embeddings")
        left.plot(rows["without_embeddings"] / 1e3, 100 * rows["score"], marker="o", label=f"{name} dimensions")
    for row in full.itertuples():
        place = (row.without_embeddings / 1e3, 100 * row.score)
        left.annotate(label(row.model).split(",")[0], place, xytext=(-5, 5), textcoords="offset points", ha="right")
    left.set(xlabel="non-embedding parameters (thousands)", ylabel="mean score x 100")
    _log_axis(left, (full["without_embeddings"] / 1e3).round().astype(int).unique())
    left.margins(x=0.15, y=0.12)
    for model in full["model"][::-1]:
        rows = points[points["model"] == model].sort_values("dim")
        right.plot(rows["dim"], 100 * rows["score"], marker="o", label=label(model))
    right.set(xlabel="dimensions kept")
    _log_axis(right, points["dim"].unique())
    for one in axes:
        one.legend(loc="center right")


def plot_claims(axes, claimed: pd.DataFrame) -> None:
    """One line per row of `ablations.claims`, the first on top: the gain and its interval; grey within noise."""
    rows, colors = claimed[::-1], {"yes": "C2", "no": "C3"}
    for place, row in enumerate(rows.itertuples()):
        color = colors.get(row.shown, "grey")
        axes.plot([row.low, row.high], [place, place], color=color, linewidth=2)
        axes.plot(row.gain, place, "o", color=color)
    names = [f"{row.claim}: {label(row.model).removesuffix(', distilled')}" for row in rows.itertuples()]
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("gain in the mean score x 100, 95 % interval")


def plot_languages(axes, languages: pd.DataFrame, models: dict[str, str]) -> None:
    """One line per language, one marker per model; sorted by the last model's lead over the model before it.

    languages: model, language, score. models: {model: its marker}.
    """
    table = 100 * languages.pivot_table(index="language", columns="model", values="score")
    *_, other, shown = models
    table = table.loc[(table[shown] - table[other]).sort_values().index]
    for model, marker in models.items():
        axes.plot(table[model], range(len(table)), marker, label=label(model))
    axes.set_yticks(range(len(table)), [language_name(code) for code in table.index])
    axes.set(xlabel="bitext F1 x 100")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _log_axis(axes, ticks) -> None:
    axes.set_xscale("log")
    axes.set_xticks(sorted(ticks), [f"{tick:,}" for tick in sorted(ticks)])
    axes.minorticks_off()
