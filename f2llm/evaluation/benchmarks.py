"""Which tasks a benchmark has, and the instruction that a model gets before the texts of each."""

import copy
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path

import pandas as pd

from ..config import root
from ..store.checked import closest
from ..store.tuples import load_tasks
from .library import mteb

EMBEDDED = "embedded"  # the kit's own tasks, in files that the stage `data` writes
BENCHMARKS = (  # [v2] table 2: 608 tasks, 430 different ones
    "MTEB(Multilingual, v2)",
    "MTEB(eng, v2)",
    "MTEB(Code, v1)",
    "MTEB(Medical, v1)",
    "MTEB(Europe, v1)",
    "MTEB(Scandinavian, v1)",
    "MTEB(Indic, v1)",
    "MTEB(deu, v1)",
    "MTEB(fra, v1)",
    "MTEB(kor, v1)",
    "MTEB(pol, v1)",
    "MTEB(cmn, v1)",
    "JMTEB(v2)",
    "MTEB(nld, v1)",
    "MTEB(rus, v1.1)",
    "MTEB(fas, v2)",
    "VN-MTEB (vie, v1)",
)
OF_TYPES = {  # F2LLM-v2's instructions for tasks without one of their own, as mteb's registry has them
    "STS": "Retrieve semantically similar text.",
    "BitextMining": "Retrieve translations of the following text.",
    "Classification": "Classify the topic of the given text.",
    "MultilabelClassification": "Classify the topic of the given text.",
    "Clustering": "Classify the topic of the given text.",
    "PairClassification": "Retrieve semantically entailed text.",
    "query": "Given a question, retrieve passages that can help answer the question.",
}


def tasks_of(
    benchmark: str | Sequence[str] = (),
    languages: Sequence[str] = (),
    splits: Sequence[str] = (),
    own: Path | None = None,
) -> list:
    """New mteb tasks of a benchmark, or of names of tasks and benchmarks, each task once.

    languages: ISO 639-3 codes, with or without script, as in eng or eng-Latn; other subsets are left out. splits:
    instead of the tasks' own. own: the folder of the kit's tasks, for `embedded` or the name of one. ValueError for an
    unknown name.
    """
    known = _known_languages()
    for language in languages:
        if language.split("-")[0] not in known:
            raise ValueError(
                f"language {language!r} is unknown to mteb{closest(language, known)}; remedy: ISO 639-3, as in eng"
            )
    names = [benchmark] if isinstance(benchmark, str) else benchmark
    found = {}
    for task in (task for name in names for task in _named(name, own)):
        if task is not (first := found.setdefault(task.metadata.name, task)):  # two benchmarks may ask for other parts
            first.hf_subsets = [
                part for part in first.metadata.hf_subsets if part in {*first.hf_subsets, *task.hf_subsets}
            ]
            first.filter_eval_splits(list(dict.fromkeys([*first.eval_splits, *task.eval_splits])))
    tasks = [task for task in found.values() if not languages or _speaks(task, languages)]
    for task in tasks:
        _restrict(task, languages, splits)
    left_out = [name for name, task in found.items() if task not in tasks]
    if tasks and left_out:
        print(f"left out, without {', '.join(languages)}: {', '.join(left_out)}", flush=True)
    if not tasks:
        raise ValueError(f"no task of {', '.join(names)} has {', '.join(languages)}; remedy: other languages or tasks")
    return tasks


def _named(name: str, own: Path | None) -> list:
    """The tasks of one benchmark, or one task. mteb hands out the same objects each time, and a task that has run
    draws other random numbers; so each is copied.
    """
    library, folder = mteb(), own or root() / "data" / "assembled" / "evaluation"
    ours = {path.stem for path in folder.glob("*.json")}
    if name == EMBEDDED or name in ours:
        from .tasks import mteb_task

        return [mteb_task(task) for task in load_tasks(folder) if name in (EMBEDDED, task["name"])]
    benchmarks = {benchmark.name: benchmark for benchmark in library.get_benchmarks()}
    if name in benchmarks:
        return [copy.deepcopy(task) for task in benchmarks[name].tasks]
    tasks = import_module("mteb.get_tasks")._TASKS_REGISTRY  # mteb.get_tasks itself is the function of that name
    if name in tasks:
        return [tasks[name]()]
    known = [EMBEDDED, *ours, *benchmarks, *tasks]
    raise ValueError(
        f"mteb {library.__version__} has no benchmark and no task {name!r}{closest(name, known, most=2)}; "
        "remedy: f2llm benchmarks lists the 17 of F2LLM-v2, mteb.get_benchmarks() and mteb.get_tasks() all"
    )


@cache
def _known_languages() -> dict:
    mteb()
    from mteb.languages import ISO_TO_LANGUAGE

    return ISO_TO_LANGUAGE


def _speaks(task, languages: Sequence[str]) -> bool:
    spoken = {code for codes in task.metadata.hf_subsets_to_langscripts.values() for code in codes}
    return bool(set(languages) & {part for code in spoken for part in (code, code.split("-")[0])})


def _restrict(task, languages: Sequence[str], splits: Sequence[str]) -> None:
    """Leave out other subsets and splits.

    Not subsets of clustering: all subsets of a task draw from one sequence of random numbers, so without the others a
    subset would be given another score.
    """
    mteb()
    from mteb.abstasks import AbsTaskClustering

    if languages and not isinstance(task, AbsTaskClustering):
        task.filter_languages(list(languages))
    if splits:
        existing = set(task.metadata.eval_splits) | set(task.metadata.descriptive_stats or {})
        if missing := sorted(set(splits) - existing):
            raise ValueError(
                f"{task.metadata.name} has no split {missing[0]!r}; remedy: one of {', '.join(sorted(existing))}"
            )
        task.filter_eval_splits(list(splits))


def leaves(tasks: Iterable) -> list:
    """The tasks that read data: in place of an aggregate task, which only averages others, those others."""
    mteb()
    from mteb.abstasks.aggregated_task import AbsTaskAggregate

    return [
        leaf
        for task in tasks
        for leaf in (leaves(task.metadata.tasks) if isinstance(task, AbsTaskAggregate) else [task])
    ]


def benchmark_table() -> pd.DataFrame:
    """benchmark, task: one row for each of the 608 tasks of the 17 benchmarks."""
    named = {name: mteb().get_benchmark(name).tasks for name in BENCHMARKS}
    rows = [(name, task.metadata.name) for name, tasks in named.items() for task in tasks]
    return pd.DataFrame(rows, columns=["benchmark", "task"])


# Instructions -----------------------------------------------------------------------------------


@cache
def _published_instructions() -> pd.DataFrame:
    return pd.read_csv(root() / "data" / "published" / "instructions.csv", keep_default_na=False).set_index("task")


def instructions(recipe: str) -> dict[str, str]:
    """{task, or type of tasks, or "query": instruction} of F2LLM ("v1") or F2LLM-v2 ("v2"), as in the published runs.

    mteb takes the first that it finds of task, type, and "query" for a search; for another task of v1, its own default.
    """
    return _published_instructions()[recipe].to_dict() | (OF_TYPES if recipe == "v2" else {})
