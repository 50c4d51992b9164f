"""Encoding texts: packed, against sentence-transformers; and one instruction for all queries, computed once or not.

python -m benchmarks.encode [--quick]
"""

import argparse
import json
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

import f2llm.model
from benchmarks.harness import interleave, keep_freed_memory, ratio, write
from benchmarks.legs import (
    MAX_TOKENS,
    PASSAGE,
    QUERY,
    SHAPE,
    SMALL_SHAPE,
    draw_texts,
    new_model,
    useful_flops,
    word_tokenizer,
)
from f2llm.model import Embedder

FULL = {"shape": SHAPE, "rounds": 7, "queries": 128, "passages": 48, "instructed": 256, "token_budget": 2048}
QUICK = {"shape": SMALL_SHAPE, "rounds": 1, "queries": 24, "passages": 8, "instructed": 24, "token_budget": 2048}
DEFAULT, BEST = 32, 8  # batch sizes of sentence-transformers
INSTRUCTED = (8, 32)  # tokens of a query after the instruction: 10th and 90th percentile
INSTRUCTION_WORDS = 18  # with "Instruct:" and "Query:" 20 tokens
NEVER = 10**9
TOLERANCE = 1e-5
REMARKS = """\
CPU seconds of one thread, legs in turn, the same texts in every round, tokenisation included. Both sides load one
saved folder; sentence-transformers sorts by length too, and its batches are padded. padding: the other leg's share of
pads in all positions that it computes. Not shared: the same code, told never to share. Embeddings agree to 1e-5 within
each comparison. Freed memory is kept (harness.MEMORY), which helps all legs. share_of_matmul: 2 x weights without the
embedding table x tokens, and causal attention, per second, over the float32 matmul rate of that round; tokens of an
instruction count for every query."""


def measure(legs: dict, texts: list[str], settings: dict, tokenizer) -> dict[str, dict]:
    """CPU seconds of every leg, which returns unit-length embeddings of `texts`, and what follows from them."""
    embeddings = {name: leg() for name, leg in legs.items()}  # the first, untimed run of each
    require_equal(embeddings)
    square = torch.randn(1024, 1024)
    seconds = interleave(legs | {"matmul": lambda: [square @ square for _ in range(8)]}, settings["rounds"])
    rates = [8 * 2 * len(square) ** 3 / second for second in seconds.pop("matmul")]  # FLOP/s
    token_ids = tokenizer(texts)["input_ids"]
    num_tokens, flops = sum(map(len, token_ids)), useful_flops(settings["shape"], token_ids) / 3  # forward only
    return {
        name: {
            "cpu_seconds": spent,
            "tokens_per_second": [num_tokens / second for second in spent],
            "texts_per_second": [len(texts) / second for second in spent],
            "share_of_matmul": [flops / second / rate for second, rate in zip(spent, rates)],
        }
        for name, spent in seconds.items()
    } | {"matmul": {"gflops": [rate / 1e9 for rate in rates]}}


def require_equal(embeddings: dict[str, np.ndarray]) -> None:
    """RuntimeError unless all legs have the same unit-length embeddings, `TOLERANCE` apart."""
    (first, reference), *others = embeddings.items()
    if not np.allclose(np.linalg.norm(reference, axis=1), 1, atol=TOLERANCE):
        raise RuntimeError(f"leg '{first}' has embeddings that are not of unit length: nothing to compare with")
    for name, other in others:
        if not (apart := np.abs(other - reference).max()) <= TOLERANCE:
            raise RuntimeError(f"legs disagree: embeddings of '{first}' and '{name}' are {apart} apart")


def padding(texts: list[str], batch_size: int, tokenizer) -> float:
    """Share of pads in the batches of sentence-transformers, which sorts by number of characters."""
    lengths = [len(ids) for ids in tokenizer(sorted(texts, key=len, reverse=True))["input_ids"]]
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    return 1 - sum(lengths) / sum(len(batch) * max(batch) for batch in batches)


def against_sentence_transformers(folder: Path, ours: Embedder, settings: dict, random: np.random.Generator):
    """(ratios, legs) for queries and passages of mixed lengths."""
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(folder), device="cpu")
    vocab = settings["shape"]["vocab_size"]
    texts = draw_texts(QUERY, settings["queries"], vocab, random)
    texts += draw_texts(PASSAGE, settings["passages"], vocab, random)
    random.shuffle(texts)
    legs = {"ours": lambda: ours.encode(texts)}
    for size in (DEFAULT, BEST):
        legs[f"sentence_transformers_{size}"] = lambda size=size: theirs.encode(texts, batch_size=size)
    measured = measure(legs, texts, settings, ours.tokenizer)
    ratios = {}
    for size, goal, what in ((DEFAULT, 2.2, "its default"), (BEST, None, "its best here")):
        spent = measured[f"sentence_transformers_{size}"]["cpu_seconds"]
        share = {"padding": padding(texts, size, ours.tokenizer), "goal": goal}
        against = {"against": f"SentenceTransformer.encode, batch size {size}, {what}"}
        suffix = "" if size == DEFAULT else f"_batch{size}"
        ratios[f"vs_sentence_transformers{suffix}"] = ratio(spent, measured["ours"]["cpu_seconds"]) | share | against
    return ratios, measured


def shared_against_not(ours: Embedder, settings: dict, random: np.random.Generator):
    """(ratio, legs) for queries with one instruction."""
    vocab = settings["shape"]["vocab_size"]
    queries = draw_texts(INSTRUCTED, settings["instructed"], vocab, random)
    instruction = " ".join(f"w{word}" for word in random.integers(3, vocab, INSTRUCTION_WORDS))

    def without_sharing() -> np.ndarray:
        with patch.object(f2llm.model, "WORTH_SHARING", NEVER):
            return ours.encode(queries, instruction)

    legs = {"shared": lambda: ours.encode(queries, instruction), "not_shared": without_sharing}
    texts = [f2llm.model.prompted(query, instruction) for query in queries]
    measured = measure(legs, texts, settings, ours.tokenizer)
    figures = ratio(measured["not_shared"]["cpu_seconds"], measured["shared"]["cpu_seconds"])
    return figures | {"padding": 0.0, "goal": 1.7, "against": "our encoder without sharing the prefix"}, measured


def main(words: list[str] | None = None) -> dict:
    """The ratios, also printed; the full run writes them to benchmarks/results/encode_cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small and in seconds; writes nothing")
    settings = QUICK if parser.parse_args(words).quick else FULL
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Embedder(new_model(settings["shape"]), word_tokenizer(settings["shape"]["vocab_size"]), MAX_TOKENS).write(
            folder
        )
        ours = Embedder.load(folder, settings["token_budget"])
        mixed, mixed_legs = against_sentence_transformers(folder, ours, settings, random)
    shared, shared_legs = shared_against_not(ours, settings, random)

    ratios = mixed | {"shared_instruction": shared}
    print(json.dumps(ratios, indent=1))
    if settings is FULL:
        laws = {"query_tokens": QUERY, "passage_tokens": PASSAGE, "max_tokens": MAX_TOKENS}
        instructed = {"instructed_tokens": INSTRUCTED, "instruction_tokens": INSTRUCTION_WORDS + 2}
        legs = {f"mixed_{name}": leg for name, leg in mixed_legs.items()}
        legs |= {f"instructed_{name}": leg for name, leg in shared_legs.items()}
        facts = {
            "settings": settings | laws | instructed,
            "ratios": ratios,
            "legs": legs,
            "remarks": " ".join(REMARKS.split()),
        }
        print(write("encode_cpu", facts))
    return ratios


if __name__ == "__main__":
    keep_freed_memory()
    main()
