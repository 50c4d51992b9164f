"""Scores by mteb, on tasks that are kept as plain files.

mteb does the scoring: this module hands it tasks and encoders. Each model gets fresh task objects, since a task
that was run before carries the state of its random numbers into the next run.
"""

import os
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd

from .config import root
from .miners import Tfidf
from .model import Embedder
from .tuples import load_tasks

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # local tasks only; mteb would otherwise retry for a minute
os.environ.setdefault("MTEB_CACHE", str(root() / "scratch" / "mteb"))  # mteb makes this folder at import

import mteb
from datasets import Dataset, DatasetDict
from mteb.abstasks import (
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from mteb.types import PromptType

COLUMNS = ["model", "task", "type", "score"]


def evaluate(encode: Callable, name: str, tasks: Path = Path("data/assembled/evaluation")) -> pd.DataFrame:
    """One row per task and subset: model, task, type, subset, score (main score, 0 to 1).

    encode(texts, instruction) returns one row per text; instruction is None for the documents of retrieval
    and reranking, and the task's own for everything else.
    """
    loaded = load_tasks(tasks)
    instructions = {task["name"]: task["instruction"] for task in loaded}
    encoder = _Encoder(encode, name, instructions)
    with redirect_stderr(StringIO()):  # a progress bar per subset would be hundreds of lines in a notebook
        result = mteb.evaluate(
            encoder, [mteb_task(task) for task in loaded], cache=None, co2_tracker=False, show_progress_bar=False
        )
    kinds = {task["name"]: task["type"] for task in loaded}
    rows = [
        {"model": name, "task": task.task_name, "type": kinds[task.task_name]}
        | {"subset": score["hf_subset"], "score": round(float(score["main_score"]), 4)}
        for task in result.task_results
        for score in task.scores["test"]
    ]
    return pd.DataFrame(rows)


def mean_over_subsets(scores: pd.DataFrame) -> pd.DataFrame:
    """One row per model and task, in the order given; a negative rank correlation (STS) counts as 0, chance."""
    means = scores.groupby(["model", "task", "type"], sort=False, as_index=False)["score"].mean()
    return means.assign(score=means["score"].clip(lower=0).round(4))[COLUMNS]


def metrics(scores: pd.DataFrame) -> dict[str, dict[str, float]]:
    """{model: {mean, retrieval_and_bitext, mean of each type}} for `dvc metrics`."""
    found = {}
    for model, rows in scores.groupby("model", sort=False):
        searched = rows[rows["type"].isin(["Retrieval", "BitextMining"])]
        found[model] = {"mean": rows["score"].mean(), "retrieval_and_bitext": searched["score"].mean()}
        found[model] |= rows.groupby("type")["score"].mean().to_dict()
        found[model] = {key: round(float(value), 4) for key, value in found[model].items()}
    return found


def encoder_of(model: Embedder, instructions: bool, dim: int | None = None) -> Callable:
    """A model's `encode` as `evaluate` wants it; texts stay raw for a model that never saw an instruction."""
    return lambda texts, instruction: model.encode(texts, instruction if instructions else None, dim)


def cached(encode: Callable) -> Callable:
    """`encode` that computes every (text, instruction) once: languages share English texts, dims share all."""
    known: dict[tuple[str, str | None], np.ndarray] = {}

    def lookup(texts: list[str], instruction: str | None) -> np.ndarray:
        missing = list(dict.fromkeys(text for text in texts if (text, instruction) not in known))
        rows = encode(missing, instruction) if missing else []
        known.update({(text, instruction): row for text, row in zip(missing, rows, strict=True)})
        return np.stack([known[text, instruction] for text in texts])

    return lookup


def at_dim(encode: Callable, dim: int) -> Callable:
    """The first `dim` dimensions, brought to unit length again."""

    def shortened(texts: list[str], instruction: str | None) -> np.ndarray:
        part = encode(texts, instruction)[:, :dim]
        return part / np.linalg.norm(part, axis=1, keepdims=True).clip(1e-12)

    return shortened


def tfidf_encoder(tfidf: Tfidf) -> Callable:
    """The character n-gram baseline as dense rows; it has no use for an instruction."""
    return lambda texts, instruction: tfidf.encode(texts).toarray()


class _Encoder(AbsEncoder):
    """What mteb asks of a model."""

    def __init__(self, encode: Callable, name: str, instructions: dict[str, str]):
        self.function, self.instructions = encode, instructions
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={
                "name": f"f2llm/{name}",
                "revision": "local",
                "similarity_fn_name": ScoringFunction.COSINE,
                "modalities": ["text"],
            }
        )

    def encode(self, inputs, *, task_metadata, hf_split, hf_subset, prompt_type=None, **kwargs) -> np.ndarray:
        texts = [text for batch in inputs for text in batch["text"]]
        instruction = None if prompt_type == PromptType.document else self.instructions[task_metadata.name]
        return self.function(texts, instruction)


# Tasks ------------------------------------------------------------------------------------------


def _bitext(data: dict) -> dict:
    return {subset: DatasetDict(test=Dataset.from_dict(columns)) for subset, columns in data.items()}


def _pairs(data: dict) -> DatasetDict:
    return DatasetDict(test=Dataset.from_dict(data["default"]))


def _train_and_test(data: dict) -> DatasetDict:
    return DatasetDict({split: Dataset.from_dict(columns) for split, columns in data["default"].items()})


def _retrieval(data: dict) -> dict:
    parts = data["default"]
    queries = [{"id": f"q{number}", "text": text} for number, text in enumerate(parts["queries"])]
    corpus = [{"id": f"d{number}", "title": "", "text": text} for number, text in enumerate(parts["corpus"])]
    relevant = {f"q{number}": {f"d{row}": 1 for row in rows} for number, rows in enumerate(parts["relevant"])}
    candidates = None
    if "candidates" in parts:
        candidates = {f"q{number}": [f"d{row}" for row in rows] for number, rows in enumerate(parts["candidates"])}
    split = RetrievalSplitData(
        queries=Dataset.from_list(queries),
        corpus=Dataset.from_list(corpus),
        relevant_docs=relevant,
        top_ranked=candidates,
    )
    return {"default": {"test": split}}


# type: base class, how its data are built, main score, what the class needs to know
KINDS = {
    "BitextMining": (AbsTaskBitextMining, _bitext, "f1", {}),
    "Retrieval": (AbsTaskRetrieval, _retrieval, "ndcg_at_10", {}),
    "Reranking": (AbsTaskRetrieval, _retrieval, "map_at_1000", {}),
    "STS": (AbsTaskSTS, _pairs, "cosine_spearman", {"min_score": 0, "max_score": 1}),
    "PairClassification": (AbsTaskPairClassification, _pairs, "max_ap", {}),
    "Classification": (
        AbsTaskClassification,
        _train_and_test,
        "accuracy",
        {"samples_per_label": 16, "n_experiments": 5},
    ),
    "Clustering": (
        AbsTaskClustering,
        _pairs,
        "v_measure",
        {"max_fraction_of_documents_to_embed": None, "max_document_to_embed": None, "max_documents_per_cluster": 512},
    ),
}


def mteb_task(task: dict):
    """A fresh mteb task of one of our files; nothing of it is ever looked up on a hub."""
    base, build, main_score, settings = KINDS[task["type"]]
    languages = task["languages"]
    metadata = TaskMetadata(
        name=task["name"],
        description=f"Embedded evaluation task of type {task['type']}: {task['instruction']}",
        reference=None,
        type=task["type"],
        category="t2c" if task["type"] in ("Classification", "Clustering") else "t2t",
        main_score=main_score,
        dataset={"path": f"local/{task['name']}", "revision": "local"},
        eval_splits=["test"],
        eval_langs=languages if task["type"] == "BitextMining" else languages["default"],
        modalities=["text"],
        date=("2025-01-01", "2025-12-31"),
        domains=["Written"],
        task_subtypes=[],
        license="not specified",
        annotations_creators="derived",
        dialect=[],
        sample_creation="created",
        bibtex_citation="",
    )

    def load_data(self, *arguments, **kwargs):
        self.dataset, self.data_loaded = build(task["data"]), True

    return type(task["name"], (base,), {"metadata": metadata, "load_data": load_data, **settings})()
