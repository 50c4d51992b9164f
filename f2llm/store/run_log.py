"""The log of a training: a progress line every ten seconds, log.csv, validation.csv and train.json."""

import csv
import json
import platform
import resource
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from ..config import Config
from .files import clear_errors
from .progress import SECONDS, duration

PARTS = ("hard_negative", "in_batch", "distill")


class Run:
    """Rows (one per step), validation (one per source and dim), times and tokens of one training.

    folder: where log.csv and validation.csv grow while training runs; None: nowhere. quiet: print nothing, for
    all processes but the first.
    """

    def __init__(
        self,
        name: str,
        num_steps: int,
        folder: Path | None = None,
        quiet: bool = False,
        print_every: float = SECONDS,
        tensorboard: bool = False,
    ):
        self.name, self.num_steps, self.folder = name, num_steps, folder
        self.quiet, self.print_every = quiet, print_every
        self.rows: list[dict] = []
        self.validation: list[dict] = []
        self.seconds = 0.0  # of earlier, interrupted processes
        self.started = self.printed = time.monotonic()
        self.first_step = 0
        self.board = _board(folder) if tensorboard and folder and not quiet else None

    def resume(self, step: int, state: dict) -> None:
        """Resume after `step`, with the rows of a checkpoint's state."""
        self.rows, self.validation = state["rows"], state["validation"]
        self.seconds, self.first_step = state["seconds"], step
        self._rewrite("log.csv", self.rows)
        self._rewrite("validation.csv", self.validation)

    def state(self) -> dict:
        """What `resume` needs."""
        return {"rows": self.rows, "validation": self.validation, "seconds": self.elapsed()}

    def elapsed(self) -> float:
        """Seconds of training, those of interrupted processes included."""
        return self.seconds + time.monotonic() - self.started

    def log(
        self, step: int, source: str, rate: float, grad_norm: float, losses: dict[str, float], tokens: dict
    ) -> None:
        """One step. losses: weighted, by part. tokens: useful and padded, what a padded batch would have been."""
        row = {"step": step, "source": source, "lr": rate, "grad_norm": grad_norm, "loss": sum(losses.values())}
        row |= {name: losses.get(name, "") for name in PARTS} | tokens
        self._add(self.rows, "log.csv", row)
        if self.board:
            for name in ("loss", "lr", "grad_norm", *losses):
                self.board.add_scalar(f"train/{name}", row[name], step)
        now = time.monotonic()
        if now - self.printed >= self.print_every or step == self.num_steps:
            self.printed = now
            if not self.quiet:
                print(self.line(), flush=True)

    def line(self) -> str:
        """The progress line: means of the last 50 steps, tokens per second and time left of this process."""
        recent, here = self.rows[-50:], self.rows[self.first_step :]
        step, seconds = self.rows[-1]["step"], time.monotonic() - self.started
        parts = {name: [row[name] for row in recent if row[name] != ""] for name in PARTS}
        parts = " + ".join(f"{name} {sum(values) / len(recent):.3f}" for name, values in parts.items() if values)
        useful, padded = (sum(row[name] for row in here) for name in ("tokens", "padded_tokens"))
        loss = np.mean([row["loss"] for row in recent])
        return (
            f"{self.name}: step {step}/{self.num_steps}, loss {loss:.3f} = {parts}, "
            f"lr {self.rows[-1]['lr']:.1e}, {useful / seconds:,.0f} tokens/s, no padding "
            f"({1 - useful / padded:.0%} if padded), {peak_memory_mib():,} MiB, {duration(self.seconds_left())} left"
        )

    def seconds_left(self) -> float:
        """Time left, at the mean speed of this process so far."""
        done = len(self.rows) - self.first_step
        return (time.monotonic() - self.started) / max(1, done) * (self.num_steps - self.rows[-1]["step"])

    def validate(self, step: int, rows: Iterable[dict]) -> None:
        """Rows of `train.validate`: source, dim, loss, accuracy; none if no source has a row to withhold."""
        for row in rows:
            self._add(self.validation, "validation.csv", {"step": step, **row})
        now = [row for row in self.validation if row["step"] == step]
        if not now:
            return
        full = max(row["dim"] for row in now)
        wide = [row for row in now if row["dim"] == full]
        if self.board:
            for row in now:
                self.board.add_scalar(f"validation/{row['source']}/{row['dim']}", row["loss"], step)
        if not self.quiet:
            loss, accuracy = (np.mean([row[key] for row in wide]) for key in ("loss", "accuracy"))
            print(
                f"{self.name}: step {step}, validation loss {loss:.3f}, accuracy {accuracy:.3f} "
                f"(mean of {len(wide)} sources at {full} dimensions)",
                flush=True,
            )

    def write(self, folder: Path, config: Config, inputs: list[str], extra: dict) -> None:
        """log.csv, validation.csv and train.json beside the weights."""
        for name, rows in (("log.csv", self.rows), ("validation.csv", self.validation)):
            if rows:
                _write(folder / name, rows)
        facts = {"stage": self.name, "size_name": config.name, "recipe": config.recipe, "seed": config.seed}
        facts |= {"inputs": inputs, "steps": len(self.rows), "seconds": round(self.elapsed(), 1)}
        facts |= {"tokens": sum(row["tokens"] for row in self.rows)}
        last = [row["loss"] for row in self.rows[-50:]]
        facts |= {"last_losses": np.mean(last).item() if last else None} | extra | provenance()
        (folder / "train.json").write_text(json.dumps(facts, indent=1) + "\n")

    def _add(self, rows: list[dict], file: str, row: dict) -> None:
        rows.append(row)
        if self.folder and not self.quiet:
            path, mode = self.folder / file, "w" if len(rows) == 1 else "a"  # w: a killed process may have left one
            with clear_errors(path), path.open(mode, newline="", encoding="utf-8") as opened:
                writer = csv.DictWriter(opened, fieldnames=list(row))
                if len(rows) == 1:
                    writer.writeheader()
                writer.writerow(row)

    def _rewrite(self, file: str, rows: list[dict]) -> None:
        if self.folder and not self.quiet:
            with clear_errors(self.folder / file):
                (self.folder / file).unlink(missing_ok=True)
                if rows:
                    _write(self.folder / file, rows)


def _write(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _board(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "machine.tensorboard is true, but it is not installed; remedy: pip install tensorboard"
        ) from None
    return SummaryWriter(folder / "tensorboard")


def peak_memory_mib() -> int:
    """Peak memory of this process: on the GPU if there is one, else in RAM."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**10 if platform.system() == "Linux" else 2**20)


def provenance() -> dict:
    """Versions, hardware and peak memory of this process."""
    packages = ("torch", "transformers", "tokenizers", "numpy")
    return {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "peak_memory_mib": peak_memory_mib(),
    }
