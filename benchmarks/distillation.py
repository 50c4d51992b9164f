"""A distillation step with the teacher's embeddings read from the cache against one that computes them.

python -m benchmarks.distillation [--quick]
"""

import argparse
import itertools
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import gate, interleave, keep_freed_memory, ratio, write
from benchmarks.legs import MAX_TOKENS, SHAPE, SMALL_SHAPE, draw_batch, new_model, word_tokenizer
from f2llm.config import load_config
from f2llm.model import Embedder
from f2llm.step import clip_gradients, embed_without_gradient, grad_cache_backward, prepare
from f2llm.teacher import Cached, live

STUDENT = {
    **SHAPE,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 384,
}
FULL = {"teacher": SHAPE, "student": STUDENT, "batch": 8, "rounds": 5}
QUICK = {"teacher": SMALL_SHAPE, "student": {**SMALL_SHAPE, "hidden_size": 32}, "batch": 2, "rounds": 1}
AGAINST = {
    "cached_teacher": ("live", "cached", "the same step with a live teacher, ten times as large without embeddings"),
    "first_pass": ("live", "first", "a live teacher; the step that fills the cache"),
    "look_up": ("given", "cached", "the same step with the embeddings at hand"),
}
REMARKS = """\
CPU seconds of one thread. The teacher has ten times the student's non-embedding parameters; F2LLM-v2's 4B teacher has
8.2 times those of its 0.6B student. live: the teacher embeds the step's texts. first: f2llm.teacher.Cached, empty,
asks the teacher and writes its rows to the disk. cached: it finds every text by its digest and reads its row from that
file. given: the embeddings are at hand, without any look-up. Loss and gradient norm are the same in all."""


def main(words: list[str] | None = None) -> dict:
    """The ratios, also printed; the full run writes them to benchmarks/results/distillation_cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small and in seconds; writes nothing")
    settings = QUICK if parser.parse_args(words).quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(settings, Path(folder))
    ratios = {
        name: ratio(seconds[slow], seconds[fast]) | {"goal": None, "against": against}
        for name, (slow, fast, against) in AGAINST.items()
    }
    print(json.dumps(ratios, indent=1))
    if settings is FULL:
        legs = {name: {"cpu_seconds": spent} for name, spent in seconds.items()}
        print(write("distillation_cpu", {"settings": settings, "ratios": ratios, "legs": legs, "remarks": REMARKS}))
    return ratios


def measure(settings: dict, folder: Path) -> dict[str, list[float]]:
    """CPU seconds of every leg per round, with caches in the folder; a RuntimeError if the legs' losses disagree."""
    torch.set_num_threads(1)
    random, tokenizer = np.random.default_rng(0), word_tokenizer(settings["teacher"]["vocab_size"])
    teacher, student = (Embedder(new_model(settings[name]), tokenizer, MAX_TOKENS) for name in ("teacher", "student"))
    config = load_config()
    training = replace(config.stage2, distillation_weight=1.0, in_batch_tasks=["retrieval"])
    machine = replace(config.machine, token_budget=2048, activation_tokens=2**30)
    packed = prepare(student, draw_batch(settings["batch"], tokenizer, random).batch, machine)
    numbers, outcomes = itertools.count(), {}
    full = Cached(teacher, folder / "full", machine)
    known = full(packed)
    full.flush()

    def first(packed):
        cached = Cached(teacher, folder / str(next(numbers)), machine)
        rows = cached(packed)
        cached.flush()
        return rows

    teachers = {"live": live(teacher), "first": first, "cached": full, "given": lambda packed: known}

    def step(name: str) -> None:
        losses = grad_cache_backward(student, packed, training, teachers[name](packed))
        outcomes[name] = sum(losses.values()), clip_gradients(student, 1.0)
        student.model.zero_grad(set_to_none=True)

    legs = {name: lambda name=name: step(name) for name in teachers}
    interleave(legs, rounds=1)  # warm-up
    seconds = interleave(legs, settings["rounds"])
    gate(outcomes)
    if not torch.equal(known, embed_without_gradient(teacher, packed)) or full.new:
        raise RuntimeError("the cache's rows are not those of the live teacher")
    return seconds


if __name__ == "__main__":
    keep_freed_memory()
    main()
