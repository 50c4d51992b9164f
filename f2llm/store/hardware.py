"""GPUs: what their data sheets say, which ones this machine has, and the settings of `machines` that suit them."""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .checked import closest

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    name: str
    gib: float


@dataclass(frozen=True)
class Sheet:
    """Of a data sheet: memory in GiB as torch reports it; dense peaks in TFLOP/s; links to GPUs of its machine, GB/s.

    half: of bfloat16 or, before Ampere, which has none, of float16.
    """

    gib: float
    half: int
    float32: float
    link: int
    ampere: bool = True


SHEETS = {
    "T4": Sheet(14.6, 65, 8.1, 16, ampere=False),
    "L4": Sheet(22, 121, 30.3, 32),
    "L40S": Sheet(44, 362, 91.6, 32),
    "RTX 4090": Sheet(23.5, 165, 82.6, 32),
    "A100": Sheet(79.1, 312, 19.5, 300),
    "H100": Sheet(79.2, 989, 67, 450),
    "H200": Sheet(139.8, 989, 67, 450),
}
UNKNOWN = Sheet(0, 100, 20, 16)  # [assumed] for any other GPU, but for its memory


def sheet_of(gpu: Gpu) -> Sheet:
    """The data sheet of a GPU by its name, `UNKNOWN` where none is known."""
    return next((sheet for name, sheet in SHEETS.items() if re.search(rf"\b{name}\b", gpu.name)), UNKNOWN)


def gpu_named(name: str) -> Gpu:
    """A GPU of `SHEETS`; ValueError for other names."""
    if name not in SHEETS:
        names = ", ".join(SHEETS)
        raise ValueError(f"--gpu is {name!r}, but must be one of: {names}, none{closest(name, [*SHEETS, 'none'])}")
    return Gpu(name, SHEETS[name].gib)


@cache
def gpus_here() -> tuple[Gpu, ...]:
    """The GPUs that torch would use. Importing torch takes seconds, so this is done only if a driver is installed."""
    if not (shutil.which("nvidia-smi") or any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()):
        return ()
    code = "import torch\nfor i in range(torch.cuda.device_count()):\n p = torch.cuda.get_device_properties(i)\n"
    code += " print(p.total_memory, p.name)"  # in a process of its own, or a GPU context would stay during training
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2]
        raise RuntimeError(f"torch cannot list this machine's GPUs: {reason}; remedy: a torch that fits the driver")
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    return tuple(Gpu(name, int(size) / GIB) for size, name in lines)


def preset_for(gpus: tuple[Gpu, ...], machines: dict[str, dict]) -> str:
    """The name of the last of `machines` whose `gpus` GPUs of at least `gib` GiB each are there.

    GPUs before Ampere suit only settings of float16. ValueError if none suits.
    """
    names = presets_for(gpus, machines)
    if not names:
        found = ", ".join(f"{gpu.name} with {gpu.gib:.0f} GiB" for gpu in gpus) or "no GPU"
        raise ValueError(f"machine.preset is auto, but none of {', '.join(machines)} suits {found}; remedy: none")
    return names[-1]


def presets_for(gpus: tuple[Gpu, ...], machines: dict[str, dict]) -> list[str]:
    """The names of those of `machines` that suit these GPUs, in their order."""
    return [name for name, machine in machines.items() if _suits(gpus, machine)]


def _suits(gpus: tuple[Gpu, ...], machine: dict) -> bool:
    if not machine["gpus"] or not gpus:
        return machine["gpus"] == len(gpus)
    old = not all(sheet_of(gpu).ampere for gpu in gpus)
    in_float16 = machine["machine"].get("precision") == "float16"
    return len(gpus) >= machine["gpus"] and min(gpu.gib for gpu in gpus) >= machine["gib"] and (in_float16 or not old)
