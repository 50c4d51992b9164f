"""Takes the steps of an order of `measure` with the training loop, and says how long they took."""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from ... import lora
from ...batches import Batch
from ...config import SHAPE
from ...model import Embedder, device_and_dtype
from ...optimizer import build_optimizer
from ...step import clip_gradients, embed_without_gradient, prepare
from ...store.tuples import TupleStore
from ...train import train
from .costs import Work, num_parameters
from .counted import BACKBONE, batches_of, sampled
from .measure import Order, Took, few

FEW_DOCUMENTS = 10**6  # that are tokenised before the first step, as a stage does


class Clock:
    """In place of the log of a training: the times at which its steps ended."""

    folder, quiet, name = None, True, "measured"

    def __init__(self):
        self.rows: list[tuple[float, float]] = []

    def log(self, *_) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.rows.append((time.perf_counter(), time.process_time()))

    def means(self) -> tuple[float, float]:
        """(seconds, CPU seconds) of a step, without the first, which warms up."""
        first, last = np.array(self.rows[0]), np.array(self.rows[-1])
        return tuple(((last - first) / (len(self.rows) - 1)).tolist())


class Chosen(Sequence):
    """Some steps of a training's batches, the first one twice; made when they are asked for, as in training."""

    def __init__(self, batches, steps: list[int]):
        self.batches, self.steps = batches, [steps[0], *steps]

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, number: int) -> Batch:
        return self.batches[self.steps[number]]


def take(order: Order) -> Took:
    """Train a random model for the steps of an order."""
    work, machine = order.work, order.machine
    torch.set_num_threads(machine.threads or torch.get_num_threads())
    settings = replace(work.training, validate_every=0)
    model = _model(order)
    batches, tokens = _real(order, model) if order.config else _random(work)
    zeros = partial(torch.zeros, device=model.device)
    teacher = (lambda packed: zeros(len(packed.batch.texts), model.dim)) if work.teacher[0] else None
    torch.nn.functional.linear(*torch.randn(2, 64, 64, device=model.device, requires_grad=True)).sum().backward()
    base, clock = _memory(reset=True), Clock()  # libraries have what they need for themselves
    train(model, batches, settings, clock, machine, teacher, tokens)
    peak = _memory()
    seconds, cpu_seconds = clock.means()
    optimizer = _seconds_of_optimizer(model, settings)
    held = 0 if torch.cuda.is_available() else 4 * num_parameters(**work.shape)[0]
    return Took(
        seconds=max(seconds - optimizer, 0.0),
        cpu_seconds=max(cpu_seconds - optimizer, 0.0),
        optimizer=optimizer,
        encoding=_seconds_of_encoding(model, batches, machine, tokens),
        teaching=_seconds_of_encoding(_teacher(order), batches, machine, tokens) if work.teacher_shape else 0.0,
        peak=None if peak is None else peak - (base or 0) + held,
    )


def _model(order: Order) -> Embedder:
    """A model of the work's shape with random weights and the settings of its machine."""
    work, machine = order.work, order.machine
    tokenizer = AutoTokenizer.from_pretrained(BACKBONE) if order.config else _tokenizer()
    shape = {name: work.shape[name] for name in SHAPE}
    shape["vocab_size"] = max(shape["vocab_size"], len(tokenizer))
    device, dtype = device_and_dtype()
    torch.manual_seed(0)
    with device:
        config = AutoConfig.for_model(work.shape["architecture"], **shape, use_cache=False)
        model = AutoModel.from_config(config, dtype=torch.float32)
    embedder = Embedder(model, tokenizer, work.training.max_tokens, machine.token_budget)
    products = dtype if machine.precision == "auto" else getattr(torch, machine.precision)
    embedder.autocast_dtype = products if products != torch.float32 else None
    if work.training.lora.rank:
        lora.add_adapter(model, work.training.lora, seed=0)
    if machine.recompute != "none":
        embedder.recompute(selectively=machine.recompute == "selective")
    if machine.compile:
        embedder.compile()
    return embedder


def _teacher(order: Order) -> Embedder:
    """A model of the teacher's shape with random weights, which reads what the student reads."""
    shaped = replace(order.work, shape=order.work.teacher_shape)
    plain = replace(order.machine, recompute="none", compile=False)
    return _model(Order(shaped, plain, order.config))


def _tokenizer() -> PreTrainedTokenizerFast:
    """One that is never asked for more than EOS."""
    tokenizer = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, "a"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="a")


def _random(work: Work) -> tuple[list[Batch], dict[str, list[np.ndarray]]]:
    """(batches, the first one twice; token ids of their texts by step) of the work's lengths."""
    random, batches, tokens = np.random.default_rng(0), [], {}
    for number, (queries, documents) in enumerate(work.lengths):
        size, rows = len(queries), len(queries) + np.arange(len(documents))
        negatives = max(0, round(len(rows) / size) - 1)
        passage, hard = np.resize(rows, size), np.resize(rows[::-1], (size, negatives))
        texts, every = size + len(rows), np.arange(size)
        batches.append(Batch(str(number), "retrieval", every, [""] * texts, every, passage, hard, passage, every,
                             stored=list(range(texts))))  # fmt: skip
        vocab = work.shape["vocab_size"]
        tokens[str(number)] = [random.integers(2, vocab, length) for length in (*queries, *documents)]
    return [batches[0], *batches], tokens


def _real(order: Order, model: Embedder) -> tuple[Chosen, dict | None]:
    """(the batches that the plan has counted, the first one twice; stored token ids of their documents)."""
    from ..train_stage import stored_tokens

    batches = batches_of(order.work, order.config, TupleStore())
    stored = sum(len(batches.store.documents[name]) for name in batches.rows) <= FEW_DOCUMENTS
    return Chosen(batches, few(sampled(len(batches)))), stored_tokens(batches, model) if stored else None


def _seconds_of_optimizer(model: Embedder, settings) -> float:
    """Of clipping and of a step of the optimizer, by gradients of 0: the least of three."""
    optimizer, found = build_optimizer(model.model, settings), []
    trained = [parameter for parameter in model.model.parameters() if parameter.requires_grad]
    for _ in range(3):
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        start = _now()
        clip_gradients(model, settings.max_grad_norm)
        optimizer.step()
        found.append(_now() - start)
    optimizer.zero_grad(set_to_none=True)
    return min(found)


def _seconds_of_encoding(model: Embedder, batches: Sequence[Batch], machine, tokens) -> float:
    """Of embedding the texts of a step without gradients, in the mean."""
    packed = [prepare(model, batches[number], machine, tokens) for number in range(1, len(batches))]
    start = _now()
    for batch in packed:
        embed_without_gradient(model, batch)
    return (_now() - start) / len(packed)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _memory(reset: bool = False) -> int | None:
    """Bytes at the peak until now, or since a reset; None where the system does not tell (not Linux)."""
    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
            return 0
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
