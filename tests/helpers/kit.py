"""A copy of the repository to run DVC in, and commands with this Python. Not a test itself."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import yaml
from conftest import ROOT


def environment() -> dict[str, str]:
    """This Python first in PATH, and a name for git; the copy's f2llm is the one in its folder."""
    own = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}
    names = {f"GIT_{who}_{what}": "test@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    return {**os.environ, **own, **names}


def run(folder: Path, *command: str, check: bool = True) -> str:
    """A command; its output."""
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert not check or done.returncode == 0, f"{command} in {folder}:\n{output}"
    return output


def copy_of_repository(folder: Path, prepare: Callable[[dict], None]) -> None:
    """The working tree's tracked and new files as a repository of one commit; prepare changes params.yaml's values."""
    listed = run(ROOT, "git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    for name in listed:
        if (ROOT / name).is_file() and name != "dvc.lock":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    prepare(params)
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    run(folder, "git", "init", "-q", "-b", "main")
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-qm", "copy")
