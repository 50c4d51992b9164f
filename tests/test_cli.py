"""The command line: what it writes, and that a mistake is one line."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from f2llm.config import read_yaml


def f2llm(*arguments, cwd=ROOT):
    """The finished process of `python -m f2llm ...`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "f2llm", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_sizes_are_listed_with_their_shape_and_students(config, params):
    done = f2llm("sizes")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == list(params["sizes"])
    nano = next(line for line in lines if line.startswith("nano"))
    assert f"x {config.backbone.hidden_dim}" in nano
    assert all(student in nano for student in config.prune.students)
    assert nano.endswith("<- model.size") == (params["model"]["size"] == "nano")


def test_config_writes_the_resolved_configuration(config, tmp_path):
    assert f2llm("config", "nano", tmp_path / "build" / "config.yaml").returncode == 0
    values = read_yaml(tmp_path / "build" / "config.yaml")
    assert values["name"] == "nano"
    assert values["stage1"]["learning_rate"] == config.stage1.learning_rate


@pytest.mark.parametrize(
    ("arguments", "cwd", "message"),
    [
        (("config", "nanno", "x"), ROOT, "error: model.size is 'nanno'"),
        (("code", "absent.ipynb", "x"), None, "error: absent.ipynb is missing; remedy"),
        (("sizes",), None, "error: no dvc.yaml in"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(tmp_path, arguments, cwd, message):
    done = f2llm(*arguments, cwd=cwd or tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(message)
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (ROOT / "x").exists()
