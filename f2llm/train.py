"""Contrastive training and distillation: the loop reads as the method.

Run as its own process, by `f2llm.launch` or by hand: python -m f2llm.train stage1 | stage2 | distill
In several: torchrun or accelerate launch, with the same words after -m; `f2llm plan` prints the line.
"""

import argparse
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint, distributed
from .batches import HomogeneousBatches
from .config import TRAINING_STAGES, Config, Machine, Training, load_config
from .launch import die_with_parent
from .model import Embedder
from .optimizer import build_optimizer, learning_rate
from .run import Run
from .step import (
    Work,
    accumulate_gradients,
    ahead,
    clip_gradients,
    prepare,
    require_finite,
    validate,
)
from .targets import Cached, check_teacher, teacher_embeddings
from .tokens import Tokens, tokenise
from .tuples import TupleStore


def train(
    model: Embedder,
    batches: HomogeneousBatches,
    config: Training,
    run: Run,
    machine: Machine,
    teacher: Callable[[Work], Tensor] | None = None,
    tokens: dict[str, Tokens] | None = None,
) -> None:
    """Train `model` in place: one optimizer step per batch, one source per batch.

    Goes on from the newest checkpoint in run.folder, if there is one. teacher: gives the embeddings that distillation
    is to reach, see `f2llm.targets`. tokens: of the documents, where they are stored.
    """
    optimizer = build_optimizer(model.model, config)
    first = resume(model, optimizer, run)
    model.model.train()
    for work in ahead(lambda step: prepare(model, batches[step], machine, tokens), range(first, len(batches))):
        step = len(run.rows) + 1
        target = teacher(work) if teacher and config.distillation_weight else None
        losses = accumulate_gradients(model, work, config, target)
        grad_norm = clip_gradients(model, config.max_grad_norm)
        require_finite(step, work, losses, grad_norm)
        rate = learning_rate(step - 1, len(batches), config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.log(step, work.batch.source, rate, grad_norm, losses, work.tokens())
        if config.validate_every and (step % config.validate_every == 0 or step == len(batches)):
            run.validate(step, validate(model, batches, config, machine))
        if run.folder and (step % machine.save_every == 0 or step == len(batches)):
            if isinstance(teacher, Cached):
                teacher.flush()
            save(step, model, optimizer, run)
    model.model.eval()


# Beginning, going on, ending --------------------------------------------------------------------


def resume(model: Embedder, optimizer: torch.optim.Optimizer, run: Run) -> int:
    """Put the newest checkpoint of run.folder into model, optimizer and run; the number of steps that are done."""
    if not run.folder:
        return 0
    path = checkpoint.latest(run.folder) if distributed.rank() == 0 else None
    weights, moments, state = checkpoint.restore(path) if path else ({}, {}, None)
    state = distributed.from_first(state)
    if state is None:
        return 0
    distributed.set_whole_state(model.model, optimizer, weights, moments)
    run.resume(state["step"], state)
    if not run.quiet:
        print(f"{run.name}: goes on after step {state['step']} of {run.num_steps}, from {path}", flush=True)
    return state["step"]


def save(step: int, model: Embedder, optimizer: torch.optim.Optimizer, run: Run) -> None:
    """A checkpoint of this step in run.folder, written by the first process."""
    weights, moments = distributed.whole_state(model.model, optimizer)
    if distributed.rank() == 0:
        checkpoint.save(run.folder, step, weights, moments, run.state())
    distributed.wait_for_all()


def run_stage(stage: str, config: Config) -> None:
    """Read the stage's inputs, train, and put each model in its place."""
    distributed.start()
    machine, first = config.machine, distributed.rank() == 0
    torch.manual_seed(config.seed)
    threads = machine.threads or torch.get_num_threads()
    torch.set_num_threads(max(1, threads // distributed.num_ranks()) if not torch.cuda.is_available() else threads)
    if stage == "distill":
        with checkpoint.clear_errors(Path("models/distilled")):
            Path("models/distilled").mkdir(parents=True, exist_ok=True)  # also when the family has no students
    for start, out in inputs_and_outputs(stage, config):
        training = config.training(stage, out.name)
        name = stage if stage != "distill" else f"distill {out.name}"
        teacher_path = path_of_teacher(stage, config, training)
        inputs = [start] + ([teacher_path] if teacher_path else [])
        batches = HomogeneousBatches(TupleStore(), training, config.seed, stage1=stage == "stage1")
        if first and batches.too_few:
            print(f"{name}: rows left out, with fewer hard negatives than a step draws: {batches.too_few}", flush=True)
        with ExitStack() as stack:
            folder = scratch_folder(name, training, config, inputs) if first else Path()
            folder = Path(distributed.from_first(str(folder)))
            if first:
                stack.enter_context(checkpoint.alone_in(folder))
            model = load_for_training(start, training, machine)
            teacher = load_teacher(teacher_path, model, batches, machine) if teacher_path and len(batches) else None
            tokens = stored_tokens(batches, model)
            run = Run(name, len(batches), folder, quiet=not first, tensorboard=machine.tensorboard)
            train(model, batches, training, run, machine, teacher, tokens)
            write_model(model, out, run, config, [str(path) for path in inputs])
    distributed.stop()


def path_of_teacher(stage: str, config: Config, training: Training) -> Path | None:
    """Students learn from the stage-2 model, stage 2 from what `teacher` names, if anything."""
    if not training.distillation_weight:
        return None
    return Path("models/stage2" if stage == "distill" else "models/teacher")


def load_teacher(path: Path, model: Embedder, batches: HomogeneousBatches, machine: Machine) -> Callable:
    """The teacher that fits the student, with its embeddings made once where they fit."""
    teacher = Embedder.load(path, machine.token_budget)
    teacher.max_tokens = model.max_tokens
    check_teacher(model, teacher)
    return teacher_embeddings(path, teacher, batches, machine)


def load_for_training(start: Path, training: Training, machine: Machine) -> Embedder:
    """The model with the machine's settings for speed and memory."""
    model = Embedder.load(start, machine.token_budget, training=True)
    model.max_tokens = training.max_tokens
    if machine.recompute != "none":
        model.recompute(selectively=machine.recompute == "selective")
    if machine.compile:
        model.compile()
    if distributed.wants_shards(machine.shard):
        distributed.shard(model.model, model.half)
    return model


def stored_tokens(batches: HomogeneousBatches, model: Embedder) -> dict[str, Tokens]:
    """Tokens of all documents of a stage, made by the first process where they are not there yet."""
    make = partial(tokenise, batches.store, list(batches.rows), model, Path("scratch/tokens"))
    if distributed.rank() == 0:
        make()
    distributed.wait_for_all()
    return make(quiet=True)


def write_model(model: Embedder, out: Path, run: Run, config: Config, inputs: list[str]) -> None:
    """The trained model, its logs and its provenance, whole; the scratch folder is marked as finished."""
    weights, _ = distributed.whole_state(model.model, None)
    if distributed.rank() == 0:
        with checkpoint.whole_folder(out) as folder:
            model.write(folder, weights)
            run.write(folder, config, inputs, {"processes": distributed.num_ranks(), "machine": asdict(config.machine)})
        checkpoint.mark_finished(run.folder)
    distributed.wait_for_all()


def inputs_and_outputs(stage: str, config: Config) -> list[tuple[Path, Path]]:
    """(where training starts from, where the model goes) of every model that a stage trains."""
    models = Path("models")
    if stage == "distill":
        return [(models / "pruned" / name, models / "distilled" / name) for name in config.prune.students]
    return [(models / {"stage1": "backbone", "stage2": "stage1"}[stage], models / stage)]


def scratch_folder(name: str, training: Training, config: Config, inputs: list[Path]) -> Path:
    """Where a training keeps its checkpoints: one folder for one set of parameters, inputs and code.

    The machine's settings are not part of it: a training may go on with another token budget or on more processes.
    """
    data = [Path("data/assembled/manifest.json"), *sorted(Path("data/mined").glob("*.arrow"))]
    files = data + [
        file for path in inputs for file in sorted(path.rglob("*")) if file.suffix in (".safetensors", ".json")
    ]
    code = sorted(Path(__file__).parent.glob("*.py"))
    facts = {"parameters": {"seed": config.seed, **asdict(training)}}
    facts["inputs"] = {str(file): checkpoint.sha256(file) for file in files if file.name != "train.json"}
    facts["code"] = {file.name: checkpoint.sha256(file) for file in code if file.stem in CODE}
    return checkpoint.keyed_folder(Path("scratch/train"), name.replace(" ", "-"), facts)


CODE = ("arrow", "attention", "batches", "distributed", "losses", "model", "optimizer", "packing", "step", "text")
CODE += ("targets", "tokens", "train", "tuples")


def main() -> None:
    """Train a stage; an error ends this process, and its launcher ends the others."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=TRAINING_STAGES)
    parser.add_argument("--size", help="another size than params.yaml's")
    arguments = parser.parse_args()
    die_with_parent()
    try:
        run_stage(arguments.stage, load_config(arguments.size))
    except Exception as error:
        if not isinstance(error, (ValueError, RuntimeError)):
            traceback.print_exc()
        of_rank = f" of process {distributed.rank()}" if distributed.num_ranks() > 1 else ""
        print(f"error{of_rank}: {error or type(error).__name__}", file=sys.stderr, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
