"""params.yaml -> one checked configuration of one size. Nothing has a default here.

`resolve` merges recipe <- size <- what the size says under the recipe <- override, puts the values into the dataclasses
below, which check them, and then checks what two sections must agree on. The stage `config` writes the result to
build/config.yaml, whose sections are the other stages' parameters.
"""

import re
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Annotated, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    Field,
    NonNegativeInt,
    PositiveInt,
    TypeAdapter,
    model_validator,
)

from .store.checked import build, checked, closest, matches, must_be, require
from .store.model_folder import ARCHITECTURES, LINEAR, OF_LLAMA
from .store.packages import BACKBONES
from .store.params import TRAINING_STAGES as TRAINING_STAGES
from .store.params import overrides_of as overrides_of
from .store.params import read_yaml, values_of

Task = Literal["retrieval", "clustering", "classification"]
TASKS = get_args(Task)
CUT = ("hidden_size", "intermediate_size", "num_hidden_layers")  # of a shape, what pruning makes smaller
SHAPE = ("vocab_size", *CUT, "num_attention_heads", "num_key_value_heads", "head_dim")  # in transformers' words
Commit = Annotated[str, must_be("a commit of the hub: 40 hexadecimal digits", matches("[0-9a-f]{40}"))]


def _finite(value: float) -> float:
    require(value < inf, "a finite number")
    return value


PositiveFloat = Annotated[float, Field(gt=0), AfterValidator(_finite)]
NonNegativeFloat = Annotated[float, Field(ge=0), AfterValidator(_finite)]
Beta = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, must_be("a share from 0 to 1", lambda value: 0 <= value <= 1)]
NamedModel = Annotated[
    str,
    must_be(
        "none, hub:<repository>@<commit of the hub, 40 digits>, experiment:<name> or folder:<path>, "
        "as in folder:models/larger",
        matches("none|hub:[^@]+@[0-9a-f]{40}|(experiment|folder):.+"),
    ),
]
Miner = Annotated[
    str,
    must_be(
        "tfidf, embedder:<folder> or sentence-transformers:<folder or name>, as in embedder:models/stage1",
        matches("tfidf|(embedder|sentence-transformers):.+"),
    ),
]


Targets = Annotated[
    str | list[str],
    must_be(
        f"all, or a list of these linear layers: {', '.join(LINEAR)}",
        lambda value: value == "all" or (isinstance(value, list) and value and set(value) <= set(LINEAR)),
    ),
]
Benchmark = Annotated[
    str | list[str],
    must_be(
        "embedded, a benchmark or task of mteb, or a list of these, as in 'MTEB(eng, v2)'",
        lambda value: value and all(value),
    ),
]


@checked
class Machine:
    preset: str  # of `machines`, whose values it has taken; none: of no preset
    threads: NonNegativeInt
    processes: NonNegativeInt
    token_budget: PositiveInt
    activation_tokens: PositiveInt
    precision: Literal["auto", "float32", "bfloat16", "float16"]
    compile: bool
    recompute: Literal["none", "selective", "full"]
    shard: bool
    save_every: PositiveInt
    teacher_cache_gib: NonNegativeFloat
    check_needs: bool
    tensorboard: bool

    @model_validator(mode="after")
    def _agrees(self):
        """Settings for one kind of machine do not ask for another's; by hand, processes are the launcher's affair."""
        require(
            self.preset == "none" or not self.shard or self.processes != 1,
            f"preset is {self.preset!r} and shard is true, but processes is 1, which has nobody to share with; "
            "remedy: processes 0 (one per GPU), shard false, or another preset",
        )
        return self


@checked
class Backbone:
    source: Annotated[Literal["embedded", "hub", "package"], Field(alias="from")]
    architecture: Literal[ARCHITECTURES]  # model_type of transformers
    name: str | None  # of the hub's repository, or of the package
    revision: Commit | None  # None: of the day of the fetch, which the mirror records
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: Annotated[int, must_be("an even number above 0 (rotary embeddings)", lambda n: n > 0 and n % 2 == 0)]
    # Of a backbone that is made here, else null:
    initializer_range: PositiveFloat | None
    token_table: (
        Literal["statistics", "random"] | None
    )  # input embeddings: what tokens meet in training pairs, or noise
    prompt_tokens: bool | None  # each prompt before queries is one token

    @model_validator(mode="after")
    def _agrees(self):
        """One that is made here is a Qwen3 and says how, one of the hub or of a package has a name."""
        of_source = {"embedded": ("initializer_range", "token_table", "prompt_tokens"), "hub": ("name",)}
        of_source["package"] = ("name",)
        for key in of_source[self.source]:
            missing = f"{key} is null, but backbone.from {self.source} needs it; remedy: name one"
            require(getattr(self, key) is not None, missing)
        require(
            self.source != "package" or self.name in BACKBONES,
            f"name is {self.name!r}, but the packages that hold a backbone are: {', '.join(BACKBONES)}",
        )
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads is {self.num_attention_heads}, but must be a multiple of num_key_value_heads, "
            f"{self.num_key_value_heads} (grouped-query attention)",
        )
        require(
            self.source != "embedded" or self.architecture == "qwen3",
            f"architecture is {self.architecture!r}, but backbone.from embedded makes a qwen3",
        )
        require(
            self.source != "embedded" or self.vocab_size >= 300,
            f"vocab_size is {self.vocab_size}, but a byte-level tokenizer needs at least 300",
        )
        require(
            self.token_table != "statistics" or self.hidden_size < self.vocab_size,
            f"hidden_size is {self.hidden_size}, but token_table statistics has fewer columns than tokens, "
            f"{self.vocab_size}; remedy: a smaller hidden_size, or token_table random",
        )
        return self


@checked
class Data:
    source: Annotated[Literal["embedded", "released", "sources", "local"], Field(alias="from")]
    mirror: str
    released: str
    revision: Commit | None  # of `released`; None: of the day of the fetch, which the mirror records
    cap_per_source: NonNegativeInt
    negatives: PositiveInt
    deduplicate: Literal["none", "exact", "normalised"]
    decontaminate: Literal["none", "exact", "ngram"]
    licences: Literal["all", "known", "commercial"]
    only: list[str]
    leave_out: list[str]
    held_out_percent: Annotated[int, must_be("from 1 to 50", lambda n: 1 <= n <= 50)]  # for evaluation
    split: str


@checked
class Mine:
    miner: Miner
    anchor: Literal["query", "passage"]
    instructions: bool
    max_tokens: PositiveInt
    range_max: PositiveInt
    range_min: NonNegativeInt
    range_min_after: Literal["ranking", "limits"]
    max_score: Annotated[float, must_be("a share above 0, at most 1", lambda value: 0 < value <= 1)]
    relative_margin: Share
    num_negatives: PositiveInt
    drop_short: bool

    @model_validator(mode="after")
    def _agrees(self):
        require(
            self.range_min + self.num_negatives <= self.range_max,
            f"num_negatives is {self.num_negatives}, but only {self.range_max - self.range_min} candidates remain "
            f"of mine.range_max {self.range_max} after mine.range_min {self.range_min}",
        )
        return self


@checked
class HardNegatives:
    retrieval: NonNegativeInt
    clustering: NonNegativeInt
    classification: NonNegativeInt


@checked
class Average:
    """The weights after the last step and after every `every`-th before it, `last` in all, are averaged; 0: none."""

    last: NonNegativeInt
    every: PositiveInt


@checked
class Lora:
    """An adapter that is trained instead of all weights, see `f2llm.lora`; rank 0: none."""

    rank: NonNegativeInt
    alpha: PositiveFloat
    dora: bool
    targets: Targets

    @model_validator(mode="after")
    def _agrees(self):
        require(self.rank > 0 or not self.dora, "dora is true, but rank is 0: no adapter; remedy: a rank above 0")
        return self


@checked
class Training:
    learning_rate: PositiveFloat
    min_learning_rate: NonNegativeFloat
    warmup_steps: NonNegativeInt
    epochs: NonNegativeInt
    max_steps: NonNegativeInt
    global_batch_size: Annotated[int, must_be("2 or more (in-batch loss)", lambda n: n >= 2)]
    cap_per_source: NonNegativeInt
    instructions: bool
    document_instruction_share: Share
    temperature: PositiveFloat
    in_batch_tasks: list[Task]
    in_batch_gradient: Literal["full", "query_only"]
    mask_duplicates: bool
    matryoshka_min_dim: NonNegativeInt
    hard_negatives: HardNegatives
    distillation_weight: NonNegativeFloat
    distillation_normalised: bool
    weight_decay: NonNegativeFloat
    decay_norms: bool
    betas: Annotated[list[Beta], must_be("two numbers above 0 and below 1", lambda pair: len(pair) == 2)]
    max_grad_norm: PositiveFloat
    average: Average
    max_tokens: Annotated[int, must_be("2 or more (one token and EOS)", lambda n: n >= 2)]
    validate_every: NonNegativeInt
    validation_rows: NonNegativeInt
    lora: Lora

    @model_validator(mode="after")
    def _agrees(self):
        require(
            self.min_learning_rate <= self.learning_rate,
            f"min_learning_rate is {self.min_learning_rate}, but must not exceed learning_rate, {self.learning_rate}",
        )
        require(
            self.validate_every == 0 or self.validation_rows > 0,
            f"validate_every is {self.validate_every}, but validation_rows is 0; remedy: both or none",
        )
        for task in TASKS:
            require(
                getattr(self.hard_negatives, task) > 0 or self.distillation_weight > 0 or task in self.in_batch_tasks,
                f"hard_negatives.{task} is 0, but without them {task} has no loss at all; "
                f"remedy: 1 or more, or name {task} in in_batch_tasks",
            )
        return self


@checked
class Shape:
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt


@checked
class Prune:
    """Which channels and layers go, and how the rest is put together; `f2llm.prune` says what each choice means."""

    calibration_set: Literal["documents", "queries"]
    calibration_texts: PositiveInt
    activations: Literal["normed", "residual"]  # where hidden channels are measured
    norm: Literal["l1", "l2", "max"]  # of a channel's activations over all tokens
    channels: Literal["importance", "first", "random"]
    order: Literal["original", "importance"]
    rescale: Literal["none", "masked", "calibrated"]  # the weights of RMS norms
    layers: Literal["first", "change", "last"]
    weights: Literal["pruned", "random"]
    leave_out: list[str]
    students: dict[str, Shape]


@checked
class Evaluate:
    benchmark: Benchmark
    dims: list[PositiveInt]
    precisions: list[Literal["int8", "binary"]]
    only: list[str]


def _has_epochs(training: Training) -> Training:
    require(training.epochs > 0, "epochs is 0, but must be above 0")
    return training


@checked
class Config:
    name: str  # the size; not called `size`: DVC leaves keys of that name out of its run cache
    recipe: str
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    machine: Machine
    start_from: NamedModel  # a finished embedder, instead of the backbone and stage 1
    backbone: Backbone
    data: Data
    mine: Mine
    stage1: Training
    teacher: NamedModel  # of stage 2
    stage2: Training
    prune: Prune
    distill: dict[str, Annotated[Training, AfterValidator(_has_epochs)]]  # by student
    evaluate: Evaluate

    def training(self, stage: str, student: str | None = None) -> Training:
        """The training section of stage1 or stage2, or of one student's distillation."""
        return self.distill[student] if stage == "distill" else getattr(self, stage)


def root(start: Path | None = None) -> Path:
    """The repository: the nearest folder upwards with a dvc.yaml, also inside a temporary experiment."""
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / "dvc.yaml").exists():
            return folder
    raise ValueError(f"no dvc.yaml in {here} or above; remedy: run this inside a clone of the repository")


def load_config(size: str | None = None, **overrides) -> Config:
    """The configuration of params.yaml, the same in JupyterLab, papermill, DVC and Colab.

    size None: model.size of params.yaml. overrides: sections, as in stage1={"max_steps": 10}.
    """
    return resolve(read_yaml(root() / "params.yaml"), size, overrides)


def resolve(params: dict, size: str | None = None, overrides: dict | None = None) -> Config:
    """The checked configuration of one size. Errors are ValueErrors that name key, value, rule and remedy."""
    values = values_of(params, size, overrides or {})
    config = _without_left_out(build(Config, values, "params.yaml"))
    config = config if config.start_from == "none" else _adapting(config)
    _check_sections(config)
    return config


def _adapting(config: Config) -> Config:
    """A configuration whose stage 2 alone trains: a finished embedder of the size's shape, without students.

    A pruned size has the shape of the student that it is named after, and is scored at dimensions below its own.
    """
    student, evaluate = config.prune.students.get(config.name), config.evaluate
    if student:
        cut = {key: getattr(student, key) for key in CUT}
        dims = [dim for dim in evaluate.dims if dim <= student.hidden_size]
        config = replace(config, backbone=replace(config.backbone, **cut), evaluate=replace(evaluate, dims=dims))
    return replace(
        config,
        stage1=replace(config.stage1, epochs=0),
        prune=replace(config.prune, students={}, leave_out=[]),
        distill={},
    )


def _without_left_out(config: Config) -> Config:
    """A configuration without the students of prune.leave_out."""
    students, left_out = config.prune.students, config.prune.leave_out
    for name in left_out:
        if name not in students:
            names = ", ".join(students) or "none"
            raise ValueError(f"prune.leave_out has {name!r}, but the students are: {names}{closest(name, students)}")
    shapes = {name: shape for name, shape in students.items() if name not in left_out}
    distill = {name: config.distill[name] for name in shapes}
    return replace(config, prune=replace(config.prune, students=shapes), distill=distill)


def names_of_models(config: Config) -> list[str]:
    """The names of the models that are evaluated, in the order of the tables."""
    students = [f"{name}-{step}" for name in config.prune.students for step in ("pruned", "distilled")]
    return ["tfidf", "untrained", "backbone", "stage1", "stage2", *students]


def config_yaml(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(TypeAdapter(Config).dump_python(config, by_alias=True), sort_keys=False)


def write_config(config: Config, path: Path) -> None:
    """The resolved configuration as a params file for DVC."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(config_yaml(config))


def _check_sections(config: Config) -> None:
    """What values of several sections must agree on."""
    backbone, stage2, cap = config.backbone, config.stage2, config.data.cap_per_source
    require(
        not config.prune.students or backbone.architecture in OF_LLAMA,
        f"prune.students has {', '.join(config.prune.students)}, but the layers of {backbone.architecture} cannot be "
        f"pruned, only those of {', '.join(OF_LLAMA)}; remedy: prune.leave_out with all of them",
    )
    for name, shape in config.prune.students.items():
        require(
            re.fullmatch(r"\w[\w.-]*", name) is not None,
            f"prune.students has {name!r}, but a name is a folder's: letters, digits, dots and hyphens",
        )
        for key, most in ((key, getattr(backbone, key)) for key in CUT):
            where = f"prune.students.{name}.{key}"
            cut = getattr(shape, key)
            require(cut <= most, f"{where} is {cut}, but pruning only removes: at most the backbone's {most}")
        heads = backbone.num_attention_heads
        require(
            backbone.architecture != "llama" or shape.hidden_size % heads == 0,
            f"prune.students.{name}.hidden_size is {shape.hidden_size}, but transformers wants a llama's to be a "
            f"multiple of num_attention_heads, {heads}; remedy: {shape.hidden_size // heads * heads}",
        )
    for name in config.evaluate.only:
        names = names_of_models(config)
        require(
            name in names,
            f"evaluate.only has {name!r}, but the models are: {', '.join(names)}{closest(name, names)}; "
            "remedy: names of these, or [] for all",
        )
    for dim in config.evaluate.dims:
        most = backbone.hidden_size
        require(dim <= most, f"evaluate.dims has {dim}, but the embedding has only {most} dimensions")
    require(
        cap == 0 or cap >= stage2.cap_per_source > 0,
        f"data.cap_per_source is {cap}, but stage2.cap_per_source asks for {stage2.cap_per_source or 'all rows'}; "
        "remedy: keep at least as many, 0 keeps all",
    )
    require(
        (config.teacher == "none") == (stage2.distillation_weight == 0),
        f"teacher is {config.teacher!r}, but stage2.distillation_weight is {stage2.distillation_weight}; "
        "remedy: name a teacher and a weight above 0, or none and 0",
    )
    for section, training in (("stage1", config.stage1), ("stage2", stage2)):
        _check_training(training, section, backbone.hidden_size, config)
    for name, training in config.distill.items():
        _check_training(training, f"distill.{name}", config.prune.students[name].hidden_size, config)


def _check_training(training: Training, section: str, dim: int, config: Config) -> None:
    """What a training, whose model has embeddings of `dim` numbers, asks of machine, mine and data."""
    require(
        training.max_tokens <= config.machine.token_budget,
        f"machine.token_budget is {config.machine.token_budget}, but one text may have {training.max_tokens} tokens "
        f"({section}.max_tokens); remedy: a budget of at least that",
    )
    limits = {"retrieval": config.mine.num_negatives, "clustering": config.data.negatives, "classification": 1}
    for task, limit in limits.items():
        drawn = getattr(training.hard_negatives, task)
        require(drawn <= limit, f"{section}.hard_negatives.{task} is {drawn}, but only {limit} are kept per query")
    require(
        not (training.lora.dora and config.machine.compile),
        f"machine.compile is true, but {section}.lora.dora is too, whose layers torch.compile compiles for every shape "
        "anew and then gives up; remedy: compile: false, or dora: false",
    )
    require(
        training.matryoshka_min_dim <= dim,
        f"{section}.matryoshka_min_dim is {training.matryoshka_min_dim}, but the embedding has only {dim} dimensions",
    )
