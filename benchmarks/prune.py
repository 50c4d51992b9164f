"""Time and memory of pruning 0.6B to each of its students on this CPU: scores, then cutting.

python -m benchmarks.prune [--quick]
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3Model
from transformers.initialization import no_init_weights

from benchmarks.harness import in_child, keep_freed_memory, peak_memory, write
from benchmarks.legs import MAX_TOKENS, PASSAGE, SMALL_SHAPE, draw_texts, word_tokenizer
from f2llm.config import SHAPE, Config, Shape, load_config
from f2llm.model import Embedder
from f2llm.prune import importance_scores, prune_to

TOKEN_BUDGET = 1024
QUICK = {"texts": 2, "rounds": 1, "students": {"small": Shape(32, 64, 1)}}
REMARKS = """\
CPU seconds of one thread, float32, random weights in the shape of 0.6B. scores_seconds: importance_scores on random
words of passages' lengths; cut_seconds: prune_to with params.yaml's choices. added_mib: what both add to the peak
resident memory (VmHWM) of a fresh process that holds the model and has scored one short text, scores_mib: the scores
alone; student_mib: the student's weights, which are part of it. Every student and round has a process of its own."""


def settings_of(quick: bool) -> tuple[dict, dict[str, Shape], Config]:
    """(settings, students, configuration)."""
    config = load_config("0.6B")
    if quick:
        shape = {name: SMALL_SHAPE[name] for name in SHAPE}
        return {"shape": shape, "texts": QUICK["texts"], "rounds": QUICK["rounds"]}, QUICK["students"], config
    shape = {name: getattr(config.backbone, name) for name in SHAPE}
    return {"shape": shape, "texts": 12, "rounds": 3}, config.prune.students, config


def make_model(shape: dict) -> Embedder:
    """Random weights, uniform: normal ones of this size take long, and the arithmetic is the same."""
    torch.manual_seed(0)
    with no_init_weights():
        model = Qwen3Model(Qwen3Config(**shape, max_position_embeddings=MAX_TOKENS, pad_token_id=0, eos_token_id=1))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1) if "norm" in name else weight.uniform_(-0.03, 0.03)
    return Embedder(model.eval(), word_tokenizer(min(shape["vocab_size"], 4096)), MAX_TOKENS, TOKEN_BUDGET)


def pruning(name: str, quick: bool) -> dict:
    """Seconds and memory of one student; its parameters and the sum of scores tell whether it was the same work."""
    torch.set_num_threads(1)
    settings, students, config = settings_of(quick)
    model, plan = make_model(settings["shape"]), config.prune
    texts = draw_texts(PASSAGE, settings["texts"], len(model.tokenizer), np.random.default_rng(0))
    importance_scores(model, ["w3 w4 w5"], plan.norm, plan.activations)
    before, start = peak_memory(), time.process_time()
    scores = importance_scores(model, texts, plan.norm, plan.activations)
    middle, scored = peak_memory(), time.process_time()
    student = prune_to(model, students[name], scores, plan, config.seed)
    cut = time.process_time()
    num_parameters, _ = student.num_parameters()
    return {
        "scores_seconds": scored - start,
        "cut_seconds": cut - scored,
        "added_mib": (peak_memory() - before) / 2**20,
        "scores_mib": (middle - before) / 2**20,
        "student_mib": 4 * num_parameters / 2**20,
        "tokens": sum(map(len, model.tokenize(texts))),
        "parameters": num_parameters,
        "sum_of_scores": float(scores.hidden.sum()),
    }


def figures(legs: dict[str, list[dict]], what: str) -> dict:
    """Of seconds and MiB over rounds; a RuntimeError if processes that did the same work disagree about it."""
    found = [measured for rounds in legs.values() for measured in rounds]
    for key, groups in (("sum_of_scores", [found]), ("tokens", [found]), ("parameters", legs.values())):
        if any(len({round(measured[key], 6) for measured in group}) != 1 for group in groups):
            raise RuntimeError(f"processes disagree about {key}: {[measured[key] for measured in found]}")
    ratios = {"scores_s": _figure([one["scores_seconds"] for one in found], f"{found[0]['tokens']:,} tokens, {what}")}
    for name, rounds in legs.items():
        ratios[f"cut_{name}_s"] = _figure([one["cut_seconds"] for one in rounds], f"{name} out of {what}")
        ratios[f"memory_{name}_mib"] = _figure(
            [one["added_mib"] for one in rounds],
            f"scores and cutting, {rounds[0]['student_mib']:,.0f} of it the student",
        )
    return ratios


def _figure(values: list[float], against: str) -> dict:
    spread = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return spread | {"goal": None, "against": against}


def main(words: list[str] | None = None) -> dict:
    """The figures, also printed; the full run writes them to benchmarks/results/prune_cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small and in seconds; writes nothing")
    parser.add_argument("--one", metavar="STUDENT", help="one measurement, as JSON")
    arguments = parser.parse_args(words)
    if arguments.one:
        print(json.dumps(pruning(arguments.one, arguments.quick)))
        return {}
    settings, students, config = settings_of(arguments.quick)
    more = ["--quick"] if arguments.quick else []
    legs = {name: [] for name in students}
    for _ in range(settings["rounds"]):
        for name, rounds in legs.items():
            rounds.append(in_child("benchmarks.prune", "--one", name, *more))
    ratios = figures(legs, "a small model" if arguments.quick else "0.6B")
    print(json.dumps(ratios, indent=1))
    if not arguments.quick:
        settings |= {"token_budget": TOKEN_BUDGET, "prune": asdict(config.prune)}
        print(write("prune_cpu", {"settings": settings, "ratios": ratios, "legs": legs, "remarks": REMARKS}))
    return ratios


if __name__ == "__main__":
    keep_freed_memory()
    main()
