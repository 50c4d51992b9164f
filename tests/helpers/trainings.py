"""Trainings that meet a fault at a chosen call: killed, starved, held up. Not a test itself.

One process imports everything, loads the model of its only argument once, since both take longer than a tiny training,
and forks a training per order. Orders are lines of JSON: {"start": folder, "stage": name, "fault": {...}} is answered
by a process id, {"wait": id} by its exit status (below 0: the signal that ended it) and its output. The folder holds
config.pickle.
"""

import ctypes
import importlib
import inspect
import json
import os
import pickle
import resource
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch

from f2llm.batches import HomogeneousBatches
from f2llm.model import Embedder
from f2llm.pipeline import train_stage
from f2llm.store import checkpoint
from f2llm.store.tuples import TupleStore

NO_MOUNT = 77  # exit status: this system lets us mount nothing

# Faults: what takes the place of a call ---------------------------------------------------------


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_before(call: partial):
    die()


def die_after(call: partial):
    """After a generator's first item, if the call makes one."""
    result = call()
    if not inspect.isgenerator(result):
        die()

    def first():
        yield next(result)
        die()

    return first()


def die_within(call: partial):
    """Half of a file is written, or one file of a folder is removed."""
    (path,) = (argument for argument in call.args if isinstance(argument, Path))
    if path.is_dir():
        min(path.iterdir()).unlink()
    else:
        call()
        os.truncate(path, path.stat().st_size // 2)
    die()


def no_number(call: partial):
    """Losses that are nan, or a gradient norm that is infinite."""
    result = call()
    return {name: value * torch.nan for name, value in result.items()} if isinstance(result, dict) else float("inf")


def files_stay_small(call: partial):
    """From now on no file grows beyond 100 bytes: as a full disk, but with "File too large" for a reason."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return call()


def disk_fills(call: partial):
    """Not one byte is left in scratch/."""
    with Path("scratch/filler").open("wb", buffering=0) as file:
        for size in (2**16, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass
    return call()


def wait_for_go(call: partial):
    Path("waits").touch()
    end = time.monotonic() + 60
    while not Path("go").exists():
        assert time.monotonic() < end, "nobody said go"
        time.sleep(0.01)
    return call()


def strike(at: str, do: str, number: int = 1, text: str = "") -> None:
    """Let `do` take the place of the number-th call of `at` ("module:name") of which an argument holds `text`."""
    module, _, path = at.partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    original, count = getattr(owner, name), 0

    def replacement(*arguments, **options):
        nonlocal count
        call = partial(original, *arguments, **options)
        if not any(text in str(argument) for argument in arguments):
            return call()
        count += 1
        return globals()[do](call) if count == number else call()

    setattr(owner, name, replacement)


def mount_scratch(options: str) -> None:
    """scratch/ is a small disk that only this process sees ("size=..."), or nothing can be written there ("ro")."""
    new_mounts, read_only, private = 0x20000, 1, 0x44000  # CLONE_NEWNS, MS_RDONLY, MS_REC | MS_PRIVATE
    system = ctypes.CDLL(None)
    Path("scratch").mkdir(exist_ok=True)
    flags, options = (read_only, "size=1m") if options == "ro" else (0, options)
    if (
        sys.platform != "linux"
        or system.unshare(new_mounts)
        or system.mount(b"none", b"/", None, private, None)
        or system.mount(b"tmpfs", b"scratch", b"tmpfs", flags, options.encode())
    ):
        sys.exit(NO_MOUNT)


# Processes --------------------------------------------------------------------------------------


def work(order: dict) -> None:
    """The command itself, in the order's folder; again: a second time, on a disk with free space."""
    os.chdir(order["start"])
    config = pickle.loads(Path("config.pickle").read_bytes())
    train_stage.load_config = lambda size: config
    sys.argv = ["train", order["stage"]]
    if "mount" in order:
        mount_scratch(order["mount"])
    if order["fault"]:
        strike(**order["fault"])
    if "again" in order:
        try:
            train_stage.main()
        except SystemExit as end:
            (folder,) = Path("scratch/train").iterdir()
            print(f"exit code {end.code}, whole: {checkpoint.latest(folder)}")
        Path("scratch/filler").unlink()  # there, or nothing was filled
    train_stage.main()


def start(order: dict) -> tuple[int, int]:
    """(process id, the end of a pipe with its output)."""
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return process, reading
    code = 1
    try:
        os.dup2(writing, 1), os.dup2(writing, 2)
        work(order)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def serve(orders, answers) -> None:
    outputs = {}
    for line in orders:
        order = json.loads(line)
        if "wait" in order:
            with os.fdopen(outputs.pop(order["wait"]), encoding="utf-8") as output:
                text = output.read()
            answer = [os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), text]
        else:
            answer, reading = start(order)
            outputs[answer] = reading
        print(json.dumps(answer), file=answers, flush=True)


def warm_up(folder: Path) -> None:
    """What a process does slowly the first time; no tensor is computed, for its threads would not outlive a fork."""
    torch.set_num_threads(1)
    config = pickle.loads((folder / "config.pickle").read_bytes())
    store = TupleStore(folder / "data" / "assembled", folder / "data" / "mined")
    HomogeneousBatches(store, config.stage2, seed=0, stage1=False)
    Embedder.load(folder / "models" / "stage1", training=True)


if __name__ == "__main__":
    warm_up(Path(sys.argv[1]))
    serve(sys.stdin, sys.stdout)
