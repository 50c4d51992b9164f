"""One training step: packed and compiled, against the authors' padded batch and sentence-transformers.

python -m benchmarks.training [--quick]
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import gate, interleave, keep_freed_memory, ratio, write
from benchmarks.legs import (
    ADAMW,
    HARD_NEGATIVES,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    MAX_TOKENS,
    MIN_DIM,
    PASSAGE,
    QUERY,
    SHAPE,
    SMALL_SHAPE,
    TEMPERATURE,
    UNPADDED,
    Step,
    TokenBatch,
    authors_step,
    draw_batch,
    new_model,
    sentence_transformers_step,
    useful_flops,
    word_tokenizer,
)
from f2llm.config import load_config
from f2llm.losses import matryoshka_dims
from f2llm.model import Embedder
from f2llm.optimizer import build_optimizer
from f2llm.step import clip_gradients, grad_cache_backward, prepare

FULL = {"shape": SHAPE, "rounds": 3, "batch_sizes": [4, 16], "token_budget": 4096, "compile": True}
QUICK = {"shape": SMALL_SHAPE, "rounds": 1, "batch_sizes": [2, 3], "token_budget": 1024, "compile": False}
OURS, PACKED = "ours_compiled", "ours_packed"
SHIPPED, WITHOUT_PADS = "authors_as_shipped", "authors_unpadded_attention"
CACHED, BY_TEXT = "sentence_transformers_8", "sentence_transformers_1"  # with their mini-batch sizes
GOALS = {  # of ours_compiled: name -> (number of the batch size, other leg, goal, against)
    "vs_authors_as_shipped": (0, SHIPPED, 6, "one padded batch of 4, SDPA, full activation checkpointing"),
    "vs_authors_as_shipped_batch16": (1, SHIPPED, 12, "one padded batch of 16, SDPA, full activation checkpointing"),
    "vs_authors_unpadded_attention_batch16": (1, WITHOUT_PADS, 8, "the same, where attention computes no pads"),
    "vs_sentence_transformers": (0, CACHED, 3.3, "its cached loss, batch 4, mini-batches of 8 (and 32: the same)"),
    "vs_sentence_transformers_one_by_one": (0, BY_TEXT, None, "its cached loss, batch 4, mini-batches of 1: no pads"),
}
REMARKS = """\
CPU seconds of one thread per step, legs in turn; each round is another batch, the same for all legs, which start from
the same weights. Every leg runs under glibc settings that keep freed memory (harness.MEMORY), which help all of them.
Our legs run f2llm.train's step and its preparation from texts; the others get token ids. padding: the other leg's share
of pads in all positions that it computes. Loss and gradient norm of our and the authors' legs agree to 1e-4 in
every round. The loss of sentence-transformers is another sum (one softmax over passages and hard negatives together),
which costs no time worth naming; its two legs are compared with each other. It pads each column by itself and, with
mini-batches, embeds each text twice; 4 rows a column fill neither 8 nor 32. share_of_matmul: 6 x weights without
the embedding table x useful tokens, and causal attention, per second, over the float32 matmul rate of that round. All
legs are counted so, though ours computes the last layer for the last token of each text only."""


def our_step(embedder: Embedder, compiled: bool, token_budget: int, activation_tokens: int = 2**30) -> Step:
    """What f2llm.train does in a step, from texts to updated weights; 2**30 keeps all activations."""
    config = load_config()
    training = replace(
        config.stage1, learning_rate=LEARNING_RATE, min_learning_rate=0.0, betas=list(ADAMW["betas"]),
        weight_decay=ADAMW["weight_decay"],
        decay_norms=True, temperature=TEMPERATURE, max_grad_norm=MAX_GRAD_NORM, matryoshka_min_dim=MIN_DIM,
        in_batch_tasks=["retrieval"], in_batch_gradient="full", distillation_weight=0.0,
    )  # fmt: skip
    machine = replace(config.machine, token_budget=token_budget, activation_tokens=activation_tokens)
    if compiled:
        embedder.compile()
    embedder.model.train()
    optimizer = build_optimizer(embedder.model, training)

    def step(batch: TokenBatch) -> tuple[float, float]:
        losses = grad_cache_backward(embedder, prepare(embedder, batch.batch, machine), training)
        norm = clip_gradients(embedder, training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return sum(losses.values()), norm

    return step


def make_steps(names: list[str], settings: dict, folder: Path) -> dict[str, Step]:
    """The legs of these names, each with a model of its own with equal weights."""
    shape, budget = settings["shape"], settings["token_budget"]
    dims = matryoshka_dims(shape["hidden_size"], MIN_DIM)
    tokenizer = word_tokenizer(shape["vocab_size"])
    Embedder(new_model(shape), tokenizer, MAX_TOKENS).write(folder)

    def ours(compiled: bool) -> Step:
        return our_step(Embedder(new_model(shape), tokenizer, MAX_TOKENS), compiled, budget)

    makers = {
        SHIPPED: lambda: authors_step(new_model(shape), dims),
        WITHOUT_PADS: lambda: authors_step(new_model(shape), dims, UNPADDED),
        CACHED: lambda: sentence_transformers_step(folder, dims, mini_batch_size=8),
        BY_TEXT: lambda: sentence_transformers_step(folder, dims, mini_batch_size=1),
        PACKED: lambda: ours(compiled=False),
        OURS: lambda: ours(compiled=settings["compile"]),
    }
    return {name: makers[name]() for name in names}


def measure(names: list[str], batches: list[TokenBatch], warm_up: TokenBatch, settings: dict) -> dict[str, dict]:
    """CPU seconds and outcomes of every leg on every batch, and what follows from them."""
    with tempfile.TemporaryDirectory() as folder:
        steps = make_steps(names, settings, Path(folder))
    for step in steps.values():
        step(warm_up)
    outcomes = {name: [] for name in names}

    def run(name: str) -> None:
        outcomes[name].append(steps[name](batches[len(outcomes[name])]))

    square = torch.randn(1024, 1024)
    matmul = {"matmul": lambda: [square @ square for _ in range(8)]}
    seconds = interleave(matmul | {name: lambda name=name: run(name) for name in names}, len(batches))
    rates = [8 * 2 * len(square) ** 3 / second for second in seconds.pop("matmul")]  # FLOP/s
    for number in range(len(batches)):
        for same in ([SHIPPED, WITHOUT_PADS, PACKED, OURS], [CACHED, BY_TEXT]):
            gate({name: outcomes[name][number] for name in same if name in names} or {"none": (1.0, 1.0)})
    work = [useful_flops(settings["shape"], batch.token_ids) for batch in batches]
    return {
        name: {
            "cpu_seconds": seconds[name],
            "useful_tokens_per_second": [batch.num_tokens / spent for batch, spent in zip(batches, seconds[name])],
            "share_of_matmul": [flops / spent / rate for flops, spent, rate in zip(work, seconds[name], rates)],
            "padding": [padding(name, batch) for batch in batches],
            "loss_and_gradient_norm": outcomes[name],
        }
        for name in names
    } | {"matmul": {"gflops": [rate / 1e9 for rate in rates]}}


def padding(name: str, batch: TokenBatch) -> float:
    """Share of pads in what a leg computes."""
    computed = {SHIPPED: batch.padding, WITHOUT_PADS: batch.padding, CACHED: batch.padding_by_column}
    return computed[name]() if name in computed else 0.0


def main(words: list[str] | None = None) -> dict:
    """The ratios, also printed; the full run writes them to benchmarks/results/training_cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small and in seconds; writes nothing")
    settings = QUICK if parser.parse_args(words).quick else FULL
    torch.set_num_threads(1)
    began = time.monotonic()
    random, tokenizer = np.random.default_rng(0), word_tokenizer(settings["shape"]["vocab_size"])
    small, large = settings["batch_sizes"]
    measured = {}
    for size, names in ((small, [SHIPPED, CACHED, BY_TEXT, PACKED, OURS]), (large, [SHIPPED, WITHOUT_PADS, OURS])):
        batches = [draw_batch(size, tokenizer, random) for _ in range(settings["rounds"])]
        measured[size] = measure(names, batches, draw_batch(2, tokenizer, random), settings)

    ratios = {}
    for name, (number, other, goal, against) in GOALS.items():
        legs = measured[settings["batch_sizes"][number]]
        figures = ratio(legs[other]["cpu_seconds"], legs[OURS]["cpu_seconds"])
        share = statistics.median(legs[other]["padding"])
        ratios[name] = figures | {"padding": share, "goal": goal, "against": against}
    print(json.dumps(ratios, indent=1))
    if settings is FULL:
        laws = {"query_tokens": QUERY, "passage_tokens": PASSAGE, "max_tokens": MAX_TOKENS}
        facts = {**settings, **laws, "hard_negatives": HARD_NEGATIVES, "wall_seconds": time.monotonic() - began}
        legs = {f"batch{size}_{name}": leg for size, legs in measured.items() for name, leg in legs.items()}
        remarks = " ".join(REMARKS.split())
        print(write("training_cpu", {"settings": facts, "ratios": ratios, "legs": legs, "remarks": remarks}))
    return ratios


if __name__ == "__main__":
    keep_freed_memory()
    main()
