"""Saving a sharded training: gathered and written by one process, against parts written in the background.

python -m benchmarks.sharding [--quick]: two processes on the CPU (gloo); --quick runs a tiny model and writes nothing.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

from benchmarks.harness import ROOT, ratio, write
from benchmarks.legs import SHAPE, SMALL_SHAPE, new_model, word_tokenizer
from f2llm import distributed
from f2llm.config import load_config
from f2llm.model import Embedder
from f2llm.optimizer import LossScale, WeightAverage, build_optimizer
from f2llm.resume import Checkpoints
from f2llm.store import checkpoint
from f2llm.store.run_log import Run

FULL = {"shape": SHAPE | {"num_hidden_layers": 8, "vocab_size": 32000}, "rounds": 5, "processes": 2}
QUICK = {"shape": SMALL_SHAPE, "rounds": 2, "processes": 2}
REMARKS = """\
Random weights with AdamW's state, sharded by FSDP2. gathered: the whole state is brought to process 0, which writes it
and reads it back for its hash, while all others wait; what the kit did before. in_background: every process copies its
part, and training goes on; `wait` until the parts are on the disk. Wall-clock seconds of process 0."""


def save_here(settings: dict, folder: Path) -> None:
    """What every process runs: both ways in turn; process 0 prints seconds and bytes as JSON."""
    distributed.start()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Embedder(new_model(settings["shape"]), word_tokenizer(settings["shape"]["vocab_size"]), 64)
    distributed.shard(model.model, None)
    plan = load_config("nano").stage2
    optimizer, run = build_optimizer(model.model, plan), Run("sharding", 100, folder, quiet=True)
    checkpoints = Checkpoints(model, optimizer, LossScale(False), WeightAverage(optimizer, 100, plan), run)
    seconds = {"gathered": [], "in_background": [], "until_written": []}
    for step in range(settings["rounds"]):
        began = time.monotonic()
        gathered(model, optimizer, folder / "gathered", step)
        seconds["gathered"].append(time.monotonic() - began)
        began = time.monotonic()
        checkpoints.save(step)
        distributed.barrier()
        seconds["in_background"].append(time.monotonic() - began)
        checkpoints.wait()
        distributed.barrier()
        seconds["until_written"].append(time.monotonic() - began)
    if distributed.rank() == 0:
        sizes = {
            name: sorted(file.stat().st_size for file in checkpoint.path_of(path, step).glob("*.safetensors"))
            for name, path in (("gathered", folder / "gathered"), ("sharded", folder))
        }
        print(json.dumps({"seconds": seconds, "bytes": sizes}))
    distributed.stop()


def gathered(model: Embedder, optimizer: torch.optim.Optimizer, folder: Path, step: int) -> None:
    """The whole state on process 0, which writes it."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model.model, options=whole)
    state = get_optimizer_state_dict(model.model, optimizer, options=whole).get("state", {})
    if distributed.rank() == 0:
        flat = {f"{name}.{key}": value for name, values in state.items() for key, value in values.items()}
        checkpoint.save(folder, step, weights, flat, {})
    distributed.barrier()


def main(words: list[str] | None = None) -> dict:
    """Ratios and seconds, also printed; the full run writes them to benchmarks/results/sharding_cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small and in seconds; writes nothing")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    settings = QUICK if arguments.quick else FULL
    if arguments.folder:
        save_here(settings, arguments.folder)
        return {}
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={settings['processes']}"]
        command = [sys.executable, "-m", *launcher, "-m", "benchmarks.sharding", "--folder", folder]
        command += ["--quick"] if arguments.quick else []
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    (found,) = (json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"seconds"'))
    seconds = found["seconds"]
    ratios = {
        name: ratio(seconds["gathered"], seconds[leg]) | {"against": f"gathered by one process; {what}", "goal": None}
        for name, leg, what in (
            ("training_waits", "in_background", "training goes on while parts are written"),
            ("until_on_disk", "until_written", "until all parts are on the disk"),
        )
    }
    print(json.dumps({"ratios": ratios, **found}, indent=1))
    if settings is FULL:
        write("sharding_cpu", {"settings": settings, "ratios": ratios, "legs": found, "remarks": REMARKS})
    return ratios


if __name__ == "__main__":
    main()
