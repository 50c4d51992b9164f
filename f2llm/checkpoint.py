"""Folders that are complete or not there, checkpoints among them, and a look ahead: can they be written at all?

A checkpoint is a folder step-00000100 with weights and optimizer state as safetensors, what else training needs to go
on as JSON, and a manifest of sizes and hashes. No pickle is ever written or read.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Tensor

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)


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
        with clear_errors(path):
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
        with clear_errors(path, under=new):
            yield new
        with clear_errors(path):
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
def clear_errors(path: Path, under: Path | None = None):
    """An error of the disk about `path` says what was to be written and what to do; any other passes.

    under: where the block writes; an error about a file elsewhere passes, unless the disk is full.
    """
    try:
        yield
    except Exception as error:
        number, file = _system_error(error), getattr(error, "filename", None)
        elsewhere = under and file and not Path(str(file)).is_relative_to(under)
        if number is None or (elsewhere and number != errno.ENOSPC):
            raise
        raise RuntimeError(
            f"cannot write {path}: {os.strerror(number)}; what was there before is kept. "
            "remedy: free disk space, or make the folder writable"
        ) from error


def _system_error(error: Exception) -> int | None:
    """The system's number of an error; safetensors and tokenizers have it in their text only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found and int(found[1]) in DISK_ERRORS else None


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
    """Write the checkpoint of a step: complete or invisible. The `keep` newest until this step stay."""
    folder = Path(folder)
    with whole_folder(_path(folder, step)) as new:
        for name, tensors in (("model.safetensors", weights), ("optimizer.safetensors", moments)):
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, new / name)
        (new / "state.json").write_text(json.dumps({"step": step, **state}))
        files = {name: {"bytes": (new / name).stat().st_size, "sha256": sha256(new / name)} for name in FILES}
        (new / "manifest.json").write_text(json.dumps({"training": folder.name, "files": files}, indent=1))
    older = [other for other in steps(folder) if other <= step]  # a later one was not whole: it is no replacement
    for left in [*folder.glob(".step-*"), *(_path(folder, other) for other in older[:-keep])]:
        shutil.rmtree(left, ignore_errors=True)


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


def sha256(file: Path) -> str:
    """Hash of a file, read in pieces."""
    with Path(file).open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def alone_in(folder: Path, work: str = "training"):
    """No other process does this work in the folder while the block runs; the system releases it when one dies."""
    lock = FileLock(folder / ".lock")
    try:
        with clear_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
    except Timeout:
        raise RuntimeError(
            f"another {work} works in {folder}; remedy: wait for it or stop it, two would overwrite each other"
        ) from None
    try:
        yield
    finally:
        lock.release()


def keyed_folder(parent: Path, name: str, facts: dict[str, dict]) -> Path:
    """parent/name-<hash of facts>, with the facts in it; says what is different from other folders of that name."""
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
                f"{name} starts anew: an interrupted training in {other} had other {', '.join(changed)}. "
                "It goes on if they are put back; otherwise the folder can be deleted",
                flush=True,
            )
    with clear_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "facts.json").exists():
            whole = folder / f".facts.json.{os.getpid()}"
            whole.write_text(text)
            whole.rename(folder / "facts.json")
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
    """The model of this training is in place: `clear_finished` may remove the folder."""
    with clear_errors(folder):
        (folder / "finished").touch()


def clear_finished(parent: Path) -> None:
    """Remove the folders of trainings whose models are in place."""
    for mark in Path(parent).glob("*/finished"):
        for checkpoint in mark.parent.glob("step-*"):  # before the mark: half a folder must not look interrupted
            shutil.rmtree(checkpoint, ignore_errors=True)
        shutil.rmtree(mark.parent, ignore_errors=True)
