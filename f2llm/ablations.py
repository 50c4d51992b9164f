"""Ablations as DVC experiments: an arm changes one thing, runs with every seed, and its difference has an interval."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
from scipy.stats import t as student_t

from .checkpoint import alone_in, sha256
from .config import load_config, read_yaml
from .notebook import code_of

KEYS = ["group", "arm", "seed", "model"]
COLUMNS = [*KEYS, "score", "base", "commit"]


@dataclass(frozen=True)
class Experiment:
    """One arm with one seed. settings: of the resolved configuration, as in stage1.epochs=0, or recipe=v1.

    models: whose scores count; stage2@8 is stage2 at 8 dimensions.
    """

    group: str
    arm: str
    seed: int
    settings: tuple[str, ...]
    models: tuple[str, ...]

    def name(self, base: str) -> str:
        """Of the DVC experiment: letters, digits and hyphens; other code or other settings are another experiment."""
        digest = hashlib.sha256(json.dumps([base, self.settings]).encode()).hexdigest()[:6]
        words = re.findall(r"[a-z0-9]+", self.arm.lower())
        return "-".join(["ablate", self.group, *words, str(self.seed), digest])


def experiments(path: Path = Path("ablations.yaml")) -> list[Experiment]:
    """All that ablations.yaml asks for, arm by arm, checked."""
    plan = read_yaml(path)
    if set(plan) != {"seeds", "groups"} or len(set(plan["seeds"])) < 2:
        raise ValueError(f"{path} must have the keys seeds (two different ones or more: noise needs them) and groups")
    found = []
    for group, table in plan["groups"].items():
        if set(table) != {"models", "settings", "arms"} or not table["models"]:
            raise ValueError(f"{path}: group {group} must have the keys models (at least one), settings and arms")
        only = ",".join(dict.fromkeys(model.partition("@")[0] for model in table["models"]))
        for arm, settings in table["arms"].items():
            all_of_them = (*table["settings"], f"evaluate.only=[{only}]", *settings)
            by_key = {setting.partition("=")[0]: setting for setting in all_of_them}  # an arm's come last
            facts = tuple(by_key.values()), tuple(table["models"])
            found += [Experiment(group, arm, seed, *facts) for seed in plan["seeds"]]
    names = [experiment.name("") for experiment in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path}: two arms have the same name for DVC, {twice[0]}; remedy: rename one")
    return found


def first_arms(planned: list[Experiment]) -> dict[str, str]:
    """{group: the arm that the others are compared with}."""
    return {one.group: one.arm for one in reversed(planned)}


def base_of() -> str:
    """Eight digits for what all arms start from: the code of all stages up to evaluation, and the configuration.

    Scores of different bases are never compared. f2llm/config.py counts by what it decides; how results are shown and
    `machine` do not count.
    """
    stages = {name: stage for name, stage in read_yaml(Path("dvc.yaml"))["stages"].items() if name not in LATER}
    paths = sorted({path for stage in stages.values() for path in stage.get("deps", [])})
    facts = {path: sha256(Path(path)) for path in paths if path.startswith("f2llm/") and path not in UNCOUNTED}
    names = [Path(path).stem for path in paths if path.startswith("build/") and path.endswith(".py")]
    facts |= {name: code_of(Path("notebooks") / f"{name}.ipynb") for name in names}
    facts["config"] = {key: value for key, value in asdict(load_config()).items() if key not in ("machine", "seed")}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]


LATER = ("code", "report", "ablations")  # stages that no score depends on
UNCOUNTED = ("f2llm/config.py", "f2llm/report.py")


# Running ----------------------------------------------------------------------------------------


def run_missing(jobs: int, only: str = "") -> None:
    """Queue what has not been run, and run the queue; after a kill the same call goes on with what is missing.

    only: a part of the experiments' names; the arms that they are compared with run too. Finished stages come from
    DVC's run cache. Workers that an earlier call left at work finish what they have begun; what was killed under way
    begins again.
    """
    if subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "params.yaml"]).returncode:
        raise ValueError(
            "params.yaml differs from the last commit, as an experiment in the work tree leaves it, and every arm "
            "would start from it; remedy: git checkout params.yaml, or commit it"
        )
    with alone_in(Path("scratch/ablate"), "ablation"):
        planned, base = experiments(), base_of()
        chosen = {experiment for experiment in planned if only in experiment.name(base)}
        first, groups = first_arms(planned), {experiment.group for experiment in chosen}
        chosen |= {one for one in planned if one.group in groups and one.arm == first[one.group]}
        wanted = {one.name(base): one for one in planned if one in chosen}
        running, done = clear_leftovers(set(wanted)), finished()
        missing = [name for name in wanted if name not in (*done, *running)]
        print(
            f"{len(wanted)} experiments: {sum(name in done for name in wanted)} finished before, "
            f"{len(running)} under way, {len(missing)} to queue",
            flush=True,
        )
        for name in missing:
            settings = (f"seed={wanted[name].seed}", *map(_setting, wanted[name].settings))
            options = [word for setting in settings for word in ("-S", setting)]
            _dvc("exp", "run", "--queue", "--name", name, *options, "evaluate")
        if missing:
            _dvc("queue", "start", "--jobs", str(jobs))
        if missing or running:
            wait_for_workers(list(wanted))
    if failed := [name for name in wanted if name not in finished()]:
        raise RuntimeError(
            f"{len(failed)} of {len(wanted)} experiments did not finish: {', '.join(failed)}; "
            f"remedy: dvc queue logs {failed[0]}, then the same command again"
        )


def _setting(setting: str) -> str:
    """recipe=v1 as it is; what has a section goes under `override`."""
    return f"+override.{setting}" if "." in setting.partition("=")[0] else setting


def clear_leftovers(names: set[str]) -> set[str]:
    """Take out of DVC's queue what an interrupted call has left of these experiments; those that workers still see to.

    Without a worker, what is marked as running is dead. Other experiments in the queue stay as they are.
    """
    tasks, workers = queue_status(_dvc("queue", "status"))
    ours = [(task, name, state) for task, name, state in tasks if name in names]
    if dead := [task for task, _, state in ours if state == "Running" and not workers]:
        _dvc("queue", "kill", "--force", *dead, check=False)  # marks them as failed
    waiting = [] if workers else [task for task, _, state in ours if state == "Queued"]
    if left := dead + waiting + [task for task, _, state in ours if state == "Failed"]:
        _dvc("queue", "remove", *left, check=False)
    return {name for _, name, state in ours if workers and state in ("Running", "Queued")}


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
    """([(task, experiment, state)], number of workers, at work or between two tasks) of `dvc queue status`."""
    rows = [line.split() for line in text.splitlines()]
    workers = re.search(r"Worker status: (\d+) active, (\d+) idle", text)
    tasks = [(row[0], row[1], row[-1]) for row in rows if len(row) > 3 and re.fullmatch("[0-9a-f]{7,}", row[0])]
    return tasks, sum(map(int, workers.groups())) if workers else 0


def finished() -> dict[str, str]:
    """{name: reference} of all experiments of this repository."""
    lines = _git("for-each-ref", "--format=%(refname)", "refs/exps").split()
    return {line.rpartition("/")[2]: line for line in lines if line.count("/") >= 4}


def collect(earlier: pd.DataFrame) -> pd.DataFrame:
    """Mean scores (0 to 1) of all that has been run, in the plan's order, as COLUMNS say.

    What this clone has run with today's code and parameters, and of `earlier` all else that the plan still names.
    """
    references, base, planned, rows = finished(), base_of(), experiments(), []
    for experiment in planned:
        if not (reference := references.get(experiment.name(base))):
            continue
        means = _means(reference)
        facts = [experiment.group, experiment.arm, experiment.seed]
        commit = _git("rev-parse", "--short", f"{reference}~1").strip()
        rows += [[*facts, model, round(means[model], 5), base, commit] for model in experiment.models]
    both = pd.concat([frame for frame in (earlier, pd.DataFrame(rows, columns=COLUMNS)) if len(frame)] or [earlier])
    both = both.drop_duplicates(KEYS, keep="last").set_index(KEYS)
    order = [(one.group, one.arm, one.seed, model) for one in planned for model in one.models]
    return both.loc[[key for key in order if key in both.index]].reset_index()[COLUMNS]


def _means(reference: str) -> dict[str, float]:
    """Mean scores of an experiment's models, and of model@dim where shorter embeddings were scored."""
    scores, dims = (
        pd.read_csv(io.StringIO(_git("show", f"{reference}:results/{name}.csv"))) for name in ("scores", "dims")
    )
    dims = dims.assign(model=dims["model"] + "@" + dims["dim"].astype(str))
    return pd.concat([scores, dims]).groupby("model")["score"].mean().to_dict()


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


def compare(scores: pd.DataFrame, first: dict[str, str], confidence: float = 0.95) -> pd.DataFrame:
    """One row per group, model and arm: mean, standard deviation, difference to the group's first arm, its interval.

    scores as `collect` gives them, times 1; the table times 100; first as of `first_arms`. Differences are taken seed
    by seed and of one base, so that what a seed changes in both arms cancels; the interval is Student's for their
    mean. verdict: 'within noise' where the interval holds 0, 'too few seeds' below two common ones.
    """
    rows = []
    for (group, model), of_model in scores.groupby(["group", "model"], sort=False):
        table = 100 * of_model.pivot(index=["base", "seed"], columns="arm", values="score")
        against = table.get(first[group], pd.Series(float("nan"), table.index))
        for arm in dict.fromkeys(of_model["arm"]):
            values, change = table[arm].dropna(), (table[arm] - against).dropna()
            row = {"group": group, "model": model, "arm": arm, "seeds": len(values)}
            row |= {"mean": values.mean(), "sd": values.std()}
            if arm != first[group]:
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
