"""What `f2llm plan` says of steps per second and peak memory, against trainings of other steps on this CPU.

python -m benchmarks.plan [--quick]
"""

import argparse
import json
import os
import time
from dataclasses import replace

import numpy as np

from benchmarks.harness import keep_freed_memory, write
from f2llm.config import Config, HardNegatives, load_config
from f2llm.pipeline.planning import costs
from f2llm.pipeline.planning.costs import Work
from f2llm.pipeline.planning.measure import Order, measure, run
from f2llm.pipeline.planning.plan import Here
from f2llm.store.hardware import GIB

NANO = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
NANO |= {"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 8192, "architecture": "qwen3"}
WIDE = NANO | {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8}
DEEP = NANO | {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 8}
SHORT, LONG = ((3, 12), (4, 30)), ((20, 60), (80, 300))  # tokens of queries and documents: 10th and 90th percentile
CASES = {  # shape, queries, hard negatives, lengths, settings of the machine; operations of a step measured whole
    "nano": (NANO, 128, 1, SHORT, {"token_budget": 1024, "activation_tokens": 16384}, 2e11),
    "wide": (WIDE, 6, 7, LONG, {"token_budget": 4096, "activation_tokens": 65536}, 3e10),
    "deep": (DEEP, 8, 7, LONG, {"token_budget": 2048, "activation_tokens": 2048}, 3e10),
}
QUICK = {"nano": (NANO | {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 512}, 8, *CASES["nano"][2:])}
AGAINST = {
    "nano": "one layer; the plan measures 8 whole steps",
    "wide": "two wide layers, all activations kept; the plan measures fewer queries",
    "deep": "eight layers, gradient caching; the plan measures two and three layers, fewer queries",
}
GOAL = 1.25
REMARKS = """\
How many times the plan and a training are apart, whichever is larger: 1 is a perfect plan. speed: CPU seconds of a
step, planned by `f2llm plan --measure` from a few steps, reduced as "against" says, and taken by a training of other
batches of the same law, whole. memory: what the plan counts from shapes (weights, gradients, optimizer, activations,
losses), without measuring, and what the training adds to the resident memory of its process, weights included. One
thread; every training runs in a process of its own. No figure for a GPU is held against a GPU here."""


def work_of(case: tuple, seed: int, steps: int) -> tuple[Work, Config]:
    """A training of random lengths, and the configuration whose machine it runs on."""
    shape, size, negatives, laws, settings, _ = case
    config = load_config("nano")
    config = replace(config, machine=replace(config.machine, threads=1, **settings))
    training = replace(
        config.stage1, global_batch_size=size, hard_negatives=HardNegatives(negatives, negatives, negatives),
        max_tokens=1024, validate_every=0,
    )  # fmt: skip
    random = np.random.default_rng(seed)
    lengths = [(_draw(laws[0], size, random), _draw(laws[1], size * (1 + negatives), random)) for _ in range(steps)]
    return Work("stage1", shape, training, 1000, lengths), config


def _draw(law: tuple[int, int], number: int, random: np.random.Generator) -> list[int]:
    """Lognormal lengths with the law's 10th and 90th percentile."""
    low, high = np.log(law)
    lengths = np.exp(random.normal((low + high) / 2, (high - low) / 2 / 1.2816, number))
    return lengths.round().clip(2, 1024).astype(int).tolist()


def compare(case: tuple, seed: int, steps: int) -> dict:
    """Seconds of a step and GiB at the peak, planned and of a training."""
    here = Here([], 0, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB)
    work, config = work_of(case, 2 * seed, 8)
    planned = measure(work, config, here, most=case[-1], clock="cpu_seconds")
    trained, _ = work_of(case, 2 * seed + 1, steps)
    took = run(Order(trained, config.machine), here)
    counted = sum(costs.memory(work, config.machine, None).values())
    seconds = took.cpu_seconds + took.optimizer
    return {
        "planned_seconds": planned.seconds, "seconds": seconds, "how": planned.how,
        "planned_gib": counted / GIB, "gib": took.peak / GIB, "tokens": trained.tokens(),
    }  # fmt: skip


def apart(one: float, other: float) -> float:
    return max(one / other, other / one)


def main(words: list[str] | None = None) -> dict:
    """The ratios, also printed; the full run writes them to benchmarks/results/plan_cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small and in seconds; writes nothing")
    quick = parser.parse_args(words).quick
    rounds, steps, cases = (1, 2, QUICK) if quick else (3, 16, CASES)
    began, legs, ratios = time.monotonic(), {}, {}
    for name, case in cases.items():
        legs[name] = [compare(case, seed, steps) for seed in range(rounds)]
        for kind, unit in (("speed", "seconds"), ("memory", "gib")):
            found = sorted(apart(leg[f"planned_{unit}"], leg[unit]) for leg in legs[name])
            figures = {"min": found[0], "median": found[len(found) // 2], "max": found[-1]}
            ratios[f"{name}_{kind}"] = figures | {"goal": GOAL, "at_most": True, "against": AGAINST[name]}
    print(json.dumps(ratios, indent=1))
    if not quick:
        settings = {"cases": cases, "rounds": rounds, "steps": steps, "wall_seconds": time.monotonic() - began}
        remarks = " ".join(REMARKS.split())
        print(write("plan_cpu", {"settings": settings, "ratios": ratios, "legs": legs, "remarks": remarks}))
    return ratios


if __name__ == "__main__":
    keep_freed_memory()
    main()
