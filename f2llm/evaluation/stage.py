"""All models of the pipeline on a benchmark, as the stage `evaluate` scores them, and tables of it."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from ..store.progress import Progress
from .benchmarks import EMBEDDED, tasks_of
from .mirrored import num_characters
from .results import whole
from .run import TASKS, own_instructions, run_tasks
from .variants import variants_of


def evaluate_all(
    models: Mapping,
    tasks: Path | Sequence = TASKS,
    dims: Sequence[int] = (),
    precisions: Sequence[str] = (),
    instructions: Mapping | None = None,
    keep: Path | None = None,
    processes: int = 1,
) -> pd.DataFrame:
    """model, dim, precision, task, type, split, subset, score of every model of `models_of`.

    Trained models also with the first `dims` dimensions, those below their own, and at `precisions`. A line for each
    model has its mean and time. keep: a folder for the results of each task, from which a killed evaluation resumes.
    processes: models scored at the same time, on a CPU. RuntimeError at the end if tasks failed; the others are kept.
    """
    if isinstance(tasks, Path):
        tasks = tasks_of(EMBEDDED, own=tasks)
    asked = {"tasks": tasks, "dims": dims, "precisions": precisions, "keep": keep}
    asked["instructions"] = {**(instructions or {}), **own_instructions(tasks)}
    parts, failures = [], {}
    progress = Progress("evaluate all models", "characters", len(models) * _characters(tasks), shared=True)
    work = partial(_evaluate_one, models, asked, progress)
    with _in_processes(work, list(models), processes) as results, progress.watch():
        for name, (rows, failed, seconds) in results:
            parts.append(rows)
            failures |= {f"{task}, {name}": reason for task, reason in failed.items()}
            mean = whole(rows).groupby("task")["score"].mean().mean()
            print(f"{name}: mean {mean:.3f}, {seconds:.0f} s", flush=True)
    if failures:
        shown = "; ".join(f"{task}: {reason}" for task, reason in failures.items())
        raise RuntimeError(f"{len(failures)} tasks failed: {shown}; the others' results are in {keep}")
    return pd.concat(parts, ignore_index=True)


def _characters(tasks: Sequence) -> int:
    return sum(map(num_characters, tasks))


def _evaluate_one(
    models: Mapping, asked: Mapping, progress: Progress, name: str
) -> tuple[pd.DataFrame, dict[str, str], float]:
    """(rows, failures, seconds) of one model."""
    from .tasks import Encoder

    started, model = time.monotonic(), models[name]
    variants = variants_of(model.encode, model.dim, *((asked["dims"], asked["precisions"]) if model.trained else ()))
    encoders = {key: Encoder(encode, name, asked["instructions"]) for key, encode in variants.items()}
    keep, digest = asked["keep"], model.digest(asked["instructions"]) if asked["keep"] else None
    folders = {(dim, code): keep / f"{name}-{digest}-{dim}-{code}" for dim, code in variants} if digest else None
    with progress.work(_characters(asked["tasks"])):
        results = run_tasks(encoders, asked["tasks"], folders)
    return results.by_variant(name), results.failures, time.monotonic() - started


@contextmanager
def _in_processes(work: Callable, names: Sequence[str], processes: int) -> Iterator[Iterator[tuple[str, object]]]:
    """(name, work(name)) in order. Forked processes share the models, which a GPU would not allow.

    They are forked before the block begins, since a thread of the block's would not be forked with them.
    """
    if processes < 2 or torch.cuda.is_available() or not hasattr(os, "fork"):
        yield ((name, work(name)) for name in names)
        return
    _forked["work"] = work
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context, initializer=_in_fork) as pool:
        yield zip(names, pool.map(_work_in_fork, names))


_forked: dict[str, Callable] = {}


def _in_fork() -> None:
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _work_in_fork(name: str):
    return _forked["work"](name)
