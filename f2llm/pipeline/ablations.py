"""Ablations as DVC experiments: an arm changes one thing and runs with every seed; differences have an interval."""

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
from functools import partial
from pathlib import Path

import pandas as pd
from scipy.stats import t as student_t

from ..config import load_config, overrides_of, read_yaml, resolve
from ..data.registry import choose_sources, load_registry
from ..evaluation.results import judged
from ..reporting.tables import means_by_type
from ..store.code import code_digests, imported_modules
from ..store.files import alone_in, sha256
from ..store.progress import duration
from .launch import die_with_parent
from .notebook import MODELS, code_of, stage_notebooks

KEYS = ["group", "arm", "seed", "model", "type"]
COLUMNS = [*KEYS, "score", "base", "experiment", "commit"]
CLAIMED = ["claim", "model", "gain", "low", "high", "seeds", "shown"]
MEAN = "Mean"  # over all tasks, beside types of tasks
RESULTS = Path("results/ablations.csv")
LOGS = Path("scratch/ablate")  # the output of every experiment, as <its name>.log
EVALUATION = "08_evaluate"  # no score depends on the notebooks after it


@dataclass(frozen=True)
class Experiment:
    """One arm with one seed. settings: changes of the resolved configuration, as in stage1.epochs=0, or recipe=v1.

    models: those whose scores are compared; stage2@8 is stage2 at 8 dimensions.
    """

    group: str
    arm: str
    seed: int
    settings: tuple[str, ...]
    models: tuple[str, ...]

    def name(self, base: str) -> str:
        """The DVC experiment's name: letters, digits, hyphens. It depends on the base (`base_of`) and the settings."""
        digest = hashlib.sha256(json.dumps([base, self.settings, self.models]).encode()).hexdigest()[:6]
        words = re.findall(r"[a-z0-9]+", self.arm.lower())
        return "-".join(["ablate", self.group, *words, str(self.seed), digest])


def experiments(path: Path = Path("ablations.yaml")) -> list[Experiment]:
    """All experiments of ablations.yaml, arm by arm, checked."""
    plan = read_yaml(path)
    if set(plan) - {"claims"} != {"seeds", "groups"} or len(set(plan["seeds"])) < 2:
        raise ValueError(
            f"{path} must have the keys seeds (two different ones or more: noise needs them), groups and, where the "
            "papers say something, claims"
        )
    found = []
    for group, table in plan["groups"].items():
        if set(table) != {"models", "settings", "arms"} or not table["models"]:
            raise ValueError(f"{path}: group {group} must have the keys models (at least one), settings and arms")
        only = ",".join(dict.fromkeys(model.partition("@")[0] for model in table["models"]))
        dims = {int(dim) for _, at, dim in (model.partition("@") for model in table["models"]) if at}
        for arm, settings in table["arms"].items():
            all_of_them = (*table["settings"], f"evaluate.only=[{only}]", *settings)
            by_key = {setting.partition("=")[0]: setting for setting in all_of_them}  # an arm's settings win
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
    """A digest of all that arms share: code of the stages up to evaluation, parameters, data, Python, packages.

    Scores of different bases are never compared. Comments, the seed, `machine` and the code that shows results have no
    effect on it.
    """
    codes = {path.stem: code_of(path) for path in stage_notebooks() if path.stem <= EVALUATION}
    digests = code_digests(MODELS, *(module for code in codes.values() for module in imported_modules(code)))
    facts = codes | {module: digest for module, digest in digests.items() if not module.startswith("f2llm.reporting.")}
    facts["inputs"] = _inputs()
    facts |= {"python": platform.python_version(), "packages": sha256(Path("constraints.txt"))}
    return "b" + hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:7]


def _inputs() -> list[dict]:
    """Configuration and sources of the size as it is and under every recipe, since an arm can change the recipe."""
    params, chosen, registry, facts = read_yaml(Path("params.yaml")), load_config(), load_registry(), []
    recipes = [name for name, table in params["recipes"].items() if chosen.name in table.get("sizes", params["sizes"])]
    for config in (chosen, *(resolve(params | {"recipe": recipe, "override": {}}) for recipe in recipes)):
        facts.append({key: value for key, value in asdict(config).items() if key not in ("machine", "seed")})
        facts += map(asdict, choose_sources(registry, config.data, config.recipe)[0])
    return facts


# Results ----------------------------------------------------------------------------------------


def read_ablations(path: Path = RESULTS) -> pd.DataFrame:
    """results/ablations.csv, checked: scores (0 to 1), with a single base in each group.

    type: a type of tasks, as in README's table, or MEAN, over all tasks.
    """
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
    """Scores (0 to 1) of all finished experiments by type of tasks, in the order of ablations.yaml: COLUMNS.

    The scores that this clone has for the current base are added to the rows of `earlier`. In groups with such
    scores, rows of another base or of other settings are left out: they cannot be compared.
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
        rows += [
            [*facts, model, kind, round(score, 5), base, name, commit]
            for model in one.models
            for kind, score in means[model].items()
        ]
    made = pd.DataFrame(rows, columns=COLUMNS)
    kept = earlier[earlier["experiment"].isin(names) | ~earlier["group"].isin(made["group"])]
    both = pd.concat([frame for frame in (kept, made) if len(frame)] or [earlier], ignore_index=True)
    both = both.drop_duplicates(KEYS, keep="last")
    order = {(one.group, one.arm, one.seed, model): None for one in names.values() for model in one.models}
    place = {key: number for number, key in enumerate(order)}
    places = both[KEYS[:-1]].apply(tuple, axis=1).map(place) if len(both) else pd.Series(dtype=float)
    return both.loc[places.dropna().sort_values(kind="stable").index].reset_index(drop=True)[COLUMNS]


def finished() -> dict[str, str]:
    """{name: git reference} of all DVC experiments of this repository."""
    lines = _git("for-each-ref", "--format=%(refname)", "refs/exps").split()
    return {line.rpartition("/")[2]: line for line in lines if line.count("/") >= 4}


def _means(reference: str) -> dict[str, dict[str, float]]:
    """{model: {MEAN or type: mean score}} of an experiment, and of model@dim for shorter embeddings."""
    scores, dims = (
        pd.read_csv(io.StringIO(_git("show", f"{reference}:results/{name}.csv"))) for name in ("scores", "dims")
    )
    dims = dims.assign(model=dims["model"] + "@" + dims["dim"].astype(str))
    return means_by_type(judged(pd.concat([scores, dims], ignore_index=True))).to_dict("index")


# Running ----------------------------------------------------------------------------------------


def run_missing(earlier: pd.DataFrame, only: str = "") -> None:
    """Run the missing experiments, one after the other; after a kill the same call runs those that are still missing.

    earlier: rows of results/ablations.csv, whose experiments are not run again. only: a part of the names or arms of
    the experiments to run; the arms that they are compared with run too. The results of stages that an earlier run
    has finished come from DVC's run cache.
    """
    if subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "params.yaml"]).returncode:
        raise ValueError(
            "params.yaml differs from the last commit, as an experiment in the work tree leaves it, and every arm "
            "would start from it; remedy: git checkout HEAD params.yaml, or commit it"
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
            line = f"{count} of {len(missing)}: {name}{failed}, {duration(now - before)}, about {duration(left)} left"
            print(line, flush=True)
    if failed := [name for name in missing if name not in finished()]:
        raise RuntimeError(
            f"{len(failed)} of {len(wanted)} experiments did not finish: {', '.join(failed)}; "
            f"remedy: read {LOGS / failed[0]}.log, then the same command again"
        )


def run_experiment(name: str, one: Experiment) -> None:
    """Run `dvc exp run` in a temporary copy of the repository; its output goes to the terminal and scratch/ablate.

    On an interrupt DVC stops the stage and removes the copy. If this process is killed, DVC ends too (on Linux).
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
        preexec_fn=partial(die_with_parent, signal.SIGKILL),  # DVC cleans up after neither signal
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
    """Remove what DVC keeps of our killed experiments: copies of the repository, and marks that they run."""
    for mark in folder.glob("run/*/*.run"):
        try:
            facts = json.loads(mark.read_text())
        except ValueError:  # half written: DVC was killed meanwhile, or is still writing
            continue
        if re.fullmatch(r"ablate-.+-\d+-[0-9a-f]{6}", facts["name"] or ""):
            shutil.rmtree(folder / "standalone" / Path(facts["root_dir"]).name, ignore_errors=True)
            shutil.rmtree(folder / "standalone" / "run" / mark.parent.name, ignore_errors=True)
            shutil.rmtree(mark.parent)


def chosen(names: dict[str, Experiment], only: str) -> list[str]:
    """Names of the experiments with `only` in their name or arm, and of the arms that they are compared with."""
    matched = {name for name, one in names.items() if only in name or only in one.arm}
    if not matched:
        arms = "; ".join(dict.fromkeys(f"{one.group}: {one.arm}" for one in names.values()))
        raise ValueError(f"--only {only!r} is no part of an arm; remedy: one of these: {arms}")
    first, groups = first_arms(list(names.values())), {names[name].group for name in matched}
    return [
        name for name, one in names.items() if name in matched or (one.group in groups and one.arm == first[one.group])
    ]


def _setting(setting: str) -> str:
    """A setting for `dvc exp run -S`: recipe=v1 stays as it is; a key with a section goes under `override`."""
    return f"+override.{setting}" if "." in setting.partition("=")[0] else setting


def require_git() -> None:
    """Raise a RuntimeError without git, or outside a clone: experiments are commits."""
    try:
        inside = subprocess.run(["git", "rev-parse", "--git-dir"], capture_output=True).returncode == 0
        fault, remedy = f"{Path.cwd()} is no git clone", "git clone the repository"
    except FileNotFoundError:
        inside, fault, remedy = False, "git is not installed", "install git"
    if not inside:
        raise RuntimeError(f"{fault}, but experiments are commits of a clone; nothing was run. remedy: {remedy}")


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout


# Comparing --------------------------------------------------------------------------------------


def family(scores: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(mean, half the width of its 95 % interval) over seeds of the default's models, but those that were only pruned.

    Both have types as index and models as columns, in the order of ablations.yaml.
    """
    rows = scores[(scores["group"] == "family") & ~scores["model"].str.endswith("-pruned")]
    order = [list(dict.fromkeys(rows[key])) for key in ("type", "model")]
    by = rows.groupby(["type", "model"])["score"]
    return tuple(table.unstack("model").loc[order[0], order[1]] for table in (by.mean(), by.apply(half_interval)))


def compare(scores: pd.DataFrame, first: dict[str, str], confidence: float = 0.95) -> pd.DataFrame:
    """One row per group, model and arm: mean, standard deviation, difference to the group's first arm, its interval.

    scores: of `read_ablations`, 0 to 1, of which those over all tasks are compared; the returned values are times 100.
    first: of `first_arms`. Differences are paired by seed, so that effects of a seed on both arms cancel; the interval
    is Student's t interval of their mean. seeds: how many the arm has or, for a difference, both arms have. verdict:
    'higher', 'lower', 'within noise' if the interval contains 0, 'too few seeds' if fewer than two are common.
    """
    rows, scores = [], scores[scores["type"] == MEAN]
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


def claims(scores: pd.DataFrame, path: Path = Path("ablations.yaml")) -> pd.DataFrame:
    """One row per claim of ablations.yaml and model: gain, its interval (low, high), seeds, shown.

    scores: of `read_ablations`. gain: times 100, what the mean loses in the claim's arm, against the group's first arm;
    or, for a claim with `over` instead of an arm, by how much the model is above that one in the first arm. Paired by
    seed. shown: 'yes' if the whole interval is above 0, 'no' if it is below, else the verdict of `difference`.
    ValueError for a claim about an arm that the plan does not have.
    """
    planned, rows = experiments(path), []
    arms, first = {(one.group, one.arm) for one in planned}, first_arms(planned)
    means = 100 * scores[scores["type"] == MEAN].set_index(["group", "arm", "model", "seed"])["score"].sort_index()
    for claim, about in read_yaml(path).get("claims", {}).items():
        group, arm = about["group"], about.get("arm", first.get(about["group"]))
        if (group, arm) not in arms:
            raise ValueError(f"{path}: the claim {claim!r} is about {arm!r}, which is no arm of {group}")
        for model in about["models"]:
            sides = (first[group], model), (arm, about.get("over", model))
            whole, without = (means.get((group, *side), pd.Series(dtype=float)) for side in sides)
            change = (whole - without).dropna()
            gain, low, high, verdict = difference(change, 0.95)
            shown = {"higher": "yes", "lower": "no"}.get(verdict, verdict)
            rows.append(dict(zip(CLAIMED, (claim, model, gain, low, high, len(change), shown), strict=True)))
    return pd.DataFrame(rows, columns=CLAIMED)


def half_interval(values: pd.Series, confidence: float = 0.95) -> float:
    """Half the width of Student's t interval of the mean of values; NaN for fewer than two."""
    return student_t.ppf((1 + confidence) / 2, len(values) - 1) * values.std() / len(values) ** 0.5


def difference(change: pd.Series, confidence: float) -> tuple[float, float, float, str]:
    """(mean, low, high, verdict) of paired differences: Student's t interval of their mean; NaN are left out."""
    change = change.dropna()
    if len(change) < 2:
        return float("nan"), float("nan"), float("nan"), "too few seeds"
    half = half_interval(change, confidence)
    low, high = change.mean() - half, change.mean() + half
    return change.mean(), low, high, "within noise" if low <= 0 <= high else "lower" if high < 0 else "higher"
