"""Ablations as DVC experiments: an arm changes one thing, runs with every seed, and its difference has an interval."""

import hashlib
import io
import json
import os
import platform
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
from .config import load_config, overrides_of, read_yaml
from .notebook import code_of

KEYS = ["group", "arm", "seed", "model"]
COLUMNS = [*KEYS, "score", "base", "experiment", "commit"]
RESULTS = Path("results/ablations.csv")


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
        digest = hashlib.sha256(json.dumps([base, self.settings, self.models]).encode()).hexdigest()[:6]
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
        dims = {int(dim) for _, at, dim in (model.partition("@") for model in table["models"]) if at}
        for arm, settings in table["arms"].items():
            all_of_them = (*table["settings"], f"evaluate.only=[{only}]", *settings)
            by_key = {setting.partition("=")[0]: setting for setting in all_of_them}  # an arm's come last
            scored = overrides_of([by_key.get("evaluate.dims", "evaluate.dims=[]")])["evaluate"]["dims"]
            if absent := sorted(dims - set(scored)):
                raise ValueError(f"{path}: group {group} counts scores at {absent} dimensions; remedy: evaluate.dims")
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
    """A digest of what all arms start from: code of all stages up to evaluation, configuration, Python, packages.

    Scores of different bases are never compared. f2llm/config.py counts by what it decides; how results are shown and
    `machine` do not count.
    """
    stages = {name: stage for name, stage in read_yaml(Path("dvc.yaml"))["stages"].items() if name not in LATER}
    paths = sorted({path for stage in stages.values() for path in stage.get("deps", [])})
    facts = {path: sha256(Path(path)) for path in paths if path.startswith("f2llm/") and path not in UNCOUNTED}
    names = [Path(path).stem for path in paths if path.startswith("build/") and path.endswith(".py")]
    facts |= {name: code_of(Path("notebooks") / f"{name}.ipynb") for name in names}
    facts["config"] = {key: value for key, value in asdict(load_config()).items() if key not in ("machine", "seed")}
    facts |= {"python": platform.python_version(), "packages": sha256(Path("constraints.txt"))}
    return "b" + hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:7]


LATER = ("code", "report", "ablations")  # stages that no score depends on
UNCOUNTED = ("f2llm/config.py", "f2llm/report.py")


# Results ----------------------------------------------------------------------------------------


def read_ablations(path: Path = RESULTS) -> pd.DataFrame:
    """results/ablations.csv, checked: mean scores (0 to 1), one base in each group."""
    if not path.exists():
        raise ValueError(f"{path} is missing; remedy: git checkout {path}, or f2llm ablate")
    scores = pd.read_csv(path, dtype=dict.fromkeys(("base", "experiment", "commit"), str))
    if list(scores.columns) != COLUMNS or scores[COLUMNS].isna().any(axis=None):
        raise ValueError(f"{path} must have the columns {', '.join(COLUMNS)}, all filled; remedy: git checkout {path}")
    bases = scores.groupby("group")["base"].nunique()
    if (mixed := bases[bases > 1]).any():
        raise ValueError(f"{path}: group {mixed.index[0]} has rows of several bases; remedy: f2llm ablate")
    return scores


def collect(earlier: pd.DataFrame) -> pd.DataFrame:
    """Mean scores (0 to 1) of all that has been run, in the plan's order, as COLUMNS say.

    What this clone has run on today's base is added to the rows of `earlier`. In a group of which something has,
    rows of another base or of other settings are left out: they cannot be compared.
    """
    references, base, rows = finished(), base_of(), []
    names = {one.name(base): one for one in experiments()}
    for name, one in names.items():
        if not (reference := references.get(name)):
            continue
        means = _means(reference)
        if absent := [model for model in one.models if model not in means]:
            raise ValueError(f"{name} has no score of {absent[0]}; remedy: dvc exp remove {name}, then f2llm ablate")
        facts, commit = [one.group, one.arm, one.seed], _git("rev-parse", "--short", f"{reference}~1").strip()
        rows += [[*facts, model, round(means[model], 5), base, name, commit] for model in one.models]
    made = pd.DataFrame(rows, columns=COLUMNS)
    kept = earlier[earlier["experiment"].isin(names) | ~earlier["group"].isin(made["group"])]
    both = pd.concat([frame for frame in (kept, made) if len(frame)] or [earlier])
    both = both.drop_duplicates(KEYS, keep="last").set_index(KEYS)
    order = [(one.group, one.arm, one.seed, model) for one in names.values() for model in one.models]
    return both.loc[[key for key in order if key in both.index]].reset_index()[COLUMNS]


def finished() -> dict[str, str]:
    """{name: reference} of all experiments of this repository."""
    lines = _git("for-each-ref", "--format=%(refname)", "refs/exps").split()
    return {line.rpartition("/")[2]: line for line in lines if line.count("/") >= 4}


def _means(reference: str) -> dict[str, float]:
    """Mean scores of an experiment's models, and of model@dim where shorter embeddings were scored."""
    scores, dims = (
        pd.read_csv(io.StringIO(_git("show", f"{reference}:results/{name}.csv"))) for name in ("scores", "dims")
    )
    dims = dims.assign(model=dims["model"] + "@" + dims["dim"].astype(str))
    return pd.concat([scores, dims]).groupby("model")["score"].mean().to_dict()


# Running ----------------------------------------------------------------------------------------


def run_missing(jobs: int, earlier: pd.DataFrame, only: str = "") -> None:
    """Queue what has not been run, and run the queue; after a kill the same call goes on with what is missing.

    earlier: rows of results/ablations.csv; experiments that it has need not be run again. only: a part of the
    experiments' names or arms; the arms that they are compared with run too. Finished stages come from DVC's run
    cache. Workers that an earlier call left at work finish what is in the queue; what was killed under way begins
    again.
    """
    if subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "params.yaml"]).returncode:
        raise ValueError(
            "params.yaml differs from the last commit, as an experiment in the work tree leaves it, and every arm "
            "would start from it; remedy: git checkout params.yaml, or commit it"
        )
    with alone_in(Path("scratch/ablate"), "ablation"):
        planned, base = experiments(), base_of()
        names = {one.name(base): one for one in planned}
        wanted = {name: names[name] for name in chosen(names, only)}
        known = set(finished()) | set(earlier["experiment"])
        under_way = clear_leftovers(set(wanted), all_of_them=set(names))
        missing = [name for name in wanted if name not in known | under_way]
        print(
            f"{len(wanted)} experiments: {len(known & set(wanted))} finished before, {len(under_way)} under way, "
            f"{len(missing)} to queue",
            flush=True,
        )
        for name in missing:
            settings = (f"seed={wanted[name].seed}", *map(_setting, wanted[name].settings))
            options = [word for setting in settings for word in ("-S", setting)]
            _dvc("exp", "run", "--queue", "--name", name, *options, "evaluate")
        if missing:
            _dvc("queue", "start", "--jobs", str(jobs))
        if missing or under_way:
            wait_for_workers([*missing, *under_way])
    if failed := [name for name in wanted if name not in known | set(finished())]:
        raise RuntimeError(
            f"{len(failed)} of {len(wanted)} experiments did not finish: {', '.join(failed)}; "
            f"remedy: dvc queue logs {failed[0]}, then the same command again"
        )


def chosen(names: dict[str, Experiment], only: str) -> list[str]:
    """Names that `only` is a part of, or of whose arm, and those of the arms that they are compared with."""
    matched = {name for name, one in names.items() if only in name or only in one.arm}
    if not matched:
        arms = "; ".join(dict.fromkeys(f"{one.group}: {one.arm}" for one in names.values()))
        raise ValueError(f"--only {only!r} is no part of an arm; remedy: one of these: {arms}")
    first, groups = first_arms(list(names.values())), {names[name].group for name in matched}
    return [
        name for name, one in names.items() if name in matched or (one.group in groups and one.arm == first[one.group])
    ]


def _setting(setting: str) -> str:
    """recipe=v1 as it is; what has a section goes under `override`."""
    return f"+override.{setting}" if "." in setting.partition("=")[0] else setting


def clear_leftovers(names: set[str], all_of_them: set[str]) -> set[str]:
    """Take out of DVC's queue what interrupted calls have left; those of `names` that workers still see to.

    Without a worker, what is marked as running is dead. Experiments of other code or other settings than
    `all_of_them` are left behind for good; what is not ours stays as it is.
    """
    tasks, workers = queue()
    ours = [(task, name, state) for task, name, state in tasks if name in names]
    behind = [task for task, name, state in tasks if state != "Running" and _is_old(name, all_of_them)]
    if dead := [task for task, _, state in ours if state == "Running" and not workers]:
        _dvc("queue", "kill", "--force", *dead, check=False)  # marks them as failed
    waiting = [] if workers else [task for task, _, state in ours if state == "Queued"]
    if left := dead + waiting + behind + [task for task, _, state in ours if state == "Failed"]:
        _dvc("queue", "remove", *left, check=False)
    return {name for _, name, state in ours if workers and state in ("Running", "Queued")}


def _is_old(name: str, all_of_them: set[str]) -> bool:
    return bool(re.fullmatch(r"ablate-.+-\d+-[0-9a-f]{6}", name)) and name not in all_of_them


def wait_for_workers(names: list[str], seconds: float = 20) -> None:
    """Until all are finished or no worker is left; says what has been finished."""
    shown = set()
    while True:
        _, workers = queue(seconds)
        for name in (new := [name for name in names if name in finished() and name not in shown]):
            shown.add(name)
            print(f"{len(shown)} of {len(names)}: {name}", flush=True)
        if len(shown) == len(names) or (not workers and not new):
            return
        time.sleep(seconds)


def queue(seconds: float = 5, trials: int = 3) -> tuple[list[tuple[str, str, str]], int]:
    """As `queue_status` now. Workers have a second to answer: only several silences mean that there is none."""
    for trial in range(trials):
        tasks, workers = queue_status(_dvc("queue", "status"))
        if workers or not any(state in ("Running", "Queued") for _, _, state in tasks):
            break
        if trial + 1 < trials:
            time.sleep(seconds)
    return tasks, workers


def queue_status(text: str) -> tuple[list[tuple[str, str, str]], int]:
    """([(task, experiment, state)], number of workers, at work or between two tasks) of `dvc queue status`."""
    rows = [line.split() for line in text.splitlines()]
    workers = re.search(r"Worker status: (\d+) active, (\d+) idle", text)
    tasks = [(row[0], row[1], row[-1]) for row in rows if len(row) > 3 and re.fullmatch("[0-9a-f]{7,}", row[0])]
    return tasks, sum(map(int, workers.groups())) if workers else 0


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

    scores as `read_ablations` gives them, times 1; the table times 100; first as of `first_arms`. Differences are
    taken seed by seed, so that what a seed changes in both arms cancels; the interval is Student's for their mean.
    seeds: of the arm itself, or common to both. verdict: 'within noise' where the interval holds 0, 'too few seeds'
    below two common ones.
    """
    rows = []
    for (group, model), of_model in scores.groupby(["group", "model"], sort=False):
        table = 100 * of_model.pivot(index="seed", columns="arm", values="score")
        against = table.get(first[group], pd.Series(float("nan"), table.index))
        for arm in dict.fromkeys(of_model["arm"]):
            row = {"group": group, "model": model, "arm": arm, "seeds": table[arm].count()}
            row |= {"mean": table[arm].mean(), "sd": table[arm].std()}
            if arm != first[group]:
                change = table[arm] - against
                row |= {"seeds": change.count(), "against": first[group]}
                row |= dict(zip(("difference", "low", "high", "verdict"), difference(change, confidence)))
            rows.append(row)
    return pd.DataFrame(rows)


def difference(change: pd.Series, confidence: float) -> tuple[float, float, float, str]:
    """(mean, low, high, verdict) of paired differences, those that are numbers: Student's interval of their mean."""
    change = change.dropna()
    if len(change) < 2:
        return float("nan"), float("nan"), float("nan"), "too few seeds"
    half = student_t.ppf((1 + confidence) / 2, len(change) - 1) * change.std() / len(change) ** 0.5
    low, high = change.mean() - half, change.mean() + half
    return change.mean(), low, high, "within noise" if low <= 0 <= high else "lower" if high < 0 else "higher"
