"""params.yaml -> one checked configuration of one size. Nothing has a default here.

`resolve` merges recipes[recipe] <- sizes[base] <- sizes[size] <- what they say of this recipe <- override and checks
every value; the `config` stage writes the result to build/config.yaml, whose sections are the other stages' parameters.
"""

import difflib
import re
import types
import typing
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Machine:
    threads: int
    processes: int
    token_budget: int
    activation_tokens: int
    compile: bool
    recompute: str  # none, selective, full
    shard: bool
    save_every: int
    teacher_cache_gib: float
    check_needs: bool
    tensorboard: bool


@dataclass(frozen=True)
class Pretrain:
    steps: int
    tokens_per_step: int
    learning_rate: float
    warmup_steps: int
    max_tokens: int  # of one text


@dataclass(frozen=True)
class Backbone:
    source: str  # `from` in params.yaml: embedded, hub
    name: str | None  # of the hub's repository
    revision: str | None  # a commit of it
    vocab: int
    hidden_dim: int
    mlp_dim: int
    layers: int
    query_heads: int
    key_value_heads: int
    head_dim: int
    init_range: float | None  # of a backbone that is made here
    pretrain: Pretrain | None


@dataclass(frozen=True)
class Data:
    source: str  # `from` in params.yaml: embedded, released, sources, local
    mirror: str
    released: str
    revision: str | None  # of `released`; None: of the day of the fetch, which the mirror records
    cap_per_source: int
    negatives: int
    deduplicate: str  # none, exact, normalised
    decontaminate: str  # none, exact, ngram
    licences: str  # all, known, commercial
    only: list[str]
    leave_out: list[str]
    held_out_percent: int  # of messages and modules, for evaluation
    split: str


@dataclass(frozen=True)
class Mine:
    miner: str  # tfidf, embedder:<folder> or sentence-transformers:<folder or name>
    anchor: str
    instructions: bool
    max_tokens: int
    range_max: int
    skip: int
    skip_after: str  # ranking, limits
    max_score: float
    relative_margin: float
    keep: int
    drop_short: bool


@dataclass(frozen=True)
class HardNegatives:
    retrieval: int
    clustering: int
    classification: int


@dataclass(frozen=True)
class Training:
    learning_rate: float
    min_learning_rate: float
    warmup_steps: int
    epochs: int
    max_steps: int
    global_batch_size: int
    cap_per_source: int
    instructions: bool
    document_instruction_share: float
    temperature: float
    in_batch_tasks: list[str]
    in_batch_gradient: str  # full, query_only
    mask_duplicates: bool
    matryoshka_min_dim: int
    hard_negatives: HardNegatives
    distillation_weight: float
    distillation_normalised: bool
    weight_decay: float
    decay_norms: bool
    betas: list[float]
    max_grad_norm: float
    max_tokens: int
    validate_every: int
    validation_rows: int


@dataclass(frozen=True)
class Shape:
    hidden_dim: int
    mlp_dim: int
    layers: int


@dataclass(frozen=True)
class Prune:
    """Which channels and layers go, and how the rest is put together; `f2llm.prune` says what each choice means."""

    calibration_set: str  # documents, queries
    calibration_texts: int
    activations: str  # normed, residual: where hidden channels are measured
    norm: str  # l1, l2, max: of a channel's activations over all tokens
    channels: str  # importance, first, random
    order: str  # original, importance
    rescale: str  # none, masked, calibrated: the weights of RMS norms
    layers: str  # first, change, last
    weights: str  # pruned, random
    leave_out: list[str]
    students: dict[str, Shape]


@dataclass(frozen=True)
class Evaluate:
    benchmark: str
    dims: list[int]
    only: list[str]


@dataclass(frozen=True)
class Config:
    name: str  # the size; not called `size`: DVC leaves keys of that name out of its run cache
    recipe: str
    seed: int
    machine: Machine
    backbone: Backbone
    data: Data
    mine: Mine
    stage1: Training
    teacher: str  # of stage 2: none, hub:<repository>@<commit>, experiment:<name> or folder:<path>
    stage2: Training
    prune: Prune
    distill: dict[str, Training]  # by student
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
    path = root() / "params.yaml"
    params = read_yaml(path)
    config = resolve(params, size, overrides)
    return config


def resolve(params: dict, size: str | None = None, overrides: dict | None = None) -> Config:
    """The checked configuration of one size. Errors are ValueErrors that name key, value, rule and remedy."""
    known = {"model", "recipe", "seed", "machine", "override", "recipes", "sizes"}
    _check_keys(params, required=known, where="params.yaml")
    if not isinstance(params["model"], dict) or set(params["model"]) != {"size"}:
        raise ValueError(f"params.yaml: model is {params['model']!r}, but must be a table with the one key size")
    size = str(params["model"]["size"] if size is None else size)
    for table in ("recipes", "sizes"):
        _check_table(params[table], table)
    recipe = _one_of(params["recipe"], params["recipes"], "recipe")
    _check_table(params["recipes"][recipe], f"recipes.{recipe}")
    values = _merge(params["recipes"][recipe], preset_of(params, size, recipe))
    _one_of(size, values.pop("sizes", params["sizes"]), f"model.size under recipe {recipe}")
    wanted = {}
    for extra in (params["override"], overrides or {}):
        _check_table(extra, "override")
        wanted = _merge(wanted, extra)
    if alien := {"name", "recipe"} & set(wanted):  # they decide which presets are read
        raise ValueError(f"override has {min(alien)}, which chooses presets; remedy: model.size and recipe")
    of_all_students = wanted.pop("distill", {})
    _check_table(of_all_students, "override.distill")
    values = _merge(values, wanted)
    values["distill"] = {name: _merge(own, of_all_students) for name, own in _by_student(values).items()}
    left_out = _left_out(values["prune"])
    for table in (values["prune"].get("students", {}), values["distill"]):
        for name in left_out:
            table.pop(name, None)
    own = {"name": size, "recipe": recipe, "seed": params["seed"], "machine": params["machine"]}
    config = _build(Config, own | values, where="")
    _check_values(config)
    return config


def preset_of(params: dict, size: str, recipe: str) -> dict:
    """What params.yaml says of a size under a recipe: its base's values, its own, then those of its key `recipe`."""
    preset = params["sizes"][_one_of(size, params["sizes"], "model.size")]
    _check_table(preset, f"sizes.{size}")
    if base := preset.get("base"):
        preset = _merge(params["sizes"][_one_of(base, params["sizes"], f"sizes.{size}.base")], preset)
    special = {"base", *params["recipes"]}
    _check_table(preset.get(recipe, {}), f"sizes.{size}.{recipe}")
    return _merge({key: value for key, value in preset.items() if key not in special}, preset.get(recipe, {}))


def _by_student(values: dict) -> dict[str, dict]:
    """The section distill of every student: what all have in common, then its own; moves the latter out of prune."""
    _check_table(values.get("prune", {}), "prune")
    values["prune"] = dict(values.get("prune", {}))
    _check_table(values["prune"].get("students", {}), "prune.students")
    for name, shape in values["prune"].get("students", {}).items():
        _check_table(shape, f"prune.students.{name}")
        _check_table(shape.get("distill", {}), f"prune.students.{name}.distill")
    students = {name: dict(shape) for name, shape in values["prune"].get("students", {}).items()}
    values["prune"]["students"] = students
    return {name: _merge(values["distill"], shape.pop("distill", {})) for name, shape in students.items()}


def _left_out(prune: dict) -> list[str]:
    """Students that are not wanted, each a student of the size."""
    if not isinstance(names := prune.get("leave_out", []), list):
        raise ValueError(f"prune.leave_out is {names!r}, but must be a list of str")
    for name in names:
        if name not in prune["students"]:
            known = ", ".join(prune["students"]) or "none"
            raise ValueError(
                f"prune.leave_out has {name!r}, but the students are: {known}{_closest(name, prune['students'])}"
            )
    return names


def overrides_of(settings: list[str]) -> dict:
    """{'data': {'from': 'released'}} of ['data.from=released']: values as YAML, for `load_config`."""
    tables = {}
    for setting in settings:
        path, equals, value = setting.partition("=")
        *sections, key = path.split(".")
        if not (all(sections) and key and equals):
            raise ValueError(f"--set {setting!r} is not of the form section.key=value, as in data.from=released")
        try:
            table = {key: yaml.load(value, _Loader)}
        except yaml.YAMLError as error:
            raise ValueError(f"--set {setting!r}: the value is not valid YAML: {error}") from None
        for section in reversed(sections):
            table = {section: table}
        tables = _merge(tables, table)
    return tables


def write_config(config: Config, path: Path) -> None:
    """The resolved configuration as a params file for DVC."""
    values = asdict(config)
    for section in ("backbone", "data"):
        values[section] = {"from" if key == "source" else key: value for key, value in values[section].items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False))


# Reading ----------------------------------------------------------------------------------------


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # the one in C reads the registry in a tenth of a second
    """YAML 1.2 numbers and booleans: DVC writes 1e-05 after -S x=1e-5, which PyYAML reads as a string."""


_OWN = {"tag:yaml.org,2002:float", "tag:yaml.org,2002:int", "tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp"}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag not in _OWN]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_NUMBER = r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), "tTfF")
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?\d+$"), "-+0123456789")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_NUMBER), "-+.0123456789")


def read_yaml(path: Path) -> dict:
    """A YAML file as DVC reads it (YAML 1.2); a ValueError names the file and the line that is wrong."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; remedy: git checkout -- {Path(path).name}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    _check_table(values, str(path))
    return values


# Checking ---------------------------------------------------------------------------------------


def _merge(low: dict, high: dict) -> dict:
    """`high` over `low`, table by table."""
    merged = dict(low)
    for key, value in high.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _check_table(value, where: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r}, but must be a table of keys and values")


def _one_of(value, known, where: str) -> str:
    if value not in known:
        names = ", ".join(map(str, known))
        raise ValueError(f"{where} is {value!r}, but params.yaml offers only: {names}{_closest(value, known)}")
    return value


def _closest(key, known) -> str:
    near = difflib.get_close_matches(str(key), [str(name) for name in known], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _check_keys(values: dict, required, where: str) -> None:
    for key in values:
        if key not in required:
            names = ", ".join(sorted(required))
            raise ValueError(f"{where}: unknown key {key!r}{_closest(key, required)}; known keys: {names}")
    for key in sorted(required):
        if key not in values:
            raise ValueError(f"{where}: key {key!r} is missing; remedy: add it, nothing has a default")


def _build(kind, values, where: str):
    """A dataclass from a table, every value of the declared type."""
    _check_table(values, where or "the configuration")
    values = {"source" if key == "from" else key: value for key, value in values.items()}
    hints = typing.get_type_hints(kind)
    _check_keys(values, required=hints.keys(), where=where or "params.yaml")
    return kind(**{key: _typed(hints[key], value, f"{where}.{key}".lstrip(".")) for key, value in values.items()})


def _typed(hint, value, where: str):
    if is_dataclass(hint):
        return _build(hint, value, where)
    if isinstance(hint, types.UnionType):  # a type or None
        return None if value is None else _typed(hint.__args__[0], value, where)
    if isinstance(hint, types.GenericAlias) and hint.__origin__ is dict:
        _check_table(value, where)
        return {key: _typed(hint.__args__[1], item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(hint, types.GenericAlias):
        if not isinstance(value, list):
            raise ValueError(f"{where} is {value!r}, but must be a list of {hint.__args__[0].__name__}")
        return [_typed(hint.__args__[0], item, where) for item in value]
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{where} is {value!r} ({type(value).__name__}), but must be of type {hint.__name__}")
    return value


TRAINING_STAGES = ("stage1", "stage2", "distill")
TASKS = ("retrieval", "clustering", "classification")
_CHOICES = {
    "backbone.source": ("embedded", "hub"),
    "data.source": ("embedded", "released", "sources", "local"),
    "data.deduplicate": ("none", "exact", "normalised"),
    "data.decontaminate": ("none", "exact", "ngram"),
    "data.licences": ("all", "known", "commercial"),
    "mine.anchor": ("query", "passage"),
    "mine.skip_after": ("ranking", "limits"),
    "evaluate.benchmark": ("embedded",),
    "machine.recompute": ("none", "selective", "full"),
    "prune.calibration_set": ("documents", "queries"),
    "prune.activations": ("normed", "residual"),
    "prune.norm": ("l1", "l2", "max"),
    "prune.channels": ("importance", "first", "random"),
    "prune.order": ("original", "importance"),
    "prune.rescale": ("none", "masked", "calibrated"),
    "prune.layers": ("first", "change", "last"),
    "prune.weights": ("pruned", "random"),
}
_IN_BATCH_GRADIENTS = ("full", "query_only")
_MAY_BE_ZERO = {
    "seed",
    "machine.threads",
    "machine.processes",
    "machine.teacher_cache_gib",
    "stage1.epochs",
    "validate_every",
    "validation_rows",
    "skip",
    "warmup_steps",
    "max_steps",
    "cap_per_source",
    "weight_decay",
}
_MAY_BE_ZERO |= {"document_instruction_share", "matryoshka_min_dim", "distillation_weight", "relative_margin"}
_MAY_BE_ZERO |= {"retrieval", "clustering", "classification", "min_learning_rate", "steps"}
_SHARES = {"document_instruction_share", "relative_margin", "max_score"}


def _check_values(config: Config) -> None:
    """Ranges first, then values that contradict each other."""
    for where, value in _numbers(config):
        key = where.rpartition(".")[2]
        if value < 0 or (value == 0 and not {key, where} & _MAY_BE_ZERO) or value != value:
            rule = "0 or more" if {key, where} & _MAY_BE_ZERO else "above 0"
            raise ValueError(f"{where} is {value}, but must be {rule}")
        if key in _SHARES and value > 1:
            raise ValueError(f"{where} is {value}, but is a share and must not exceed 1")
    for where, choices in _CHOICES.items():
        section, _, key = where.partition(".")
        value = getattr(getattr(config, section), key)
        if value not in choices:
            shown = where.replace("source", "from")
            raise ValueError(
                f"{shown} is {value!r}, but must be one of: {', '.join(choices)}{_closest(value, choices)}"
            )
    _check_backbone(config.backbone)
    _check_shapes(config)
    _check_data(config.data, config.stage2)
    _check_mining(config.mine)
    _check_teacher(config.teacher, config.stage2)
    for section in ("stage1", "stage2"):
        _check_training(config.training(section), section, config.backbone.hidden_dim, config)
    for name, training in config.distill.items():
        _check_training(training, f"distill.{name}", config.prune.students[name].hidden_dim, config)


def _numbers(value, where: str = ""):
    """(dotted name, number) of every number in a configuration."""
    if is_dataclass(value):
        for field in fields(value):
            yield from _numbers(getattr(value, field.name), f"{where}.{field.name}".lstrip("."))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{where}.{key}")
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, where)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield where, value


_COMMIT = r"[0-9a-f]{40}"


def _check_backbone(backbone: Backbone) -> None:
    """One that is made here needs an init_range and a plan, one of the hub a name and a commit."""
    needed = {"embedded": ("init_range", "pretrain"), "hub": ("name", "revision")}[backbone.source]
    for key in needed:
        if getattr(backbone, key) is None:
            raise ValueError(f"backbone.{key} is null, but backbone.from {backbone.source} needs it; remedy: name one")
    if backbone.source == "hub" and not re.fullmatch(_COMMIT, backbone.revision):
        raise ValueError(
            f"backbone.revision is {backbone.revision!r}, but must be a commit of the hub: 40 hexadecimal digits"
        )


def _check_teacher(teacher: str, stage2: Training) -> None:
    kind, _, what = teacher.partition(":")
    if teacher != "none" and not (kind in ("hub", "experiment", "folder") and what):
        raise ValueError(
            f"teacher is {teacher!r}, but must be none, hub:<repository>@<commit>, experiment:<name> or "
            "folder:<path>, as in folder:models/larger"
        )
    if kind == "hub" and not re.fullmatch(f"[^@]+@{_COMMIT}", what):
        raise ValueError(f"teacher is {teacher!r}, but needs a commit of the hub: hub:<repository>@<40 digits>")
    if (teacher == "none") != (stage2.distillation_weight == 0):
        raise ValueError(
            f"teacher is {teacher!r}, but stage2.distillation_weight is {stage2.distillation_weight}; "
            "remedy: name a teacher and a weight above 0, or none and 0"
        )


def _check_shapes(config: Config) -> None:
    backbone = config.backbone
    if backbone.query_heads % backbone.key_value_heads:
        raise ValueError(
            f"backbone.query_heads is {backbone.query_heads}, but must be a multiple of "
            f"key_value_heads, {backbone.key_value_heads} (grouped-query attention)"
        )
    if backbone.head_dim % 2:
        raise ValueError(f"backbone.head_dim is {backbone.head_dim}, but rotary embeddings need an even number")
    if backbone.source == "embedded" and backbone.vocab < 300:
        raise ValueError(f"backbone.vocab is {backbone.vocab}, but a byte-level tokenizer needs at least 300")
    if not 1 <= config.data.held_out_percent <= 50:
        raise ValueError(f"data.held_out_percent is {config.data.held_out_percent}, but must be from 1 to 50")
    for name, shape in config.prune.students.items():
        for key in ("hidden_dim", "mlp_dim", "layers"):
            if getattr(shape, key) > getattr(backbone, key):
                raise ValueError(
                    f"prune.students.{name}.{key} is {getattr(shape, key)}, but pruning only removes: "
                    f"at most the backbone's {getattr(backbone, key)}"
                )
    for dim in config.evaluate.dims:
        if dim > backbone.hidden_dim:
            raise ValueError(f"evaluate.dims has {dim}, but the embedding has only {backbone.hidden_dim} dimensions")


def _check_data(data: Data, stage2: Training) -> None:
    if data.revision is not None and not re.fullmatch(_COMMIT, data.revision):
        raise ValueError(f"data.revision is {data.revision!r}, but must be a commit of the hub: 40 hexadecimal digits")
    if 0 < data.cap_per_source < (stage2.cap_per_source or float("inf")):
        raise ValueError(
            f"data.cap_per_source is {data.cap_per_source}, but stage2.cap_per_source asks for "
            f"{stage2.cap_per_source or 'all rows'}; remedy: keep at least as many, 0 keeps all"
        )


def _check_mining(mine: Mine) -> None:
    kind, _, model = mine.miner.partition(":")
    if mine.miner != "tfidf" and not (kind in ("embedder", "sentence-transformers") and model):
        raise ValueError(
            f"mine.miner is {mine.miner!r}, but must be tfidf, embedder:<folder> or "
            "sentence-transformers:<folder or name>, as in embedder:models/stage1"
        )
    if mine.skip + mine.keep > mine.range_max:
        raise ValueError(
            f"mine.keep is {mine.keep}, but only {mine.range_max - mine.skip} candidates remain "
            f"of mine.range_max {mine.range_max} after mine.skip {mine.skip}"
        )


def _check_training(training: Training, section: str, dim: int, config: Config) -> None:
    if training.in_batch_gradient not in _IN_BATCH_GRADIENTS:
        raise ValueError(
            f"{section}.in_batch_gradient is {training.in_batch_gradient!r}, but must be one of: "
            f"{', '.join(_IN_BATCH_GRADIENTS)}"
        )
    if training.min_learning_rate > training.learning_rate:
        raise ValueError(
            f"{section}.min_learning_rate is {training.min_learning_rate}, "
            f"but must not exceed learning_rate, {training.learning_rate}"
        )
    if training.global_batch_size < 2:
        raise ValueError(f"{section}.global_batch_size is {training.global_batch_size}, but in-batch loss needs 2")
    if training.validate_every and not training.validation_rows:
        raise ValueError(
            f"{section}.validate_every is {training.validate_every}, but validation_rows is 0; remedy: both or none"
        )
    if training.max_tokens > config.machine.token_budget:
        raise ValueError(
            f"machine.token_budget is {config.machine.token_budget}, but one text may have "
            f"{training.max_tokens} tokens ({section}.max_tokens); remedy: a budget of at least that"
        )
    if len(training.betas) != 2 or not all(beta < 1 for beta in training.betas):
        raise ValueError(f"{section}.betas is {training.betas}, but must be two numbers below 1")
    if unknown := set(training.in_batch_tasks) - set(TASKS):
        raise ValueError(f"{section}.in_batch_tasks has {sorted(unknown)}, but tasks are: {', '.join(TASKS)}")
    for task in TASKS:
        lossless = not getattr(training.hard_negatives, task) and not training.distillation_weight
        if lossless and task not in training.in_batch_tasks:
            raise ValueError(
                f"{section}.hard_negatives.{task} is 0, but without them {task} has no loss at all; "
                f"remedy: 1 or more, or name {task} in {section}.in_batch_tasks"
            )
    limits = {"retrieval": config.mine.keep, "clustering": config.data.negatives, "classification": 1}
    for task, limit in limits.items():
        wanted = getattr(training.hard_negatives, task)
        if wanted > limit:
            raise ValueError(f"{section}.hard_negatives.{task} is {wanted}, but only {limit} are kept per query")
    if training.matryoshka_min_dim > dim:
        raise ValueError(
            f"{section}.matryoshka_min_dim is {training.matryoshka_min_dim}, "
            f"but the embedding has only {dim} dimensions"
        )
    if training.max_tokens < 2:
        raise ValueError(f"{section}.max_tokens is {training.max_tokens}, but one token and EOS are the least: 2")
