"""What training a size takes: GPU memory, disk, hours. Estimates; each assumption stands beside its number.

Counted is what `dvc repro` trains: stage 1, stage 2 and the students. Not counted: mining, evaluation, a pretraining.
"""

import re
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from math import ceil, inf

import torch

from .config import Config, Machine, Training, read_yaml, resolve, root
from .registry import Source, choose_sources, load_registry

GIB = 2**30
SMALL = 50_000_000  # [assumed] parameters outside embeddings that any machine trains in time, without a GPU too
# [v1] section on data: means of both columns of lengths over its 36 retrieval sets, weighted by their queries.
# [assumed] for all tasks and for v2, which publishes no lengths; longer texts are cut at max_tokens.
QUERY_TOKENS, PASSAGE_TOKENS = 81, 173
DOCUMENTS_PER_ROW = 22_050_569 / 4_918_949  # [v1] passages by queries of retrieval; [assumed] for v2
ROW_BYTES = 564e9 / 60_147_938  # of the released F2LLM-v2, 24 negatives included; [assumed] for v1 and original sets
FILLED = 0.5  # [assumed] of the cap that one of many files reaches: gives the 18 million rows of stage 2 that [v2] has
TRAINED = 16 + 2  # bytes a parameter: float32 weight, gradient and Adam's two moments; a bfloat16 copy for products
KEPT = 12 * 3  # bytes a parameter on disk: weight and moments of the two newest checkpoints and of one being written
PEAK = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165, "L4": 121}  # dense bfloat16, TFLOP/s
OTHER_PEAK = 100  # [assumed] for any other GPU, TFLOP/s
USED = 0.4  # [assumed] of the peak: usual where language models are trained with care


@dataclass(frozen=True)
class Gpu:
    name: str
    gib: float


REFERENCE = Gpu("NVIDIA H100", 80)  # of which hours are told where there is no GPU


@dataclass(frozen=True)
class Here:
    """A machine: its GPUs, and the disk that is free or holds what a run puts there."""

    gpus: list[Gpu]
    disk_gib: float


@dataclass(frozen=True)
class Needs:
    """Memory of each GPU; disk; hours of one GPU, None where nobody has counted the rows: local files."""

    gpu_gib: float
    disk_gib: float
    hours: float | None


def num_parameters(
    vocab: int, hidden_dim: int, mlp_dim: int, layers: int, query_heads: int, key_value_heads: int, head_dim: int
) -> tuple[int, int]:
    """(all, without the embedding table) of a Qwen3 without language-model head."""
    attention = hidden_dim * head_dim * (2 * query_heads + 2 * key_value_heads) + 2 * head_dim
    body = layers * (attention + 3 * hidden_dim * mlp_dim + 2 * hidden_dim) + hidden_dim
    return vocab * hidden_dim + body, body


SHAPE = ("vocab", "hidden_dim", "mlp_dim", "layers", "query_heads", "key_value_heads", "head_dim")


def shape_of(config: Config, student: str | None = None) -> dict[str, int]:
    """What `num_parameters` asks for, of the backbone or of a student, whose attention is the backbone's."""
    shape = {name: getattr(config.backbone, name) for name in SHAPE}
    cut = config.prune.students[student] if student else config.backbone
    return shape | {name: getattr(cut, name) for name in ("hidden_dim", "mlp_dim", "layers")}


def needs(config: Config, registry: list[Source], gpus: list[Gpu]) -> Needs:
    """What training takes on such GPUs: the most memory and the largest checkpoints of all trainings, all hours."""
    stage1_rows, stage2_rows, mirror_rows = rows_of(config, registry)
    main, students = shape_of(config), {name: shape_of(config, name) for name in config.prune.students}
    total, _ = num_parameters(**main)
    teacher = teacher_parameters(config.teacher, total)
    trainings = [(main, config.stage1, stage1_rows, 0), (main, config.stage2, stage2_rows, teacher)]
    trainings += [(shape, config.distill[name], stage2_rows, total) for name, shape in students.items()]
    num_processes = min(config.machine.processes or len(gpus), len(gpus))
    num_shards = num_processes if config.machine.shard else 1
    memory = max(gpu_bytes(shape, config.machine, teacher, num_shards) for shape, _, _, teacher in trainings)
    speed = USED * 1e12 * min(peak_of(gpu) for gpu in gpus)
    hours = sum(flops(*training, config.machine) for training in trainings) / speed / 3600
    # Models: stages 1 and 2, pruned and distilled in float32; backbone and teacher in bfloat16, in the mirror as well.
    made = 8 * (total + sum(num_parameters(**shape)[0] for shape in students.values()))
    brought = 2 * (total + teacher)
    documents = (1 + DOCUMENTS_PER_ROW) * (stage1_rows + stage2_rows)
    texts = 4 * PASSAGE_TOKENS * documents  # [assumed] four bytes of text a token; its number in scratch/ has four too
    disk = 2 * (made + brought + texts)  # DVC's cache has a copy of all outputs
    disk += brought + texts + ROW_BYTES * mirror_rows + KEPT * total
    return Needs(memory / GIB, disk / GIB, hours or None)


def rows_of(config: Config, registry: list[Source]) -> tuple[float, float, int]:
    """Rows of the chosen sources (in stage 1, in stage 2, that the mirror holds); of local files 0."""
    sources, _ = choose_sources(registry, config.data, config.recipe)
    counts = [(source, source.rows or source.published_rows or 0) for source in sources]
    stage1 = sum(count for source, count in counts if source.stage1) if config.stage1.epochs else 0
    cap = config.stage2.cap_per_source or inf
    caps = [cap * (FILLED * len(source.files) if len(source.files) > 1 else 1) for source in sources]
    stage2 = sum(min(count, most) for (_, count), most in zip(counts, caps, strict=True))
    published = config.data.source in ("released", "sources")
    return stage1, stage2, sum(count for _, count in counts) if published else 0


def teacher_parameters(teacher: str, own: int) -> int:
    """What its name tells, as in hub:codefuse-ai/F2LLM-v2-4B; [assumed] else as many as its student has."""
    found = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)([BM])(?!\w)", teacher)
    named = int(float(found[1]) * {"B": 1e9, "M": 1e6}[found[2]]) if found else own
    return 0 if teacher == "none" else named


def gpu_bytes(shape: dict, machine: Machine, teacher: int, num_shards: int) -> float:
    """What a process holds at most: its shard of the training, the whole teacher in bfloat16, activations."""
    kept = max(machine.activation_tokens, machine.token_budget)  # one pack always is
    activations = kept * activation_bytes(shape, machine.recompute)
    return TRAINED * num_parameters(**shape)[0] / num_shards + 2 * teacher + activations


def activation_bytes(shape: dict, recompute: str) -> int:
    """Bytes that one token's activations take until the backward pass: what the operators of Qwen3 save.

    The residual stream is float32, matrix products take bfloat16. Of a layer: h 26 (two norms save input and
    normalised input, 4 + 4; q, k, v, gate and up their cast of it, 2 each), I 8 (silu, product, down_proj), query and
    key-value width 10 each (a norm 4 + 2, attention 2 each of q, k, v, output). full: every layer's input and one
    layer whole. selective: also the results of matrix products and attention.
    """
    h, mlp = shape["hidden_dim"], shape["mlp_dim"]
    heads = (shape["query_heads"] + shape["key_value_heads"]) * shape["head_dim"]
    layer = 26 * h + 8 * mlp + 10 * heads
    products = 4 * h + 4 * mlp + 4 * heads if recompute == "selective" else 0
    return layer * shape["layers"] if recompute == "none" else (4 * h + products) * shape["layers"] + layer


def flops(shape: dict, training: Training, rows: float, teacher: int, machine: Machine) -> float:
    """6 per token and parameter outside embeddings, 2 more for each repeated forward pass; 2 per teacher's parameter.

    [assumed] every task draws as many negatives as retrieval; attention over tokens is ignored: a few percent at these
    lengths. Texts beyond activation_tokens go forward twice (gradient caching), and once more where recompute says so.
    """
    negatives = training.hard_negatives.retrieval
    query, passage = (min(tokens, training.max_tokens) for tokens in (QUERY_TOKENS, PASSAGE_TOKENS))
    of_step = training.global_batch_size * (query + (1 + negatives) * passage)
    steps = ceil(rows / training.global_batch_size) * training.epochs
    repeated = (of_step > machine.activation_tokens) + (machine.recompute != "none")
    a_token = (6 + 2 * repeated) * num_parameters(**shape)[1] + 2 * teacher
    return of_step * min(steps, training.max_steps or steps) * a_token


def peak_of(gpu: Gpu) -> int:
    """Its bfloat16 matrix products, TFLOP/s."""
    return next((peak for name, peak in PEAK.items() if re.search(rf"\b{name}\b", gpu.name)), OTHER_PEAK)


# Does it fit? -----------------------------------------------------------------------------------


def machine_here(config: Config) -> Here:
    """This machine's GPUs, and its disk including what fetching and earlier runs have put there."""
    code = "import torch\nfor i in range(torch.cuda.device_count()):\n p = torch.cuda.get_device_properties(i)\n"
    code += " print(p.total_memory, p.name)"
    lines = []
    if torch.cuda.is_available():  # another process asks, or a GPU context of this one would stay during training
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    held = 0
    for folder in (config.data.mirror, "data", "models", "scratch", ".dvc/cache"):
        for path in (root() / folder).rglob("*"):
            with suppress(OSError):  # removed meanwhile
                held += path.stat().st_size if path.is_file() else 0
    return Here([Gpu(name, int(size) / GIB) for size, name in lines], (shutil.disk_usage(root()).free + held) / GIB)


def shown(here: Here) -> str:
    """A machine in words."""
    gpus = ", ".join(f"{gpu.name} with {gpu.gib:.0f} GiB" for gpu in here.gpus) or "no GPU"
    return f"{gpus}, {here.disk_gib:,.0f} GiB of disk"


def gpus_or_reference(here: Here, config: Config) -> list[Gpu]:
    """The GPUs of a machine, or as many of the kind whose hours are told where there is none."""
    return here.gpus or [REFERENCE] * max(1, config.machine.processes)


def is_small(config: Config) -> bool:
    """Whether any machine trains it."""
    return num_parameters(**shape_of(config))[1] <= SMALL


def fits(config: Config, registry: list[Source], here: Here) -> bool:
    """Whether a machine can train a size."""
    if is_small(config) or not here.gpus:
        return is_small(config)
    wanted = needs(config, registry, here.gpus)
    return wanted.gpu_gib <= min(gpu.gib for gpu in here.gpus) and wanted.disk_gib <= here.disk_gib


def frugal(config: Config) -> Config:
    """The same with the least memory that settings of `machine` give on as many GPUs: slower, not another method."""
    least = {"recompute": "full", "activation_tokens": config.machine.token_budget}
    return replace(config, machine=replace(config.machine, **least))


def require_fits(config: Config) -> None:
    """Raise a RuntimeError for a size that this machine cannot train, unless machine.check_needs is false."""
    if not config.machine.check_needs or is_small(config):
        return
    here, registry = machine_here(config), load_registry(root() / "data" / "sources.yaml")
    if fits(config, registry, here):
        return
    gpus = gpus_or_reference(here, config)
    wanted, least = needs(config, registry, gpus), needs(frugal(config), registry, gpus)
    others = sizes_of(read_yaml(root() / "params.yaml"), config.recipe)
    largest = max((other for other in others if fits(other, registry, here)), key=own_parameters)
    hours = f"{wanted.hours:,.0f} hours of one {gpus[0].name}" if wanted.hours else "hours that local files decide"
    raise RuntimeError(
        f"this machine cannot train size {config.name}, nothing was run. By estimate it needs {wanted.gpu_gib:,.0f} "
        f"GiB of GPU memory, {wanted.disk_gib:,.0f} GiB of disk and {hours}; here: {shown(here)}. "
        f"The largest size of recipe {config.recipe} that fits here is {largest.name}. remedy: that size; "
        f"or a larger machine; or less memory: {least.gpu_gib:,.0f} GiB by machine.recompute: full and "
        f"machine.activation_tokens: {config.machine.token_budget}, still less by machine.shard with "
        "machine.processes over several GPUs; or machine.check_needs: false, to try it nevertheless"
    )


# The table of sizes -----------------------------------------------------------------------------


def sizes_of(params: dict, recipe: str) -> list[Config]:
    """The configurations of all sizes that a recipe knows, as the presets are: without `override`."""
    plain = params | {"recipe": recipe, "override": {}}
    return [resolve(plain, name) for name in params["recipes"][recipe].get("sizes", params["sizes"])]


def student_of(config: Config) -> str | None:
    """The student that a pruned size is called after."""
    return config.name if config.name in config.prune.students else None


def own_parameters(config: Config) -> tuple[int, int]:
    """(all, without embeddings) of the model that a size is called after."""
    return num_parameters(**shape_of(config, student_of(config)))


def published_row(config: Config, base: str | None) -> dict:
    """A size as the papers' tables have it; of a pruned one the student, whose teacher is what it is cut from."""
    student = student_of(config)
    shape, training = shape_of(config, student), config.distill[student] if student else config.stage2
    name = config.teacher.partition("@")[0].rpartition("-")[2]
    teacher = base if student else "" if config.teacher == "none" else name
    keys = ("hidden_dim", "layers", "mlp_dim", "query_heads", "key_value_heads", "head_dim")
    names = ("hidden", "layers", "intermediate", "heads", "kv_heads", "head_dim")
    row = {"recipe": config.recipe, "size": config.name} | {name: shape[key] for name, key in zip(names, keys)}
    row |= {"parameters": num_parameters(**shape)[0], "learning_rate": training.learning_rate}
    return row | {"epochs": training.epochs, "global_batch": training.global_batch_size, "teacher": teacher}
