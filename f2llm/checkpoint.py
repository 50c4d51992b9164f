"""Folders that are complete or not there, checkpoints among them, and a look ahead: can they be written at all?

A checkpoint is a folder step-00000100 with weights and optimizer state as safetensors, what else training needs to go
on as JSON, and a manifest of sizes and hashes. No pickle is ever written or read.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


def require_writable(folders: list[Path], free_mib: int) -> None:
    """Raise a RuntimeError now, rather than after an hour, when a folder cannot take the results."""
    for folder in map(Path, folders):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"x")
            free = shutil.disk_usage(folder).free // 2**20
        except OSError as error:
            raise RuntimeError(
                f"cannot write into {folder}: {error.strerror or error}; nothing was run. "
                "remedy: make the folder writable, or free disk space"
            ) from error
        if free < free_mib:
            raise RuntimeError(
                f"only {free} MiB are free for {folder}, but at least {free_mib} are needed; nothing was run. "
                "remedy: free disk space"
            )


@contextmanager
def whole_folder(path: Path):
    """A folder to write into that takes the place of `path` only when the block ends without an error.

    The old folder is moved aside and removed as a whole, so nothing is ever written through a link into the
    DVC cache, and an error leaves it as it was.
    """
    path = Path(path)
    new, old = (path.with_name(f".{path.name}.{state}") for state in ("writing", "old"))
    try:
        with _clear_errors(path):
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
        with _clear_errors(path, under=new):
            yield new
        with _clear_errors(path):
            for file in (*new.rglob("*"), new):
                _flush(file)
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():
                path.rename(old)
            new.rename(path)
            _flush(path.parent)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


@contextmanager
def _clear_errors(path: Path, under: Path | None = None):
    """An OSError about `path` says what was to be written and what to do; one about another file passes."""
    try:
        yield
    except OSError as error:
        elsewhere = under and error.filename and not Path(str(error.filename)).is_relative_to(under)
        if elsewhere and error.errno != errno.ENOSPC:
            raise
        raise RuntimeError(
            f"cannot write {path}: {error.strerror or error}; what was there before is kept. "
            "remedy: free disk space, or make the folder writable"
        ) from error


def _flush(file: Path) -> None:
    """Force one file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Checkpoints ------------------------------------------------------------------------------------

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


def save(folder: Path, step: int, weights: dict[str, Tensor], moments: dict[str, Tensor], state: dict, keep: int = 2):
    """Write the checkpoint of a step: complete or invisible. The `keep` newest stay."""
    with whole_folder(_path(folder, step)) as new:
        for name, tensors in (("model.safetensors", weights), ("optimizer.safetensors", moments)):
            with _disk_errors():
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, new / name)
        (new / "state.json").write_text(json.dumps({"step": step, **state}))
        facts = {name: {"bytes": (new / name).stat().st_size, "sha256": sha256(new / name)} for name in FILES}
        (new / "manifest.json").write_text(json.dumps(facts, indent=1))
    for old in steps(folder)[:-keep]:
        shutil.rmtree(_path(folder, old), ignore_errors=True)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; one that is not is named and left out."""
    for step in reversed(steps(folder)):
        path = _path(folder, step)
        if fault := _fault(path):
            print(f"{path} is not a whole checkpoint and is left out: {fault}", flush=True)
        else:
            return path
    return None


def restore(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """(weights, moments, state) of a checkpoint that `latest` found whole."""
    weights, moments = (load_file(path / name) for name in FILES[:2])
    return weights, moments, json.loads((path / "state.json").read_text())


def steps(folder: Path) -> list[int]:
    """Steps of which there are checkpoints, in order."""
    found = (path.name.removeprefix("step-") for path in Path(folder).glob("step-*") if path.is_dir())
    return sorted(int(name) for name in found if name.isdigit())


def _path(folder: Path, step: int) -> Path:
    return Path(folder) / f"step-{step:08d}"


def _fault(path: Path) -> str:
    """What is wrong with a checkpoint, '' if nothing."""
    try:
        facts = json.loads((path / "manifest.json").read_text())
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


def sha256(file: Path) -> str:
    """Hash of a file, read in pieces."""
    with Path(file).open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def _disk_errors():
    """safetensors reports a full disk or a folder without rights as its own error: make it the system's."""
    try:
        yield
    except SafetensorError as error:
        code = errno.ENOSPC if "No space" in str(error) or "os error 28" in str(error) else errno.EIO
        raise OSError(code, str(error)) from error


@contextmanager
def alone_in(folder: Path):
    """No other training uses this folder while the block runs; the system releases it when the process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise RuntimeError(
            f"another training works in {folder}; remedy: wait for it or stop it, two would overwrite each other"
        ) from None
    try:
        yield
    finally:
        lock.release()


def keyed_folder(parent: Path, name: str, facts: dict[str, dict]) -> Path:
    """parent/name-<hash of facts>, with the facts in it; says what is different from other folders of that name."""
    text = json.dumps(facts, indent=1, sort_keys=True)
    folder = parent / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    for other in sorted(parent.glob(f"{name}-????????????")):
        if other != folder and not folder.exists() and not (other / "finished").exists() and steps(other):
            try:
                changed = _differences(json.loads((other / "facts.json").read_text()), facts)
            except (OSError, ValueError):
                changed = ["facts.json, which cannot be read"]
            print(
                f"{name} starts anew: an interrupted training in {other} had other {', '.join(changed)}. "
                "It goes on if they are put back; otherwise the folder can be deleted",
                flush=True,
            )
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "facts.json").exists():
        (folder / "facts.json").write_text(text)
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


def clear_finished(parent: Path) -> None:
    """Remove the folders of trainings whose models are in place."""
    for mark in Path(parent).glob("*/finished"):
        shutil.rmtree(mark.parent, ignore_errors=True)
