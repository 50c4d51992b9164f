"""What every process of tests/test_distributed.py runs: the gradients of one batch under several settings.

Arguments: folder with model, teacher and store; folder for results. Not a test itself.
"""

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
from f2llm.run import Run
from f2llm.step import accumulate_gradients, embed_without_gradient, prepare, validate
from f2llm.train import train
from f2llm.tuples import TupleStore

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
    if machine.shard and distributed.num_ranks() > 1:
        distributed.shard(model.model, model.half)
    batches = HomogeneousBatches(TupleStore(folder / "store", mined=None), training, seed=0, stage1=False)
    batch = next(batches[step] for step in range(batches.per_epoch) if batches[step].source == "pairs")
    work = prepare(model, batch, machine)
    target = embed_without_gradient(teacher, work) if training.distillation_weight else None
    losses = accumulate_gradients(model, work, training, target)
    grads = {
        name: (weight.grad.full_tensor() if hasattr(weight.grad, "full_tensor") else weight.grad).clone()
        for name, weight in model.model.named_parameters()
    }
    return losses, grads


def trained(folder: Path, training, machine, scratch: Path):
    """Weights after three steps, and the validation rows on the way."""
    model = Embedder.load(folder / "model", training=True)
    model.max_tokens = training.max_tokens
    if machine.shard and distributed.num_ranks() > 1:
        distributed.shard(model.model, model.half)
    batches = HomogeneousBatches(TupleStore(folder / "store", mined=None), training, seed=0, stage1=False)
    scratch.mkdir(exist_ok=True)
    run = Run("test", len(batches), scratch, quiet=distributed.rank() > 0)
    train(model, batches, training, run, replace(machine, save_every=2))
    list(validate(model, batches, training, machine))
    return distributed.whole_state(model.model, None)[0], run.validation


def main() -> None:
    folder, out, params_path = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    distributed.start()
    training, machine = plans(params_path)
    for name, setting in SETTINGS.items():
        losses, grads = gradients(folder, training, machine, setting)
        if distributed.rank() == 0:
            save_file(
                grads | {f"loss.{key}": torch.tensor(value) for key, value in losses.items()},
                out / f"{name}.safetensors",
            )
    for name, shard in (("trained", False), ("trained_sharded", True)):
        for suffix in ("", "_resumed"):
            if suffix and distributed.rank() == 0:  # as if killed after step 2
                shutil.rmtree(out / name / "step-00000003")
            distributed.wait_for_all()
            weights, _ = trained(folder, training, replace(machine, shard=shard), out / name)
            if distributed.rank() == 0:
                save_file({key: tensor.clone() for key, tensor in weights.items()}, out / f"{name}{suffix}.safetensors")
    distributed.stop()


if __name__ == "__main__":
    main()
