"""Starts a training module as a separate process and prints its log in the calling notebook cell."""

import ctypes
import os
import signal
import subprocess
import sys

import torch


def launch(module: str, *arguments: str, nproc: int = 1) -> None:
    """Run `python -m module arguments` and print its output line by line; RuntimeError if it fails.

    nproc: the number of processes (torchrun); 0: one per GPU. They end with their parent, also when the notebook's
    kernel is killed (Linux; elsewhere only on an interrupt). In a separate process, training leaves no memory and no
    GPU context in the parent.
    """
    process = subprocess.Popen(
        [sys.executable, "-u", *_torchrun(nproc), "-m", module, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        preexec_fn=die_with_parent,
    )
    tail, errors = [], []
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            tail = [*tail[-4:], line.strip()]
            errors += [line.strip()] if line.startswith("error") else []
        code = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if code:
        reason = " | ".join(line for line in errors[:1] or tail if line) or "no output"
        raise RuntimeError(f"{module} {' '.join(map(str, arguments))} ended with exit code {code}: {reason}")


def _torchrun(nproc: int) -> list[str]:
    """The arguments that start several processes by torchrun, [] for one; an error in one process ends all."""
    nproc = nproc or max(1, torch.cuda.device_count())
    return [] if nproc == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]


def environment() -> dict[str, str]:
    """Of a process that trains: this one's, and what makes it faster."""
    return {**_SLEEP_WHILE_WAITING, **os.environ, **_KEEP_FREED_MEMORY}


# glibc returns freed tensors to the system and page-faults them in again; keeping them is 5 to 20 % faster on CPU.
_KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_TOP_PAD_": str(2**26)}
# Waiting threads sleep instead of spinning: on shared cores, spinning takes time from threads that compute.
_SLEEP_WHILE_WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}


def die_with_parent(by: int = signal.SIGTERM) -> None:
    """Ask Linux to send this process a signal when its parent ends; does nothing on other systems."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, by)  # 1: PR_SET_PDEATHSIG
