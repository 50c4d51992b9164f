"""Real steps of a training on this machine, in a process of its own, by the loop of its stage.

Weights are random, which does not change the speed. Texts are those of the stage where its data are there, else random
token ids of the plan's lengths. What would take too long is measured on fewer queries and at two depths, and scaled.

python -m f2llm.pipeline.planning.measure: reads an `Order` from its input, prints what it took as JSON.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from ...config import Config, Machine, Training
from ...store.checked import build
from ...store.files import whole_file
from ...store.hardware import GIB
from ..launch import environment
from . import costs
from .costs import Work
from .plan import Here, Measured, cost, num_processes, room

# Operations of a step that is measured as it is: a few seconds of a CPU thread, or of a GPU.
MOST_FLOPS = {"cpu": 2e11, "gpu": 2e14}
DEPTHS = 2, 3  # layers of the models that stand for a deeper one
FOLDER = Path("scratch/plan")
MEASURED = 8  # steps, evenly spaced over those that are counted
GAIN = 1.03  # a token budget is better if it is so many times as fast


@dataclass(frozen=True)
class Order:
    """Steps to run: of the work's lengths, on a model of its shape. config: to read the texts of the stage instead."""

    work: Work
    machine: Machine
    config: Config | None = None


@dataclass(frozen=True)
class Took:
    """Seconds of a step's texts and losses, of its optimizer, of encoding its texts; bytes at the peak, or None.

    cpu_seconds: as `seconds`, of all threads; the same on a machine that others use, too. teaching: as `encoding`, by
    the teacher, if its shape is known.
    """

    seconds: float
    cpu_seconds: float
    optimizer: float
    encoding: float
    peak: int | None
    teaching: float = 0.0


def written(order: Order) -> bytes:
    """An order as JSON; `read` is its inverse."""
    whole = order.config and TypeAdapter(Config).dump_python(order.config, by_alias=True)
    return json.dumps({"work": asdict(order.work), "machine": asdict(order.machine), "config": whole}).encode()


def read(content: bytes) -> Order:
    """The order that `written` made JSON of."""
    order = json.loads(content)
    work = order["work"] | {"training": build(Training, order["work"]["training"], "training")}
    work |= {"lengths": [tuple(step) for step in work["lengths"]], "teacher": tuple(work["teacher"])}
    config = order["config"] and build(Config, order["config"], "config")
    return Order(Work(**work), build(Machine, order["machine"], "machine"), config)


def measure(work: Work, config: Config, here: Here, most: float | None = None, clock: str = "seconds") -> Measured:
    """Seconds of a step and peak memory, by real steps; kept in scratch/plan.

    most: operations of a step that is measured as it is. RuntimeError if not even the reduced training fits here.
    """
    most = most or MOST_FLOPS["gpu" if here.gpus else "cpu"]
    alone, sample = _alone(config.machine), replace(work, lengths=few(work.lengths))
    reduced = fewer_queries(sample, config.machine, most)
    depth = work.shape["num_hidden_layers"]
    whole = depth <= max(DEPTHS) or sum(costs.flops(reduced, alone).values()) <= most
    real = config if work.counted and reduced is sample and whole else None
    depths = [depth] if whole else DEPTHS
    took = {layers: run(Order(with_layers(reduced, layers), alone, real), here) for layers in depths}
    found = scaled(took, reduced, work, config.machine, here, clock)
    with whole_file(_kept_in(work, config.machine)) as path:
        path.write_text(json.dumps(asdict(found)))
    return found


def remembered(work: Work, machine: Machine) -> Measured | None:
    """What `measure` found earlier, for the same training and settings."""
    path = _kept_in(work, machine)
    return Measured(**json.loads(path.read_text())) if path.exists() else None


def _kept_in(work: Work, machine: Machine) -> Path:
    return FOLDER / f"{hashlib.sha256(repr((work, machine)).encode()).hexdigest()[:16]}.json"


def _alone(machine: Machine) -> Machine:
    return replace(machine, processes=1, shard=False)


def few(sample: list) -> list:
    """Those of a sample of steps that are measured."""
    return sample[:: max(1, len(sample) // MEASURED)]


def with_layers(work: Work, layers: int) -> Work:
    return replace(work, shape=work.shape | {"num_hidden_layers": layers})


def fewer_queries(work: Work, machine: Machine, most: float) -> Work:
    """A training with so few queries a step, at least two, that at three layers it has at most so many operations."""
    shallow = with_layers(work, min(max(DEPTHS), work.shape["num_hidden_layers"]))
    share = most / sum(costs.flops(shallow, _alone(machine)).values())
    if share >= 1:
        return work
    size = max(2, int(work.training.global_batch_size * share))
    lengths = [(_spread(queries, size), _spread(documents, size * len(documents) // len(queries)))
               for queries, documents in work.lengths]  # fmt: skip
    return replace(work, training=replace(work.training, global_batch_size=size), lengths=lengths[:2])


def _spread(lengths: list[int], number: int) -> list[int]:
    """So many of the lengths, evenly over all."""
    number = min(number, len(lengths))
    return [lengths[len(lengths) * place // number] for place in range(number)]


def scaled(
    took: dict[int, Took], reduced: Work, work: Work, machine: Machine, here: Here, clock: str = "seconds"
) -> Measured:
    """What a training takes, from what a reduced one took at its own depth or at two.

    Layers add equal times; texts count by operations, the optimizer by trained parameters, a teacher of unknown shape
    as encoding.
    """
    depth, deepest, processes = work.shape["num_hidden_layers"], max(took), num_processes(machine, here)
    alone, last = _alone(machine), took[deepest]
    seconds, peak = _at_depth({layers: getattr(one, clock) for layers, one in took.items()}, depth), None
    if all(one.peak is not None for one in took.values()) and _as_full(reduced, work, alone):
        larger = cost(work, alone, here).peak_gib - cost(reduced, alone, here).peak_gib  # of all counted steps
        peak = _at_depth({layers: one.peak for layers, one in took.items()}, depth) / GIB + larger
    flops, of_reduced = costs.flops(work, alone), costs.flops(reduced, alone)
    share = sum(of_reduced.values()) - of_reduced["teacher"]
    seconds *= (sum(flops.values()) - flops["teacher"]) / share
    shallow = with_layers(reduced, deepest)
    per_flop = last.encoding / costs.forward_flops_of(shallow)
    optimizer = last.optimizer * costs.trained_parameters(work) / costs.trained_parameters(shallow)
    teacher = flops["teacher"] * per_flop
    if work.teacher_shape:
        texts = costs.forward_flops_of(work, work.teacher_shape) / costs.forward_flops_of(reduced, work.teacher_shape)
        teacher = last.teaching * texts * costs.share_embedded(work, alone)
    total = (seconds + teacher) / processes + optimizer
    parts = [f"{' and '.join(map(str, sorted(took)))} of {depth} layers"] * (depth not in took)
    sizes = [one.training.global_batch_size for one in (reduced, work)]
    parts += [f"{sizes[0]} of {sizes[1]} queries"] * (sizes[0] != sizes[1])
    how = f"measured{' at ' * bool(parts)}{', '.join(parts)}"
    return Measured(total, per_flop, peak if processes == 1 else None, how)


def _at_depth(found: dict[int, float], depth: int) -> float:
    """The value at a depth, on the line through those of two depths."""
    if depth in found:
        return found[depth]
    low, high = sorted(found)
    return found[high] + (depth - high) * (found[high] - found[low]) / (high - low)


def _as_full(reduced: Work, work: Work, machine: Machine) -> bool:
    """Whether a reduced training keeps as many activations as the whole one."""
    same = reduced.training.global_batch_size == work.training.global_batch_size
    return same or reduced.tokens() > max(machine.activation_tokens, machine.token_budget)


def run(order: Order, here: Here) -> Took:
    """Run the steps of an order in a process of its own. RuntimeError if they do not fit here, or fail."""
    needed = cost(order.work, order.machine, here).peak_gib
    if needed > room(here):
        raise RuntimeError(
            f"{order.work.name} needs {needed:,.1f} GiB for {len(order.work.lengths)} steps to measure, but here are "
            f"{room(here):,.1f}; remedy: less memory, as the plan without --measure says"
        )
    command = [sys.executable, "-m", "f2llm.pipeline.planning.measure"]
    done = subprocess.run(command, input=written(order), capture_output=True, env=environment())
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise RuntimeError(f"{order.work.name} could not be measured: {reason}")
    return Took(**json.loads(done.stdout.decode().splitlines()[-1]))


def rates(work: Work, config: Config, here: Here) -> Iterator[tuple[int, float]]:
    """(token budget, tokens per second), doubling until two budgets in a row bring nothing or memory ends."""
    machine, best, worse = config.machine, 0.0, 0
    reduced = fewer_queries(work, machine, MOST_FLOPS["gpu" if here.gpus else "cpu"])
    reduced = with_layers(reduced, min(max(DEPTHS), work.shape["num_hidden_layers"]))
    budget = 1 << max(8, (work.training.max_tokens - 1).bit_length())
    while worse < 2:
        tried = replace(machine, token_budget=budget, activation_tokens=max(budget, machine.activation_tokens))
        if cost(work, _alone(tried), here).peak_gib > room(here):
            return
        try:
            took = run(Order(reduced, _alone(tried)), here)
        except RuntimeError:
            return
        yield budget, (rate := reduced.tokens() / took.seconds)
        worse = 0 if rate > GAIN * best else worse + 1
        best = max(best, rate)
        if budget >= reduced.tokens():
            return
        budget *= 2


if __name__ == "__main__":
    from .steps import take

    print(json.dumps(asdict(take(read(sys.stdin.buffer.read())))))
