"""Tables of scores, and the files of results/ that the report reads."""

import json
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from ..store.tuples import OWN
from .variants import PRECISIONS

COLUMNS = ["model", "task", "type", "score"]


def mean_over_subsets(by_subset: pd.DataFrame) -> pd.DataFrame:
    """One row per model and task, in the order given.

    A rank correlation (STS) that is negative, or undefined because all cosines are equal, counts as 0: chance.
    """
    rounded = by_subset.assign(score=by_subset["score"].fillna(0).round(4))
    means = rounded.groupby(["model", "task", "type"], sort=False, as_index=False)["score"].mean()
    return means.assign(score=means["score"].clip(lower=0).round(4))[COLUMNS]


def whole(scores: pd.DataFrame) -> pd.DataFrame:
    """Of the rows of `evaluate_all`, those of whole float32 embeddings."""
    full = scores["dim"] == scores.groupby("model")["dim"].transform("max")
    return scores[full & (scores["precision"] == "float32")].drop(columns=["dim", "precision"])


def by_dim(scores: pd.DataFrame, models: Mapping) -> pd.DataFrame:
    """model, dim, task, type, score of the trained models, the whole embedding first."""
    rows = scores[(scores["precision"] == "float32") & scores["model"].isin(_trained(models))]
    parts = [mean_over_subsets(part).assign(dim=dim) for (_, dim), part in rows.groupby(["model", "dim"], sort=False)]
    empty = pd.DataFrame(columns=["model", "dim", "task", "type", "score"])
    return pd.concat(parts, ignore_index=True)[list(empty)] if parts else empty


def by_storage(scores: pd.DataFrame, models: Mapping) -> pd.DataFrame:
    """model, dim, precision, mb_per_million (documents), score (mean over tasks) of the trained models."""
    rows = scores[scores["model"].isin(_trained(models))]
    parts = [
        (model, dim, precision, dim * PRECISIONS[precision], round(mean_over_subsets(part)["score"].mean(), 4))
        for (model, dim, precision), part in rows.groupby(["model", "dim", "precision"], sort=False)
    ]
    return pd.DataFrame(parts, columns=["model", "dim", "precision", "mb_per_million", "score"])


def _trained(models: Mapping) -> list[str]:
    return [name for name, model in models.items() if model.trained]


def _language(pair: str) -> str:
    parts = [part[:3] for part in pair.split("-")]
    return next((part for part in parts if part != "eng"), parts[0])


def mean_by_language(by_subset: pd.DataFrame) -> pd.DataFrame:
    """model, task, language, score of the bitext tasks, whose subsets are pairs of languages, as fra-eng.

    Of a pair with English it is the other language, else the first.
    """
    bitext = by_subset[by_subset["type"] == "BitextMining"]
    bitext = bitext.assign(language=bitext["subset"].map(_language), score=bitext["score"].round(4))
    return bitext.groupby(["model", "task", "language"], as_index=False, sort=False)["score"].mean().round(4)


def by_origin(scores: pd.DataFrame, benchmark: str | list[str] = "embedded") -> dict[str, pd.DataFrame]:
    """{where tasks come from: their rows}: local data, if rows of it were held out, before the embedded corpus.

    benchmark: of the configuration; public tasks are of one origin.
    """
    own = scores["task"].str.endswith(OWN)
    if benchmark != "embedded":
        return {benchmark if isinstance(benchmark, str) else ", ".join(benchmark): scores}
    if not own.any():
        return {"held-out tasks of the embedded corpus": scores}
    return {"held-out rows of your data": scores[own], "the kit's own tasks, not your data": scores[~own]}


def judged(scores: pd.DataFrame) -> pd.DataFrame:
    """The rows that a run is judged by: on held-out rows of local data, or all rows where there is no such task."""
    return next(iter(by_origin(scores).values()))


def metrics(scores: pd.DataFrame) -> dict[str, dict[str, float]]:
    """{model: {mean, retrieval_and_bitext, mean of each type}} for `dvc metrics`.

    A run with held-out local data has these of its own tasks, and `embedded`, the mean of the kit's tasks.
    """
    by_model, (own, *embedded) = {}, by_origin(scores).values()
    embedded = embedded[0].groupby("model")["score"].mean() if embedded else {}
    for model, rows in own.groupby("model", sort=False):
        searched = rows[rows["type"].isin(["Retrieval", "BitextMining"])]
        means = {"mean": rows["score"].mean()}
        means |= {"retrieval_and_bitext": searched["score"].mean()} if len(searched) else {}
        means |= rows.groupby("type")["score"].mean().to_dict()
        means |= {"embedded": embedded[model]} if model in embedded else {}
        by_model[model] = {key: round(float(value), 4) for key, value in means.items()}
    return by_model


def write_results(
    scores: pd.DataFrame,
    models: Mapping,
    parameters: pd.DataFrame,
    ledger: pd.DataFrame,
    folder: Path = Path("results"),
) -> None:
    """Write scores.csv, dims.csv, storage.csv, languages.csv, parameters.csv, ledger.csv and metrics.json.

    scores: of `evaluate_all`, models: of `models_of`, parameters: of `parameters_of`, ledger: of `ledger.py`.
    """
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    by_subset = whole(scores)
    tables = {"scores": mean_over_subsets(by_subset), "dims": by_dim(scores, models)}
    tables |= {"storage": by_storage(scores, models), "languages": mean_by_language(by_subset)}
    tables |= {"parameters": parameters, "ledger": ledger}
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False)
    (folder / "metrics.json").write_text(json.dumps(metrics(tables["scores"]), indent=1) + "\n")
