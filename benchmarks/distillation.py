"""A distillation step with the teacher's embeddings at hand against one that computes them.

python -m benchmarks.distillation [--quick]
"""

import argparse
import json
from dataclasses import replace

import numpy as np
import torch

from benchmarks.harness import gate, interleave, keep_freed_memory, ratio, write
from benchmarks.legs import MAX_TOKENS, SHAPE, SMALL_SHAPE, draw_batch, new_model, word_tokenizer
from f2llm.config import load_config
from f2llm.model import Embedder
from f2llm.step import accumulate_gradients, clip_gradients, embed_without_gradient, prepare

STUDENT = {**SHAPE, "hidden": 128, "layers": 3, "head": 32, "query_heads": 4, "key_value_heads": 2, "mlp": 384}
FULL = {"teacher": SHAPE, "student": STUDENT, "batch": 8, "rounds": 5}
QUICK = {"teacher": SMALL_SHAPE, "student": {**SMALL_SHAPE, "hidden": 32}, "batch": 2, "rounds": 1}
REMARKS = """\
CPU seconds of one thread. The teacher's body has ten times the student's weights; F2LLM-v2's 4B teacher has 8.2 times
those of its 0.6B student. live: the teacher embeds the step's texts. cached: its embeddings are given. Same loss."""


def main(words: list[str] | None = None) -> dict:
    """The ratio, also printed; the full run writes it to benchmarks/results/distillation_cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small and in seconds; writes nothing")
    settings = QUICK if parser.parse_args(words).quick else FULL
    torch.set_num_threads(1)
    random, tokenizer = np.random.default_rng(0), word_tokenizer(settings["teacher"]["vocab"])
    teacher, student = (Embedder(new_model(settings[name]), tokenizer, MAX_TOKENS) for name in ("teacher", "student"))
    config = load_config()
    training = replace(config.distill, distillation_weight=1.0, in_batch_tasks=["retrieval"])
    machine = replace(config.machine, token_budget=2048, activation_tokens=2**30)
    work = prepare(student, draw_batch(settings["batch"], tokenizer, random).batch, machine)
    known, outcomes = embed_without_gradient(teacher, work), {}

    def step(name: str) -> None:
        target = known if name == "cached" else embed_without_gradient(teacher, work)
        losses = accumulate_gradients(student, work, training, target)
        outcomes[name] = sum(losses.values()), clip_gradients(student, 1.0)
        student.model.zero_grad(set_to_none=True)

    legs = {name: lambda name=name: step(name) for name in ("live", "cached")}
    interleave(legs, rounds=1)  # warm-up
    seconds = interleave(legs, settings["rounds"])
    gate(outcomes)
    goal = {"goal": None, "against": "the same step with a live teacher of ten times the student's body"}
    ratios = {"cached_teacher": ratio(seconds["live"], seconds["cached"]) | goal}
    print(json.dumps(ratios, indent=1))
    if settings is FULL:
        legs = {name: {"cpu_seconds": spent} for name, spent in seconds.items()}
        print(write("distillation_cpu", {"settings": settings, "ratios": ratios, "legs": legs, "remarks": REMARKS}))
    return ratios


if __name__ == "__main__":
    keep_freed_memory()
    main()
