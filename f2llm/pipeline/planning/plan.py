"""What training costs on a machine: memory, hours, money; whether it fits, and which settings would make it fit."""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from ...config import Config, Machine, read_yaml, resolve, root
from ...data.registry import Source, load_registry
from ...store.hardware import GIB, Gpu, gpus_here, sheet_of
from . import costs
from .costs import Work, num_parameters, shape_of

# Any machine can train a size of so many non-embedding parameters, even without a GPU: smollm2's 106 million take an
# hour of a laptop's CPU and 14 GB.
TRAINS_ANYWHERE = 120_000_000
MOST_BUDGET = 16384  # tokens a pass that are looked at for a GPU
REFERENCE = Gpu("NVIDIA H100", 80)  # costs are estimated for this GPU if the machine has none


@dataclass(frozen=True)
class Here:
    """A machine, or several alike: the GPUs of one; disk space that is free or holds files of earlier runs; memory."""

    gpus: list[Gpu]
    disk_gib: float
    ram_gib: float = 0
    nodes: int = 1


@dataclass(frozen=True)
class Needs:
    """Memory per GPU; disk; hours of one GPU, None for local files, whose number of rows is not known."""

    gpu_gib: float
    disk_gib: float
    hours: float | None


@dataclass(frozen=True)
class Measured:
    """Of a training on this machine: seconds of a step, and of encoding per operation; peak in GiB, None if unknown."""

    seconds: float
    seconds_per_flop: float
    peak_gib: float | None
    how: str


@dataclass(frozen=True)
class Cost:
    """Of one training: GiB by part in a process, operations of a step by part; seconds of a step, None if unknown."""

    work: Work
    memory: dict[str, float]
    flops: dict[str, float]
    seconds: float | None
    measured: Measured | None = None

    @property
    def peak_gib(self) -> float:
        return (self.measured and self.measured.peak_gib) or sum(self.memory.values())

    @property
    def hours(self) -> float | None:
        """From start to end, without validation and checkpoints."""
        known = self.seconds is not None and self.work.steps is not None
        return self.seconds * self.work.steps / 3600 if known else None


def cost(work: Work, machine: Machine, here: Here, measured: Measured | None = None) -> Cost:
    """What a training costs on a machine; without a GPU its time is known only if it was measured."""
    gpu = min(here.gpus, key=lambda gpu: gpu.gib) if here.gpus else None
    processes = num_processes(machine, here)
    memory = {name: size / GIB for name, size in costs.memory(work, machine, gpu, processes).items()}
    flops = costs.flops(work, machine, processes)
    if measured:
        return Cost(work, memory, flops, measured.seconds, measured)
    slowest = min(here.gpus, key=lambda gpu: sheet_of(gpu).half) if here.gpus else None
    return Cost(work, memory, flops, slowest and costs.seconds_on(work, machine, slowest, processes, here.nodes))


def num_processes(machine: Machine, here: Here) -> int:
    """That share a training: machine.processes on each machine, at most one per GPU."""
    most = len(here.gpus) or max(1, machine.processes)
    return here.nodes * min(machine.processes or most, most)


def needs(config: Config, registry: list[Source], gpus: list[Gpu]) -> Needs:
    """What training needs on such GPUs: the largest memory of all trainings, the sum of their hours, disk space."""
    here = Here(gpus, 0)
    found = [cost(work, config.machine, here) for work in costs.trainings(config, registry)]
    hours = sum(one.hours or 0 for one in found) * num_processes(config.machine, here)
    disk = costs.disk_bytes(config, registry) / GIB
    return Needs(max(one.peak_gib for one in found), disk, hours or None)


# Does it fit? -----------------------------------------------------------------------------------


def machine_here(config: Config) -> Here:
    """This machine's GPUs and memory, and its disk space, including what earlier fetches and runs have stored there."""
    folders = (config.data.mirror, "data", "models", "scratch", ".dvc/cache")
    held = sum(_bytes_in(root() / folder) for folder in folders)
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return Here(list(gpus_here()), (shutil.disk_usage(root()).free + held) / GIB, ram)


def _bytes_in(folder: Path) -> int:
    held = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # removed meanwhile
                held += os.stat(os.path.join(path, name)).st_size
    return held


def shown(here: Here) -> str:
    """A machine in words."""
    gpus = ", ".join(f"{gpu.name} with {gpu.gib:.0f} GiB" for gpu in here.gpus) or "no GPU"
    return f"{gpus}, {here.disk_gib:,.0f} GiB of disk"


def gpus_or_reference(here: Here, config: Config) -> list[Gpu]:
    """The GPUs of a machine; if it has none, machine.processes (at least one) of REFERENCE."""
    return here.gpus or [REFERENCE] * max(1, config.machine.processes)


def is_small(config: Config) -> bool:
    """Whether a size is so small that any machine can train it."""
    return num_parameters(**shape_of(config))[1] <= TRAINS_ANYWHERE


def fits(config: Config, registry: list[Source], here: Here) -> bool:
    """Whether a machine can train a size."""
    if is_small(config) or not here.gpus:
        return is_small(config)
    wanted = needs(config, registry, here.gpus)
    return wanted.gpu_gib <= min(gpu.gib for gpu in here.gpus) and wanted.disk_gib <= here.disk_gib


def frugal(config: Config) -> Config:
    """The configuration with the `machine` settings that need least memory on as many GPUs: slower, same method."""
    least = {"recompute": "full", "activation_tokens": config.machine.token_budget}
    return replace(config, machine=replace(config.machine, **least))


def room(here: Here) -> float:
    """GiB that a process may take: of the smallest GPU, or of the machine's memory."""
    return min((gpu.gib for gpu in here.gpus), default=here.ram_gib)


def settings_that_fit(works: list[Work], machine: Machine, here: Here) -> dict | None:
    """The values of `machine` to change so that all trainings fit: of all that fit the fastest; None if none does.

    Every candidate is evaluated as a plan. Without a GPU, whose speed is unknown, fewer operations count as faster.
    """
    found = []
    for changes in _candidates(works, machine, here):
        changed = replace(machine, **changes)
        tried = [cost(work, changed, here) for work in works]
        if max(one.peak_gib for one in tried) <= room(here):
            slow = sum((one.seconds or sum(one.flops.values())) * (one.work.steps or 1) for one in tried)
            found.append((slow, len(changes), changes))
    return min(found, key=lambda one: one[:2])[2] if found else None


def _candidates(works: list[Work], machine: Machine, here: Here) -> Iterator[dict]:
    """Changes of `machine` that may save memory without changing the method."""
    longest = max(work.training.max_tokens for work in works)
    most = max(machine.token_budget, MOST_BUDGET if here.gpus else 0)
    budgets = [machine.token_budget * 2**power for power in range(-16, 17)]
    budgets = [int(budget) for budget in budgets if longest <= budget <= most and budget == int(budget)]
    old = here.gpus and not all(sheet_of(gpu).ampere for gpu in here.gpus)
    precisions = ["float16"] if old else [machine.precision]  # the only half precision that they have
    shards = {machine.shard, machine.shard or num_processes(replace(machine, processes=0), here) > 1}
    for budget, recompute, shard, precision in product(budgets, ("none", "selective", "full"), shards, precisions):
        for kept in {budget, max(budget, machine.activation_tokens)}:
            wanted = {"token_budget": budget, "activation_tokens": kept, "recompute": recompute, "shard": shard}
            wanted |= {"precision": precision} | ({"processes": 0} if shard and machine.processes == 1 else {})
            yield {key: value for key, value in wanted.items() if getattr(machine, key) != value}


def command(config: Config, changes: dict, *others: str) -> str:
    """The experiment with these values of `machine` as a line to paste; others: of override, as section.key=value."""
    settings = [f"-S model.size={config.name}", f"-S recipe={config.recipe}"]
    values = {key: str(value).lower() if isinstance(value, bool) else value for key, value in changes.items()}
    settings += [f"-S '++override.machine.{key}={value}'" for key, value in values.items()]
    settings += [f"-S '++override.{other}'" for other in others]
    return f"dvc exp run {' '.join(settings)}"


def require_fits(config: Config) -> None:
    """Raise a RuntimeError for a size that this machine cannot train, unless machine.check_needs is false."""
    if not config.machine.check_needs or is_small(config):
        return
    here, registry = machine_here(config), load_registry(root() / "data" / "sources.yaml")
    if fits(config, registry, here):
        return
    gpus = gpus_or_reference(here, config)
    wanted = needs(config, registry, gpus)
    others = sizes_of(read_yaml(root() / "params.yaml"), config.recipe)
    largest = max((other for other in others if fits(other, registry, here)), key=own_parameters)
    hours = f"{wanted.hours:,.0f} hours of one {gpus[0].name}" if wanted.hours else "hours that local files decide"
    changes = settings_that_fit(costs.trainings(config, registry), config.machine, here) if here.gpus else None
    less = f"; or settings with less memory: {command(config, changes)}" if changes else ""
    raise RuntimeError(
        f"this machine cannot train size {config.name}, nothing was run. By estimate it needs {wanted.gpu_gib:,.0f} "
        f"GiB of GPU memory, {wanted.disk_gib:,.0f} GiB of disk and {hours}; here: {shown(here)}. "
        f"The largest size of recipe {config.recipe} that fits here is {largest.name}. remedy: that size{less}; "
        f"or a larger machine, which `f2llm plan --size {config.name} --gpu NAME` looks for; or "
        "machine.check_needs: false, to try it nevertheless"
    )


def sizes_of(params: dict, recipe: str) -> list[Config]:
    """The configurations of all sizes of a recipe, as preset: without `override`."""
    plain = params | {"recipe": recipe, "override": {}}
    return [resolve(plain, name) for name in params["recipes"][recipe].get("sizes", params["sizes"])]


def student_of(config: Config) -> str | None:
    """The student that a pruned size is named after; None for other sizes."""
    return config.name if config.name in config.prune.students else None


def own_parameters(config: Config) -> tuple[int, int]:
    """(all, non-embedding) parameters of the model that a size is named after."""
    return num_parameters(**shape_of(config, student_of(config)))
