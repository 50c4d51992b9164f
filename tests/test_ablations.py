"""Ablations: names, settings that resolve, intervals against scipy, and results out of DVC's references."""

import re
import shutil
import subprocess
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from scipy.stats import ttest_1samp

from f2llm import ablations
from f2llm.ablations import (
    COLUMNS,
    base_of,
    chosen,
    collect,
    compare,
    difference,
    experiments,
    finished,
    first_arms,
    read_ablations,
)
from f2llm.config import overrides_of, resolve


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
        {"group": "g", "arm": arm, "seed": seed, "model": "m", "score": score, "base": "b"}
        for arm, scores in arms.items()
        for seed, score in enumerate(scores)
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
    (tmp_path / "results" / "scores.csv").write_text("model,task,type,score\nm,a,A,0.2\nm,b,A,0.4\nother,a,A,0.9\n")
    (tmp_path / "results" / "dims.csv").write_text(
        "model,dim,task,type,score\nm,8,a,A,0.1\nm,8,b,A,0.2\nm,16,a,A,0.9\n"
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
    whole, short = collect(EMPTY).to_dict("records")
    facts = {"group": "g", "arm": "one", "seed": 1, "base": "base"}
    facts |= {"experiment": NAMES["one", 1], "commit": git(repository, "rev-parse", "--short", "HEAD")}
    assert whole == facts | {"model": "m", "score": pytest.approx(0.3)}
    assert short == facts | {"model": "m@8", "score": pytest.approx(0.15)}


def rows_of(*keys, base="base") -> pd.DataFrame:
    """Rows of the group g, each an arm, a seed and a model."""
    planned = {(one.arm, one.seed): one.name(base) for one in experiments()}
    facts = {"group": "g", "score": 0.7, "base": base, "commit": "1234567"}
    rows = [facts | dict(zip(("arm", "seed", "model"), key)) for key in keys]
    return pd.DataFrame([row | {"experiment": planned.get((row["arm"], row["seed"]), "gone")} for row in rows])[COLUMNS]


def test_what_others_have_run_on_the_same_base_stays_as_long_as_the_plan_names_it(repository):
    keys = [("two", 0, "m"), ("one", 1, "m"), ("one", 0, "m"), ("gone", 0, "m"), ("one", 0, "other")]
    found = collect(rows_of(*keys))
    kept = list(found[["arm", "seed", "model", "score"]].itertuples(index=False, name=None))
    assert kept == [
        ("one", 0, "m", 0.7),
        ("one", 1, "m", pytest.approx(0.3)),
        ("one", 1, "m@8", pytest.approx(0.15)),
        ("two", 0, "m", 0.7),
    ], "in the plan's order; what was run here replaces what was there"
    assert collect(found).equals(found)


def test_a_group_has_one_base(repository, monkeypatch):
    older = rows_of(("one", 0, "m"), ("two", 0, "m"), base="older")
    assert collect(older)["base"].unique() == ["base"], "what has been run here is of today's"
    monkeypatch.setattr(ablations, "base_of", lambda: "newer")
    assert len(collect(older)) == 2, "as long as nothing has, the table stays as it is"


def test_an_arm_that_now_means_something_else_is_missing(repository, monkeypatch):
    asked, earlier = queue_of(monkeypatch), rows_of(*((arm, seed, "m") for arm in ("one", "two") for seed in (0, 1)))
    (repository / "ablations.yaml").write_text(PLAN.replace("a.b=1", "a.b=2"))
    assert set(collect(earlier)["arm"]) == {"one"}
    with pytest.raises(RuntimeError, match="2 of 4 experiments did not finish: ablate-g-two-0"):
        ablations.run_missing(1, earlier)
    assert sum("--queue" in words for words in asked) == 2


def test_the_table_is_checked_and_read_as_it_was_written(repository):
    path = repository / "ablations.csv"
    with pytest.raises(ValueError, match=r"ablations\.csv is missing; remedy"):
        read_ablations(path)
    good = rows_of(("one", 0, "m"), ("one", 1, "m"), base="12345e67").assign(commit="0012345")
    good.to_csv(path, index=False)
    pd.testing.assert_frame_equal(read_ablations(path), good)
    good.drop(columns="base").to_csv(path, index=False)
    with pytest.raises(
        ValueError, match="must have the columns group, arm, seed, model, score, base, experiment, commit"
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
        ablations.run_missing(1, EMPTY)


def queue_of(monkeypatch) -> list[tuple]:
    """What DVC is asked for."""
    asked = []
    monkeypatch.setattr(ablations, "wait_for_workers", lambda names: None)
    monkeypatch.setattr(ablations, "_dvc", lambda *words, **_: asked.append(words) or "")
    return asked


def test_only_what_is_missing_is_queued(repository, monkeypatch, capsys):
    asked = queue_of(monkeypatch)
    with pytest.raises(RuntimeError, match=f"3 of 4 experiments did not finish: {NAMES['one', 0]}"):
        ablations.run_missing(1, EMPTY)
    queued = {words[4]: words[5:] for words in asked if "--queue" in words}
    assert set(queued) == set(NAMES.values()) - {NAMES["one", 1]}
    assert queued[NAMES["two", 1]] == (
        *("-S", "seed=1", "-S", "+override.evaluate.dims=[8]", "-S", "+override.evaluate.only=[m]"),
        *("-S", "recipe=v1", "-S", "+override.a.b=1"),
        "evaluate",
    )
    assert "4 experiments: 1 finished before, 0 under way, 3 to queue" in capsys.readouterr().out


def test_what_the_table_has_of_today_is_not_run_again(repository, monkeypatch):
    asked = queue_of(monkeypatch)
    earlier = rows_of(("one", 0, "m"), ("one", 0, "m@8"))
    older = rows_of(*((arm, seed, "m") for arm in ("one", "two") for seed in (0, 1)), base="older")
    with pytest.raises(RuntimeError, match="2 of 4 experiments did not finish"):
        ablations.run_missing(1, pd.concat([earlier, older]))
    assert {words[4] for words in asked if "--queue" in words} == {NAMES["two", 0], NAMES["two", 1]}


def test_arms_are_chosen_by_a_part_of_their_name_or_of_their_title():
    names = {one.name("base"): one for one in experiments(ROOT / "ablations.yaml")}
    titled = {(names[name].group, names[name].arm) for name in chosen(names, "random weights, no")}
    assert titled == {("students", "default"), ("students", "random weights, no distillation")}
    assert len(chosen(names, "recipes")) == 6 and set(chosen(names, "")) == set(names)
    with pytest.raises(
        ValueError, match="--only 'stage 3' is no part of an arm; remedy: one of these: family: default"
    ):
        chosen(names, "stage 3")


def test_what_an_arm_is_compared_with_runs_too(repository, monkeypatch):
    asked = queue_of(monkeypatch)
    with pytest.raises(RuntimeError, match="2 of 3 experiments did not finish"):
        ablations.run_missing(1, EMPTY, only="two-1")
    assert {words[4] for words in asked if "--queue" in words} == {NAMES["one", 0], NAMES["two", 1]}


def test_the_base_is_that_of_code_and_parameters_but_not_of_machine_seed_or_report(tmp_path, monkeypatch):
    for name in ("dvc.yaml", "params.yaml", "constraints.txt", "f2llm", "notebooks", "data"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    params, seen = (tmp_path / "params.yaml").read_text(), [base_of()]
    for old, new in (("seed: 0", "seed: 1"), ("token_budget: 1024", "token_budget: 512")):
        assert params.count(old) == 1
        (tmp_path / "params.yaml").write_text(params.replace(old, new))
        assert base_of() == seen[0], new
    for name in ("f2llm/report.py", "f2llm/config.py", "notebooks/09_report.ipynb"):
        with (tmp_path / name).open("a") as file:
            file.write("\n")
        assert base_of() == seen[0], name
    (tmp_path / "params.yaml").write_text(params.replace("max_steps: 130", "max_steps: 131"))
    seen.append(base_of())
    with (tmp_path / "f2llm" / "step.py").open("a") as file:
        file.write("# other code\n")
    seen.append(base_of())
    path = tmp_path / "notebooks" / "06_prune.ipynb"
    path.write_text(path.read_text().replace("plan = config.prune", "plan  = config.prune"))
    seen.append(base_of())
    assert len(set(seen)) == 4


STATUS = """Task     Name               Created    Status
ee14175  {one}     12:51 PM   Running
e3fcaaf  unrelated          12:51 PM   Queued
0ddba11  ablate-g-one-0-000000  12:51 PM   Queued
9822e30  {other}     12:50 PM   Success

Worker status: {active} active, {idle} idle
"""


def status_with(active: int, idle: int = 0) -> str:
    return STATUS.format(one=NAMES["one", 0], other=NAMES["one", 1], active=active, idle=idle)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_died_is_queued_again_and_what_still_runs_is_not(repository, monkeypatch, workers):
    asked = []

    def dvc(*words, **_):
        asked.append(words)
        return status_with(workers) if words == ("queue", "status") else ""

    monkeypatch.setattr(ablations, "_dvc", dvc)
    monkeypatch.setattr(ablations, "wait_for_workers", lambda names: None)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(RuntimeError, match=f"did not finish: {NAMES['one', 0]}"):
        ablations.run_missing(1, EMPTY, only="one")
    assert (("queue", "kill", "--force", "ee14175") in asked) == (workers == 0)
    removed = ("ee14175", "0ddba11") if workers == 0 else ("0ddba11",)
    assert ("queue", "remove", *removed) in asked, "what other code has left behind, too"
    assert not any("e3fcaaf" in words for words in asked), "an experiment of somebody else stays in the queue"
    assert any("--queue" in words for words in asked) == (workers == 0)
    assert (("queue", "start", "--jobs", "1") in asked) == (workers == 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_waits_in_the_queue_is_left_to_workers_if_there_are_any(monkeypatch, workers):
    asked = []
    text = "aaaaaa1  one  12:51 PM  Queued\naaaaaa2  two  12:51 PM  Failed\naaaaaa3  other  12:51 PM  Queued\n"
    text += f"\nWorker status: 0 active, {workers} idle\n"
    monkeypatch.setattr(ablations, "_dvc", lambda *words, **_: asked.append(words) or text)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert ablations.clear_leftovers({"one", "two"}, {"one", "two"}) == ({"one"} if workers else set())
    removed = ("aaaaaa2",) if workers else ("aaaaaa1", "aaaaaa2")
    assert asked == [("queue", "status")] * (1 if workers else 3) + [("queue", "remove", *removed)]


def test_a_worker_that_is_late_with_its_answer_is_not_dead(monkeypatch):
    answers = iter([0, 1])
    text = "aaaaaa1  one  12:51 PM  Running\n\nWorker status: {} active, 0 idle\n"
    monkeypatch.setattr(ablations, "_dvc", lambda *_: text.format(next(answers)))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert ablations.clear_leftovers({"one"}, {"one"}) == {"one"}


def test_a_dvc_that_leaves_workers_behind_is_not_waited_for(tmp_path, monkeypatch):
    """Workers outlive `dvc queue start` and keep its output open."""
    worker = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    (tmp_path / "dvc.py").write_text(f"{worker}print('started')\nsys.exit(sys.argv[1] == 'fail' and 'it is broken')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    start = time.monotonic()
    assert ablations._dvc("start") == "started\n"
    with pytest.raises(RuntimeError, match="dvc fail: it is broken; remedy"):
        ablations._dvc("fail")
    assert time.monotonic() - start < 50, "waited for the worker"


def test_waiting_ends_when_all_is_done_or_no_worker_is_left(repository, monkeypatch, capsys):
    base, left = git(repository, "rev-parse", "HEAD"), iter([(1, 0), (0, 1), (1, 0), (0, 0), (0, 0), (0, 0)])

    def dvc(*_):
        workers = next(left)
        if workers == (1, 0):
            git(repository, "update-ref", f"refs/exps/{base[:2]}/{base[2:]}/{NAMES['one', 0]}", "HEAD")
        return status_with(*workers)

    monkeypatch.setattr(ablations, "_dvc", dvc)
    ablations.wait_for_workers([NAMES["one", 0], NAMES["one", 1]], seconds=0)
    assert set(capsys.readouterr().out.splitlines()) == {
        f"1 of 2: {NAMES['one', 0]}",
        f"2 of 2: {NAMES['one', 1]}",
    }
    ablations.wait_for_workers(["never", NAMES["one", 1]], seconds=0)
    assert next(left, None) is None, "silence three times has ended the waiting"
