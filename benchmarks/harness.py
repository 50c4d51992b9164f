"""What the benchmarks share: legs timed in turn on one thread, the check that they agree, one form of result.

A leg is a function without arguments that does the work once. Times are CPU seconds of this process.
"""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# glibc gives freed memory back to the system, and asking for it again costs page faults on every large tensor.
MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "8589934592", "MALLOC_TOP_PAD_": "67108864"}


def keep_freed_memory() -> None:
    """Start this program over with `MEMORY` in its environment, unless it has been: glibc reads it only then."""
    if not MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | MEMORY)


def hardware() -> dict:
    """The CPU's name, the threads in use, and the float32 matmul rate of one thread (median of 5, GFLOP/s)."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    square = torch.randn(1024, 1024)
    seconds = interleave({"matmul": lambda: square @ square}, rounds=6)["matmul"][1:]
    rate = 2 * 1024**3 / statistics.median(seconds) / 1e9
    return {
        "cpu": names[0] if names else platform.machine(),
        "threads": torch.get_num_threads(),
        "matmul_gflops": round(rate, 1),
    }


def versions() -> dict[str, str]:
    """Of Python, torch and transformers."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers")}}


def interleave(legs: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every leg per round, on one thread; every other round runs the legs in reverse order."""
    torch.set_num_threads(1)
    seconds = {name: [] for name in legs}
    for number in range(rounds):
        for name in list(legs) if number % 2 == 0 else reversed(legs):
            start = time.process_time()
            legs[name]()
            seconds[name].append(time.process_time() - start)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """min, median and max over rounds of slow / fast; above 1 where fast is the better."""
    if len(slow) != len(fast) or not slow:
        raise ValueError(f"{len(slow)} and {len(fast)} rounds; a ratio needs the same rounds of both, at least one")
    ratios = [one / other for one, other in zip(slow, fast)]
    return {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)}


def gate(legs: dict[str, tuple[float, float]], tolerance: float = 1e-4) -> None:
    """RuntimeError unless all legs have one loss and one gradient norm, finite, not 0, relative `tolerance` apart."""
    (first, reference), *others = legs.items()
    if not all(math.isfinite(value) and value > 0 for value in reference):
        raise RuntimeError(f"leg '{first}' has (loss, gradient norm) {reference}: nothing to compare with")
    for name, values in others:
        if not all(math.isclose(one, other, rel_tol=tolerance) for one, other in zip(values, reference)):
            raise RuntimeError(f"legs disagree in (loss, gradient norm): '{first}' {reference}, '{name}' {values}")


def peak_memory() -> int:
    """Bytes: the highest resident size of this process until now (Linux).

    Not getrusage's ru_maxrss: a child process starts with its parent's there.
    """
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def in_child(module: str, *arguments: str) -> dict:
    """Run `python -m module arguments` from the root of the repository; the last line that it prints, read as JSON."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def write(name: str, content: dict) -> Path:
    """Put settings, ratios, legs and remarks into benchmarks/results/<name>.json, with date, hardware and versions."""
    if content.keys() != (parts := {"settings", "ratios", "legs", "remarks"}):
        raise ValueError(f"a result consists of {sorted(parts)}, not of {sorted(content)}")
    head = {"name": name, "date": datetime.now(UTC).date().isoformat(), "hardware": hardware(), "versions": versions()}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(head | content, indent=1) + "\n")
    return path
