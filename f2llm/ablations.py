"""Ablations as DVC experiments: an arm changes one thing, runs with every seed, and its difference has an interval."""

import io
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from scipy.stats import t as student_t

from .checkpoint import alone_in
from .config import read_yaml

COLUMNS = ["group", "arm", "seed", "model", "score", "commit"]


@dataclass(frozen=True)
class Experiment:
    """One arm with one seed. settings: of the resolved configuration, as in stage1.epochs=0."""

    group: str
    arm: str
    seed: int
    settings: tuple[str, ...]
    models: tuple[str, ...]  # whose scores count

    @property
    def name(self) -> str:
        """Of the DVC experiment: letters, digits and hyphens."""
        return "-".join(["ablate", self.group, *re.findall(r"[a-z0-9]+", self.arm.lower()), str(self.seed)])


def experiments(path: Path = Path("ablations.yaml")) -> list[Experiment]:
    """All that ablations.yaml asks for, arm by arm, checked."""
    plan = read_yaml(path)
    if set(plan) != {"seeds", "groups"} or len(set(plan["seeds"])) < 2:
        raise ValueError(f"{path} must have the keys seeds (two different ones or more: noise needs them) and groups")
    found = []
    for group, table in plan["groups"].items():
        if set(table) != {"models", "settings", "arms"} or not table["models"]:
            raise ValueError(f"{path}: group {group} must have the keys models (at least one), settings and arms")
        for arm, settings in table["arms"].items():
            both = (*table["settings"], f"evaluate.only=[{','.join(table['models'])}]", *settings)
            found += [Experiment(group, arm, seed, both, tuple(table["models"])) for seed in plan["seeds"]]
    names = [experiment.name for experiment in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path}: two arms have the same name for DVC, {twice[0]}; remedy: rename one")
    return found


# Running ----------------------------------------------------------------------------------------


def run_missing(jobs: int, only: str = "") -> None:
    """Queue what has not been run, and run the queue; after a kill the same call goes on with what is missing.

    only: a part of the experiments' names. Finished stages come from DVC's run cache. Workers that an earlier call
    left at work finish what they have begun; what was killed under way begins again.
    """
    with alone_in(Path("scratch/ablate"), "ablation"):
        wanted = [experiment for experiment in experiments() if only in experiment.name]
        running, done = clear_leftovers({experiment.name for experiment in wanted}), finished()
        missing = [experiment for experiment in wanted if experiment.name not in (*done, *running)]
        print(
            f"{len(wanted)} experiments: {sum(one.name in done for one in wanted)} finished before, "
            f"{len(running)} running, {len(missing)} to queue",
            flush=True,
        )
        for experiment in missing:
            settings = [f"+override.{setting}" for setting in experiment.settings]
            options = [word for setting in (f"seed={experiment.seed}", *settings) for word in ("-S", setting)]
            _dvc("exp", "run", "--queue", "--name", experiment.name, *options, "evaluate")
        if missing:
            _dvc("queue", "start", "--jobs", str(jobs))
        if missing or running:
            wait_for_workers([experiment.name for experiment in wanted])
    if failed := [experiment.name for experiment in wanted if experiment.name not in finished()]:
        raise RuntimeError(
            f"{len(failed)} of {len(wanted)} experiments did not finish: {', '.join(failed)}; "
            f"remedy: dvc queue logs {failed[0]}, then the same command again"
        )


def clear_leftovers(names: set[str]) -> set[str]:
    """Take out of DVC's queue what an interrupted call has left of these experiments; those that still run.

    Without a worker, what is marked as running is dead. Other experiments in the queue stay as they are.
    """
    tasks, workers = queue_status(_dvc("queue", "status"))
    ours = [(task, name, state) for task, name, state in tasks if name in names]
    running = {name for _, name, state in ours if state == "Running"} if workers else set()
    if dead := [task for task, _, state in ours if state == "Running" and not workers]:
        _dvc("queue", "kill", "--force", *dead, check=False)  # marks them as failed
    if left := dead + [task for task, _, state in ours if state in ("Queued", "Failed")]:
        _dvc("queue", "remove", *left, check=False)
    return running


def wait_for_workers(names: list[str], seconds: float = 20) -> None:
    """Until all are finished or no worker is left; says what has been finished."""
    shown = {name for name in names if name in finished()}
    while len(shown) < len(names):
        time.sleep(seconds)
        _, workers = queue_status(_dvc("queue", "status"))
        for name in (new := [name for name in names if name in finished() and name not in shown]):
            shown.add(name)
            print(f"{len(shown)} of {len(names)}: {name}", flush=True)
        if not workers and not new:
            return


def queue_status(text: str) -> tuple[list[tuple[str, str, str]], int]:
    """([(task, experiment, state)], number of workers at work) of `dvc queue status`."""
    rows = [line.split() for line in text.splitlines()]
    workers = re.search(r"Worker status: (\d+) active", text)
    tasks = [(row[0], row[1], row[-1]) for row in rows if len(row) > 3 and re.fullmatch("[0-9a-f]{7,}", row[0])]
    return tasks, int(workers[1]) if workers else 0


def finished() -> dict[str, str]:
    """{name: reference} of all experiments of this repository."""
    lines = _git("for-each-ref", "--format=%(refname)", "refs/exps").split()
    return {line.rpartition("/")[2]: line for line in lines if line.count("/") >= 4}


def collect() -> pd.DataFrame:
    """Mean scores (0 to 1) of all that has been run: group, arm, seed, model, score, commit that it started from."""
    references, rows = finished(), []
    for experiment in experiments():
        if not (reference := references.get(experiment.name)):
            continue
        scores = pd.read_csv(io.StringIO(_git("show", f"{reference}:results/scores.csv")))
        means = scores.groupby("model")["score"].mean()
        commit = _git("rev-parse", "--short", f"{reference}~1").strip()
        facts = [experiment.group, experiment.arm, experiment.seed]
        rows += [[*facts, model, round(means[model], 5), commit] for model in experiment.models]
    return pd.DataFrame(rows, columns=COLUMNS)


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout


def _dvc(*words: str, check: bool = True) -> str:
    """What it prints; errors only if it fails. Into files: queue workers hold a pipe open as long as they live."""
    own = {"DVC_NO_ANALYTICS": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-m", "dvc", *words]
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(command, env={**os.environ, **own}, stdout=printed, stderr=errors)
        printed.seek(0)
        errors.seek(0)
        if check and done.returncode:
            reason = errors.read().strip() or f"exit code {done.returncode}"
            raise RuntimeError(f"dvc {' '.join(words[:3])}: {reason}; remedy: dvc queue status")
        return printed.read()


# Comparing --------------------------------------------------------------------------------------


def compare(scores: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """One row per group, model and arm: mean, standard deviation, difference to the group's first arm, its interval.

    scores as `collect` gives them, times 1; the table times 100. Differences are taken seed by seed, so that what a
    seed changes in both arms cancels; the interval is Student's for their mean. verdict: 'within noise' where the
    interval holds 0, 'too few seeds' below two common ones.
    """
    rows = []
    for (group, model), of_model in scores.groupby(["group", "model"], sort=False):
        table = 100 * of_model.pivot(index="seed", columns="arm", values="score")
        arms = list(dict.fromkeys(of_model["arm"]))
        for arm in arms:
            values, change = table[arm].dropna(), (table[arm] - table[arms[0]]).dropna()
            row = {"group": group, "model": model, "arm": arm, "seeds": len(values)}
            row |= {"mean": values.mean(), "sd": values.std()}
            if arm != arms[0]:
                row |= dict(zip(("difference", "low", "high", "verdict"), difference(change, confidence)))
            rows.append(row)
    return pd.DataFrame(rows)


def difference(change: pd.Series, confidence: float) -> tuple[float, float, float, str]:
    """(mean, low, high, verdict) of paired differences: Student's interval of their mean."""
    if len(change) < 2:
        return float("nan"), float("nan"), float("nan"), "too few seeds"
    half = student_t.ppf((1 + confidence) / 2, len(change) - 1) * change.std() / len(change) ** 0.5
    low, high = change.mean() - half, change.mean() + half
    return change.mean(), low, high, "within noise" if low <= 0 <= high else "lower" if high < 0 else "higher"
