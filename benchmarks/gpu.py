"""Training and encoding on one GPU: packed, compiled, and the authors' padded recipe, side by side.

python -m benchmarks.gpu [--quick]: a random Qwen3-0.6B, so no hub; --quick runs a tiny one, on the CPU if need be.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from benchmarks.harness import gate, versions, write
from benchmarks.legs import (
    MAX_TOKENS,
    SMALL_SHAPE,
    UNPADDED,
    Step,
    TokenBatch,
    authors_step,
    draw_batch,
    new_model,
    word_tokenizer,
)
from benchmarks.training import our_step, useful_flops
from f2llm import attention
from f2llm.losses import matryoshka_dims
from f2llm.model import Embedder

QWEN3_06B = {
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151936,
}
FULL = {"shape": QWEN3_06B, "batch_sizes": [16, 32], "warm_up": 5, "steps": 15}
FULL |= {"token_budget": 32768, "activation_tokens": 32768}  # tokens per forward pass, and kept for the backward pass
QUICK = {"shape": SMALL_SHAPE, "batch_sizes": [2, 3], "warm_up": 1, "steps": 2}
QUICK |= {"token_budget": 1024, "activation_tokens": 2**30}
PEAK = 989e12  # dense bfloat16 FLOP/s of an H100 or H200 by its data sheet
REMARKS = """\
Random weights, bfloat16 matrix products, float32 weights and gradients. Seconds between CUDA events, all legs on the
same batches. authors: one padded batch, full activation checkpointing, attention without pads (varlen), as flash
attention does it there. mfu: useful FLOPs (6 x weights without the embedding table x useful tokens, and causal
attention) per second over 989 TFLOP/s. Of our legs, texts beyond activation_tokens go forward twice (gradient caching).
Gate: first losses within 2 %: bfloat16 rounds differently in every leg."""


def seconds_of(step: Callable[[], None]) -> float:
    """Of one step, on the GPU's own clock where there is one."""
    if not torch.cuda.is_available():
        began = time.perf_counter()
        step()
        return time.perf_counter() - began
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    step()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / 1000


def autocast() -> torch.autocast:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def attend_varlen(module, query, key, value, attention_mask, scaling, **_) -> tuple[torch.Tensor, None]:
    """Causal attention (texts, L, H, E) of a padded batch that computes no pads, by torch's varlen attention."""
    dtype = torch.get_autocast_dtype(query.device.type)  # queries and keys come in float32 from norms
    query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    texts, _, longest, _ = query.shape
    lengths = (
        attention_mask.sum(1) if attention_mask is not None else torch.full((texts,), longest, device=query.device)
    )
    real = torch.arange(longest, device=query.device) < lengths[:, None]  # (texts, L)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    heads = (tensor.transpose(1, 2)[real] for tensor in (query, key, value))  # (T, heads, E)
    output = query.new_zeros(texts, longest, *query.shape[1::2])
    output[real] = attention.attention_varlen(*heads, cu_seqlens, longest, scaling)
    return output, None


AttentionInterface.register("padded_varlen", attend_varlen)
AttentionMaskInterface.register("padded_varlen", flash_attention_mask)


def make_steps(settings: dict) -> dict[str, Step]:
    """The legs, each with a model of its own with equal weights."""
    shape, device = settings["shape"], "cuda" if torch.cuda.is_available() else "cpu"
    dims, tokenizer = matryoshka_dims(shape["hidden_size"], 8), word_tokenizer(shape["vocab_size"])

    def ours(compiled: bool) -> Step:
        embedder = Embedder(new_model(shape).to(device), tokenizer, MAX_TOKENS)
        embedder.autocast_dtype = torch.bfloat16 if device == "cuda" else None
        return our_step(embedder, compiled, settings["token_budget"], settings["activation_tokens"])

    plain = authors_step(new_model(shape).to(device), dims, "padded_varlen" if device == "cuda" else UNPADDED)

    def authors(batch: TokenBatch) -> tuple[float, float]:
        with autocast():
            return plain(batch)

    return {"authors": authors, "packed": ours(compiled=False), "compiled": ours(compiled=device == "cuda")}


def train_legs(settings: dict, size: int) -> dict[str, dict]:
    """Seconds and losses of every leg over the same batches, and rates that follow."""
    random, tokenizer = np.random.default_rng(size), word_tokenizer(settings["shape"]["vocab_size"])
    batches = [draw_batch(size, tokenizer, random) for _ in range(settings["warm_up"] + settings["steps"])]
    legs = {}
    for name, step in make_steps(settings).items():
        outcomes = []
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        spent = [seconds_of(lambda batch=batch, run=step, to=outcomes: to.append(run(batch))) for batch in batches]
        spent, measured = spent[settings["warm_up"] :], batches[settings["warm_up"] :]
        flops = sum(useful_flops(settings["shape"], batch.token_ids) for batch in measured)
        legs[name] = {
            "seconds": spent,
            "samples_per_second": size * len(spent) / sum(spent),
            "useful_tokens_per_second": sum(batch.num_tokens for batch in measured) / sum(spent),
            "mfu": flops / sum(spent) / PEAK,
            "padding": statistics.median(batch.padding() for batch in measured) if name == "authors" else 0.0,
            "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
            "first_loss": outcomes[0][0],
        }
    gate({name: (leg["first_loss"], 1.0) for name, leg in legs.items()}, tolerance=0.02)
    return legs


def encode_leg(settings: dict) -> dict:
    """Tokens per second of `Embedder.encode` on passages; weights in bfloat16 on a GPU."""
    random, tokenizer = np.random.default_rng(1), word_tokenizer(settings["shape"]["vocab_size"])
    model = new_model(settings["shape"]).eval()
    model = model.to("cuda", torch.bfloat16) if torch.cuda.is_available() else model
    embedder = Embedder(model, tokenizer, MAX_TOKENS, settings["token_budget"])
    batch = draw_batch(256 if torch.cuda.is_available() else 4, tokenizer, random)
    embedder.encode(batch.batch.texts)
    spent = [seconds_of(lambda: embedder.encode(batch.batch.texts)) for _ in range(3)]
    return {"seconds": spent, "tokens_per_second": batch.num_tokens / statistics.median(spent)}


def save(settings: dict, ratios: dict, legs: dict) -> None:
    """Write benchmarks/results/gpu.json, with the GPU's name and memory."""
    path = write("gpu", {"settings": settings, "ratios": ratios, "legs": legs, "remarks": REMARKS})
    result = json.loads(path.read_text())
    result["hardware"] |= {"gpu": torch.cuda.get_device_name(), "memory": torch.cuda.mem_get_info()[1]}
    path.write_text(json.dumps(result | {"versions": versions() | {"cuda": torch.version.cuda}}, indent=1) + "\n")


def main(words: list[str] | None = None) -> dict:
    """The ratios, also printed; the full run writes them to benchmarks/results/gpu.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small and in seconds; writes nothing")
    settings = QUICK if parser.parse_args(words).quick else FULL
    if settings is FULL and not torch.cuda.is_available():
        raise RuntimeError("no GPU is here, and Qwen3-0.6B would take hours on a CPU; remedy: --quick, or a GPU")
    legs, ratios = {}, {}
    for size in settings["batch_sizes"]:
        found = train_legs(settings, size)
        legs |= {f"batch{size}_{name}": leg for name, leg in found.items()}
        ours, theirs = (found[name]["seconds"] for name in ("compiled", "authors"))
        each = [other / own for other, own in zip(theirs, ours)]
        ratios[f"vs_authors_batch{size}"] = {
            "min": min(each), "median": statistics.median(each), "max": max(each), "goal": 10,
            "padding": found["authors"]["padding"], "against": f"one padded batch of {size}, full checkpointing",
        }  # fmt: skip
        if settings is FULL:
            save(settings, ratios, legs)  # what is measured is kept if a later leg fails
    legs["encode"] = encode_leg(settings)
    print(json.dumps({"ratios": ratios, "legs": legs}, indent=1))
    if settings is FULL:
        save(settings, ratios, legs)
    return ratios


if __name__ == "__main__":
    main()
