"""Runs a training stage of the pipeline: loads its inputs, trains its models, writes them to models/.

Runs as a separate process, started by `f2llm.pipeline.launch` or by hand: python -m f2llm.pipeline.train_stage stage1 |
stage2 | distill. With several processes: torchrun, with the same arguments after -m; see configs/slurm.sbatch.
"""

import argparse
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from .. import contract, distributed, lora
from ..batches import HomogeneousBatches
from ..config import TRAINING_STAGES, Config, Machine, Training, load_config
from ..encoder import load_encoder
from ..losses import matryoshka_dims
from ..model import Embedder
from ..store import checkpoint
from ..store.code import code_digests
from ..store.files import alone_in, clear_errors, sha256, whole_folder
from ..store.run_log import Run
from ..store.tuples import TupleStore
from ..teacher import check_teacher, teacher_embeddings, teacher_of
from ..text import prompted
from ..tokens import Tokens, tokenise
from ..train import train
from .launch import die_with_parent

DISTILLED = Path("models/distilled")
NO_INPUTS = ("train.json", contract.FILE)  # files of a model that say how it was made, and what follows from the others


@dataclass(frozen=True)
class ModelToTrain:
    """One training of a stage: its name in the log, its initial model, its teacher, and the folder of its result."""

    name: str
    training: Training
    start: Path
    teacher: Path | None
    out: Path

    @property
    def inputs(self) -> list[Path]:
        return [self.start, *([self.teacher] if self.teacher else [])]


def models_to_train(stage: str, config: Config) -> list[ModelToTrain]:
    """The one model of stage 1 or 2, or every student of `distill`.

    Students learn from the stage-2 model; stage 2 learns from the model that `teacher` names, if any.
    """
    models = Path("models")
    if stage == "distill":
        found = [
            ModelToTrain(f"distill {name}", training, models / "pruned" / name, models / "stage2", DISTILLED / name)
            for name, training in config.distill.items()
        ]
    else:
        start = models / {"stage1": "backbone", "stage2": "stage1"}[stage]
        found = [ModelToTrain(stage, config.training(stage), start, models / "teacher", models / stage)]
    return [one if one.training.distillation_weight else replace(one, teacher=None) for one in found]


def run_stage(stage: str, config: Config) -> None:
    """Train every model of a stage and write it to its folder."""
    distributed.start()
    torch.manual_seed(config.seed)
    threads = config.machine.threads or torch.get_num_threads()
    torch.set_num_threads(max(1, threads // distributed.world_size()) if not torch.cuda.is_available() else threads)
    if stage == "distill":
        with clear_errors(DISTILLED):
            DISTILLED.mkdir(parents=True, exist_ok=True)  # also when the size has no students
    for one in models_to_train(stage, config):
        train_model(one, stage, config)
    distributed.stop()


def train_model(one: ModelToTrain, stage: str, config: Config) -> None:
    """Read the inputs of one training, train or resume, and write the model."""
    machine, training, first = config.machine, one.training, distributed.rank() == 0
    batches = HomogeneousBatches(TupleStore(), training, config.seed, stage1=stage == "stage1")
    if first and batches.draws:
        print(f"{one.name}: sources without as many hard negatives as asked for draw {batches.draws}", flush=True)
    if first and batches.too_few:
        print(f"{one.name}: rows left out, with fewer hard negatives than a step draws: {batches.too_few}", flush=True)
    with ExitStack() as stack:
        folder = scratch_folder(one.name, training, config, one.inputs) if first else Path()
        folder = Path(distributed.broadcast_from_rank0(str(folder)))
        if first:
            stack.enter_context(alone_in(folder))
        model = load_for_training(one.start, training, machine, config.seed)
        trained, total = lora.num_trained(model.model)
        if first:
            print(f"{one.name}: trains {trained:,} of {total:,} parameters", flush=True)
        teacher = load_teacher(one.teacher, model, batches, machine) if one.teacher and len(batches) else None
        tokens = stored_tokens(batches, model)
        run = Run(one.name, len(batches), folder, quiet=not first, tensorboard=machine.tensorboard)
        train(model, batches, training, run, machine, teacher, tokens)
        write_model(model, one, run, config)


def load_teacher(path: Path, model: Embedder, batches: HomogeneousBatches, machine: Machine) -> Callable:
    """Teacher embeddings as a function of a batch, computed once if they fit into machine.teacher_cache_gib.

    ValueError if the teacher is narrower than the student, or cannot be run as it is meant.
    """
    teacher = teacher_of(model, load_encoder(path, machine.token_budget))
    check_teacher(model, teacher)
    return teacher_embeddings(path, teacher, batches, machine)


def load_for_training(start: Path, training: Training, machine: Machine, seed: int = 0) -> Embedder:
    """The model to train, with a new adapter if it has one, and the machine's settings for speed and memory."""
    model = Embedder.load(start, machine.token_budget, training=True, precision=machine.precision)
    model.max_tokens = training.max_tokens
    model.query_prompt = prompted("", contract.INSTRUCTION) if training.instructions else ""
    model.matryoshka_dims = matryoshka_dims(model.dim, training.matryoshka_min_dim)
    if training.lora.rank and training.epochs:
        lora.add_adapter(model.model, training.lora, seed)
    if machine.recompute != "none":
        model.recompute(selectively=machine.recompute == "selective")
    if machine.compile:
        model.compile()
    if machine.shard and distributed.world_size() > 1:
        distributed.shard(model.model, model.autocast_dtype)
    return model


def stored_tokens(batches: HomogeneousBatches, model: Embedder) -> dict[str, Tokens]:
    """Tokens of all documents of a stage; the first process makes them if they are not stored yet."""
    make = partial(tokenise, batches.store, list(batches.rows), model, Path("scratch/tokens"))
    if distributed.rank() == 0:
        make()
    distributed.barrier()
    return make(quiet=True)


def write_model(model: Embedder, one: ModelToTrain, run: Run, config: Config) -> None:
    """Write the trained model, its logs and its provenance atomically; mark the scratch folder as finished.

    A model with an adapter is written merged, and the adapter beside it in the folder `adapter`.
    """
    weights = distributed.full_weights(model.model)
    if distributed.rank() == 0:
        with whole_folder(one.out) as folder:
            if lora.has_adapter(model.model):
                lora.save_adapter(folder / "adapter", model, weights, one.start)
                lora.merge(folder / "adapter", one.start).write(folder)
            else:
                model.write(folder, weights)
            facts = {"instructions": one.training.instructions, "processes": distributed.world_size()}
            inputs = [str(path) for path in one.inputs]
            run.write(folder, config, inputs, facts | {"machine": asdict(config.machine)})
        checkpoint.mark_finished(run.folder)
    distributed.barrier()


def scratch_folder(name: str, training: Training, config: Config, inputs: list[Path]) -> Path:
    """The folder of a training's checkpoints: one for each set of parameters, inputs and code.

    It does not depend on the machine's settings: a training may resume with another token budget or more processes.
    """
    data = [Path("data/assembled/manifest.json"), *sorted(Path("data/mined").glob("*.arrow"))]
    files = data + [
        file for path in inputs for file in sorted(path.rglob("*")) if file.suffix in (".safetensors", ".json")
    ]
    facts = {"parameters": {"seed": config.seed, **asdict(training)}}
    facts["inputs"] = {str(file): sha256(file) for file in files if file.name not in NO_INPUTS}
    facts["code"] = code_digests("f2llm.pipeline.train_stage")
    return checkpoint.keyed_folder(Path("scratch/train"), name.replace(" ", "-"), facts)


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
        of_rank = f" of process {distributed.rank()}" if distributed.world_size() > 1 else ""
        print(f"error{of_rank}: {error or type(error).__name__}", file=sys.stderr, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
