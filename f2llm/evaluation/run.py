"""Scores by mteb: runs it on our tasks and encoders, and makes tables of its results."""

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from io import TextIOBase
from pathlib import Path
from typing import TextIO

import numpy as np
import pandas as pd

from ..config import root
from ..store.tuples import load_tasks
from .results import mean_over_subsets

TASKS = Path("data/assembled/evaluation")


def evaluate(encode: Callable, name: str, tasks: Path = TASKS) -> pd.DataFrame:
    """One row per task and subset: model, task, type, subset, score (main score, 0 to 1).

    encode(texts, instruction) returns one row per text; instruction is None for the documents of retrieval
    and reranking, and the task's own for everything else.
    """
    loaded = load_tasks(tasks)
    with _own_cache():
        import mteb

        from .tasks import Encoder, mteb_task
    instructions = {task["name"]: task["instruction"] for task in loaded}
    encoder = Encoder(encode, name, instructions)
    with redirect_stderr(_WithoutProgressBars(sys.stderr)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="To copy construct from a tensor")  # once per bitext subset
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


def evaluate_all(models: Mapping, tasks: Path = TASKS) -> pd.DataFrame:
    """The rows of `evaluate` for every model of `models_of`; prints each one's mean and time as it is done."""
    parts = []
    for name, model in models.items():
        started = time.monotonic()
        parts.append(evaluate(model.encode, name, tasks))
        mean = parts[-1].groupby("task")["score"].mean().mean()
        print(f"{name}: mean {mean:.3f}, {time.monotonic() - started:.0f} s", flush=True)
    return pd.concat(parts)


def evaluate_prefixes(models: Mapping, scores: pd.DataFrame, dims: Sequence[int], tasks: Path = TASKS) -> pd.DataFrame:
    """model, dim, task, type, score of every trained model: at its full dim, as in `scores`, then at each of `dims`.

    scores: those of `mean_over_subsets`. A dim that is not below a model's own is left out.
    """
    trained = {name: model for name, model in models.items() if model.trained}
    parts = [scores[scores["model"] == name].assign(dim=model.embedder.dim) for name, model in trained.items()]
    for name, model in trained.items():
        for dim in (dim for dim in dims if dim < model.embedder.dim):
            parts.append(mean_over_subsets(evaluate(at_dim(model.encode, dim), name, tasks)).assign(dim=dim))
    return pd.concat(parts or [scores.head(0).assign(dim=0)])[["model", "dim", "task", "type", "score"]]


def at_dim(encode: Callable, dim: int) -> Callable:
    """`encode` with the first `dim` dimensions only, scaled to unit length again."""

    def shortened(texts: list[str], instruction: str | None) -> np.ndarray:
        part = encode(texts, instruction)[:, :dim]
        return part / np.linalg.norm(part, axis=1, keepdims=True).clip(1e-12)

    return shortened


@contextmanager
def _own_cache() -> Iterator[None]:
    """Sets mteb's cache to a folder of this repository while mteb is imported, unless MTEB_CACHE is set."""
    if "MTEB_CACHE" in os.environ:
        yield
        return
    os.environ["MTEB_CACHE"] = str(root() / "scratch" / "mteb")  # mteb makes this folder at import
    try:
        yield
    finally:
        del os.environ["MTEB_CACHE"]


class _WithoutProgressBars(TextIOBase):
    """A stream that drops tqdm's bars: mteb shows two per bitext subset even with show_progress_bar=False.

    tqdm writes a bar as one text that begins with a carriage return, and a line break when the bar is finished.
    """

    def __init__(self, stream: TextIO):
        self.stream, self.in_bar = stream, False

    def write(self, text: str) -> int:
        self.in_bar = text.startswith("\r") or (self.in_bar and not text.strip())
        return len(text) if self.in_bar else self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()
