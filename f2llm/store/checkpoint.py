"""Checkpoints of a training: complete or invisible.

A checkpoint is a folder step-00000100 with weights and optimizer state as safetensors, what else training needs to
resume as JSON, and a manifest of sizes and hashes. No pickle is ever written or read.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from .files import clear_errors, sha256, whole_file, whole_folder

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


def save(
    folder: Path, step: int, weights: dict[str, Tensor], optimizer_state: dict[str, Tensor], state: dict, keep: int = 2
):
    """Write the checkpoint of a step, complete or not at all; of earlier ones keep the newest, `keep` in all."""
    folder = Path(folder)
    with whole_folder(_path(folder, step)) as new:
        for name, tensors in (("model.safetensors", weights), ("optimizer.safetensors", optimizer_state)):
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, new / name)
        (new / "state.json").write_text(json.dumps({"step": step, **state}))
        files = {name: {"bytes": (new / name).stat().st_size, "sha256": sha256(new / name)} for name in FILES}
        (new / "manifest.json").write_text(json.dumps({"training": folder.name, "files": files}, indent=1))
    # A later checkpoint is damaged, or training would have resumed from it.
    older = [other for other in steps(folder) if other <= step]
    for left in [*folder.glob(".step-*"), *(_path(folder, other) for other in older[:-keep])]:
        shutil.rmtree(left, ignore_errors=True)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint that is complete; damaged ones are named on the console and skipped."""
    for step in reversed(steps(folder)):
        path = _path(folder, step)
        if fault := _fault(path):
            print(f"{path} is not a whole checkpoint and is left out: {fault}", flush=True)
        else:
            return path
    return None


def restore(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """(weights, optimizer state, state) of a checkpoint that `latest` returned."""
    weights, optimizer_state = (load_file(path / name) for name in FILES[:2])
    return weights, optimizer_state, json.loads((path / "state.json").read_text())


def steps(folder: Path) -> list[int]:
    """Steps of which there are checkpoints, in order."""
    names = (path.name for path in Path(folder).glob("step-*") if path.is_dir())
    return sorted(int(name.removeprefix("step-")) for name in names if re.fullmatch(r"step-[0-9]{8,}", name))


def _path(folder: Path, step: int) -> Path:
    return Path(folder) / f"step-{step:08d}"


def _fault(path: Path) -> str:
    """What is wrong with a checkpoint, '' if nothing."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["training"] != path.parent.name:
            return f"it belongs to {manifest['training']}"
        facts = manifest["files"]
        for name in FILES:
            size = (path / name).stat().st_size
            if size != facts[name]["bytes"]:
                return f"{name} has {size} bytes, not the {facts[name]['bytes']} of its manifest"
            if sha256(path / name) != facts[name]["sha256"]:
                return f"the content of {name} is not what was written"
        if (found := json.loads((path / "state.json").read_text())["step"]) != int(path.name.removeprefix("step-")):
            return f"it says that it is of step {found}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def keyed_folder(parent: Path, name: str, facts: dict[str, dict]) -> Path:
    """parent/name-<hash of facts>; if an interrupted training of that name had other facts, prints which differ."""
    text = json.dumps(facts, indent=1, sort_keys=True)
    folder = parent / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    others = [] if folder.exists() else sorted(parent.glob(f"{name}-????????????"))
    for other in others:
        if steps(other) and not (other / "finished").exists():
            try:
                changed = _differences(json.loads((other / "facts.json").read_text()), json.loads(text))
            except (OSError, ValueError, AttributeError):
                changed = ["facts.json, which cannot be read"]
            print(
                f"{name} starts from step 0: an interrupted training in {other} had other {', '.join(changed)}. "
                "It resumes if they are put back; otherwise the folder can be deleted",
                flush=True,
            )
    with clear_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "facts.json").exists():
            with whole_file(folder / "facts.json") as whole:
                whole.write_text(text)
    return folder


def _differences(old: dict, new: dict, where: str = "") -> list[str]:
    """Dotted names of what is different between two tables."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        one, other = old.get(key), new.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += _differences(one, other, f"{where}{key}.")
        elif one != other:
            found.append(f"{where}{key}")
    return found


def mark_finished(folder: Path) -> None:
    """Mark a training whose model is written: `clear_finished` may remove its folder."""
    with clear_errors(folder):
        (folder / "finished").touch()


def clear_finished(parent: Path) -> None:
    """Remove the folders of trainings whose models are written."""
    for mark in Path(parent).glob("*/finished"):
        for checkpoint in mark.parent.glob("step-*"):  # first: without its mark a folder looks interrupted
            shutil.rmtree(checkpoint, ignore_errors=True)
        shutil.rmtree(mark.parent, ignore_errors=True)
