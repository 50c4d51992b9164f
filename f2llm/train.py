"""Contrastive training and distillation: the loop reads as the method.

Run as its own process, by `f2llm.launch` or by hand: python -m f2llm.train stage1 | stage2 | distill
"""

import argparse
import csv
import json
import math
import platform
import resource
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .batches import Batch, HomogeneousBatches
from .checkpoint import whole_folder
from .config import Config, Training, load_config
from .losses import distillation_loss, hard_negative_loss, in_batch_loss, matryoshka, matryoshka_dims
from .model import Embedder
from .tuples import TupleStore

STAGES = ("stage1", "stage2", "distill")


def train(model: Embedder, batches: HomogeneousBatches, config: Training, run: "Run", teacher: Embedder | None = None):
    """Train `model` in place: one optimizer step per batch, one source per batch."""
    model.model.train()
    optimizer, schedule = build_optimizer(model, config, num_steps=len(batches))
    for step in range(len(batches)):
        batch = batches[step]
        losses = compute_losses(model, batch, config, teacher)
        total = sum(losses.values())
        total.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.model.parameters(), config.max_grad_norm)
        if not torch.isfinite(grad_norm) or not torch.isfinite(total):
            shown = {name: loss.item() for name, loss in losses.items()}
            raise RuntimeError(
                f"step {step + 1}, source {batch.source}: gradient norm {grad_norm}, losses {shown}; no step was "
                "taken on them. remedy: a lower learning_rate, a longer warmup_steps, or look at the texts of the batch"
            )
        optimizer.step()
        run.log(step + 1, batch, schedule.get_last_lr()[0], grad_norm, losses)
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    model.model.eval()


def build_optimizer(model: Embedder, config: Training, num_steps: int):
    """AdamW on every parameter, as the authors do, with the schedule of `learning_rate`."""
    optimizer = torch.optim.AdamW(
        model.model.parameters(),
        lr=config.learning_rate,
        betas=tuple(config.betas),
        weight_decay=config.weight_decay,
        fused=True,
    )

    def share_of_peak(step: int) -> float:
        return learning_rate(step, num_steps, config) / config.learning_rate

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak)


def learning_rate(step: int, num_steps: int, config: Training) -> float:
    """Rate of a step counted from 0: linear warm-up, then a cosine that ends at min_learning_rate exactly."""
    warmup = min(config.warmup_steps, num_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = min(1.0, (step - warmup + 1) / max(1, num_steps - warmup))
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * cosine


def compute_losses(model: Embedder, batch: Batch, config: Training, teacher: Embedder | None) -> dict[str, Tensor]:
    """Weighted losses by name. Which apply is the task's matter: in_batch is for retrieval only."""
    token_ids = model.tokenize(batch.texts)
    embeddings = model.embed(token_ids)  # (texts, D)
    query, passage = embeddings[batch.query], embeddings[batch.passage]  # (B, D)
    dims = matryoshka_dims(model.dim, config.matryoshka_min_dim)
    losses = {}
    if batch.hard_negatives.shape[1]:
        hard_negatives = embeddings[batch.hard_negatives]  # (B, K, D)

        def hard(*prefixes):
            return hard_negative_loss(*prefixes, temperature=config.temperature)

        losses["hard_negative"] = matryoshka(hard, query, passage, hard_negatives, dims=dims)
    if batch.task in config.in_batch_tasks:
        group = torch.as_tensor(batch.group)
        duplicates = (group[:, None] == group[None, :]).to(query.device) if config.mask_duplicates else None
        positive = torch.arange(len(query), device=query.device)

        def in_batch(*prefixes):
            return in_batch_loss(*prefixes, positive=positive, temperature=config.temperature, duplicates=duplicates)

        losses["in_batch"] = matryoshka(in_batch, query, passage, dims=dims)
    if config.distillation_weight and teacher is not None:
        with torch.no_grad():
            target = teacher.embed(token_ids)
        parts = [batch.query, batch.passage] + ([batch.hard_negatives] if batch.hard_negatives.size else [])
        distilled = sum(distillation_loss(embeddings[part], target[part]) for part in parts)
        losses["distill"] = config.distillation_weight * distilled
    return losses


class Run:
    """What a training leaves behind: one row of log.csv a step, one printed line now and then, train.json."""

    def __init__(self, name: str, num_steps: int, print_every: float = 10.0):
        self.name, self.num_steps, self.print_every = name, num_steps, print_every
        self.rows: list[dict] = []
        self.started = self.printed = time.monotonic()
        self.tokens = 0

    def log(self, step: int, batch: Batch, rate: float, grad_norm: Tensor, losses: dict[str, Tensor]) -> None:
        row = {"step": step, "source": batch.source, "lr": rate, "grad_norm": float(grad_norm)}
        row |= {"loss": float(sum(losses.values()).detach())}
        row |= {
            name: float(losses[name].detach()) if name in losses else ""
            for name in ("hard_negative", "in_batch", "distill")
        }
        self.rows.append(row)
        now = time.monotonic()
        if now - self.printed >= self.print_every or step == self.num_steps:
            self.printed = now
            left = (now - self.started) / step * (self.num_steps - step)
            mean = np.mean([row["loss"] for row in self.rows[-50:]])
            line = f"{self.name}: step {step}/{self.num_steps}, loss {mean:.3f} (mean of 50), lr {rate:.1e}"
            print(f"{line}, {(now - self.started) / step:.2f} s/step, {left:.0f} s left", flush=True)

    def write(self, folder: Path, config: Config, inputs: list[str]) -> None:
        """log.csv and train.json beside the weights."""
        with (folder / "log.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)
        facts = {"stage": self.name, "size_name": config.name, "recipe": config.recipe, "seed": config.seed}
        facts |= {"inputs": inputs, "steps": len(self.rows), "seconds": round(time.monotonic() - self.started, 1)}
        facts |= {"last_losses": np.mean([row["loss"] for row in self.rows[-50:]]).item()} | provenance()
        (folder / "train.json").write_text(json.dumps(facts, indent=1) + "\n")


def provenance() -> dict:
    """Versions, hardware and peak memory of this process."""
    packages = ("torch", "transformers", "tokenizers", "numpy")
    return {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def run_stage(stage: str, config: Config) -> None:
    """Read the stage's inputs, train, and put the model in its place."""
    training: Training = getattr(config, stage)
    torch.manual_seed(config.seed)
    torch.set_num_threads(config.machine.threads or torch.get_num_threads())
    store = TupleStore()
    batches = HomogeneousBatches(store, training, config.seed, stage1=stage == "stage1")
    teacher = Embedder.load("models/stage2", config.machine.token_budget) if stage == "distill" else None
    if stage == "distill":
        Path("models/distilled").mkdir(parents=True, exist_ok=True)  # also when the family has no students
    for start, out in inputs_and_outputs(stage, config):
        model = Embedder.load(start, config.machine.token_budget)
        model.max_tokens = training.max_tokens
        run = Run(stage if stage != "distill" else f"distill {out.name}", len(batches))
        train(model, batches, training, run, teacher)
        with whole_folder(out) as folder:
            model.write(folder)
            run.write(folder, config, inputs=[str(start)] + (["models/stage2"] if teacher else []))


def inputs_and_outputs(stage: str, config: Config) -> list[tuple[Path, Path]]:
    """(where training starts from, where the model goes) of every model that a stage trains."""
    models = Path("models")
    if stage == "distill":
        return [(models / "pruned" / name, models / "distilled" / name) for name in config.prune.students]
    return [(models / {"stage1": "backbone", "stage2": "stage1"}[stage], models / stage)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--size", help="another size than params.yaml's")
    arguments = parser.parse_args()
    run_stage(arguments.stage, load_config(arguments.size))
