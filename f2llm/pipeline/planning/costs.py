"""What a training computes and holds: parameters, texts and tokens, floating-point operations, memory by part, disk.

Each assumption stands beside its number. Not counted: mining, pretraining, scoring.
"""

import re
from dataclasses import dataclass, replace
from math import ceil, inf

from ...config import SHAPE, Config, Lora, Machine, Training
from ...data.registry import Source, choose_sources
from ...store.hardware import GIB, Gpu, sheet_of

# [v1] section on data: means of both columns of lengths over its 36 retrieval sets, weighted by their queries.
# [assumed] for all tasks and for v2, which publishes no lengths; longer texts are cut at max_tokens.
QUERY_TOKENS, PASSAGE_TOKENS = 81, 173
DOCUMENTS_PER_ROW = 22_050_569 / 4_918_949  # [v1] passages by queries of retrieval; [assumed] for v2
ROW_BYTES = 564e9 / 60_147_938  # of the released F2LLM-v2, 24 negatives included; [assumed] for v1 and original sets
# [assumed] mean share of cap_per_source that files of a source with many reach; gives [v2]'s 18 million rows
SHARE_OF_CAP = 0.5
# On disk: weight and optimizer states of the two newest checkpoints and of one being written.
CHECKPOINT_BYTES_PER_PARAMETER = 12 * 3
# Share of a GPU's peak that a training reaches: 0.6B on an H200, compiled or not (benchmarks/results/gpu.json), there
# 0.17 in `encode`, too. [assumed] for other sizes, GPUs and precisions.
COMPILED, NOT_COMPILED, ENCODING = 0.33, 0.14, 0.17
SELECTIVE = 0.2  # [assumed] of a forward pass's time: the element-wise work that selective recomputation repeats
BETWEEN_MACHINES = 50  # [assumed] GB/s between two GPUs of different machines
PROGRAM_GIB = {"gpu": 1, "cpu": 0.01}  # for libraries: [assumed] with a GPU's context; [ours] beyond what Python takes
HOLES = 0.15  # [ours] memory between tensors: benchmarks/plan.py; 0.6B on an H200 held 91 GiB, with them 92 are counted
ONLY_LAST = ("qwen3", "qwen2", "llama")  # whose last layer is computed for last tokens alone, see f2llm.attention


# Parameters -------------------------------------------------------------------------------------


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


def teacher_parameters(teacher: str, own: int) -> int:
    """The number in the teacher's name, as in hub:codefuse-ai/F2LLM-v2-4B; [assumed] else `own`, the student's number.

    0 without a teacher.
    """
    found = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)([BM])(?!\w)", teacher)
    named = int(float(found[1]) * {"B": 1e9, "M": 1e6}[found[2]]) if found else own
    return 0 if teacher == "none" else named


def adapter_parameters(shape: dict, lora: Lora) -> int:
    """Of a LoRA adapter: rank x (inputs + outputs) of every linear layer that it changes; DoRA: one more per output."""
    heads, keys = (shape[name] * shape["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    h, mlp = shape["hidden_size"], shape["intermediate_size"]
    sides = {"q_proj": (h, heads), "k_proj": (h, keys), "v_proj": (h, keys), "o_proj": (heads, h)}
    sides |= {"gate_proj": (h, mlp), "up_proj": (h, mlp), "down_proj": (mlp, h)}
    chosen = [sides[name] for name in (sides if lora.targets == "all" else lora.targets)]
    a_layer = sum(lora.rank * (inputs + outputs) + lora.dora * outputs for inputs, outputs in chosen)
    return shape["num_hidden_layers"] * a_layer


# Texts ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """One training: model, settings, teacher, and the texts of its steps.

    steps: None where the number of rows is not known. lengths: tokens of (queries, documents) of some steps.
    teacher: (all, non-embedding) parameters; teacher_shape: None where these come from its name. num_different: texts
    of the whole training, each counted once.
    """

    name: str
    shape: dict[str, int]
    training: Training
    steps: int | None
    lengths: list[tuple[list[int], list[int]]]
    teacher: tuple[int, int] = (0, 0)
    teacher_shape: dict[str, int] | None = None
    num_different: float = inf
    counted: bool = False

    @property
    def stage(self) -> str:
        return self.name.partition(" ")[0]

    def texts(self) -> float:
        """Of a step, in the mean."""
        return sum(len(queries) + len(documents) for queries, documents in self.lengths) / len(self.lengths)

    def tokens(self) -> float:
        """Of a step, in the mean."""
        return sum(sum(queries) + sum(documents) for queries, documents in self.lengths) / len(self.lengths)

    def queries(self) -> float:
        """Of a step, in the mean: fewer than a global batch where a source ends."""
        return sum(len(queries) for queries, _ in self.lengths) / len(self.lengths)


def trained_parameters(work: Work) -> int:
    """Those that have gradients: all, or those of the adapter alone."""
    return adapter_parameters(work.shape, work.training.lora) or num_parameters(**work.shape)[0]


def trainings(config: Config, registry: list[Source]) -> list[Work]:
    """All trainings of a configuration: rows of the registry, lengths of the papers; no data is read."""
    stage1_rows, stage2_rows, _ = rows_of(config, registry)
    main, main_shape = num_parameters(**shape_of(config)), shape_of(config)
    teacher = (teacher_parameters(config.teacher, main[0]), teacher_parameters(config.teacher, main[1]))
    found = [
        _assumed("stage1", main_shape, config.stage1, stage1_rows, (0, 0)),
        _assumed("stage2", main_shape, config.stage2, stage2_rows, teacher),
    ]
    students = config.prune.students
    for name in students:
        student = _assumed(f"distill {name}", shape_of(config, name), config.distill[name], stage2_rows, main)
        found.append(replace(student, teacher_shape=main_shape if student.teacher[0] else None))
    return found


def _assumed(name: str, shape: dict, training: Training, rows: float, teacher: tuple[int, int]) -> Work:
    """[assumed] every task draws as many negatives as retrieval, and every text has the mean length of its kind."""
    size, negatives = training.global_batch_size, training.hard_negatives.retrieval
    query, passage = (min(tokens, training.max_tokens) for tokens in (QUERY_TOKENS, PASSAGE_TOKENS))
    lengths = [query] * size, [passage] * size * (1 + negatives)
    steps = ceil(rows / size) * training.epochs
    steps = min(steps, training.max_steps or steps) if rows or not training.epochs else None
    teacher = teacher if training.distillation_weight else (0, 0)
    different = rows * (1 + DOCUMENTS_PER_ROW) or inf
    return Work(name, shape, training, steps, [lengths], teacher, num_different=different)


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


# Floating-point operations ----------------------------------------------------------------------


def forward_flops(shape: dict, lengths: list[int]) -> float:
    """Of one forward pass over texts: matrix products and the causal half of attention.

    The last layer computes keys and values of all tokens, but all else for the last token of each text alone.
    """
    linear, of_keys = _weights(shape)
    heads = shape["num_attention_heads"] * shape["head_dim"]
    tokens, texts, squares = sum(lengths), len(lengths), sum(length * length for length in lengths)
    layers, last_only = shape["num_hidden_layers"], shape["architecture"] in ONLY_LAST
    whole = layers - last_only
    products = 2 * (whole * linear * tokens + last_only * (of_keys * tokens + (linear - of_keys) * texts))
    return products + 2 * heads * (whole * squares + last_only * 2 * tokens)


def _weights(shape: dict) -> tuple[int, int]:
    """(numbers in all matrices of a layer, in those of keys and values)."""
    heads, keys = (shape[name] * shape["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    h = shape["hidden_size"]
    return h * (2 * heads + 2 * keys) + 3 * h * shape["intermediate_size"], 2 * h * keys


def forward_flops_of(work: Work, shape: dict | None = None) -> float:
    """Of one forward pass over all texts of a step, in the mean. shape: of another model, as the teacher."""
    found = [forward_flops(shape or work.shape, [*queries, *rest]) for queries, rest in work.lengths]
    return sum(found) / len(found)


def flops(work: Work, machine: Machine, processes: int = 1) -> dict[str, float]:
    """Floating-point operations of a step by part, of all processes together.

    A backward pass costs two forward passes, one where the weights are frozen beside an adapter. Texts of which a
    process keeps no activations go forward twice (gradient caching). The teacher embeds each text once where its
    embeddings are stored; of one whose shape is not known, 2 operations for each parameter and token.
    """
    forward = forward_flops_of(work)
    dims, batch = sum(_dims(work)), work.queries()
    teacher = forward_flops_of(work, work.teacher_shape) if work.teacher_shape else 2 * work.teacher[1] * work.tokens()
    recomputed = {"none": 0, "selective": SELECTIVE, "full": 1}[machine.recompute]
    return {
        "forward and backward": (2 if work.training.lora.rank else 3) * forward,
        "losses": 6 * dims * (work.texts() + batch * batch),
        "second forward": forward * (1 - _kept(work, machine, processes) / (work.tokens() / processes)),
        "recomputing": forward * recomputed,
        "teacher": teacher * share_embedded(work, machine),
    }


def _dims(work: Work) -> list[int]:
    """As f2llm.losses.matryoshka_dims, which would import torch."""
    dim, full = work.training.matryoshka_min_dim, work.shape["hidden_size"]
    dims = {full}
    while dim and dim < full:
        dims.add(dim)
        dim *= 2
    return sorted(dims)


def _kept(work: Work, machine: Machine, processes: int) -> float:
    """Tokens of a process whose activations wait for the backward pass: at least those of one pack."""
    return min(work.tokens() / processes, max(machine.activation_tokens, machine.token_budget))


def share_embedded(work: Work, machine: Machine) -> float:
    """Of all texts of a training those that the teacher embeds: each one once, if its embeddings can be stored."""
    drawn = work.texts() * (work.steps or 0)
    different = min(work.num_different, drawn)
    stored = different * (work.teacher_shape or work.shape)["hidden_size"] * 4 <= machine.teacher_cache_gib * GIB
    return different / drawn if stored and drawn else 1


# Memory -----------------------------------------------------------------------------------------


def is_half(machine: Machine, gpu: Gpu | None) -> bool:
    """Whether matrix products are in bfloat16 or float16."""
    return machine.precision in ("bfloat16", "float16") or (
        machine.precision == "auto" and gpu is not None and sheet_of(gpu).ampere
    )


def memory(work: Work, machine: Machine, gpu: Gpu | None, processes: int = 1) -> dict[str, float]:
    """Bytes by part that one process holds in the step of most tokens; their sum is the peak.

    gpu None: the CPU, beyond Python itself.

    Gradients grow while activations are given back, so a part of the two is never there at the same time. working:
    gradients of one layer's activations, with these if they are recomputed; or those of the embedding table until they
    are added to earlier packs'. Of a model with an adapter, gradients and optimizer state are the adapter's alone.
    """
    work = replace(work, lengths=[max(work.lengths, key=lambda step: sum(map(sum, step)))])
    total, non_embedding = num_parameters(**work.shape)
    adapter, trained = adapter_parameters(work.shape, work.training.lora), trained_parameters(work)
    shards, half = processes if machine.shard else 1, is_half(machine, gpu)
    tokens = work.tokens() / processes
    kept, budget = _kept(work, machine, processes), min(machine.token_budget, tokens)
    a_token, a_text = activation_bytes(work.shape, machine.recompute, half)
    a_token += a_text * work.texts() / work.tokens()
    activations, gradients = kept * a_token, 4 * trained / shards
    to_come = max(kept - budget, budget if kept < tokens else 0) * a_token  # once all gradients are there
    copies = 0  # of weights: autocast makes them for every pack; of sharded ones whole layers are gathered
    if shards > 1:
        copies = (2 if half else 4) * (2 * _weights(work.shape)[0] + total - non_embedding)
    elif half:
        copies = 2 * non_embedding * (ceil(kept / machine.token_budget) if machine.recompute == "none" else 1)
    of_layer = budget * layer_bytes(work.shape, half) * (1 if machine.recompute == "none" else 2)
    working = of_layer if adapter else max(of_layer, 4 * (total - non_embedding))
    return {
        "weights": 4 * (total + adapter) / shards,
        "gradients": gradients,
        "optimizer": 8 * trained / shards,
        "copies of weights": copies,
        "activations": activations,
        "working": working,
        "holes": HOLES * (activations + working),
        "losses": _bytes_of_losses(work),
        "teacher": (2 if gpu and sheet_of(gpu).ampere else 4) * work.teacher[0],
        "program": PROGRAM_GIB["gpu" if gpu else "cpu"] * GIB,
        "not at once": -min(gradients, activations - to_come),
    }


def _bytes_of_losses(work: Work) -> float:
    """Embeddings and their gradients, float32, and what every matryoshka prefix saves: similarities, unit vectors."""
    dims, batch = _dims(work), work.queries()
    embeddings = 16 * work.texts() * work.shape["hidden_size"]
    return embeddings + 8 * batch * batch * len(dims) + 16 * work.texts() * sum(dims)


def layer_bytes(shape: dict, half: bool) -> int:
    """What a layer saves of a token, see `activation_bytes`."""
    heads, keys = (shape[name] * shape["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    of_hidden, of_mlp, of_head = (26, 8, 10) if half else (24, 16, 16)
    return of_hidden * shape["hidden_size"] + of_mlp * shape["intermediate_size"] + of_head * (heads + keys)


def activation_bytes(shape: dict, recompute: str, half: bool = True) -> tuple[int, int]:
    """(bytes of a token's activations that are kept until the backward pass, more of a text's last token).

    What the operators of Qwen3 save. The residual stream is float32. Bytes per layer and unit of width, in half
    precision: hidden 26 (two norms save input and normalised input, 4 + 4 each; q, k, v, gate and up save their input,
    2 each), MLP 8 (silu, product, down_proj), query and key-value heads 10 (a norm 4 + 2, attention 2 each of q, k, v,
    output). In float32: 24 (q, k and v save one input together, gate and up another), 16 and 16.
    recompute: full keeps every layer's input; selective also keeps the results of matrix products and attention. The
    last layer computes only keys and values of all tokens. All layers share sines and cosines of positions.
    """
    h, mlp = shape["hidden_size"], shape["intermediate_size"]
    heads, keys = (shape[name] * shape["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    layer = layer_bytes(shape, half)
    last = 12 * h + (10 if half else 16) * keys if shape["architecture"] in ONLY_LAST else layer
    whole = shape["num_hidden_layers"] - 1
    shared = 8 * shape["head_dim"] + 8  # and the token's id
    if recompute == "none":
        return layer * whole + last + shared, layer - last
    wide = 4 if half else 8
    products = wide * (h + mlp + heads + keys) if recompute == "selective" else 0
    return (4 * h + products) * (whole + 1) + shared, 0


# Time and disk ----------------------------------------------------------------------------------


def seconds_on(work: Work, machine: Machine, gpu: Gpu, processes: int, nodes: int = 1) -> float:
    """Of a step: operations at a share of the GPU's peak, then messages, as if nothing were done meanwhile."""
    sheet = sheet_of(gpu)
    peak = sheet.half if is_half(machine, gpu) and (sheet.ampere or machine.precision == "float16") else sheet.float32
    speed = peak * 1e12 * (COMPILED if machine.compile else NOT_COMPILED)
    link = BETWEEN_MACHINES if nodes > 1 else sheet.link
    computing = sum(flops(work, machine, processes).values()) / processes / speed
    return computing + message_bytes(work, machine, processes) / (link * 1e9)


def message_bytes(work: Work, machine: Machine, processes: int) -> float:
    """That a process sends in a step: gradients once; sharded, weights for every pass and gradients for every pack."""
    if processes == 1:
        return 0
    total, others = num_parameters(**work.shape)[0], (processes - 1) / processes
    if not machine.shard:
        return 2 * others * 4 * total
    tokens = work.tokens() / processes
    packs = ceil(tokens / machine.token_budget)
    again = packs * (1 - _kept(work, machine, processes) / tokens)
    return others * total * (2 * (2 * packs + again) + 4 * packs)


def disk_bytes(config: Config, registry: list[Source]) -> float:
    """Of data, tuples, token ids, models, checkpoints, and DVC's copies of all outputs."""
    stage1_rows, stage2_rows, mirror_rows = rows_of(config, registry)
    total = num_parameters(**shape_of(config))[0]
    students = [num_parameters(**shape_of(config, name))[0] for name in config.prune.students]
    # Models: stages 1 and 2, pruned and distilled in float32; backbone and teacher in bfloat16, in the mirror as well.
    made, brought = 8 * (total + sum(students)), 2 * (total + teacher_parameters(config.teacher, total))
    documents = (1 + DOCUMENTS_PER_ROW) * (stage1_rows + stage2_rows)
    texts = 4 * PASSAGE_TOKENS * documents  # [assumed] 4 bytes of text per token; its id in scratch/ also has 4
    twice = 2 * (made + brought + texts)
    return twice + brought + texts + ROW_BYTES * mirror_rows + CHECKPOINT_BYTES_PER_PARAMETER * total
