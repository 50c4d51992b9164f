"""Where the teacher of stage 2 comes from: the hub's mirror, another experiment of this repository, or a folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from .checkpoint import whole_folder
from .config import Config
from .mirror import copy_model


def bring_teacher(config: Config, out: Path) -> None:
    """Put stage 2's teacher into a folder, as `teacher` in params.yaml names it; teacher.json says where it came from.

    none: the folder holds that file alone. hub: from the mirror. experiment: its models/stage2, from DVC's cache.
    """
    kind, _, what = config.teacher.partition(":")
    with whole_folder(out) as folder:
        if kind == "hub":
            repo_id, _, revision = what.rpartition("@")
            copy_model(Path(config.data.mirror), repo_id, revision, folder)
        elif kind == "experiment":
            _copy_from_experiment(what, folder)
        elif kind == "folder":
            if not (Path(what) / "config.json").exists():
                raise ValueError(
                    f"teacher is {config.teacher!r}, but {what} holds no config.json; remedy: another path"
                )
            shutil.copytree(what, folder, dirs_exist_ok=True)
        (folder / "teacher.json").write_text(json.dumps({"teacher": config.teacher}) + "\n")


def _copy_from_experiment(name: str, folder: Path) -> None:
    """models/stage2 of a DVC experiment, branch or commit of this repository; also inside a temporary experiment."""
    repository = os.environ.get("DVC_ROOT", ".")
    got = folder / "got"  # a folder that is there would get a folder stage2 inside
    command = ["-m", "dvc", "get", "--rev", name, "--out", str(got), repository, "models/stage2"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode or not (got / "config.json").exists():
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = reasons[-1].removeprefix("ERROR: ") if reasons else "it has no config.json"
        raise ValueError(
            f"teacher is 'experiment:{name}', but its models/stage2 cannot be had: {reason}; "
            "remedy: a name that `dvc exp show` lists, after `dvc exp pull` if it was run elsewhere"
        )
    for path in got.iterdir():
        path.rename(folder / path.name)
    got.rmdir()
