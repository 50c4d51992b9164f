"""Where stage 2's teacher comes from: nowhere, a folder, another experiment; and what is said if it cannot be had."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from f2llm.model import Embedder
from f2llm.teacher import bring_teacher


def test_no_teacher_leaves_a_folder_that_says_so_and_nothing_of_an_earlier_one(config, embedder, tmp_path):
    embedder.save(tmp_path / "teacher")
    bring_teacher(replace(config, teacher="none"), tmp_path / "teacher")
    assert [path.name for path in (tmp_path / "teacher").iterdir()] == ["teacher.json"]
    assert json.loads((tmp_path / "teacher" / "teacher.json").read_text()) == {"teacher": "none"}


def test_a_folder_is_copied_whole_and_loads_as_the_same_model(config, embedder, tmp_path):
    embedder.save(tmp_path / "larger")
    named = f"folder:{tmp_path / 'larger'}"
    for _ in range(2):  # also over an earlier one
        bring_teacher(replace(config, teacher=named), tmp_path / "models" / "teacher")
    brought = Embedder.load(tmp_path / "models" / "teacher")
    assert all(torch.equal(w, brought.model.state_dict()[n]) for n, w in embedder.model.state_dict().items())
    assert brought.max_tokens == embedder.max_tokens
    assert json.loads((tmp_path / "models" / "teacher" / "teacher.json").read_text()) == {"teacher": named}
    assert not (tmp_path / "larger" / "teacher.json").exists()


def test_a_copied_teacher_says_whose_it_is_now(config, embedder, tmp_path):
    embedder.save(tmp_path / "larger")
    (tmp_path / "larger" / "teacher.json").write_text('{"teacher": "none"}')
    named = f"folder:{tmp_path / 'larger'}"
    bring_teacher(replace(config, teacher=named), tmp_path / "teacher")
    assert json.loads((tmp_path / "teacher" / "teacher.json").read_text()) == {"teacher": named}


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_without_a_model_is_an_error_and_the_old_teacher_stays(config, embedder, tmp_path, there):
    embedder.save(tmp_path / "teacher")
    before = {path.name: path.read_bytes() for path in (tmp_path / "teacher").iterdir() if path.is_file()}
    if there:
        (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"teacher is 'folder:.*empty', but \S*empty holds no config.json; remedy"):
        bring_teacher(replace(config, teacher=f"folder:{tmp_path / 'empty'}"), tmp_path / "teacher")
    after = {path.name: path.read_bytes() for path in (tmp_path / "teacher").iterdir() if path.is_file()}
    assert before == after and "model.safetensors" in before
    assert not list(tmp_path.glob(".*")), "nothing half is left"


# Experiments ------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of DVC with one commit, in which models/stage2 is no output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    for name in ("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(name, "test@localhost")
    git = ["git", "-c", "commit.gpgsign=false"]
    commands = [[*git, "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"], [*git, "add", "."]]
    for command in [*commands, [*git, "commit", "-q", "-m", "first"], [*git, "branch", "other"]]:
        subprocess.run(command, check=True, env=os.environ | {"DVC_NO_ANALYTICS": "1"})
    return tmp_path


@pytest.mark.pipeline
@pytest.mark.parametrize("name", ["no-such-experiment", "other"], ids=["unknown", "without a model"])
def test_an_experiment_whose_model_cannot_be_had_is_named_with_the_reason(config, repository, name):
    with pytest.raises(ValueError) as error:
        bring_teacher(replace(config, teacher=f"experiment:{name}"), repository / "models" / "teacher")
    message = str(error.value)
    assert message.startswith(f"teacher is 'experiment:{name}', but its models/stage2 cannot be had: ")
    remedy = "; remedy: a name that `dvc exp show` lists, after `dvc exp pull` if it was run elsewhere"
    assert message.endswith(remedy) and len(message.removesuffix(remedy)) > message.index("had: ") + len("had: ")
    assert "\n" not in message
    assert not (repository / "models" / "teacher").exists()


@pytest.mark.pipeline
def test_outside_of_a_repository_an_experiment_is_the_same_error(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    with pytest.raises(ValueError, match=r"experiment:large', but its models/stage2 cannot be had: .+; remedy"):
        bring_teacher(replace(config, teacher="experiment:large"), tmp_path / "teacher")


@pytest.mark.pipeline
def test_the_stage_2_model_of_another_revision_arrives_whole_also_over_an_earlier_teacher(config, embedder, repository):
    embedder.save(repository / "models" / "stage2")
    own = os.environ | {"DVC_NO_ANALYTICS": "1"}
    dvc, git = [sys.executable, "-m", "dvc"], ["git", "-c", "commit.gpgsign=false"]
    for command in ([*dvc, "add", "-q", "models/stage2"], [*git, "add", "."], [*git, "commit", "-qm", "model"]):
        subprocess.run(command, check=True, env=own)
    subprocess.run([*git, "branch", "large"], check=True)
    subprocess.run([*git, "rm", "-q", "models/stage2.dvc"], check=True)
    for _ in range(2):
        bring_teacher(replace(config, teacher="experiment:large"), repository / "models" / "teacher")
    brought = Embedder.load(repository / "models" / "teacher").model.state_dict()
    assert all(torch.equal(weight, brought[name]) for name, weight in embedder.model.state_dict().items())
    assert not [path for path in (repository / "models" / "teacher").iterdir() if path.name in ("got", "stage2")]
