"""Ablations: names, settings that resolve, intervals against scipy, and results out of DVC's references."""

import re
import subprocess
import time

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from scipy.stats import ttest_1samp

from f2llm import ablations
from f2llm.ablations import collect, compare, difference, experiments, finished
from f2llm.config import overrides_of, resolve


def test_every_arm_resolves_and_changes_something(params):
    found = experiments(ROOT / "ablations.yaml")
    assert len({one.name for one in found}) == len(found) > 30, "vacuous: few experiments"
    resolved = {}
    for one in found:
        resolved[one.group, one.arm] = resolve(params, "nano", overrides_of(list(one.settings)))
    first = {}
    for (group, arm), config in resolved.items():
        base = first.setdefault(group, config)
        assert arm == "default" or config != base, f"{arm} changes nothing"
    assert {one.seed for one in found} >= {0, 1, 2}


def test_a_name_is_one_that_git_and_dvc_take():
    for one in experiments(ROOT / "ablations.yaml"):
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", one.name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds: [1]\ngroups: {}", "two different ones or more"),
        ("seeds: [1, 1]\ngroups: {}", "two different ones or more"),
        ("seeds: [1, 2]\ngroups: {a: {arms: {}}}", "group a must have the keys"),
        ("seeds: [1, 2]\ngroups: {a: {models: [x], settings: [], arms: {one: [], ONE: []}}}", "two arms have the same"),
    ],
)
def test_a_wrong_plan_is_named(tmp_path, text, message):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        experiments(tmp_path / "plan.yaml")


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


def scores_of(**arms) -> pd.DataFrame:
    rows = [
        {"group": "g", "arm": arm, "seed": seed, "model": "m", "score": score}
        for arm, scores in arms.items()
        for seed, score in enumerate(scores)
    ]
    return pd.DataFrame(rows)


def test_arms_are_compared_seed_by_seed():
    """Seeds differ by ten points, the arm by one in each: paired, that is no noise."""
    table = compare(scores_of(default=(0.2, 0.3, 0.4), worse=(0.19, 0.2901, 0.3899))).set_index("arm")
    assert table.loc["worse", "difference"] == pytest.approx(-1, abs=0.01)
    assert table.loc["worse", "verdict"] == "lower"
    assert table.loc["default", "mean"] == pytest.approx(30) and table.loc["default", "sd"] == pytest.approx(10)
    assert np.isnan(table.loc["default", "difference"]), "the first arm is not compared with itself"


def test_seeds_that_one_arm_lacks_are_left_out_of_the_difference():
    table = compare(scores_of(default=(0.2, 0.3, 0.9), short=(0.21, 0.31))).set_index("arm")
    assert table.loc["short", "difference"] == pytest.approx(1) and table.loc["short", "seeds"] == 2


# Results in git ---------------------------------------------------------------------------------


def git(folder, *words: str) -> str:
    own = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    return subprocess.run(["git", *own, *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with two experiments as DVC leaves them, one of them of the plan."""
    (tmp_path / "ablations.yaml").write_text("seeds: [0, 1]\ngroups: {g: {models: [m], settings: [], arms: {one: []}}}")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "base")
    base = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "scores.csv").write_text("model,task,type,score\nm,a,A,0.2\nm,b,A,0.4\nother,a,A,0.9\n")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "experiment")
    for name in ("ablate-g-one-1", "unrelated"):
        git(tmp_path, "update-ref", f"refs/exps/{base[:2]}/{base[2:]}/{name}", "HEAD")
    git(tmp_path, "update-ref", "refs/exps/stash", "HEAD")
    git(tmp_path, "reset", "-q", "--hard", base)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_scores_come_from_the_experiments_of_the_plan_that_have_run(repository):
    assert set(finished()) == {"ablate-g-one-1", "unrelated"}
    (row,) = collect().to_dict("records")
    base = git(repository, "rev-parse", "--short", "HEAD")
    assert row == {"group": "g", "arm": "one", "seed": 1, "model": "m", "score": pytest.approx(0.3), "commit": base}


def test_only_what_is_missing_is_queued(repository, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(ablations, "wait_for_workers", lambda names: None)
    monkeypatch.setattr(ablations, "_dvc", lambda *words, **_: asked.append(words) or "")
    with pytest.raises(RuntimeError, match="1 of 2 experiments did not finish: ablate-g-one-0"):
        ablations.run_missing(jobs=1)
    queued = [words for words in asked if "--queue" in words]
    assert len(queued) == 1 and "ablate-g-one-0" in queued[0] and "seed=0" in queued[0]
    assert "2 experiments: 1 finished before, 0 running, 1 to queue" in capsys.readouterr().out


STATUS = """Task     Name               Created    Status
ee14175  ablate-g-one-0     12:51 PM   Running
e3fcaaf  unrelated          12:51 PM   Queued
9822e30  ablate-g-one-1     12:50 PM   Success

Worker status: {} active, 0 idle
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_what_died_is_queued_again_and_what_still_runs_is_not(repository, monkeypatch, workers):
    asked = []

    def dvc(*words, **_):
        asked.append(words)
        return STATUS.format(workers) if words == ("queue", "status") else ""

    monkeypatch.setattr(ablations, "_dvc", dvc)
    monkeypatch.setattr(ablations, "wait_for_workers", lambda names: None)
    with pytest.raises(RuntimeError, match="did not finish: ablate-g-one-0"):
        ablations.run_missing(jobs=1)
    assert (("queue", "kill", "--force", "ee14175") in asked) == (workers == 0)
    assert (("queue", "remove", "ee14175") in asked) == (workers == 0)
    assert not any("e3fcaaf" in words for words in asked), "an experiment of somebody else stays in the queue"
    assert any("--queue" in words for words in asked) == (workers == 0)
    assert (("queue", "start", "--jobs", "1") in asked) == (workers == 0)


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
    base, left = git(repository, "rev-parse", "HEAD"), iter([1, 1, 0])

    def dvc(*_):
        workers = next(left)
        if workers:
            git(repository, "update-ref", f"refs/exps/{base[:2]}/{base[2:]}/ablate-g-one-0", "HEAD")
        return STATUS.format(workers)

    monkeypatch.setattr(ablations, "_dvc", dvc)
    ablations.wait_for_workers(["ablate-g-one-0", "ablate-g-one-1"], seconds=0)
    assert capsys.readouterr().out == "2 of 2: ablate-g-one-0\n"
    ablations.wait_for_workers(["never", "ablate-g-one-1"], seconds=0)
    assert next(left, None) is None, "the last answer, no worker, has ended the waiting"
