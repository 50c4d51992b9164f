"""Contrastive training and distillation: the loop reads as the method.

Run as its own process, by `f2llm.launch` or by hand: python -m f2llm.train stage1 | stage2 | distill
In several: torchrun or accelerate launch, with the same words after -m; `f2llm plan` prints the line.
"""

import argparse
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import checkpoint, distributed
from .batches import Batch, HomogeneousBatches
from .config import TRAINING_STAGES, Config, Machine, Training, load_config
from .launch import die_with_parent
from .losses import distillation_loss, hard_negative_loss, matryoshka, matryoshka_dims, matryoshka_in_batch_loss
from .model import Embedder
from .optimizer import build_optimizer, learning_rate
from .packing import Pack, fill, make_pack, share_out
from .run import Run
from .tuples import TupleStore


def train(
    model: Embedder,
    batches: HomogeneousBatches,
    config: Training,
    run: Run,
    machine: Machine,
    teacher: Embedder | None = None,
) -> None:
    """Train `model` in place: one optimizer step per batch, one source per batch.

    Goes on from the newest checkpoint in run.folder, if there is one.
    """
    check_teacher(model, teacher)
    optimizer = build_optimizer(model.model, config)
    first = resume(model, optimizer, run)
    model.model.train()
    for work in ahead(lambda step: prepare(model, batches[step], machine), range(first, len(batches))):
        step = len(run.rows) + 1
        target = embed_without_gradient(teacher, work) if teacher and config.distillation_weight else None
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
            save(step, model, optimizer, run)
    model.model.eval()


# A batch, made ready ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """A batch and this process's part of it. shares: texts of every process, in the order it embeds them."""

    batch: Batch
    packs: list[Pack]
    shares: list[list[int]]
    num_kept: int  # of the last packs: their activations wait for the backward pass
    lengths: list[int]  # tokens of every text
    num_cut: int  # texts that fill max_tokens

    def tokens(self) -> dict[str, int]:
        """Useful tokens of the step, and what one padded batch of queries, passages and negatives would compute."""
        padded = self.batch.num_texts * max(self.lengths)
        return {"tokens": sum(self.lengths), "padded_tokens": padded, "cut_texts": self.num_cut}


def prepare(model: Embedder, batch: Batch, machine: Machine) -> Work:
    """Tokenise a batch, share its texts out over the processes, and pack this one's."""
    token_ids = model.tokenize(batch.texts)
    lengths = [len(ids) for ids in token_ids]
    if min(lengths) < 2:
        empty = batch.texts[lengths.index(min(lengths))]
        raise ValueError(
            f"source {batch.source}: the text {empty!r} has no tokens (rows {shown(batch.rows)}); "
            "remedy: remove it from the source"
        )
    groups = [list(fill(lengths, machine.token_budget, share)) for share in share_out(lengths, distributed.num_ranks())]
    own = [make_pack(rows, [token_ids[row] for row in rows]) for rows in groups[distributed.rank()]]
    if distributed.is_sharded(model.model):  # all processes must run equally many passes: fill up with empty packs
        empty = [make_pack([], [[model.tokenizer.eos_token_id]])] * (max(map(len, groups)) - len(own))
        own = empty + own
    return Work(
        batch=batch,
        packs=own,
        shares=[[row for group in rank_groups for row in group] for rank_groups in groups],
        num_kept=min(num_kept(lengths, rank_groups, machine.activation_tokens) for rank_groups in groups),
        lengths=lengths,
        num_cut=lengths.count(model.max_tokens),
    )


def num_kept(lengths: list[int], groups: list[list[int]], activation_tokens: int) -> int:
    """How many of the last packs fit into `activation_tokens`; at least one, which is computed last anyway."""
    count = tokens = 0
    for rows in reversed(groups):
        tokens += sum(lengths[row] for row in rows)
        if count and tokens > activation_tokens:
            break
        count += 1
    return count


def ahead(make: Callable, items: Iterable, depth: int = 2) -> Iterator:
    """make(item) of every item in order, computed by a thread while the caller works on an earlier one."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# The step ---------------------------------------------------------------------------------------


def accumulate_gradients(
    model: Embedder, work: Work, config: Training, target: Tensor | None = None
) -> dict[str, float]:
    """Weighted losses of a batch by name; their gradients are added to the parameters'.

    target (texts, at least D): the teacher's embeddings.
    Gradient caching: all texts are embedded, the loss gives the gradient of every embedding, and each pack goes
    through the model once more to carry its part back, unless its activations were kept. So loss and
    gradients do not depend on what fits into memory. Source: Gao et al. 2021, arXiv 2101.06983.
    """
    first_kept = len(work.packs) - work.num_kept
    outputs = []
    for number, pack in enumerate(work.packs):
        with torch.set_grad_enabled(number >= first_kept):
            outputs.append(model.embed_pack(pack)[: len(pack.rows)])
    embeddings = distributed.gather(_cat(outputs, model), work.shares).requires_grad_()  # (texts, D)
    losses = compute_losses(embeddings, work.batch, config, target)
    sum(losses.values()).backward()
    gradient = embeddings.grad  # (texts, D)
    if distributed.is_sharded(model.model):
        gradient = gradient * distributed.num_ranks()  # FSDP2 takes the mean over processes
    for number in reversed(range(len(work.packs))):  # the kept ones first: their memory is free for the others
        pack, output = work.packs[number], outputs.pop()
        if number < first_kept:
            output = model.embed_pack(pack)[: len(pack.rows)]
        output.backward(gradient[pack.rows].to(output.dtype))
        del output
    distributed.sum_gradients(model.model)
    return {name: loss.item() for name, loss in losses.items()}


@torch.no_grad()
def embed_without_gradient(model: Embedder, work: Work) -> Tensor:
    """Embeddings (texts, D), float32, of a batch that is made ready, in every process."""
    outputs = [model.embed_pack(pack)[: len(pack.rows)] for pack in work.packs]
    return distributed.gather(_cat(outputs, model), work.shares)


def _cat(outputs: list[Tensor], model: Embedder) -> Tensor:
    return torch.cat(outputs) if outputs else torch.zeros(0, model.dim, device=model.device)


def compute_losses(
    embeddings: Tensor, batch: Batch, config: Training, target: Tensor | None = None
) -> dict[str, Tensor]:
    """Weighted losses by name. Which apply is the task's matter: in_batch is for retrieval only.

    embeddings (texts, D) of batch.texts; target (texts, at least D): the teacher's.
    """
    query, passage = embeddings[batch.query], embeddings[batch.passage]  # (B, D)
    dims = matryoshka_dims(embeddings.shape[1], config.matryoshka_min_dim)
    losses = {}
    if batch.hard_negatives.shape[1]:
        hard_negatives = embeddings[batch.hard_negatives]  # (B, K, D)

        def hard(*prefixes):
            return hard_negative_loss(*prefixes, temperature=config.temperature)

        losses["hard_negative"] = matryoshka(hard, query, passage, hard_negatives, dims=dims)
    if batch.task in config.in_batch_tasks:
        positive = torch.arange(len(query), device=query.device)
        duplicates = same_group(batch, query.device) if config.mask_duplicates else None
        passages = passage.detach() if config.in_batch_gradient == "query_only" else passage
        losses["in_batch"] = matryoshka_in_batch_loss(
            query, passages, positive, config.temperature, dims=dims, duplicates=duplicates
        )
    if target is not None:
        parts = [batch.query, batch.passage] + ([batch.hard_negatives] if batch.hard_negatives.size else [])
        distilled = sum(distillation_loss(embeddings[part], target[part]) for part in parts)
        losses["distill"] = config.distillation_weight * distilled
    return losses


def same_group(batch: Batch, device: torch.device) -> Tensor:
    """(B, B), bool: passages that answer a query beside its own."""
    group = torch.as_tensor(batch.group, device=device)
    return group[:, None] == group[None, :]


def clip_gradients(model: Embedder, max_norm: float) -> float:
    """Scale all gradients so that their norm is at most `max_norm`; the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.model.parameters(), max_norm)
    return float(norm.full_tensor() if distributed.is_sharded(model.model) else norm)


def require_finite(step: int, work: Work, losses: dict[str, float], grad_norm: float) -> None:
    """Stop before the optimizer takes a step on numbers that are none."""
    if np.isfinite(grad_norm) and np.isfinite(sum(losses.values())):
        return
    raise RuntimeError(
        f"step {step}, source {work.batch.source}: gradient norm {grad_norm}, losses {losses}; no step was "
        f"taken on them, the last checkpoint is kept. rows: {shown(work.batch.rows)}. "
        "remedy: a lower learning_rate, a longer warmup_steps, or look at the texts of these rows"
    )


def shown(rows: np.ndarray) -> str:
    """The first numbers of a long list."""
    return ", ".join(map(str, rows[:8])) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")


@torch.no_grad()
def validate(model: Embedder, batches: HomogeneousBatches, config: Training, machine: Machine) -> Iterator[dict]:
    """source, dim, loss, accuracy of every source's withheld rows at every matryoshka dim.

    loss: the losses that apply to the task, unweighted. accuracy: queries whose own passage is the nearest
    of all that the losses compare it with.
    """
    model.model.eval()
    for batch in batches.validation():
        embeddings = embed_without_gradient(model, prepare(model, batch, machine))
        for dim in matryoshka_dims(embeddings.shape[1], config.matryoshka_min_dim):
            unit = torch.nn.functional.normalize(embeddings[:, :dim], dim=-1)
            query = unit[batch.query]
            scores = torch.einsum("bd,bkd->bk", query, unit[batch.hard_negatives])  # (B, K)
            if batch.task in config.in_batch_tasks:
                others = (query @ unit[batch.passage].T).masked_fill(same_group(batch, unit.device), -torch.inf)
                scores = torch.cat([scores, others], dim=1)
            own = (query * unit[batch.passage]).sum(-1)
            right = (own > scores.max(dim=1).values) if scores.shape[1] else torch.ones_like(own, dtype=bool)
            losses = compute_losses(embeddings[:, :dim], batch, replace(config, matryoshka_min_dim=0))
            yield {
                "source": batch.source,
                "dim": dim,
                "loss": round(float(sum(losses.values())), 5),
                "accuracy": round(right.float().mean().item(), 5),
            }
    model.model.train()


# Beginning, going on, ending --------------------------------------------------------------------


def check_teacher(model: Embedder, teacher: Embedder | None) -> None:
    """A student learns the first dimensions of its teacher's embeddings, from the same tokens."""
    if teacher is None:
        return
    if teacher.dim < model.dim:
        raise ValueError(
            f"the teacher's embeddings have {teacher.dim} dimensions, fewer than the student's {model.dim}; "
            "remedy: a larger teacher, or swap the two"
        )
    if teacher.tokenizer.get_vocab() != model.tokenizer.get_vocab():
        raise ValueError("teacher and student have different tokenizers; remedy: a teacher of the same family")


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
    training: Training = getattr(config, stage)
    machine, first = config.machine, distributed.rank() == 0
    torch.manual_seed(config.seed)
    threads = machine.threads or torch.get_num_threads()
    torch.set_num_threads(max(1, threads // distributed.num_ranks()) if not torch.cuda.is_available() else threads)
    batches = HomogeneousBatches(TupleStore(), training, config.seed, stage1=stage == "stage1")
    teacher_path = Path("models/stage2") if stage == "distill" else None
    teacher = Embedder.load(teacher_path, machine.token_budget) if teacher_path else None
    if stage == "distill":
        with checkpoint.clear_errors(Path("models/distilled")):
            Path("models/distilled").mkdir(parents=True, exist_ok=True)  # also when the family has no students
    for start, out in inputs_and_outputs(stage, config):
        name = stage if stage != "distill" else f"distill {out.name}"
        inputs = [start] + ([teacher_path] if teacher_path else [])
        with ExitStack() as stack:
            folder = scratch_folder(name, training, config, inputs) if first else Path()
            folder = Path(distributed.from_first(str(folder)))
            if first:
                stack.enter_context(checkpoint.alone_in(folder))
            model = load_for_training(start, training, machine)
            run = Run(name, len(batches), folder, quiet=not first, tensorboard=machine.tensorboard)
            train(model, batches, training, run, machine, teacher)
            write_model(model, out, run, config, [str(path) for path in inputs])
    distributed.stop()


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


def write_model(model: Embedder, out: Path, run: Run, config: Config, inputs: list[str]) -> None:
    """The trained model, its logs and its provenance, whole; the scratch folder is marked as finished."""
    weights, _ = distributed.whole_state(model.model, None)
    if distributed.rank() == 0:
        with checkpoint.whole_folder(out) as folder:
            model.tokenizer.backend_tokenizer.no_truncation()  # or its file would tell whether texts were tokenised
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


CODE = ("attention", "batches", "distributed", "losses", "model", "optimizer", "packing", "text", "train", "tuples")


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
