"""Scores by mteb: runs it on tasks and encoders, keeps the result of each task, and makes tables of results."""

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from ..store.files import whole_file
from ..store.progress import Progress
from .benchmarks import EMBEDDED, tasks_of
from .library import mteb, without_progress_bars
from .mirrored import num_characters

TASKS = Path("data/assembled/evaluation")


def evaluate(
    encode: Callable, name: str, tasks: Path | Sequence = TASKS, instructions: Mapping | None = None
) -> pd.DataFrame:
    """One row per task, split and subset: model, task, type, split, subset, score (main score, 0 to 1).

    encode(texts, instruction) returns one row per text; instruction is None for the documents of retrieval and
    reranking, and the task's own for everything else. tasks: a folder of the kit's tasks, or mteb tasks.
    instructions: {task, or type of tasks, or "query": instruction}; tasks of a folder bring their own.
    """
    if isinstance(tasks, Path):
        tasks = tasks_of(EMBEDDED, own=tasks)
    from .tasks import Encoder

    results = run_tasks({name: Encoder(encode, name, {**(instructions or {}), **own_instructions(tasks)})}, tasks)
    if results.failures:
        raise RuntimeError("; ".join(f"{task}: {reason}" for task, reason in results.failures.items()))
    return results.table()


def own_instructions(tasks: Sequence) -> dict[str, str]:
    """{task: instruction} of the kit's own tasks."""
    return {task.metadata.name: task.instruction for task in tasks if hasattr(task, "instruction")}


@dataclass
class Results:
    """Results of models on tasks: mteb's TaskResult by (model, task), and why tasks failed. types: of the tasks."""

    types: dict[str, str]
    of: dict[tuple[str, str], object] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    elsewhere: list[str] = field(default_factory=list)  # tasks of other processes that are not done yet

    def table(self) -> pd.DataFrame:
        """model, task, type, split, subset, score: one row for each subset of a split."""
        rows = [
            {"model": model, "task": task, "type": self.types[task], "split": split}
            | {"subset": score["hf_subset"], "score": float(score["main_score"])}
            for (model, task), result in self.of.items()
            for split, scores in result.scores.items()
            for score in scores
        ]
        return pd.DataFrame(rows, columns=["model", "task", "type", "split", "subset", "score"])

    def by_variant(self, model: str) -> pd.DataFrame:
        """`table` where the models are (dim, precision) of one model: model, dim, precision, then the other columns."""
        table = self.table()
        variants = pd.DataFrame(table.pop("model").tolist(), columns=["dim", "precision"], index=table.index)
        return pd.concat([pd.Series(model, index=table.index, name="model"), variants, table], axis=1)


def run_tasks(
    models: Mapping[str, object],
    tasks: Sequence,
    keep: Mapping[str, Path] | None = None,
    part: tuple[int, int] = (0, 1),
    after_task: Callable[[], None] = lambda: None,
) -> Results:
    """Score models, of the interface that mteb asks for, on tasks; the longest tasks first.

    keep: {model: folder} for the result of each task; what is there already is read instead of computed, if it comes
    from the same data, splits, subsets and version of mteb. The folder must stand for everything that makes the model's
    scores. part: (k, n) runs every n-th task from the k-th on, as one of n processes that share the folders.
    after_task is called after each. A task that fails does not stop the others, nor, by a file, does it those of other
    processes: they find it among the failures.
    """
    results = Results({task.metadata.name: task.metadata.type for task in tasks})
    progress = Progress("evaluate", "characters", sum(map(num_characters, tasks)))
    ordered = sorted(tasks, key=lambda task: (-num_characters(task), task.metadata.name))
    for number, task in enumerate(ordered):
        if keep and number % part[1] == part[0]:  # of an earlier run
            _failure_of(task, models, keep).unlink(missing_ok=True)
    for number, task in enumerate(ordered):
        name = task.metadata.name
        kept = {model: _read_result(keep[model] / result_name(task)) for model in models} if keep else {}
        missing = [model for model in models if not kept.get(model)]
        if not missing or number % part[1] != part[0]:
            progress.skip(num_characters(task))
        if not missing:
            results.of |= {(model, name): result for model, result in kept.items()}
        elif number % part[1] != part[0] and (failed := _failure_of(task, models, keep)).exists():
            results.failures[name] = failed.read_text(encoding="utf-8")
        elif number % part[1] != part[0]:
            results.elsewhere.append(name)
        else:  # all models again, for they may be lengths and precisions of the same embeddings
            progress.what = f"evaluate, task {number + 1} of {len(ordered)}, {name}"
            with progress.work(num_characters(task)):
                _run_task(task, models, keep, results)
        after_task()
    order = [task.metadata.name for task in tasks]
    results.of = dict(
        sorted(results.of.items(), key=lambda item: (list(models).index(item[0][0]), order.index(item[0][1])))
    )
    return results


def _run_task(task, models: Mapping[str, object], keep: Mapping[str, Path] | None, results: Results) -> None:
    """Load a task's rows once, score every model on them, keep each result as it is there."""
    from mteb._set_seed import _set_seed

    name = task.metadata.name
    try:
        for model, encoder in models.items():
            for leaf in _parts(task):  # a task that has run would draw other random numbers
                leaf.rng_state, leaf.np_rng = _set_seed(leaf.seed)
            with _quiet():
                if len(_parts(task)) == 1 and not task.data_loaded:  # rows are read once for all models
                    task.load_data()
                    after_loading = task.rng_state.getstate(), task.np_rng.bit_generator.state
                if task.data_loaded:
                    task.rng_state.setstate(after_loading[0])
                    task.np_rng.bit_generator.state = after_loading[1]
                found = mteb().evaluate(encoder, [task], cache=None, co2_tracker=False, show_progress_bar=False)
            if not found.task_results:
                raise ValueError(found.exceptions[0].exception)
            results.of[model, name] = _keep(found.task_results[0], keep and keep[model] / result_name(task))
    except (KeyboardInterrupt, MemoryError, DiskError):
        raise
    except Exception as error:
        results.failures[name] = (str(error) or type(error).__name__).splitlines()[0]
        print(f"{name} failed: {results.failures[name]}", flush=True)
        if keep:
            _failure_of(task, models, keep).write_text(results.failures[name], encoding="utf-8")
    finally:
        if task.data_loaded:
            task.unload_data()


class DiskError(RuntimeError):
    """Results cannot be kept: no other task is tried."""


def _keep(result, path: Path | None):
    """A result, written and read back: the file has six digits, so a resumed evaluation gives the same numbers."""
    if path is None:
        return result
    try:
        with whole_file(path) as new:
            result.to_disk(new)
    except RuntimeError as error:
        raise DiskError(str(error)) from None
    return _read_result(path)


def _failure_of(task, models: Mapping[str, object], keep: Mapping[str, Path]) -> Path:
    """The file that tells other processes why a task failed."""
    folder = keep[next(iter(models))]
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{result_name(task)}.failed"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without bars, notes on superseded tasks, and scikit-learn's on labels that are never predicted."""
    from sklearn.exceptions import UndefinedMetricWarning

    logger = logging.getLogger("mteb.abstasks.abstask")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with without_progress_bars(), warnings.catch_warnings():
            for message in ("To copy construct from a tensor", "The task '.*' is superseded"):
                warnings.filterwarnings("ignore", message=message)
            warnings.filterwarnings("ignore", category=UndefinedMetricWarning)
            yield
    finally:
        logger.setLevel(level)


def _parts(task) -> list:
    return [task, *getattr(task.metadata, "tasks", [])]


def result_name(task) -> str:
    """The file of a task's result; another name for other data, splits, subsets or another version of mteb."""
    leaves = _parts(task)
    facts = [mteb().__version__, list(task.eval_splits), list(task.hf_subsets)]
    facts += [
        [leaf.metadata.name, leaf.metadata.dataset.get("revision"), getattr(leaf, "data_digest", "")] for leaf in leaves
    ]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    return f"{task.metadata.name}-{digest}.json"


def _read_result(path: Path):
    """A kept result; None if there is none. A damaged file is computed again."""
    from mteb.results import TaskResult

    try:
        return TaskResult.from_disk(path)
    except FileNotFoundError:
        return None
    except Exception as error:
        print(f"{path} is damaged ({type(error).__name__}) and is computed again", flush=True)
        return None


def part_of_processes() -> tuple[int, int]:
    """(number of this process, of how many) of a Slurm array or of torchrun; (0, 1) of neither."""
    for number, count in (("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"), ("RANK", "WORLD_SIZE")):
        if number in os.environ and count in os.environ:
            first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", 0)) if number.startswith("SLURM") else 0
            return int(os.environ[number]) - first, int(os.environ[count])
    return 0, 1
