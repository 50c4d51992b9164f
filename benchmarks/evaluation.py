"""Scoring real tasks: this kit's encoder in mteb, against mteb on a SentenceTransformer of the same folder.

python -m benchmarks.evaluation [--quick]; it needs F2LLM_MTEB_MIRROR, a mirror with the tasks' data.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.harness import ratio, write
from benchmarks.legs import EOS, PAD, SHAPE, SMALL_SHAPE, new_model
from f2llm.evaluation.library import mteb
from f2llm.evaluation.mirrored import tasks_to_score
from f2llm.evaluation.public import load_model, score_model
from f2llm.evaluation.run import _quiet
from f2llm.model import Embedder

PARTS = {"XQuADRetrieval": ["en"], "NusaXBitextMining": ["eng-ind"], "KLUE-STS": None}
MAX_TOKENS = 512
REMARKS = """\
CPU seconds of one thread on the same real tasks, loading of data included, in turn: mteb.evaluate on this kit's
encoder and on a SentenceTransformer of the same folder, batch size 32, both with random weights. Scores agree to 1e-6.
processes: the tasks in one process, and shared by two; the scores are identical."""


def tasks(mirror: Path) -> list:
    found = tasks_to_score(list(PARTS), mirror)
    for task in found:
        task.hf_subsets = PARTS[task.metadata.name] or task.hf_subsets
    return found


def ours(folder: Path, mirror: Path, keep: Path) -> tuple[float, dict]:
    model, started = load_model(str(folder), mirror), time.process_time()
    scores, _ = score_model(model, tasks(mirror), keep)
    return time.process_time() - started, scores.set_index("task")["score"].to_dict()


def theirs(folder: Path, mirror: Path) -> tuple[float, dict]:
    from sentence_transformers import SentenceTransformer

    model, started = SentenceTransformer(str(folder)), time.process_time()
    with _quiet():
        result = mteb().evaluate(model, tasks(mirror), cache=None, co2_tracker=False, show_progress_bar=False)
    return time.process_time() - started, {one.task_name: one.get_score() for one in result.task_results}


def in_two_processes(folder: Path, mirror: Path, keep: Path) -> dict:
    """The same tasks, shared by two processes as in a Slurm array."""
    script = "import sys; from pathlib import Path; from benchmarks.evaluation import share; "
    script += "share(*map(Path, sys.argv[1:]))"
    for part in "01":
        array = {"SLURM_ARRAY_TASK_ID": part, "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "0"}
        command = [sys.executable, "-c", script, str(folder), str(mirror), str(keep)]
        subprocess.run(command, env=os.environ | array, check=True)
    return ours(folder, mirror, keep)[1]


def share(folder: Path, mirror: Path, keep: Path) -> None:
    from f2llm.evaluation.run import part_of_processes

    score_model(load_model(str(folder), mirror), tasks(mirror), keep, part=part_of_processes())


def byte_tokenizer(texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of these texts; appends EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=[PAD, EOS], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    number = tokenizer.token_to_id(EOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, number)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, padding_side="right")


def main() -> None:
    """Measure, compare, and write the result unless --quick."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    if "F2LLM_MTEB_MIRROR" not in os.environ:
        print("not run: F2LLM_MTEB_MIRROR names no mirror with MTEB data")
        return
    mirror = Path(os.environ["F2LLM_MTEB_MIRROR"]).resolve()
    settings = {"shape": SMALL_SHAPE if quick else SHAPE, "rounds": 1 if quick else 3, "max_tokens": MAX_TOKENS}
    torch.set_num_threads(1)
    seconds, scores = {"ours": [], "mteb": []}, []
    with tempfile.TemporaryDirectory() as there:
        folder = Path(there) / "model"
        passages = tasks(mirror)[0]
        passages.load_data()
        tokenizer = byte_tokenizer(list(passages.dataset["en"]["validation"]["corpus"]["text"]), 4096)
        shape = settings["shape"] | {"vocab_size": 4096}
        Embedder(new_model(shape), tokenizer, MAX_TOKENS).save(folder)
        for number in range(settings["rounds"]):
            keep = Path(there) / f"kept{number}"
            legs = {"ours": partial(ours, folder, mirror, keep), "mteb": partial(theirs, folder, mirror)}
            found = {}
            for name in list(legs) if number % 2 == 0 else reversed(legs):
                spent, found[name] = legs[name]()
                seconds[name].append(spent)
                print(f"{name}: {spent:.1f} s, {found[name]}", flush=True)
            if not all(abs(found["ours"][name] - score) < 1e-6 for name, score in found["mteb"].items()):
                raise RuntimeError(f"scores differ: {found}")
            scores.append(found["ours"])
        shared = in_two_processes(folder, mirror, Path(there) / "shared")
    if not shared == scores[0] == scores[-1]:
        raise RuntimeError(f"two processes give {shared}, one {scores}")
    facts = {"against": "mteb.evaluate(SentenceTransformer), batch size 32, the same tasks", "goal": 1.5}
    ratios = {"vs_mteb": ratio(seconds["mteb"], seconds["ours"]) | facts}
    print(ratios)
    if not quick:
        legs = {name: {"seconds": values} for name, values in seconds.items()} | {"scores": scores[0]}
        content = {"settings": settings | {"tasks": PARTS}, "ratios": ratios, "legs": legs}
        print(write("evaluation_cpu", content | {"remarks": " ".join(REMARKS.split())}))


if __name__ == "__main__":
    main()
