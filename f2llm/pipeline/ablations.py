"""Ablations as DVC experiments: an arm changes one thing, runs with every seed, and its difference has an interval."""

import hashlib
import io
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
from scipy.stats import t as student_t

from ..config import load_config, overrides_of, read_yaml, resolve
from ..data.registry import choose_sources, load_registry
from ..store.code import code_digests, imported_modules
from ..store.files import alone_in, sha256
from .launch import die_with_parent
from .notebook import MODELS, code_of, stage_notebooks

KEYS = ["group", "arm", "seed", "model"]
COLUMNS = [*KEYS, "score", "base", "experiment", "commit"]
RESULTS = Path("results/ablations.csv")
LOGS = Path("scratch/ablate")  # the output of every experiment, as <its name>.log
EVALUATION = "08_evaluate"  # no score depends on the notebooks after it


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
    """A digest of what all arms start from: code of the stages up to evaluation, parameters, data, Python, packages.

    Scores of different bases are never compared. Comments, the seed, `machine` and how results are shown do not count.
    """
    codes = {path.stem: code_of(path) for path in stage_notebooks() if path.stem <= EVALUATION}
    digests = code_digests(MODELS, *(module for code in codes.values() for module in imported_modules(code)))
    facts = codes | {module: digest for module, digest in digests.items() if not module.startswith("f2llm.reporting.")}
    facts["inputs"] = _inputs()
    facts |= {"python": platform.python_version(), "packages": sha256(Path("constraints.txt"))}
    return "b" + hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:7]


def _inputs() -> list[dict]:
    """What params.yaml and data/sources.yaml say of the size, under every recipe, since an arm can set it."""
    params, chosen, registry, facts = read_yaml(Path("params.yaml")), load_config(), load_registry(), []
    recipes = [name for name, table in params["recipes"].items() if chosen.name in table.get("sizes", params["sizes"])]
    for config in (chosen, *(resolve(params | {"recipe": recipe, "override": {}}) for recipe in recipes)):
        facts.append({key: value for key, value in asdict(config).items() if key not in ("machine", "seed")})
        facts += map(asdict, choose_sources(registry, config.data, config.recipe)[0])
    return facts


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


def run_missing(earlier: pd.DataFrame, only: str = "") -> None:
    """Run what has not been run, one experiment after the other; after a kill the same call runs what is missing.

    earlier: rows of results/ablations.csv; experiments that it has need not be run again. only: a part of the
    experiments' names or arms; the arms that they are compared with run too. Stages that an earlier run has finished
    come from DVC's run cache.
    """
    if subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "params.yaml"]).returncode:
        raise ValueError(
            "params.yaml differs from the last commit, as an experiment in the work tree leaves it, and every arm "
            "would start from it; remedy: git checkout params.yaml, or commit it"
        )
    with alone_in(LOGS, "ablation"):
        base = base_of()
        names = {one.name(base): one for one in experiments()}
        wanted, known = chosen(names, only), set(finished()) | set(earlier["experiment"])
        missing = [name for name in wanted if name not in known]
        count_before = len(wanted) - len(missing)
        print(f"{len(wanted)} experiments: {count_before} finished before, {len(missing)} to run", flush=True)
        start = time.monotonic()
        for count, name in enumerate(missing, start=1):
            before = time.monotonic()
            remove_killed()
            run_experiment(name, names[name])
            now, failed = time.monotonic(), "" if name in finished() else " FAILED"
            left = (now - start) / count * (len(missing) - count)
            line = f"{count} of {len(missing)}: {name}{failed}, {_shown(now - before)}, about {_shown(left)} left"
            print(line, flush=True)
    if failed := [name for name in missing if name not in finished()]:
        raise RuntimeError(
            f"{len(failed)} of {len(wanted)} experiments did not finish: {', '.join(failed)}; "
            f"remedy: read {LOGS / failed[0]}.log, then the same command again"
        )


def run_experiment(name: str, one: Experiment) -> None:
    """`dvc exp run` in a temporary copy of the repository; its output to the terminal and to scratch/ablate.

    On an interrupt DVC stops the stage and removes the copy; when this process is killed DVC is, too (on Linux).
    """
    settings = (f"seed={one.seed}", *map(_setting, one.settings))
    options = [word for setting in settings for word in ("-S", setting)]
    own = {"DVC_NO_ANALYTICS": "1", "PYTHONUNBUFFERED": "1"}
    own["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", "exp", "run", "--temp", "--name", name, *options, "evaluate"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, **own},
        start_new_session=True,  # so that DVC and the stage get an interrupt once, from here
        preexec_fn=die_with_parent,
    )
    with (LOGS / f"{name}.log").open("w", buffering=1, encoding="utf-8") as log:
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                log.write(line)
            process.wait()
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGINT)
            log.write(process.communicate()[0])
            raise


def remove_killed(folder: Path = Path(".dvc/tmp/exps")) -> None:
    """Remove what DVC keeps of killed experiments of ours: their copies of the repository, their marks as running."""
    for mark in folder.glob("run/*/*.run"):
        try:
            facts = json.loads(mark.read_text())
        except ValueError:  # half written: DVC was killed just then, or is at it
            continue
        if re.fullmatch(r"ablate-.+-\d+-[0-9a-f]{6}", facts["name"] or ""):
            shutil.rmtree(folder / "standalone" / Path(facts["root_dir"]).name, ignore_errors=True)
            shutil.rmtree(folder / "standalone" / "run" / mark.parent.name, ignore_errors=True)
            shutil.rmtree(mark.parent)


def _shown(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


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


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout


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
