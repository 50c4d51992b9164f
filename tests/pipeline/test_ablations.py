"""Ablations: names, settings that resolve, intervals against scipy, and results out of DVC's references."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import ROOT
from scipy.stats import ttest_1samp

from f2llm.config import overrides_of, read_yaml, resolve
from f2llm.pipeline import ablations, cli
from f2llm.pipeline.ablations import (
    COLUMNS,
    MEAN,
    base_of,
    chosen,
    claims,
    collect,
    compare,
    difference,
    experiments,
    family,
    finished,
    first_arms,
    read_ablations,
)
from f2llm.store import code
from f2llm.store.files import alone_in


def test_every_arm_resolves_and_changes_something(params):
    planned = experiments(ROOT / "ablations.yaml")
    assert len(planned) > 30, "vacuous: few experiments"
    resolved = {}
    for one in planned:
        plain = dict(setting.split("=") for setting in one.settings if "." not in setting.partition("=")[0])
        overrides = [setting for setting in one.settings if "." in setting.partition("=")[0]]
        resolved[one.group, one.arm] = resolve(params | plain, "nano", overrides_of(overrides))
    first = first_arms(planned)
    for (group, arm), config in resolved.items():
        assert arm == first[group] or config != resolved[group, first[group]], f"{arm} changes nothing"
        measured = {int(model.partition("@")[2]) for model in planned_models(planned, group) if "@" in model}
        assert measured <= set(config.evaluate.dims), f"{group}: nobody scores these dimensions"
    assert {one.seed for one in planned} >= {0, 1, 2}


def planned_models(planned, group):
    return next(one.models for one in planned if one.group == group)


def test_a_name_is_one_that_git_and_dvc_take_and_tells_code_and_settings_apart():
    planned = experiments(ROOT / "ablations.yaml")
    names = [one.name("base") for one in planned]
    assert len(set(names)) == len(planned)
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) for name in names)
    one, *others = planned[0], replace(planned[0], settings=("stage1.epochs=0",)), replace(planned[0], models=("a",))
    assert len({one.name("base"), one.name("another"), *(other.name("base") for other in others)}) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds: [1]\ngroups: {}", "two different ones or more"),
        ("seeds: [1, 1]\ngroups: {}", "two different ones or more"),
        ("seeds: [1, 2]\ngroups: {a: {arms: {}}}", "group a must have the keys"),
        ("seeds: [1, 2]\ngroups: {a: {models: [x], settings: [], arms: {one: [], ONE: []}}}", "two arms have the same"),
        (
            "seeds: [1, 2]\ngroups: {a: {models: [x@8], settings: [], arms: {one: []}}}",
            "at .8. dimensions; remedy: eval",
        ),
    ],
)
def test_a_wrong_plan_is_named(tmp_path, text, message):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        experiments(tmp_path / "plan.yaml")


def test_what_an_arm_sets_takes_the_place_of_its_groups(tmp_path):
    plan = "seeds: [0, 1]\ngroups: {g: {models: [m, n], settings: [a.b=1, c.d=2], arms: {one: [], two: [a.b=3]}}}"
    (tmp_path / "plan.yaml").write_text(plan)
    one, _, two, _ = experiments(tmp_path / "plan.yaml")
    assert one.settings == ("a.b=1", "c.d=2", "evaluate.only=[m,n]")
    assert two.settings == ("a.b=3", "c.d=2", "evaluate.only=[m,n]"), "Hydra takes a key once"


# Differences ------------------------------------------------------------------------------------


def test_the_interval_is_scipys_of_paired_differences():
    change = pd.Series(np.random.default_rng(0).normal(1, 2, size=5))
    mean, low, high, _ = difference(change, 0.9)
    expected = ttest_1samp(change, 0).confidence_interval(0.9)
    assert (mean, low, high) == pytest.approx((change.mean(), expected.low, expected.high))


def test_what_holds_zero_is_within_noise_and_what_does_not_has_a_direction():
    assert difference(pd.Series([-1.0, 1.0, 0.5]), 0.95)[3] == "within noise"
    assert difference(pd.Series([0.0, 0.0, 0.0]), 0.95)[3] == "within noise", "an arm that changes nothing"
    assert difference(pd.Series([1.0, 1.1, 0.9]), 0.95)[3] == "higher"
    assert difference(pd.Series([-1.0, -1.1, -0.9]), 0.95)[3] == "lower"
    assert difference(pd.Series([1.0]), 0.95)[3] == "too few seeds"
    assert difference(pd.Series([1.0, 1.2, np.nan]), 0.95) == difference(pd.Series([1.0, 1.2]), 0.95)


def scores_of(**arms) -> pd.DataFrame:
    rows = [
        {"group": "g", "arm": arm, "seed": seed, "model": "m", "type": kind, "score": score, "base": "b"}
        for arm, scores in arms.items()
        for seed, score in enumerate(scores)
        for kind, score in ((MEAN, score), ("STS", 1 - score))
    ]
    return pd.DataFrame(rows)


def test_arms_are_compared_seed_by_seed():
    """Seeds differ by ten points, the arm by one in each: paired, that is no noise."""
    scores = scores_of(default=(0.2, 0.3, 0.4), worse=(0.19, 0.2901, 0.3899))
    table = compare(scores, {"g": "default"}).set_index("arm")
    assert table.loc["worse", "difference"] == pytest.approx(-1, abs=0.01)
    assert table.loc["worse", "verdict"] == "lower"
    assert table.loc["default", "mean"] == pytest.approx(30) and table.loc["default", "sd"] == pytest.approx(10)
    assert np.isnan(table.loc["default", "difference"]), "the first arm is not compared with itself"


def test_seeds_that_one_arm_lacks_are_left_out_of_the_difference():
    scores = scores_of(default=(0.2, 0.3), short=(0.21, 0.31, 0.9), shorter=(0.21,))
    table = compare(scores, {"g": "default"}).set_index("arm")
    assert table.loc["short", "difference"] == pytest.approx(1) and table.loc["short", "against"] == "default"
    assert table["seeds"].to_dict() == {"default": 2, "short": 2, "shorter": 1}, "those in common"
    assert table.loc["shorter", "verdict"] == "too few seeds"


def test_without_the_first_arm_nothing_is_compared():
    table = compare(scores_of(one=(0.2, 0.3), two=(0.5, 0.6)), {"g": "default"}).set_index("arm")
    assert table["verdict"].tolist() == ["too few seeds"] * 2 and table["difference"].isna().all()
    assert table.loc["two", "mean"] == pytest.approx(55)


def test_a_claim_gains_what_its_arm_loses(tmp_path):
    arms = "{default: [], less: [a.b=1]}"
    plan = f"seeds: [0, 1, 2]\ngroups: {{g: {{models: [m, n], settings: [], arms: {arms}}}}}\nclaims:\n"
    path = tmp_path / "plan.yaml"
    path.write_text(plan + "  it helps: {group: g, arm: less, models: [m]}\n")
    scores = scores_of(default=(0.2, 0.3, 0.4), less=(0.19, 0.2901, 0.3899))
    (row,) = claims(scores, path).to_dict("records")
    assert (row["claim"], row["model"], row["seeds"], row["shown"]) == ("it helps", "m", 3, "yes")
    assert row["low"] < row["gain"] < row["high"] and row["gain"] == pytest.approx(1, abs=0.01)
    better = scores_of(default=(0.2, 0.3, 0.4), less=(0.21, 0.31, 0.4101))
    assert claims(better, path)["shown"].tolist() == ["no"]
    path.write_text(plan + "  it is above: {group: g, over: n, models: [m]}\n")
    both = pd.concat([scores, scores_of(default=(0.1, 0.2, 0.3)).assign(model="n")])
    (row,) = claims(both, path).to_dict("records")
    assert (row["model"], row["seeds"], row["shown"]) == ("m", 3, "yes") and row["gain"] == pytest.approx(10)
    assert claims(scores, path)["shown"].tolist() == ["too few seeds"], "no score of the other"
    path.write_text(plan + "  it helps: {group: g, arm: more, models: [m]}\n")
    with pytest.raises(ValueError, match="the claim 'it helps' is about 'more', which is no arm of g"):
        claims(scores, path)


def test_the_family_has_means_over_seeds_and_scipys_intervals():
    draw = np.random.default_rng(1)
    facts = {"group": "family", "arm": "default", "base": "b"}
    rows = [
        facts | {"seed": seed, "model": model, "type": kind, "score": draw.normal()}
        for seed in range(5)
        for model in ("tfidf", "stage2", "pico-pruned")
        for kind in (MEAN, "Bitext")
    ]
    scores = pd.DataFrame([*rows, rows[0] | {"group": "g"}])
    means, halves = family(scores)
    assert list(means.index) == list(halves.index) == [MEAN, "Bitext"]
    assert list(means.columns) == list(halves.columns) == ["tfidf", "stage2"]
    values = [row["score"] for row in rows if (row["model"], row["type"]) == ("stage2", "Bitext")]
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    mean, half = means.loc["Bitext", "stage2"], halves.loc["Bitext", "stage2"]
    assert (mean - half, mean + half) == pytest.approx((expected.low, expected.high))


# Results in git ---------------------------------------------------------------------------------


def git(folder, *words: str) -> str:
    own = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    return subprocess.run(["git", *own, *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


PLAN = """seeds: [0, 1]
groups:
  g: {models: [m, m@8], settings: ["evaluate.dims=[8]"], arms: {one: [], two: [recipe=v1, a.b=1]}}
"""
EMPTY = pd.DataFrame(columns=COLUMNS)
NAMES = {}  # (arm, seed) -> name, of the plan above


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with two experiments as DVC leaves them, one of them of the plan."""
    (tmp_path / "ablations.yaml").write_text(PLAN)
    (tmp_path / "params.yaml").write_text("seed: 0\n")
    monkeypatch.setattr(ablations, "base_of", lambda: "base")
    monkeypatch.chdir(tmp_path)
    NAMES.update({(one.arm, one.seed): one.name("base") for one in experiments()})
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "base")
    base = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "scores.csv").write_text("model,task,type,score\nm,a,A,0.2\nm,b,B,0.4\nother,a,A,0.9\n")
    (tmp_path / "results" / "dims.csv").write_text(
        "model,dim,task,type,score\nm,8,a,A,0.1\nm,8,b,B,0.2\nm,16,a,A,0.9\n"
    )
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "experiment")
    for name in (NAMES["one", 1], "unrelated"):
        git(tmp_path, "update-ref", f"refs/exps/{base[:2]}/{base[2:]}/{name}", "HEAD")
    git(tmp_path, "update-ref", "refs/exps/stash", "HEAD")
    git(tmp_path, "reset", "-q", "--hard", base)
    return tmp_path


def test_scores_come_from_the_experiments_of_the_plan_that_have_run(repository):
    assert set(finished()) == {NAMES["one", 1], "unrelated"}
    whole, of_a, of_b, short, *rest = collect(EMPTY).to_dict("records")
    facts = {"group": "g", "arm": "one", "seed": 1, "base": "base"}
    facts |= {"experiment": NAMES["one", 1], "commit": git(repository, "rev-parse", "--short", "HEAD")}
    assert whole == facts | {"model": "m", "type": MEAN, "score": pytest.approx(0.3)}
    assert of_a == facts | {"model": "m", "type": "A", "score": pytest.approx(0.2)}
    assert of_b == facts | {"model": "m", "type": "B", "score": pytest.approx(0.4)}
    assert short == facts | {"model": "m@8", "type": MEAN, "score": pytest.approx(0.15)}
    assert [row["type"] for row in rest] == ["A", "B"]


def rows_of(*keys, base="base") -> pd.DataFrame:
    """Rows of the group g, each an arm, a seed and a model."""
    planned = {(one.arm, one.seed): one.name(base) for one in experiments()}
    facts = {"group": "g", "type": MEAN, "score": 0.7, "base": base, "commit": "1234567"}
    rows = [facts | dict(zip(("arm", "seed", "model"), key)) for key in keys]
    return pd.DataFrame([row | {"experiment": planned.get((row["arm"], row["seed"]), "gone")} for row in rows])[COLUMNS]


def test_what_others_have_run_on_the_same_base_stays_as_long_as_the_plan_names_it(repository):
    keys = [("two", 0, "m"), ("one", 1, "m"), ("one", 0, "m"), ("gone", 0, "m"), ("one", 0, "other")]
    found = collect(rows_of(*keys))
    found = found[found["type"] == MEAN].reset_index(drop=True)
    kept = list(found[["arm", "seed", "model", "score"]].itertuples(index=False, name=None))
    assert kept == [
        ("one", 0, "m", 0.7),
        ("one", 1, "m", pytest.approx(0.3)),
        ("one", 1, "m@8", pytest.approx(0.15)),
        ("two", 0, "m", 0.7),
    ], "in the plan's order; what was run here replaces what was there"
    assert collect(collect(rows_of(*keys))).equals(collect(rows_of(*keys)))


def test_a_group_has_one_base(repository, monkeypatch):
    older = rows_of(("one", 0, "m"), ("two", 0, "m"), base="older")
    assert collect(older)["base"].unique() == ["base"], "what has been run here is of today's"
    monkeypatch.setattr(ablations, "base_of", lambda: "newer")
    assert len(collect(older)) == 2, "as long as nothing has, the table stays as it is"


def test_an_arm_that_now_means_something_else_is_missing(repository, monkeypatch):
    asked, earlier = started(monkeypatch), rows_of(*((arm, seed, "m") for arm in ("one", "two") for seed in (0, 1)))
    (repository / "ablations.yaml").write_text(PLAN.replace("a.b=1", "a.b=2"))
    assert set(collect(earlier)["arm"]) == {"one"}
    with pytest.raises(RuntimeError, match="2 of 4 experiments did not finish: ablate-g-two-0"):
        ablations.run_missing(earlier)
    assert [(one.arm, one.seed) for one in asked.values()] == [("two", 0), ("two", 1)]


def test_the_table_is_checked_and_read_as_it_was_written(repository):
    path = repository / "ablations.csv"
    with pytest.raises(ValueError, match=r"ablations\.csv is missing; remedy"):
        read_ablations(path)
    good = rows_of(("one", 0, "m"), ("one", 1, "m"), base="12345e67").assign(commit="0012345")
    good.to_csv(path, index=False)
    pd.testing.assert_frame_equal(read_ablations(path), good)
    good.drop(columns="base").to_csv(path, index=False)
    with pytest.raises(
        ValueError, match="must have the columns group, arm, seed, model, type, score, base, experiment, commit"
    ):
        read_ablations(path)
    good.assign(base=[None, "b"]).to_csv(path, index=False)
    with pytest.raises(ValueError, match=r"must have the columns .*, all filled"):
        read_ablations(path)
    good.assign(base=["a", "b"]).to_csv(path, index=False)
    with pytest.raises(ValueError, match="group g has rows of several bases"):
        read_ablations(path)


def test_a_changed_params_file_is_refused(repository):
    (repository / "params.yaml").write_text("seed: 0\nrecipe: v1\n")
    with pytest.raises(ValueError, match=r"differs from the last commit, .*remedy: git checkout"):
        ablations.run_missing(EMPTY)


def started(monkeypatch) -> dict:
    """{name: experiment} of what is started; nothing runs."""
    asked = {}
    monkeypatch.setattr(ablations, "run_experiment", asked.__setitem__)
    return asked


def test_only_what_is_missing_is_run(repository, monkeypatch, capsys):
    asked = started(monkeypatch)
    with pytest.raises(RuntimeError, match=f"3 of 4 experiments did not finish: {NAMES['one', 0]}"):
        ablations.run_missing(EMPTY)
    assert list(asked) == [NAMES["one", 0], NAMES["two", 0], NAMES["two", 1]]
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "4 experiments: 1 finished before, 3 to run"
    assert lines[1] == f"2 of 3: {NAMES['two', 0]} FAILED, 0 s, about 0 s left"


def test_what_the_table_has_of_today_is_not_run_again(repository, monkeypatch):
    asked = started(monkeypatch)
    earlier = rows_of(("one", 0, "m"), ("one", 0, "m@8"))
    older = rows_of(*((arm, seed, "m") for arm in ("one", "two") for seed in (0, 1)), base="older")
    with pytest.raises(RuntimeError, match="2 of 4 experiments did not finish"):
        ablations.run_missing(pd.concat([earlier, older]))
    assert set(asked) == {NAMES["two", 0], NAMES["two", 1]}


def test_arms_are_chosen_by_a_part_of_their_name_or_of_their_title():
    names = {one.name("base"): one for one in experiments(ROOT / "ablations.yaml")}
    titled = {(names[name].group, names[name].arm) for name in chosen(names, "no distil")}
    assert titled == {("students", "default"), ("students", "no distillation")}
    assert len(chosen(names, "students")) == 10 and set(chosen(names, "")) == set(names)
    with pytest.raises(
        ValueError, match="--only 'stage 3' is no part of an arm; remedy: one of these: family: default"
    ):
        chosen(names, "stage 3")


def test_what_an_arm_is_compared_with_runs_too(repository, monkeypatch):
    asked = started(monkeypatch)
    with pytest.raises(RuntimeError, match="2 of 3 experiments did not finish"):
        ablations.run_missing(EMPTY, only="two-1")
    assert set(asked) == {NAMES["one", 0], NAMES["two", 1]}


# What a base is ---------------------------------------------------------------------------------


@pytest.fixture
def inputs(tmp_path, monkeypatch) -> Path:
    """The files that a base is made of, with the embedded sources alone."""
    for name in ("dvc.yaml", "params.yaml", "constraints.txt", "notebooks", "f2llm"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    sources = read_yaml(ROOT / "data" / "sources.yaml")["sources"]
    embedded = [source for source in sources if "embedded" in source["recipes"]]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sources.yaml").write_text(yaml.safe_dump({"sources": embedded}, width=1000))
    monkeypatch.setattr(code, "PACKAGE", tmp_path / "f2llm")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change(path: Path, old: str, new: str) -> None:
    """Replace the first `old` of a file."""
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{path} has no {old!r}"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_code_parameters_data_and_packages_are_another_base(inputs):
    seen = [base_of()]
    for file, old, new in [
        ("params.yaml", "max_steps: 300", "max_steps: 301"),
        ("params.yaml", "max_steps: 2000", "max_steps: 2001"),  # of the recipe v1, which an arm can set
        ("data/sources.yaml", "instruction: ", "instruction: Please "),
        ("constraints.txt", "torch==", "torch==9"),
        ("f2llm/step.py", "from collections", "ANOTHER = 1\nfrom collections"),
        ("notebooks/06_prune.ipynb", "plan = config.prune", "plan  = config.prune"),
    ]:
        change(inputs / file, old, new)
        seen.append(base_of())
        assert seen[-1] not in seen[:-1], f"{old} in {file} does not count"


def test_seed_machine_other_sizes_reports_and_prose_are_the_same_base(inputs):
    first = base_of()
    for file, old, new in [
        ("params.yaml", "seed: 0", "seed: 1"),
        ("params.yaml", "token_budget: 1024", "token_budget: 512"),
        ("params.yaml", "hidden_size: 4096", "hidden_size: 4608"),
        ("params.yaml", "# Every value", "# Each value"),
        ("f2llm/step.py", "from collections", "# A comment.\nfrom collections"),
        ("f2llm/reporting/tables.py", "import pandas", "ANOTHER = 1\nimport pandas"),
        ("f2llm/pipeline/cli.py", "import os", "ANOTHER = 1\nimport os"),
        ("notebooks/09_report.ipynb", "config = boot(size)", "config  = boot(size)"),
        ("notebooks/06_prune.ipynb", "# Pruning", "# To prune"),
    ]:
        change(inputs / file, old, new)
    assert base_of() == first


# Experiments that DVC runs ----------------------------------------------------------------------

STAGES = """stages:
  train: {cmd: python stage.py train, deps: [stage.py], params: [seed], outs: [model.txt]}
  evaluate:
    cmd: python stage.py evaluate
    deps: [stage.py, model.txt]
    params: [seed, recipe, override]
    plots: [results/scores.csv: {cache: false}, results/dims.csv: {cache: false}]
"""
STAGE = """import os, sys, time
from pathlib import Path
import yaml
outside, stage = Path(os.environ["OUTSIDE"]), sys.argv[1]
params = yaml.safe_load(open("params.yaml"))
with (outside / "ran.txt").open("a") as file:
    print(stage, params["seed"], file=file)
print("this is", stage, flush=True)
if stage == "train":
    Path("model.txt").write_text(f"{params['seed']}")
else:
    (outside / "pid.txt").write_text(f"{os.getpid()} {os.getppid()} .")
    while (outside / "wait").exists():
        time.sleep(0.05)
    if (outside / "break").exists() and params["seed"] == 0:
        sys.exit("error: it is broken")
    score = params["seed"] / 10 + params["override"]["a"]["b"] / 100 + (params["recipe"] == "v1") / 1000
    Path("results").mkdir(exist_ok=True)
    Path("results/scores.csv").write_text(f"model,task,type,score\\nm,t,T,{score}\\n")
    Path("results/dims.csv").write_text(f"model,dim,task,type,score\\nm,8,t,T,{score / 2}\\n")
"""
ONE_ARM = """seeds: [0, 1]
groups:
  g: {models: [m, m@8], settings: ["evaluate.dims=[8]"], arms: {one: [recipe=v1, a.b=1]}}
"""


@pytest.fixture
def pipeline(tmp_path, monkeypatch) -> Path:
    """A DVC repository of two stages with a plan of two experiments; a file outside tells what ran."""
    folder, outside = tmp_path / "a repository", tmp_path / "outside"
    (folder / ".dvc").mkdir(parents=True)
    outside.mkdir()
    (folder / ".dvc" / "config").write_text("")
    (folder / ".dvc" / ".gitignore").write_text("/tmp\n/cache\n/config.local\n")
    (folder / ".gitignore").write_text("/model.txt\n/scratch\n")
    (folder / "params.yaml").write_text("seed: 5\nrecipe: v2\noverride: {}\n")
    for name, text in (("ablations.yaml", ONE_ARM), ("dvc.yaml", STAGES), ("stage.py", STAGE)):
        (folder / name).write_text(text)
    git(folder, "init", "-q")
    for key, value in (("user.name", "test"), ("user.email", "test@example.org")):
        git(folder, "config", key, value)
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "base")
    monkeypatch.setenv("OUTSIDE", str(outside))
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setattr(ablations, "base_of", lambda: "base")
    monkeypatch.chdir(folder)
    NAMES.update({(one.arm, one.seed): one.name("base") for one in experiments()})
    return folder


def ablate_until_evaluation(outside: Path) -> tuple[multiprocessing.Process, int, int]:
    """A process that runs the plan, and the ids of its stage `evaluate`, which waits there, and of its DVC."""
    (outside / "wait").touch()

    def work():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
        ablations.run_missing(EMPTY)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    until(lambda: (outside / "pid.txt").exists() and (outside / "pid.txt").read_text().endswith("."))
    stage, dvc, _ = (outside / "pid.txt").read_text().split()
    return process, int(stage), int(dvc)


def until(holds, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def copies(folder: Path) -> list[Path]:
    return list((folder / ".dvc" / "tmp" / "exps" / "standalone").glob("tmp*"))


def scores_by_seed() -> dict:
    return {(row.seed, row.model): row.score for row in collect(EMPTY).itertuples()}


def test_after_a_kill_and_a_failure_the_same_call_ends_with_the_scores_of_an_undisturbed_one(pipeline, tmp_path, capfd):
    outside, name = tmp_path / "outside", NAMES["one", 0]
    process, stage, dvc = ablate_until_evaluation(outside)
    process.kill()
    process.join()
    for pid in (dvc, stage):  # as when the machine goes down; Linux may have ended DVC already
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until(lambda: not is_alive(dvc) and not is_alive(stage))
    (outside / "wait").unlink()
    assert len(copies(pipeline)) == 1 and not finished(), "vacuous: nothing was left behind"

    log = f"scratch/ablate/{name}.log"
    (outside / "break").touch()
    with pytest.raises(RuntimeError, match=f"1 of 2 experiments did not finish: {name}; remedy: read {log}, then the"):
        ablations.run_missing(EMPTY)
    assert "error: it is broken" in Path(log).read_text()
    assert set(finished()) == {NAMES["one", 1]} and not copies(pipeline), "the others run all the same"

    (outside / "break").unlink()
    ablations.run_missing(EMPTY)
    ran = (outside / "ran.txt").read_text().splitlines()
    killed_and_failed = ["train 0", "evaluate 0", "evaluate 0"]
    assert ran == [*killed_and_failed, "train 1", "evaluate 1", "evaluate 0"], "finished stages ran once"
    assert scores_by_seed() == {(0, "m"): 0.011, (0, "m@8"): 0.0055, (1, "m"): 0.111, (1, "m@8"): 0.0555}
    printed = capfd.readouterr().out
    assert f"1 of 2: {name} FAILED, " in printed and f"1 of 1: {name}, " in printed
    assert "this is evaluate" in printed, "the output of stages is shown"
    assert not git(pipeline, "status", "--short"), "the work tree is as it was"


def test_an_interrupt_stops_the_stage_and_leaves_no_copy(pipeline, tmp_path):
    process, stage, dvc = ablate_until_evaluation(tmp_path / "outside")
    os.kill(process.pid, signal.SIGINT)
    process.join(timeout=60)
    assert process.exitcode == 1 and not is_alive(stage) and not is_alive(dvc)
    assert not copies(pipeline) and not finished()
    log = (pipeline / "scratch" / "ablate" / f"{NAMES['one', 0]}.log").read_text()
    assert "this is evaluate" in log and "KeyboardInterrupt" in log


def test_two_calls_at_a_time_are_refused(pipeline):
    with alone_in(Path("scratch/ablate"), "ablation"), pytest.raises(RuntimeError, match="another ablation works in"):
        ablations.run_missing(EMPTY)


def test_what_others_run_outside_the_work_tree_stays(tmp_path):
    """Only killed experiments of ours are removed: a copy of somebody else's may be at work."""
    folder, kept = tmp_path / "exps", []
    for name, root in (("ablate-g-one-0-abcdef", "tmpours"), ("ablated", "tmpother"), (None, "tmpnone")):
        (folder / "standalone" / root).mkdir(parents=True)
        (folder / "run" / root).mkdir(parents=True)
        mark = folder / "run" / root / f"{root}.run"
        mark.write_text(json.dumps({"name": name, "root_dir": f"/anywhere/{root}"}))
        kept += [mark.parent, folder / "standalone" / root] if root != "tmpours" else []
    (folder / "run" / "tmpnone" / "half.run").write_text('{"name": "ab')
    ablations.remove_killed(folder)
    assert sorted(path for part in ("run", "standalone") for path in (folder / part).iterdir()) == sorted(kept)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process that its parent is gone")
def test_a_stage_ends_with_a_dvc_that_is_killed(tmp_path, monkeypatch):
    path, context = tmp_path / "pid.txt", multiprocessing.get_context("fork")

    def work():
        path.write_text(f"{os.getpid()} .")
        time.sleep(120)

    def dvc():
        stage = context.Process(target=cli.run, args=("any",))
        stage.start()
        stage.join()

    monkeypatch.setattr(cli, "load_config", work)
    monkeypatch.setenv("DVC_STAGE", "any")
    parent = context.Process(target=dvc)
    parent.start()
    until(lambda: path.exists() and path.read_text().endswith("."))
    stage = int(path.read_text().split()[0])
    assert is_alive(stage)
    parent.kill()
    parent.join()
    until(lambda: not is_alive(stage), seconds=20)
