"""Tables of scores, and the files of results/ that the report reads."""

import json
from pathlib import Path

import pandas as pd

from ..store.tuples import OWN

COLUMNS = ["model", "task", "type", "score"]


def mean_over_subsets(by_subset: pd.DataFrame) -> pd.DataFrame:
    """One row per model and task, in the order given.

    A rank correlation (STS) that is negative, or undefined because all cosines are equal, counts as 0: chance.
    """
    means = (
        by_subset.fillna({"score": 0}).groupby(["model", "task", "type"], sort=False, as_index=False)["score"].mean()
    )
    return means.assign(score=means["score"].clip(lower=0).round(4))[COLUMNS]


def mean_by_language(by_subset: pd.DataFrame) -> pd.DataFrame:
    """model, task, language, score of the bitext tasks, whose subsets begin with a language: fra-eng."""
    bitext = by_subset[by_subset["type"] == "BitextMining"]
    bitext = bitext.assign(language=bitext["subset"].str[:3])
    return bitext.groupby(["model", "task", "language"], as_index=False, sort=False)["score"].mean().round(4)


def by_origin(scores: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """{where tasks come from: their rows}: local data, if rows of it were held out, before the embedded corpus."""
    own = scores["task"].str.endswith(OWN)
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
    by_subset: pd.DataFrame, dims: pd.DataFrame, parameters: pd.DataFrame, folder: Path = Path("results")
) -> None:
    """Write scores.csv, dims.csv, languages.csv, parameters.csv and metrics.json.

    by_subset: of `evaluate_all`, dims: of `evaluate_prefixes`, parameters: of `parameters_of`.
    """
    folder, scores = Path(folder), mean_over_subsets(by_subset)
    folder.mkdir(exist_ok=True)
    tables = {"scores": scores, "dims": dims, "languages": mean_by_language(by_subset), "parameters": parameters}
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False)
    (folder / "metrics.json").write_text(json.dumps(metrics(scores), indent=1) + "\n")
