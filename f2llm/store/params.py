"""params.yaml -> one table of values for one size: recipe <- size <- what the size says under the recipe <- override.

Every table may have a section `training`, which goes under its sections stage1, stage2 and distill.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import NonNegativeFloat, NonNegativeInt
from yaml.constructor import ConstructorError

from .checked import TABLE, build, checked, closest
from .hardware import gpus_here, preset_for

MOST_DEPTH, MOST_BRACKETS = 20, 10_000  # of tables within tables; PyYAML's C code crashes on many that stay open
TRAINING_STAGES = ("stage1", "stage2", "distill")


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # the one in C reads the registry in a tenth of a second
    """YAML 1.2 as DVC reads it, which writes 1e-05 after -S x=1e-5 (PyYAML: a string) and reads 010 as ten.

    Errors are doubled keys, of which PyYAML takes the last, and merge keys (<<), which DVC writes out as copies.
    """

    def construct_mapping(self, node, deep=False):
        first = {}
        for key, _ in node.value:
            if first.setdefault(str(key.value), key) is not key:
                raise ConstructorError(problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node):
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                problem = "a merge key (<<), which `dvc exp run -S` writes out as copies; remedy: state the values"
                raise ConstructorError(problem=problem, problem_mark=key.start_mark)


_OWN = {"tag:yaml.org,2002:float", "tag:yaml.org,2002:int", "tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp"}
Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag not in _OWN]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_NUMBER = r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), "tTfF")
Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?\d+$"), "-+0123456789")
Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_NUMBER), "-+.0123456789")


def read_yaml(path: Path) -> dict:
    """A YAML file as DVC reads it (YAML 1.2); a ValueError names the file and the line that is wrong."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if text.count("[") + text.count("{") > MOST_BRACKETS:
            raise ValueError(f"{path} opens more than {MOST_BRACKETS} brackets; remedy: a file with the values")
        values = yaml.load(text, Loader)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; remedy: git checkout -- {Path(path).name}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; remedy: a file with the values") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not valid YAML: byte {error.start} is not UTF-8; remedy: save it as such"
        ) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {_yaml_error(error)}") from None
    if _is_deep(values, MOST_DEPTH):
        raise ValueError(f"{path} has tables within tables deeper than {MOST_DEPTH}; remedy: remove some")
    return table_of({str(path): values}, str(path))


def _yaml_error(error: Exception) -> str:
    """An error of PyYAML in one line: what is wrong, in which line."""
    if mark := getattr(error, "problem_mark", None):
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def _is_deep(value: Any, most: int) -> bool:
    """Whether tables and lists stand in each other more than so many times."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return most < 0 or any(_is_deep(item, most - 1) for item in inner)


def overrides_of(settings: list[str]) -> dict:
    """{'data': {'from': 'released'}} of ['data.from=released']: values as YAML, for `load_config`."""
    tables = {}
    for setting in settings:
        path, equals, value = setting.partition("=")
        *sections, key = path.split(".")
        if not (all(sections) and key and equals):
            raise ValueError(f"--set {setting!r} is not of the form section.key=value, as in data.from=released")
        try:
            table = {key: yaml.load(value, Loader)}
        except yaml.YAMLError as error:
            raise ValueError(f"--set {setting!r}: the value is not valid YAML: {_yaml_error(error)}") from None
        for section in reversed(sections):
            table = {section: table}
        tables = merge(tables, table)
    return tables


@checked
class Model:
    size: Any  # also a number, taken as a name


@checked
class Params:
    """params.yaml itself; what is Any here is checked as part of a configuration."""

    model: Model
    recipe: str
    seed: Any
    machine: dict[str, Any]
    machines: dict[str, Any]
    override: dict[str, Any]
    recipes: dict[str, dict[str, Any]]
    sizes: dict[str, dict[str, Any]]


@checked
class Preset:
    """Settings of `machine` for `gpus` GPUs of at least `gib` GiB each."""

    gpus: NonNegativeInt
    gib: NonNegativeFloat
    machine: dict[str, Any]


def values_of(params: dict, size: str | None, overrides: dict) -> dict:
    """The values of a size (None: model.size), not yet checked; a ValueError for a name that params.yaml lacks."""
    choice = build(Params, params, "params.yaml")
    size = str(choice.model.size if size is None else size)
    recipe = _one_of(choice.recipe, params["recipes"], "recipe")
    values = _presets(params, _one_of(size, params["sizes"], "model.size"), recipe)
    _one_of(size, values.pop("sizes", params["sizes"]), f"model.size under recipe {recipe}")
    override = merge(*(_spread(table, "override.") for table in (params["override"], overrides)))
    if alien := {"name", "recipe"} & set(override):  # they decide which presets are read
        raise ValueError(f"override has {min(alien)}, which chooses presets; remedy: model.size and recipe")
    of_all_students = table_of(override, "distill", "override.")
    values = merge(values, {key: value for key, value in override.items() if key != "distill"})
    preset, settings = _preset(params["machines"], merge(params["machine"], table_of(values, "machine")))
    machine = merge(params["machine"], settings, table_of(values, "machine"), preset)
    top = {"name": size, "recipe": recipe, "seed": params["seed"], "machine": {}}
    return merge(top, values) | {"machine": machine} | _by_student(values, of_all_students)


def _preset(machines: dict, machine: dict) -> tuple[dict, dict]:
    """({"preset": its name}, its settings) of the preset that `machine` names: over section machine, under the rest."""
    for name in machines:
        build(Preset, table_of(machines, name, "machines."), f"params.yaml, machines.{name}")
    name = machine.get("preset", "none")
    if name == "auto":
        name = preset_for(gpus_here(), machines)
    if name == "none":
        return {key: name for key in machine if key == "preset"}, {}
    return {"preset": name}, machines[_one_of(name, machines, "machine.preset")]["machine"]


def _presets(params: dict, size: str, recipe: str) -> dict:
    """What a recipe says, over it the size, over both what the size says under the recipe's name."""
    sizes = _with_base(params["sizes"], size, "sizes")
    general = [{key: value for key, value in table.items() if key not in params["recipes"]} for table in sizes]
    under_recipe = [_spread(table_of(table, recipe, f"sizes.{size}."), f"sizes.{size}.{recipe}.") for table in sizes]
    return merge(*_with_base(params["recipes"], recipe, "recipes"), *general, *under_recipe)


def _with_base(presets: dict, name: str, where: str) -> list[dict]:
    """A recipe or size after the one that its key `base` names."""
    preset = {key: value for key, value in presets[name].items() if key != "base"}
    tables = [_spread(preset, f"{where}.{name}.")]
    if (base := presets[name].get("base")) is not None:
        others = {key: value for key, value in presets.items() if key != name}
        tables = _with_base(others, _one_of(base, others, f"{where}.{name}.base"), where) + tables
    return tables


def _spread(table: dict, where: str) -> dict:
    """A table whose section `training` goes under its sections stage1, stage2 and distill."""
    if "training" not in table:
        return table
    common = table_of(table, "training", where)
    stages = {stage: merge(common, table_of(table, stage, where)) for stage in TRAINING_STAGES}
    return {key: value for key, value in table.items() if key != "training"} | stages


def _by_student(values: dict, override: dict) -> dict:
    """prune without the students' own training, and distill by student: the common values, its own, the override's."""
    prune, common = table_of(values, "prune"), table_of(values, "distill")
    shapes, distill = {}, {}
    for name in (students := table_of(prune, "students", "prune.")):
        shape = table_of(students, name, "prune.students.")
        distill[name] = merge(common, table_of(shape, "distill", f"prune.students.{name}."), override)
        shapes[name] = {key: value for key, value in shape.items() if key != "distill"}
    return {"prune": prune | {"students": shapes}, "distill": distill}


def _one_of(value, known: Iterable, where: str) -> str:
    if value not in (known := list(known)):
        names = ", ".join(map(str, known))
        raise ValueError(f"{where} is {value!r}, but params.yaml offers only: {names}{closest(value, known)}")
    return value


def table_of(of: dict, key: str, where: str = "") -> dict:
    """A table by its key, empty where there is none."""
    if not isinstance(value := of.get(key, {}), dict):
        raise ValueError(f"{where}{key} is {value!r}, but must be {TABLE}")
    return value


def merge(*tables: dict) -> dict:
    """Each table over those before it, key by key at every depth."""
    merged = {}
    for table in tables:
        for key, value in table.items():
            both = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = merge(merged[key], value) if both else value
    return merged
