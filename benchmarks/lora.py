"""A training step of an adapter beside one of all weights: CPU time, memory, size of a checkpoint.

python -m benchmarks.lora [--quick]
"""

import argparse
import json
from dataclasses import replace

import numpy as np
import torch

from benchmarks.harness import in_child, interleave, keep_freed_memory, peak_memory, ratio, write
from benchmarks.legs import MAX_TOKENS, SHAPE, SMALL_SHAPE, draw_batch, new_model, word_tokenizer
from f2llm.config import Lora, load_config
from f2llm.distributed import state_dicts
from f2llm.lora import add_adapter
from f2llm.model import Embedder
from f2llm.optimizer import build_optimizer
from f2llm.step import clip_gradients, grad_cache_backward, prepare

WIDE = {**SHAPE, "hidden_size": 512, "num_hidden_layers": 4, "intermediate_size": 1536}
RANK, QUERIES, ROUNDS = 16, 2, 3
TOKENS = 1024  # of a pack, and of the activations that are kept: the texts of a step are embedded twice
WAYS = ("full", "lora", "dora")
REMARKS = """\
A step: gradients of a batch of nine texts a query by gradient caching, clipping, AdamW; on one thread. lora and dora:
an adapter of rank 16 on all linear layers. step: seconds of `full` over seconds of the way. memory: what model,
optimizer and two steps add to the peak resident memory (VmHWM) of a fresh process, `full` over the way. checkpoint:
bytes of weights and optimizer state. The first loss of all ways is the same: a new adapter changes nothing."""


class Trained:
    """A model, all of whose weights or whose adapter is trained, with its optimizer and a batch."""

    def __init__(self, way: str, shape: dict[str, int], queries: int):
        torch.set_num_threads(1)
        tokenizer, config = word_tokenizer(shape["vocab_size"]), load_config()
        self.model = Embedder(new_model(shape), tokenizer, MAX_TOKENS)
        if way != "full":
            add_adapter(self.model.model, Lora(rank=RANK, alpha=32.0, dora=way == "dora", targets="all"), seed=0)
        self.model.model.train()
        self.training = replace(config.stage1, in_batch_tasks=["retrieval"], matryoshka_min_dim=8)
        self.optimizer = build_optimizer(self.model.model, self.training)
        machine = replace(config.machine, token_budget=TOKENS, activation_tokens=TOKENS)
        batch = draw_batch(queries, tokenizer, np.random.default_rng(0))
        self.packed = prepare(self.model, batch.batch, machine)

    def step(self) -> float:
        """The loss before the step."""
        losses = grad_cache_backward(self.model, self.packed, self.training)
        clip_gradients(self.model, self.training.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return sum(losses.values())

    def checkpoint_bytes(self) -> int:
        parts = state_dicts(self.model.model, self.optimizer)
        return sum(tensor.numel() * tensor.element_size() for part in parts for tensor in part.values())


def memory(way: str, shape: dict[str, int], queries: int) -> dict:
    """What a training adds to the memory of this process, its first loss, its checkpoint."""
    Trained("lora", SMALL_SHAPE, 2).step()  # libraries are loaded
    before = peak_memory()
    trained = Trained(way, shape, queries)
    loss, _ = trained.step(), trained.step()
    return {"growth_mib": (peak_memory() - before) / 2**20, "loss": loss, "checkpoint": trained.checkpoint_bytes()}


def main(words: list[str] | None = None) -> dict:
    """The ratios, also printed; the full run writes them to benchmarks/results/lora_cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small and in seconds; writes nothing")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "SHAPE"), help="memory of one way, as JSON")
    arguments = parser.parse_args(words)
    if arguments.one:
        print(json.dumps(memory(arguments.one[0], json.loads(arguments.one[1]), QUERIES)))
        return {}
    shape, rounds = (SMALL_SHAPE, 1) if arguments.quick else (WIDE, ROUNDS)
    legs = {way: in_child("benchmarks.lora", "--one", way, json.dumps(shape)) for way in WAYS}
    losses = [leg["loss"] for leg in legs.values()]
    if max(losses) - min(losses) > 1e-4 * max(losses):
        raise RuntimeError(f"the first losses of {', '.join(WAYS)} disagree: {losses}")
    seconds = interleave({way: Trained(way, shape, QUERIES).step for way in WAYS}, rounds + 1)
    full, ratios = legs["full"], {}
    for way in WAYS[1:]:
        against = f"the same step of all weights; rank {RANK}"
        ratios[f"{way}_step"] = ratio(seconds["full"][1:], seconds[way][1:]) | {"goal": None, "against": against}
        for key, what in (("growth_mib", "memory"), ("checkpoint", "checkpoint")):
            value = full[key] / max(1.0, legs[way][key])
            ratios[f"{way}_{what}"] = dict.fromkeys(("min", "median", "max"), value)
            ratios[f"{way}_{what}"] |= {"goal": None, "against": "that of training all weights"}
        legs[way]["seconds"] = seconds[way][1:]
    full["seconds"] = seconds["full"][1:]
    print(json.dumps(ratios, indent=1))
    if not arguments.quick:
        settings = {"shape": shape, "rank": RANK, "queries": QUERIES, "tokens": TOKENS, "rounds": rounds}
        print(write("lora_cpu", {"settings": settings, "ratios": ratios, "legs": legs, "remarks": REMARKS}))
    return ratios


if __name__ == "__main__":
    keep_freed_memory()
    main()
