"""What every process of tests/test_distributed.py runs: the gradients of one batch under several settings, trainings,
and a teacher's embeddings.

Arguments: folder with model, teacher and store; folder for results; params.yaml; all or shards. Not a test itself.
"""

import errno
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from f2llm import distributed
from f2llm.batches import HomogeneousBatches
from f2llm.config import HardNegatives, read_yaml, resolve
from f2llm.model import Embedder
from f2llm.step import embed_without_gradient, grad_cache_backward, prepare, validate
from f2llm.store.run_log import Run
from f2llm.store.tuples import TupleStore
from f2llm.teacher import Cached
from f2llm.train import train

SETTINGS = {
    "plain": {},
    "query_only": {"in_batch_gradient": "query_only"},
    "distilled": {"distillation_weight": 0.7},
    "few_activations": {"activation_tokens": 1, "distillation_weight": 0.7},
    "large_budget": {"token_budget": 5000},
    "tiny_budget": {"token_budget": 24, "activation_tokens": 40},
    "sharded": {"shard": True, "activation_tokens": 30},
    "one_row": {"cap_per_source": 1},
}


TRAININGS = {  # machine.shard, and whether a cached teacher helps
    "trained": (False, False),
    "trained_sharded": (True, False),
    "trained_distilled": (False, True),
    "trained_distilled_sharded": (True, True),
}


class Counting(Embedder):
    """A real embedder that counts the texts it embeds."""

    num_texts = 0

    def embed_pack(self, part, *arguments, **options):
        self.num_texts += len(part.rows)
        return super().embed_pack(part, *arguments, **options)


def plans(params_path: str):
    """(training, machine) of the tests; batches of sixteen."""
    config = resolve(read_yaml(Path(params_path)), "nano")
    negatives = HardNegatives(retrieval=2, clustering=2, classification=1)
    small = {"global_batch_size": 16, "epochs": 1, "max_steps": 3, "cap_per_source": 0, "max_tokens": 24}
    small |= {"validate_every": 2, "validation_rows": 4, "warmup_steps": 1}
    machine = replace(config.machine, threads=1, token_budget=60, activation_tokens=1000)
    return replace(config.stage2, hard_negatives=negatives, **small), machine


def gradients(folder: Path, training, machine, setting: dict):
    """(losses, {name: gradient}) of the first batch of the source 'pairs'."""
    training = replace(training, **{key: value for key, value in setting.items() if hasattr(training, key)})
    machine = replace(machine, **{key: value for key, value in setting.items() if hasattr(machine, key)})
    model, teacher = (Embedder.load(folder / name, training=True) for name in ("model", "teacher"))
    model.max_tokens = teacher.max_tokens = training.max_tokens
    if machine.shard and distributed.world_size() > 1:
        distributed.shard(model.model, model.autocast_dtype)
    batches = HomogeneousBatches(TupleStore(folder / "store", mined=None), training, seed=0, stage1=False)
    batch = next(batches[step] for step in range(batches.per_epoch) if batches[step].source == "pairs")
    packed = prepare(model, batch, machine)
    target = embed_without_gradient(teacher, packed) if training.distillation_weight else None
    losses = grad_cache_backward(model, packed, training, target)
    grads = {
        name: (weight.grad.full_tensor() if hasattr(weight.grad, "full_tensor") else weight.grad).clone()
        for name, weight in model.model.named_parameters()
    }
    return losses, grads


def trained(folder: Path, training, machine, scratch: Path, distilled: bool = False):
    """Weights after three steps, and the validation rows on the way; `scratch` gets the model and a teacher's cache."""
    model = Embedder.load(folder / "model", training=True)
    model.max_tokens = training.max_tokens
    if machine.shard and distributed.world_size() > 1:
        distributed.shard(model.model, model.autocast_dtype)
    batches = HomogeneousBatches(TupleStore(folder / "store", mined=None), training, seed=0, stage1=False)
    scratch.mkdir(exist_ok=True)
    run = Run("test", len(batches), scratch, quiet=distributed.rank() > 0)
    teacher = None
    if distilled:
        training = replace(training, distillation_weight=0.7)
        teacher = Cached(Embedder.load(folder / "teacher"), scratch / "cache", machine)
    train(model, batches, training, run, replace(machine, save_every=2), teacher)
    list(validate(model, batches, training, machine))
    weights = distributed.full_weights(model.model)
    if distributed.rank() == 0:
        (scratch / "model").mkdir(exist_ok=True)
        model.write(scratch / "model", weights)
    distributed.barrier()
    return weights, run.validation


def targets(folder: Path, training, machine, cache: Path):
    """(rows of all texts of two epochs, batch by batch; how many of them this process's teacher embedded)."""
    model, teacher = Embedder.load(folder / "model"), Counting.load(folder / "teacher")
    teacher.max_tokens = model.max_tokens = training.max_tokens
    training = replace(training, epochs=2, max_steps=0)
    batches = HomogeneousBatches(TupleStore(folder / "store", mined=None), training, seed=0, stage1=False)
    cached, rows = Cached(teacher, cache, machine), []
    for step in range(len(batches)):
        rows.append(cached(prepare(model, batches[step], machine)))
        if step % 3 == 2 or step == len(batches) - 1:
            cached.flush()
    return torch.cat(rows), teacher.num_texts


def shards(folder: Path, out: Path, training, machine) -> None:
    """Sharded trainings: whole, resumed, begun by others, from a damaged checkpoint, and onto a full disk."""
    machine, first = replace(machine, shard=True), distributed.rank() == 0

    def train_as(name: str, begun: str | None = None) -> None:
        if begun and first:
            shutil.rmtree(out / begun / "step-00000003")
        distributed.barrier()
        weights, _ = trained(folder, training, machine, out / (begun or name))
        if first:
            save_file({key: tensor.clone() for key, tensor in weights.items()}, out / f"{name}.safetensors")

    for name in ("own", "of_two", "of_one"):
        train_as(name)
    if first:
        for copied in ("damaged", "full"):
            shutil.copytree(out / "own", out / copied)
            for manifest in (out / copied).glob("step-*/manifest.json"):
                manifest.write_text(manifest.read_text().replace('"own"', f'"{copied}"'))
        shutil.rmtree(out / "full" / "step-00000003")
        (damaged,) = (out / "damaged" / "step-00000003").glob("shard-00004-*")
        damaged.write_bytes(damaged.read_bytes()[:-1] + bytes([damaged.read_bytes()[-1] ^ 1]))
    train_as("own_resumed", begun="own")
    train_as("damaged")
    if distributed.rank() == 2:
        fail_at_writing("shard-00003-")
    try:
        trained(folder, training, machine, out / "full")
    except RuntimeError as error:
        (out / f"error_{distributed.rank()}.txt").write_text(f"{type(error).__name__}: {error}")


def fail_at_writing(begin: str) -> None:
    """Opening a file for writing whose name begins so fails from now on, as on a full disk."""
    opened = Path.open

    def failing(path, mode="r", *arguments, **options):
        if path.name.startswith(begin) and "w" in mode:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return opened(path, mode, *arguments, **options)

    Path.open = failing


def main() -> None:
    folder, out, params_path = map(Path, sys.argv[1:4])
    torch.set_num_threads(1)
    distributed.start()
    training, machine = plans(params_path)
    if sys.argv[4] == "shards":
        shards(folder, out, training, machine)
        distributed.stop()
        return
    for name, setting in SETTINGS.items():
        losses, grads = gradients(folder, training, machine, setting)
        if distributed.rank() == 0:
            save_file(
                grads | {f"loss.{key}": torch.tensor(value) for key, value in losses.items()},
                out / f"{name}.safetensors",
            )
    for time in ("first", "second"):
        rows, num_texts = targets(folder, training, machine, out / "cache")
        content = {"rows": rows, "num_texts": torch.tensor(num_texts)}
        save_file(content, out / f"targets_{time}_{distributed.rank()}.safetensors")
    for name, (shard, distilled) in TRAININGS.items():
        for suffix in ("", "_resumed"):
            if suffix and distributed.rank() == 0:  # as if killed after step 2
                shutil.rmtree(out / name / "step-00000003")
            distributed.barrier()
            weights, _ = trained(folder, training, replace(machine, shard=shard), out / name, distilled)
            if distributed.rank() == 0:
                save_file({key: tensor.clone() for key, tensor in weights.items()}, out / f"{name}{suffix}.safetensors")
    distributed.stop()


if __name__ == "__main__":
    main()
