"""Checkpoints of a training: complete or invisible.

A checkpoint is a folder step-00000100 with weights and optimizer state as safetensors, what else training needs to
resume as JSON, and a manifest of sizes and hashes. Weights and optimizer state are a file each, or a file for each of
several processes that hold a part of both. No pickle is ever written or read.
"""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter

from .files import clear_errors, sha256, whole_file, whole_folder

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")  # of one that a single process writes
STATE = "state.json"


def save(
    folder: Path, step: int, weights: dict[str, Tensor], optimizer_state: dict[str, Tensor], state: dict, keep: int = 2
) -> None:
    """Write the checkpoint of a step, complete or not at all; of earlier ones keep the newest, `keep` in all."""
    with being_written(folder, step) as new:
        for name, tensors in zip(FILES[:2], (weights, optimizer_state), strict=True):
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, new / name)
        seal(new, step, state, {name: facts_of(new / name) for name in FILES[:2]})
    forget(folder, step, keep)


def being_written(folder: Path, step: int) -> AbstractContextManager[Path]:
    """The folder to write a checkpoint's files into, which appears under its name when the block ends without error."""
    return whole_folder(path_of(folder, step))


def write_shard(new: Path, tensors: dict[str, Tensor], group: ProcessGroup) -> dict[str, dict]:
    """Write this process's part of sharded tensors into a folder, one file of each process; {its name: its facts}.

    All processes of the group call it together; a RuntimeError in all of them if one cannot write.
    """
    try:
        with only_our_warnings():
            dcp.save(
                tensors, storage_writer=HuggingFaceStorageWriter(str(new), save_distributed=True), process_group=group
            )
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        raise RuntimeError(
            f"process {rank} cannot write its part of {new.parent / new.name.split('.')[1]}: {reason}; the checkpoint "
            "before it is kept. remedy: free disk space, or make the folder writable for all processes"
        ) from None
    own = new / f"shard-{dist.get_rank(group) + 1:05d}-model-00001-of-00001.safetensors"
    return {own.name: facts_of(own)} if own.exists() else {}


def seal(new: Path, step: int, state: dict, files: dict[str, dict]) -> None:
    """Complete a checkpoint by what is not a tensor, and by the manifest of its files."""
    (new / STATE).write_text(json.dumps({"step": step, **state}))
    files = files | {STATE: facts_of(new / STATE)}
    (new / "manifest.json").write_text(json.dumps({"training": new.parent.name, "files": files}, indent=1))


def facts_of(file: Path) -> dict:
    """Size and hash of a file, for the manifest."""
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def forget(folder: Path, step: int, keep: int = 2) -> None:
    """Remove what other processes left half written, and checkpoints before the newest `keep` up to a step."""
    # A later checkpoint is damaged, or training would have resumed from it.
    older = [other for other in steps(folder) if other <= step]
    for left in [*Path(folder).glob(".step-*"), *(path_of(folder, other) for other in older[:-keep])]:
        shutil.rmtree(left, ignore_errors=True)


def latest(
    folder: Path, found: list[int] | None = None, fault: Callable[[Path], str] | None = None, quiet: bool = False
) -> Path | None:
    """The newest checkpoint that is complete; damaged ones are skipped, and named on the console unless `quiet`.

    found: its steps, if they are known. fault: what is wrong with a checkpoint, where several processes share in
    finding out.
    """
    for step in reversed(steps(folder) if found is None else found):
        path = path_of(folder, step)
        wrong = (fault or fault_of)(path)
        if not wrong:
            return path
        if not quiet:
            print(f"{path} is not a whole checkpoint and is left out: {wrong}", flush=True)
    return None


def read_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors, whole or this process's part of each, from a checkpoint that any number of processes wrote.

    ValueError if one is not in the checkpoint or has another shape there.
    """
    try:
        with only_our_warnings():
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    except CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
        raise ValueError(
            f"{path} is of another training: {reason}; remedy: delete {path.parent}, to start from step 0"
        ) from None


def read_state(path: Path) -> dict:
    """What is not a tensor: the step, and what `save` got as state."""
    return json.loads((path / STATE).read_text())


@contextmanager
def only_our_warnings():
    """Without torch's warnings that checkpoints in one process need no process group, and that its API may change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.distributed")
        yield


def steps(folder: Path) -> list[int]:
    """Steps of which there are checkpoints, in order."""
    names = (path.name for path in Path(folder).glob("step-*") if path.is_dir())
    return sorted(int(name.removeprefix("step-")) for name in names if re.fullmatch(r"step-[0-9]{8,}", name))


def path_of(folder: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return Path(folder) / f"step-{step:08d}"


def fault_of(path: Path, part: int = 0, parts: int = 1) -> str:
    """What is wrong with a checkpoint, '' if nothing. Of its files, every `parts`-th from number `part` on is read."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["training"] != path.parent.name:
            return f"it belongs to {manifest['training']}"
        facts = manifest["files"]
        for number, name in enumerate(sorted({*facts, STATE})):
            size = (path / name).stat().st_size
            if size != facts[name]["bytes"]:
                return f"{name} has {size} bytes, not the {facts[name]['bytes']} of its manifest"
            if number % parts == part and sha256(path / name) != facts[name]["sha256"]:
                return f"the content of {name} is not what was written"
        if (found := read_state(path)["step"]) != int(path.name.removeprefix("step-")):
            return f"it says that it is of step {found}"
        if beyond := sorted({file.name for file in path.iterdir()} - {*facts, "manifest.json"}):
            return f"{beyond[0]} is not in its manifest"
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
