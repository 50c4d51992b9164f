"""The in-batch loss summed over matryoshka dims: one loss per prefix against one pass over all of them.

python -m benchmarks.matryoshka [--quick]
"""

import argparse
import json
import math

import torch

from benchmarks.harness import gate, in_child, interleave, peak_memory, ratio, write
from f2llm.losses import in_batch_loss, matryoshka, matryoshka_dims, matryoshka_in_batch_loss

FULL = {"queries": 1024, "passages": 8192, "width": 1024, "min_dim": 8, "rounds": 7, "memory_rounds": 3}
QUICK = {"queries": 256, "passages": 4096, "width": 32, "min_dim": 8, "rounds": 3, "memory_rounds": 1}
TEMPERATURE = 0.05
LEGS = ("naive", "one_pass")


def make_legs(settings: dict) -> dict:
    """Both legs on the same random embeddings; each does loss and backward, and returns (loss, gradient norm)."""
    torch.manual_seed(0)
    query, passages = (torch.randn(settings[name], settings["width"]) for name in ("queries", "passages"))
    leaves = query.requires_grad_(), passages.requires_grad_()
    positive, dims = torch.arange(len(query)), matryoshka_dims(settings["width"], settings["min_dim"])

    def naive():
        return matryoshka(lambda q, p: in_batch_loss(q, p, positive, TEMPERATURE), *leaves, dims=dims)

    def one_pass():
        return matryoshka_in_batch_loss(*leaves, positive, TEMPERATURE, dims)

    def run(loss_fn):
        loss = loss_fn()
        gradients = torch.autograd.grad(loss, leaves)
        return loss.item(), math.hypot(*(gradient.norm().item() for gradient in gradients))

    return {loss_fn.__name__: lambda loss_fn=loss_fn: run(loss_fn) for loss_fn in (naive, one_pass)}


def memory_of(leg: str, settings: dict) -> float:
    """MB by which one run of the leg raises the peak memory of a process that has done nothing else."""
    torch.set_num_threads(1)
    make_legs({**QUICK, "queries": 2, "passages": 2})[leg]()  # loads what the first call loads
    run = make_legs(settings)[leg]
    before = peak_memory()
    run()
    return (peak_memory() - before) / 1e6


def main(words: list[str] | None = None) -> dict:
    """The ratios, also printed; the full run writes them to benchmarks/results/matryoshka_cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small and in seconds; writes nothing")
    parser.add_argument("--memory-of", choices=LEGS, help="only print the MB that one run of this leg takes")
    options = parser.parse_args(words)
    settings = QUICK if options.quick else FULL
    if options.memory_of:
        print(json.dumps({"mb": memory_of(options.memory_of, settings)}))
        return {}

    quick = ["--quick"] if options.quick else []
    megabytes = {name: [] for name in LEGS}
    for _ in range(settings["memory_rounds"]):
        for name in LEGS:
            megabytes[name].append(in_child("benchmarks.matryoshka", "--memory-of", name, *quick)["mb"])
    torch.set_num_threads(1)
    legs = make_legs(settings)
    outcomes = {name: leg() for name, leg in legs.items()}  # the first, untimed run of each
    gate(outcomes)
    seconds = interleave(legs, settings["rounds"])

    against = "matryoshka of in_batch_loss: one loss per prefix, through autograd"
    ratios = {
        "vs_naive": {**ratio(seconds["naive"], seconds["one_pass"]), "goal": 1.4, "against": against},
        "vs_naive_memory": {**ratio(megabytes["naive"], megabytes["one_pass"]), "goal": 3, "against": against},
    }
    print(json.dumps(ratios, indent=1))
    if not options.quick:
        measured = {
            name: {"cpu_seconds": seconds[name], "peak_mb": megabytes[name], "loss": loss, "gradient_norm": norm}
            for name, (loss, norm) in outcomes.items()
        }
        remarks = "Loss and gradients of both sides, one thread; peak_mb is the growth of a child's peak memory."
        content = {"settings": {**settings, "temperature": TEMPERATURE}, "ratios": ratios, "legs": measured}
        print(write("matryoshka_cpu", {**content, "remarks": remarks}))
    return ratios


if __name__ == "__main__":
    main()
