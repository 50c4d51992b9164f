"""Peak memory of a training step: flat in the global batch with gradient caching, growing with it without.

python -m benchmarks.memory [--quick]
"""

import argparse
import json
from dataclasses import replace

import numpy as np
import torch

from benchmarks.harness import in_child, keep_freed_memory, peak_memory, write
from benchmarks.legs import MAX_TOKENS, SMALL_SHAPE, draw_batch, new_model, word_tokenizer
from f2llm.config import load_config
from f2llm.model import Embedder
from f2llm.step import grad_cache_backward, prepare

SIZES = [32, 128, 512]  # queries of a global batch, 9 texts each
PLAIN = 64  # the largest batch that is also measured with all activations kept
TOKEN_BUDGET = 2048
REMARKS = """\
growth_mib: what a step adds to the peak resident memory (VmHWM) of a fresh process that has done a step of two queries;
bytes_per_token of the step. cached: activation_tokens = token_budget, so the activations of one pack only are alive.
plain: all are kept. Text lengths as in training_cpu. What still grows with the batch: token ids (Python integers),
embeddings, their gradients, the loss."""


def growth(size: int, cached: bool) -> dict:
    """Memory of a step of `size` queries, its loss, and its tokens."""
    torch.set_num_threads(1)
    random, tokenizer = np.random.default_rng(size), word_tokenizer(SMALL_SHAPE["vocab_size"])
    model = Embedder(new_model(SMALL_SHAPE), tokenizer, MAX_TOKENS)
    model.model.train()
    config = load_config()
    training = replace(config.stage1, in_batch_tasks=["retrieval"], matryoshka_min_dim=8)
    machine = replace(config.machine, token_budget=TOKEN_BUDGET, activation_tokens=TOKEN_BUDGET if cached else 2**30)
    grad_cache_backward(model, prepare(model, draw_batch(2, tokenizer, random).batch, machine), training)
    batch = draw_batch(size, tokenizer, random)
    before = peak_memory()
    losses = grad_cache_backward(model, prepare(model, batch.batch, machine), training)
    added = peak_memory() - before
    memory = {
        "peak_mib": peak_memory() / 2**20,
        "growth_mib": added / 2**20,
        "bytes_per_token": added / batch.num_tokens,
    }
    return memory | {"loss": sum(losses.values()), "tokens": batch.num_tokens}


def main(words: list[str] | None = None) -> dict:
    """The ratios, also printed; the full run writes them to benchmarks/results/memory_cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small and in seconds; writes nothing")
    parser.add_argument("--one", nargs=2, metavar=("SIZE", "WAY"), help="one measurement, as JSON")
    arguments = parser.parse_args(words)
    if arguments.one:
        print(json.dumps(growth(int(arguments.one[0]), arguments.one[1] == "cached")))
        return {}
    sizes, plain = ([2, 4], 4) if arguments.quick else (SIZES, PLAIN)
    legs = {f"cached_{size}": measure(size, "cached") for size in dict.fromkeys([*sizes, plain])}
    legs[f"plain_{plain}"] = measure(plain, "plain")
    one, other = (legs[f"{way}_{plain}"]["loss"] for way in ("cached", "plain"))
    if abs(one - other) > 1e-4 * abs(other):
        raise RuntimeError(f"the losses of both ways disagree: {one} and {other}")
    kept, cached = (legs[f"{way}_{plain}"]["growth_mib"] for way in ("plain", "cached"))
    value = kept / max(1.0, cached)  # memory of a fresh process does not scatter as time does: one measurement
    ratios = {
        "vs_all_activations_kept": {"min": value, "median": value, "max": value, "goal": None}
        | {"against": f"what a plain step of {plain} queries adds to the peak"}
    }
    print(json.dumps(ratios, indent=1))
    if not arguments.quick:
        settings = {"shape": SMALL_SHAPE, "token_budget": TOKEN_BUDGET, "sizes": sizes, "plain": plain}
        print(write("memory_cpu", {"settings": settings, "ratios": ratios, "legs": legs, "remarks": REMARKS}))
    return ratios


def measure(size: int, way: str) -> dict:
    return in_child("benchmarks.memory", "--one", str(size), way)


if __name__ == "__main__":
    keep_freed_memory()
    main()
