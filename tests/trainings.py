"""Trainings that meet a fault at a chosen call: killed, starved, held up. Not a test itself.

One process imports everything and forks a training per order, since imports take longer than a tiny training. It reads
orders as lines of JSON: {"start": folder, "stage": name, "fault": {...}} is answered by a process id, {"wait": id} by
its exit status (below 0: the signal that ended it) and its output. The folder holds config.pickle.
"""

import importlib
import inspect
import json
import os
import pickle
import resource
import signal
import sys
import time
from pathlib import Path

import torch

from f2llm import train


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_before(call):
    die()


def die_after(call):
    """A generator gives its first item before."""
    result = call()
    if not inspect.isgenerator(result):
        die()

    def first():
        yield next(result)
        die()

    return first()


def die_within(call):
    """Half of the file is written, or one of the folder's files is removed."""
    arguments = inspect.currentframe().f_back.f_locals["arguments"]
    (path,) = (argument for argument in arguments if isinstance(argument, Path))
    if path.is_dir():
        min(path.iterdir()).unlink()
    else:
        call()
        os.truncate(path, path.stat().st_size // 2)
    die()


def not_a_number(call):
    result = call()
    return {name: value * torch.nan for name, value in result.items()} if isinstance(result, dict) else float("inf")


def large_files_fail(call):
    """From now on no file grows beyond 100 bytes; the system says EFBIG where a full disk says ENOSPC."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return call()


def fill_the_disk(call):
    with Path("scratch/filler").open("wb", buffering=0) as file:
        for size in (2**16, 2**12):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass
    return call()


def wait_for_go(call):
    Path("waits").touch()
    end = time.monotonic() + 60
    while not Path("go").exists():
        assert time.monotonic() < end, "nobody said go"
        time.sleep(0.01)
    return call()


def strike(at: str, do: str, number: int = 1, text: str = "") -> None:
    """Let `do` take the place of the number-th call of `at` ("module:name") among whose arguments one holds `text`."""
    module, _, path = at.partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    original, seen = getattr(owner, name), 0

    def replacement(*arguments, **options):
        nonlocal seen
        seen += any(text in str(argument) for argument in arguments) if text else 1
        if seen != number:
            return original(*arguments, **options)
        seen += 1
        return globals()[do](lambda: original(*arguments, **options))

    setattr(owner, name, replacement)


def work(order: dict) -> None:
    """The command itself, in a folder of the order's."""
    os.chdir(order["start"])
    config = pickle.loads(Path("config.pickle").read_bytes())
    train.load_config = lambda size: config
    sys.argv = ["train", order["stage"]]
    if order["fault"]:
        strike(**order["fault"])
    train.main()


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
            _, status = os.waitpid(order["wait"], 0)
            answer = [os.waitstatus_to_exitcode(status), text]
        else:
            answer, reading = start(order)
            outputs[answer] = reading
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(sys.stdin, sys.stdout)
