"""A training that is killed and resumed, against one that is not: losses, checkpoints, memory.

python -m benchmarks.resume [--quick]: a random Qwen3-0.6B on a GPU; --quick runs a tiny one, on the CPU if need be, and
writes nothing.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu import QWEN3_06B
from benchmarks.harness import ROOT, versions, write
from benchmarks.legs import MAX_TOKENS, SMALL_SHAPE, draw_batch, new_model, word_tokenizer
from f2llm.config import load_config
from f2llm.model import Embedder
from f2llm.pipeline.train_stage import load_for_training
from f2llm.store.run_log import Run
from f2llm.train import train

FULL = {"shape": QWEN3_06B, "batch": 16, "steps": 8, "save_every": 4, "killed_at": 6, "token_budget": 16384}
QUICK = {"shape": SMALL_SHAPE, "batch": 2, "steps": 5, "save_every": 2, "killed_at": 4, "token_budget": 1024}
REMARKS = """\
Random weights and texts. One process trains all steps; another is killed by SIGKILL at a step, and a third one goes on
from its last checkpoint. difference: of the losses after it, relative, from those of the training that was not killed;
on a CPU they are equal to the bit (tests/pipeline/test_killed_trainings.py), on a GPU sums come in another order, also
in the steps before the kill. checkpoint_gib: weights in float32 and both moments of AdamW."""


class Batches:
    """Random batches by step."""

    def __init__(self, settings: dict):
        self.settings, self.tokenizer = settings, word_tokenizer(settings["shape"]["vocab_size"])

    def __len__(self) -> int:
        return self.settings["steps"]

    def __getitem__(self, step: int):
        return draw_batch(self.settings["batch"], self.tokenizer, np.random.default_rng(step)).batch

    def validation(self):
        return iter(())


class KilledRun(Run):
    """Ends its process at a step; 0: never."""

    killed_at = 0

    def log(self, step: int, *values) -> None:
        super().log(step, *values)
        if step == self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)


def train_here(settings: dict, folder: Path, start: Path, killed_at: int) -> None:
    """Train in this process; prints losses, seconds and peak memory as JSON."""
    config = load_config("0.6B" if settings is FULL else None)
    small = {"warmup_steps": 2, "max_steps": settings["steps"], "validate_every": 0, "max_tokens": MAX_TOKENS}
    training = replace(config.stage2, global_batch_size=settings["batch"], distillation_weight=0.0, **small)
    machine = replace(config.machine, token_budget=settings["token_budget"], activation_tokens=settings["token_budget"])
    machine = replace(machine, save_every=settings["save_every"])
    model = load_for_training(start, training, machine)
    run = KilledRun("resume", settings["steps"], folder)
    run.killed_at = killed_at
    began = time.monotonic()
    train(model, Batches(settings), training, run, machine)
    cuda = torch.cuda.is_available()
    facts = {"first_step": run.first_step, "losses": [row["loss"] for row in run.rows]}
    facts |= {"seconds": time.monotonic() - began}
    facts |= {"peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None}
    print(json.dumps(facts))


def in_child(settings: dict, folder: Path, start: Path, killed_at: int = 0) -> dict | None:
    """The facts that a process of its own printed; None if it was killed."""
    command = [sys.executable, "-m", "benchmarks.resume", "--folder", str(folder), "--start", str(start)]
    command += ["--killed-at", str(killed_at)] + ([] if settings is FULL else ["--quick"])
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if killed_at and done.returncode == -signal.SIGKILL:
        return None
    if done.returncode or killed_at:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(settings: dict, scratch: Path) -> dict:
    """Facts of the whole and of the resumed training, and how far apart their losses are."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer(settings["shape"]["vocab_size"])
    Embedder(new_model(settings["shape"]), tokenizer, MAX_TOKENS).save(scratch / "start")
    for name in ("whole", "killed"):
        (scratch / name).mkdir()
    whole = in_child(settings, scratch / "whole", scratch / "start")
    in_child(settings, scratch / "killed", scratch / "start", settings["killed_at"])
    checkpoint = sum(path.stat().st_size for path in (scratch / "killed").rglob("*") if path.is_file()) / 2**30
    resumed = in_child(settings, scratch / "killed", scratch / "start")
    if not 0 < resumed["first_step"] < settings["killed_at"]:
        raise RuntimeError(f"it went on after step {resumed['first_step']}, not from a checkpoint before the kill")
    pairs = list(zip(whole["losses"], resumed["losses"], strict=True))
    after = [abs(one / other - 1) for one, other in pairs[resumed["first_step"] :]]
    return {"whole": whole, "resumed": resumed, "difference": max(after), "checkpoint_gib": checkpoint}


def main(words: list[str] | None = None) -> dict:
    """What `compare` finds, also printed; the full run writes it to benchmarks/results/resume.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small and in seconds; writes nothing")
    for name, kind in (("--folder", Path), ("--start", Path), ("--killed-at", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    settings = QUICK if arguments.quick else FULL
    if arguments.folder:
        train_here(settings, arguments.folder, arguments.start, arguments.killed_at)
        return {}
    if settings is FULL and not torch.cuda.is_available():
        raise RuntimeError("no GPU is here, and Qwen3-0.6B would take hours on a CPU; remedy: --quick, or a GPU")
    with tempfile.TemporaryDirectory() as scratch:
        found = compare(settings, Path(scratch))
    print(json.dumps(found, indent=1))
    if settings is FULL:
        ratios = {"difference_of_losses": {"max": found["difference"]}}
        path = write("resume", {"settings": settings, "ratios": ratios, "legs": found, "remarks": REMARKS})
        result = json.loads(path.read_text())
        result["hardware"] |= {"gpu": torch.cuda.get_device_name(), "memory": torch.cuda.mem_get_info()[1]}
        path.write_text(json.dumps(result | {"versions": versions() | {"cuda": torch.version.cuda}}, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
