"""Estimates of the GPU memory, disk and hours that training a size needs; each assumption stands beside its number.

Counted: what `dvc repro` trains, stage 1, stage 2 and the students. Not counted: mining, evaluation, pretraining.
"""

import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from math import ceil, inf
from pathlib import Path

from ..config import SHAPE, Config, Machine, Training, load_config, read_yaml, resolve, root
from ..data.registry import Source, choose_sources, load_registry

GIB = 2**30
# Any machine can train a size of so many non-embedding parameters, even without a GPU: smollm2's 106 million take an
# hour of a laptop's CPU and 6 GB.
TRAINS_ANYWHERE = 120_000_000
# [v1] section on data: means of both columns of lengths over its 36 retrieval sets, weighted by their queries.
# [assumed] for all tasks and for v2, which publishes no lengths; longer texts are cut at max_tokens.
QUERY_TOKENS, PASSAGE_TOKENS = 81, 173
DOCUMENTS_PER_ROW = 22_050_569 / 4_918_949  # [v1] passages by queries of retrieval; [assumed] for v2
ROW_BYTES = 564e9 / 60_147_938  # of the released F2LLM-v2, 24 negatives included; [assumed] for v1 and original sets
# [assumed] mean share of cap_per_source that files of a source with many reach; gives [v2]'s 18 million rows
SHARE_OF_CAP = 0.5
# In memory: float32 weight, gradient and Adam's two states, and a bfloat16 copy for matrix products.
TRAINING_BYTES_PER_PARAMETER = 16 + 2
# On disk: weight and optimizer states of the two newest checkpoints and of one being written.
CHECKPOINT_BYTES_PER_PARAMETER = 12 * 3
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165, "L4": 121}  # dense bfloat16
DEFAULT_TFLOPS = 100  # [assumed] for any other GPU, TFLOP/s
MODEL_FLOPS_UTILISATION = 0.4  # [assumed] of the peak: usual where language models are trained with care


@dataclass(frozen=True)
class Gpu:
    name: str
    gib: float


REFERENCE = Gpu("NVIDIA H100", 80)  # hours are estimated for this GPU if the machine has none


@dataclass(frozen=True)
class Here:
    """A machine: its GPUs, and its disk space that is free or holds files of earlier fetches and runs."""

    gpus: list[Gpu]
    disk_gib: float


@dataclass(frozen=True)
class Needs:
    """Memory per GPU; disk; hours of one GPU, None for local files, whose number of rows is not known."""

    gpu_gib: float
    disk_gib: float
    hours: float | None


def num_parameters(
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    architecture: str = "qwen3",
) -> tuple[int, int]:
    """(all parameters, non-embedding parameters) of a decoder without language-model head."""
    heads, keys = num_attention_heads * head_dim, num_key_value_heads * head_dim
    of_heads = {  # norms of queries and keys, and biases
        "qwen3": 2 * head_dim,
        "gemma3_text": 2 * head_dim,
        "qwen2": heads + 2 * keys,
        "olmo2": heads + keys,
        "olmo3": heads + keys,
    }
    norms = {"gemma2": 4, "gemma3_text": 4, "olmo": 0}.get(architecture, 2)  # in a layer; OLMo's have no weights
    attention = hidden_size * 2 * (heads + keys) + of_heads.get(architecture, 0)
    layer = attention + 3 * hidden_size * intermediate_size + norms * hidden_size
    non_embedding = num_hidden_layers * layer + (hidden_size if norms else 0)
    return vocab_size * hidden_size + non_embedding, non_embedding


def shape_of(config: Config, student: str | None = None) -> dict[str, int]:
    """The arguments of `num_parameters` for the backbone or for a student, whose attention is the backbone's."""
    shape = {name: getattr(config.backbone, name) for name in (*SHAPE, "architecture")}
    cut = config.prune.students[student] if student else config.backbone
    return shape | {name: getattr(cut, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}


def needs(config: Config, registry: list[Source], gpus: list[Gpu]) -> Needs:
    """What training needs on such GPUs: the largest memory and checkpoints of all trainings, the sum of their hours."""
    stage1_rows, stage2_rows, mirror_rows = rows_of(config, registry)
    main, students = shape_of(config), {name: shape_of(config, name) for name in config.prune.students}
    total, _ = num_parameters(**main)
    teacher = teacher_parameters(config.teacher, total)
    trainings = [(main, config.stage1, stage1_rows, 0), (main, config.stage2, stage2_rows, teacher)]
    trainings += [(shape, config.distill[name], stage2_rows, total) for name, shape in students.items()]
    num_processes = min(config.machine.processes or len(gpus), len(gpus))
    num_shards = num_processes if config.machine.shard else 1
    memory = max(gpu_bytes(shape, config.machine, teacher, num_shards) for shape, _, _, teacher in trainings)
    speed = MODEL_FLOPS_UTILISATION * 1e12 * min(peak_of(gpu) for gpu in gpus)
    hours = sum(flops(*training, config.machine) for training in trainings) / speed / 3600
    # Models: stages 1 and 2, pruned and distilled in float32; backbone and teacher in bfloat16, in the mirror as well.
    made = 8 * (total + sum(num_parameters(**shape)[0] for shape in students.values()))
    brought = 2 * (total + teacher)
    documents = (1 + DOCUMENTS_PER_ROW) * (stage1_rows + stage2_rows)
    texts = 4 * PASSAGE_TOKENS * documents  # [assumed] 4 bytes of text per token; its id in scratch/ also has 4
    disk = 2 * (made + brought + texts)  # DVC's cache has a copy of all outputs
    disk += brought + texts + ROW_BYTES * mirror_rows + CHECKPOINT_BYTES_PER_PARAMETER * total
    return Needs(memory / GIB, disk / GIB, hours or None)


def rows_of(config: Config, registry: list[Source]) -> tuple[float, float, int]:
    """(rows in stage 1, rows in stage 2, rows in the mirror) of the chosen sources; local files count as 0."""
    sources, _ = choose_sources(registry, config.data, config.recipe)
    counts = [(source, source.rows or source.published_rows or 0) for source in sources]
    stage1 = sum(count for source, count in counts if source.stage1) if config.stage1.epochs else 0
    cap = config.stage2.cap_per_source or inf
    caps = [cap * (SHARE_OF_CAP * len(source.files) if len(source.files) > 1 else 1) for source in sources]
    stage2 = sum(min(count, most) for (_, count), most in zip(counts, caps, strict=True))
    published = config.data.source in ("released", "sources")
    return stage1, stage2, sum(count for _, count in counts) if published else 0


def teacher_parameters(teacher: str, own: int) -> int:
    """The number in the teacher's name, as in hub:codefuse-ai/F2LLM-v2-4B; [assumed] else `own`, the student's number.

    0 without a teacher.
    """
    found = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)([BM])(?!\w)", teacher)
    named = int(float(found[1]) * {"B": 1e9, "M": 1e6}[found[2]]) if found else own
    return 0 if teacher == "none" else named


def gpu_bytes(shape: dict, machine: Machine, teacher: int, num_shards: int) -> float:
    """Peak GPU memory of a process: its shard of the training state, the whole bfloat16 teacher, activations."""
    kept = max(machine.activation_tokens, machine.token_budget)  # those of at least one pack
    activations = kept * activation_bytes(shape, machine.recompute)
    return TRAINING_BYTES_PER_PARAMETER * num_parameters(**shape)[0] / num_shards + 2 * teacher + activations


def activation_bytes(shape: dict, recompute: str) -> int:
    """Bytes of one token's activations that are kept until the backward pass: what the operators of Qwen3 save.

    The residual stream is float32, matrix products take bfloat16. Bytes per layer and unit of width: hidden 26 (two
    norms save input and normalised input, 4 + 4 each; q, k, v, gate and up save their bfloat16 input, 2 each), MLP 8
    (silu, product, down_proj), query and key-value heads 10 (a norm 4 + 2, attention 2 each of q, k, v, output).
    recompute: full keeps every layer's input, and all activations of one layer; selective also keeps the results of
    matrix products and attention.
    """
    h, mlp = shape["hidden_size"], shape["intermediate_size"]
    heads = (shape["num_attention_heads"] + shape["num_key_value_heads"]) * shape["head_dim"]
    layer = 26 * h + 8 * mlp + 10 * heads
    products = 4 * h + 4 * mlp + 4 * heads if recompute == "selective" else 0
    return (
        layer * shape["num_hidden_layers"]
        if recompute == "none"
        else (4 * h + products) * shape["num_hidden_layers"] + layer
    )


def flops(shape: dict, training: Training, rows: float, teacher: int, machine: Machine) -> float:
    """Floating-point operations of a training.

    Per token: 6 for each non-embedding parameter, 2 more for each repeated forward pass, and 2 for each parameter of
    the teacher. [assumed] every task draws as many negatives as retrieval; attention over tokens is ignored: a few
    percent at these lengths. Steps of more than activation_tokens run the forward pass twice (gradient caching);
    recompute runs it once more.
    """
    negatives = training.hard_negatives.retrieval
    query, passage = (min(tokens, training.max_tokens) for tokens in (QUERY_TOKENS, PASSAGE_TOKENS))
    of_step = training.global_batch_size * (query + (1 + negatives) * passage)
    steps = ceil(rows / training.global_batch_size) * training.epochs
    repeated = (of_step > machine.activation_tokens) + (machine.recompute != "none")
    a_token = (6 + 2 * repeated) * num_parameters(**shape)[1] + 2 * teacher
    return of_step * min(steps, training.max_steps or steps) * a_token


def peak_of(gpu: Gpu) -> int:
    """Peak speed of a GPU's bfloat16 matrix products, TFLOP/s."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", gpu.name)), DEFAULT_TFLOPS)


# Does it fit? -----------------------------------------------------------------------------------


def machine_here(config: Config) -> Here:
    """This machine's GPUs, and its disk space, including what earlier fetches and runs have stored there."""
    folders = (config.data.mirror, "data", "models", "scratch", ".dvc/cache")
    held = sum(_bytes_in(root() / folder) for folder in folders)
    return Here(_gpus_here(), (shutil.disk_usage(root()).free + held) / GIB)


def _gpus_here() -> list[Gpu]:
    """The GPUs that torch would use. Importing torch takes seconds, so this is done only if a driver is installed."""
    if not (shutil.which("nvidia-smi") or any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()):
        return []
    code = "import torch\nfor i in range(torch.cuda.device_count()):\n p = torch.cuda.get_device_properties(i)\n"
    code += " print(p.total_memory, p.name)"  # in a process of its own, or a GPU context would stay during training
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2]
        raise RuntimeError(f"torch cannot list this machine's GPUs: {reason}; remedy: a torch that fits the driver")
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    return [Gpu(name, int(size) / GIB) for size, name in lines]


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
    """The configurations of all sizes of a recipe, as preset: without `override`."""
    plain = params | {"recipe": recipe, "override": {}}
    return [resolve(plain, name) for name in params["recipes"][recipe].get("sizes", params["sizes"])]


def student_of(config: Config) -> str | None:
    """The student that a pruned size is named after; None for other sizes."""
    return config.name if config.name in config.prune.students else None


def own_parameters(config: Config) -> tuple[int, int]:
    """(all, non-embedding) parameters of the model that a size is named after."""
    return num_parameters(**shape_of(config, student_of(config)))


def published_row(config: Config, base: str | None) -> dict:
    """A size as a row of the papers' tables; for a pruned size its student, whose teacher is the model it is cut from.

    base: the size that a pruned size is cut from.
    """
    student = student_of(config)
    shape, training = shape_of(config, student), config.distill[student] if student else config.stage2
    name = config.teacher.partition("@")[0].rpartition("-")[2]
    row = {"recipe": config.recipe, "size": config.name} | {name: shape[key] for name, key in PAPERS_WORDS.items()}
    row |= {"parameters": num_parameters(**shape)[0], "learning_rate": training.learning_rate}
    row |= {"epochs": training.epochs, "global_batch": training.global_batch_size}
    return row | {"teacher": base if student else "" if config.teacher == "none" else name}


PAPERS_WORDS = {
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "intermediate": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
}


def published_rows() -> list[tuple[Config, dict]]:
    """(configuration, row of `published_row`) of every size under every recipe."""
    params = read_yaml(root() / "params.yaml")
    configs = [config for recipe in params["recipes"] for config in sizes_of(params, recipe)]
    return [(config, published_row(config, params["sizes"][config.name].get("base"))) for config in configs]


def published_table() -> list[list]:
    """Only the published values: a heading, and a row per size of the papers and recipe."""
    rows = [row for config, row in published_rows() if config.backbone.architecture == "qwen3"]
    return [list(rows[0]), *(list(row.values()) for row in rows)]


HEADINGS = "recipe size hidden layers MLP heads KV dim parameters non-emb. rate epochs batch teacher"
HEADINGS += " GPU least disk hours"


def table_of_sizes() -> tuple[list[list[str]], str]:
    """(heading and a row per size and recipe, what the columns mean): shapes, trainings, estimates for this machine."""
    chosen, registry = load_config(), load_registry(root() / "data" / "sources.yaml")
    here, table = machine_here(chosen), [[*HEADINGS.split(), ""]]
    for config, row in published_rows():
        gpus = gpus_or_reference(here, config)
        wanted, least = needs(config, registry, gpus), needs(frugal(config), registry, gpus)
        estimates = [f"{number:,.0f}" for number in (wanted.gpu_gib, least.gpu_gib, wanted.disk_gib)]
        estimates.append(f"{wanted.hours:,.0f}" if wanted.hours else "unknown")
        remarks = [] if fits(config, registry, here) else ["not here"]
        remarks += ["<- model.size"] if (config.name, config.recipe) == (chosen.name, chosen.recipe) else []
        parameters = [f"{number / 1e6:,.1f}M" for number in own_parameters(config)]
        shape, training = list(row.values())[:8], list(row.values())[9:]
        table.append([*map(str, [*shape, *parameters, *training, *estimates]), " ".join(remarks)])
    legend = (
        f"non-emb.: parameters without the embedding table. GPU, disk: GiB, and hours of one {gpus[0].name}"
        f"{'' if here.gpus else ' (no GPU is here)'}, by estimate, with machine of params.yaml and without override; "
        "least: of a GPU's memory, by machine.recompute: full and machine.activation_tokens as machine.token_budget; "
        "a pruned size counts the training of what it is cut from, too.\n"
        f"This machine: {shown(here)}; not here: cannot be trained on it."
    )
    return table, legend
