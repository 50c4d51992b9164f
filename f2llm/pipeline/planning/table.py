"""What `f2llm plan` prints: a column per training, a row per figure, and whether it is counted, measured or assumed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...config import TRAINING_STAGES, Config, names_of_models, read_yaml, root
from ...data.registry import Source
from ...store.checked import closest
from ...store.hardware import GIB, gpu_named, presets_for, sheet_of
from . import costs, plan
from .costs import Work
from .plan import Cost, Here, Measured, command, cost, num_processes, room, settings_that_fit

EMBEDDED = "embedded"  # as evaluate.benchmark: the tasks that stage `data` makes
RANK = 16  # of an adapter that is looked at where training all weights does not fit
NOT_HELD = "not yet held against a GPU"
OF_PAPERS = "assumed: the papers' means"
COUNTED = "counted"


@dataclass(frozen=True)
class Asked:
    """What a plan is asked for: trainings, the machine (gpu None: this one), a price per GPU hour (0: unknown)."""

    stage: str = "all"
    gpu: str | None = None
    gpus: int = 1
    nodes: int = 1
    price: float = 0.0
    measure: bool = False


def check(asked: Asked) -> None:
    """ValueError for a stage that trains nothing, or figures that no machine has."""
    if asked.stage not in (stages := ("all", *TRAINING_STAGES)):
        raise ValueError(
            f"the stage is {asked.stage!r}, but must be one of: {', '.join(stages)}{closest(asked.stage, stages)}"
        )
    for name, value, least in (("gpus", asked.gpus, 1), ("nodes", asked.nodes, 1), ("price", asked.price, 0)):
        if not least <= value < float("inf"):
            raise ValueError(f"--{name} is {value}, but must be {least} or more")
    if asked.gpu is None and (asked.gpus, asked.nodes) != (1, 1):
        raise ValueError("--gpus and --nodes are of a machine that --gpu names; remedy: as in --gpu H100 --gpus 8")
    if asked.gpu not in (None, "none"):
        gpu_named(asked.gpu)
    if asked.measure and asked.gpu not in (None, "none"):
        raise ValueError(f"--measure runs steps on this machine, not on --gpu {asked.gpu}; remedy: one of the two")


def planned(config: Config, registry: list[Source], asked: Asked) -> list[str]:
    """The lines of a plan. Figures of another machine are computed, those of this one may be measured."""
    check(asked)
    config, here = _machine(config, asked)
    works, counted = _works(config, registry, asked)
    found = [cost(work, config.machine, here, _measured(work, config, here, asked)) for work in works]
    lines = [f"size {config.name}, recipe {config.recipe}, on {_words(config, here)}", ""]
    lines += _aligned([["", *(work.name for work in works), ""], *_rows(found, config, here)])
    lines += ["", *_totals(found, config, registry, here, asked), *_evaluation(found, config, here, counted)]
    lines += _budget(works, config, here) if asked.measure else []
    return lines + _advice(found, config, here, asked)


def _machine(config: Config, asked: Asked) -> tuple[Config, Here]:
    """The machine that is asked for; all GPUs of a named one train."""
    here = plan.machine_here(config)
    if asked.gpu is None:
        return config, here
    if asked.gpu == "none":
        return config, replace(here, gpus=[])
    machine = replace(config.machine, processes=0)
    return replace(config, machine=machine), Here([gpu_named(asked.gpu)] * asked.gpus, float("inf"), nodes=asked.nodes)


def _works(config: Config, registry: list[Source], asked: Asked) -> tuple[list[Work], bool]:
    """(trainings of the stages that are asked for, whether their data are there and counted)."""
    works = costs.trainings(config, registry)
    works = [work for work in works if asked.stage in ("all", work.stage)]
    if not Path("data/assembled/manifest.json").exists():
        return works, False
    from .counted import count, open_store  # these import torch, which takes seconds

    store = open_store(config, registry)
    return ([count(work, config, store) for work in works], True) if store else (works, False)


def _measured(work: Work, config: Config, here: Here, asked: Asked) -> Measured | None:
    if asked.gpu not in (None, "none") or work.steps == 0:
        return None
    from .measure import measure, remembered

    return measure(work, config, here) if asked.measure else remembered(work, config.machine)


def _words(config: Config, here: Here) -> str:
    machine, count = config.machine, len(here.gpus)
    if not count:
        return f"the CPU of this machine, {here.ram_gib:.0f} GiB of memory, precision {machine.precision}"
    nodes = f"{here.nodes} machines with " * (here.nodes > 1)
    gpu = here.gpus[0]
    return f"{nodes}{count} x {gpu.name}, {room(here):.0f} GiB each, precision {machine.precision}"


# Rows -------------------------------------------------------------------------------------------


def _rows(found: Sequence[Cost], config: Config, here: Here) -> list[list[str]]:
    """Name, a value per training, how it is known."""
    works = [one.work for one in found]
    texts = "counted in data/" if works[0].counted else OF_PAPERS
    of_rows = texts if works[0].counted else "assumed: rows of data/sources.yaml"
    rows = [_row("steps", works, lambda work: work.steps, "{:,.0f}", of_rows)]
    rows.append(_row("texts a step", works, lambda work: work.texts(), "{:,.0f}", texts))
    rows.append(_row("tokens a step", works, lambda work: work.tokens(), "{:,.0f}", texts))
    for name in found[0].flops:
        if any(one.flops[name] for one in found):
            known = "assumed: the number in its name" if name == "teacher" and ":" in config.teacher else COUNTED
            rows.append(_row(f"TFLOP {name}", found, lambda one, name=name: one.flops[name] / 1e12, "{:,.3g}", known))
    where = "GiB of a GPU" if here.gpus else "GiB"
    for name in found[0].memory:
        if any(one.memory[name] for one in found):
            known = "assumed" if name in ("program", "holes") else COUNTED
            rows.append(_row(f"{where} {name}", found, lambda one, name=name: one.memory[name], "{:,.3g}", known))
    rows.append(_row(f"{where} at the peak", found, lambda one: one.peak_gib, "{:,.3g}", _of_peak(found, here)))
    rows.append(_row("seconds a step", found, lambda one: one.seconds, "{:,.3g}", _of_time(found, config, here)))
    rows.append(_row("hours", found, lambda one: one.hours, "{:,.3g}", "steps times seconds"))
    return rows


def _row(name: str, items: Sequence, value: Callable, form: str, known: str) -> list[str]:
    values = map(value, items)
    return [name, *("unknown" if value is None else form.format(value) for value in values), known]


def _of_peak(found: Sequence[Cost], here: Here) -> str:
    if all(one.measured and one.measured.peak_gib for one in found):
        return "measured, without Python itself"
    if any(one.measured and one.measured.peak_gib for one in found):
        return "measured or counted"
    return f"counted, {NOT_HELD}" if here.gpus else "counted, without Python itself"


def _of_time(found: Sequence[Cost], config: Config, here: Here) -> str:
    if any(one.measured for one in found):
        ways = dict.fromkeys(one.measured.how if one.measured else "unknown" for one in found)
        return "; ".join(ways)
    if not here.gpus:
        return "remedy: --measure"
    share = costs.COMPILED if config.machine.compile else costs.NOT_COMPILED
    return f"assumed: {share:.0%} of the GPU's peak, {NOT_HELD}"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first, *others = widths[:-1]
    lines = []
    for name, *values, known in rows:
        cells = "  ".join(cell.rjust(width) for cell, width in zip(values, others, strict=True))
        lines.append(f"{name:{first}}  {cells}  {known}".rstrip())
    return lines


# What follows from them -------------------------------------------------------------------------


def _totals(found: Sequence[Cost], config: Config, registry: list[Source], here: Here, asked: Asked) -> list[str]:
    """Hours, money and disk of all that is planned."""
    hours = [one.hours for one in found]
    if None in hours:
        line = "time: unknown" + ("" if here.gpus else "; `f2llm plan --measure` takes some steps on this machine")
    else:
        total, gpus = sum(hours), num_processes(config.machine, here)
        line = f"time: {total:,.2f} hours"
        line += f", {total * gpus:,.1f} GPU hours" if here.gpus else ""
        priced = asked.price and here.gpus
        line += f", {total * gpus * asked.price:,.2f} at {asked.price:g} per GPU hour" if priced else ""
        line += "; without validation and checkpoints"
    disk = (
        f"disk: {costs.disk_bytes(config, registry) / GIB:,.1f} GiB of the whole pipeline, assumed: the papers' means"
    )
    return [line, disk + (f"; here {here.disk_gib:,.0f}" if here.disk_gib < float("inf") else "")]


def _evaluation(found: Sequence[Cost], config: Config, here: Here, counted: bool) -> list[str]:
    """Encoding of all texts of evaluate.benchmark by every model."""
    lengths = None
    if counted:
        from .counted import evaluated_lengths

        lengths = evaluated_lengths(config)
    if lengths is None:
        ours = config.evaluate.benchmark == EMBEDDED
        reason = "stage `data` makes its tasks" if ours else "the number of its texts is not known here"
        return [f"evaluation of {config.evaluate.benchmark}: unknown; {reason}"]
    names = [name for name in names_of_models(config) if name != "tfidf" and name in (config.evaluate.only or [name])]
    shapes = [costs.shape_of(config, _student(name)) for name in names]
    flops = sum(costs.forward_flops(shape, lengths) for shape in shapes)
    line = f"evaluation: {len(lengths):,} texts of {sum(lengths):,} tokens, counted, by {len(names)} models"
    rates = [one.measured.seconds_per_flop for one in found if one.measured]
    if here.gpus and not rates:
        rates = [1 / (sheet_of(here.gpus[0]).half * 1e12 * costs.ENCODING)]
    hours = f"{flops * max(rates) / 3600:,.3g} hours of encoding" if rates else "hours unknown"
    return [f"{line}: {hours}; scoring by mteb: unknown"]


def _budget(works: Sequence[Work], config: Config, here: Here) -> list[str]:
    """The token budget with most tokens per second of the costliest training, as a line to paste."""
    from .measure import rates

    costliest = max(works, key=lambda work: (work.steps or 1) * sum(costs.flops(work, config.machine).values()))
    found = dict(rates(costliest, config, here))
    if not found:
        return []
    best, now = max(found, key=found.get), config.machine.token_budget
    tried = ", ".join(f"{budget}: {rate:,.0f}" for budget, rate in found.items())
    line = "the best of these is set" if best == now else command(config, {"token_budget": best})
    return [f"token budget: tokens per second of {costliest.name}, measured: {tried}; {line}"]


def _student(name: str) -> str | None:
    return name.rpartition("-")[0] or None


def _advice(found: Sequence[Cost], config: Config, here: Here, asked: Asked) -> list[str]:
    """Whether it fits, and the line to paste with which it would; a precision that suits the GPU."""
    lines, peak, works = [], max(one.peak_gib for one in found), [one.work for one in found]
    if here.gpus and not sheet_of(here.gpus[0]).ampere and config.machine.precision != "float16":
        line = command(config, {"precision": "float16"})
        lines.append(f"precision {config.machine.precision}: {here.gpus[0].name} is fast in float16 only: {line}")
    if here.gpus and config.machine.preset == "none":
        presets = presets_for(tuple(here.gpus), read_yaml(root() / "params.yaml")["machines"])
        words = "preset for such a machine: dvc exp run -S model.size="
        lines += [f"{words}{config.name} -S machine.preset={name}" for name in presets[-1:]]
    if peak <= room(here):
        return [*lines, f"fits: {peak:,.1f} of {room(here):,.1f} GiB"]
    lines.append(f"does not fit: {peak:,.1f} of {room(here):,.1f} GiB")
    if changes := settings_that_fit(works, config.machine, here):
        tried = [cost(work, replace(config.machine, **changes), here) for work in works]
        line = command(config, changes | ({"processes": 0} if asked.gpu and len(here.gpus) > 1 else {}))
        return [*lines, f"would fit with {max(one.peak_gib for one in tried):,.1f} GiB: {line}"]
    return [*lines, *_adapter(works, config, here), _larger(works, config, here)]


def _adapter(works: Sequence[Work], config: Config, here: Here) -> list[str]:
    """The line to paste with which an adapter would fit: another method than training all weights."""
    if any(work.training.lora.rank for work in works):
        return []
    trainings = [replace(work.training, lora=replace(work.training.lora, rank=RANK)) for work in works]
    adapted = [replace(work, training=training) for work, training in zip(works, trainings, strict=True)]
    if (changes := settings_that_fit(adapted, config.machine, here)) is None:
        return []
    peak = max(cost(work, replace(config.machine, **changes), here).peak_gib for work in adapted)
    line = command(config, changes, f"training.lora.rank={RANK}")
    return [f"an adapter, which is another method, would fit with {peak:,.1f} GiB: {line}"]


def _larger(works: Sequence[Work], config: Config, here: Here) -> str:
    """How many such GPUs would do, sharded; or which known GPU."""
    if not here.gpus:
        return "no setting of machine makes it fit; remedy: a smaller size, or a GPU: --gpu"
    for count in (2, 4, 8, 16, 32, 64):
        more = Here([here.gpus[0]] * min(count, 8), here.disk_gib, nodes=max(1, count // 8))
        if count > num_processes(config.machine, here) and (changes := settings_that_fit(works, config.machine, more)):
            nodes = f" on {more.nodes} machines" if more.nodes > 1 else ""
            return f"would fit on {count} x {here.gpus[0].name}{nodes}: {command(config, changes | {'processes': 0})}"
    return "no setting of machine and no number of such GPUs makes it fit; remedy: a larger GPU"
