"""Checked values from YAML files: dataclasses with the rules beside their fields, and errors that are one line."""

import difflib
import json
import re
from collections.abc import Callable, Iterable
from types import UnionType
from typing import Annotated, Any, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError, WrapValidator
from pydantic.dataclasses import dataclass

TABLE = "a table of keys and values"
checked = dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid", populate_by_name=True))


def must_be(rule: str, test: Callable[[Any], object] = lambda value: True) -> WrapValidator:
    """A rule beside its field: a value of another type, or that fails the test, is an error with the rule's words."""

    def check(value, of_type):
        try:
            value = of_type(value)
        except ValidationError:
            raise ValueError(rule) from None
        if not test(value):
            raise ValueError(rule)
        return value

    return WrapValidator(check)


def matches(pattern: str) -> Callable[[str], object]:
    """The test whether a whole text matches."""
    return re.compile(pattern).fullmatch


def require(holds: bool, message: str) -> None:
    """A rule about several values: a ValueError where it does not hold."""
    if not holds:
        raise ValueError(message)


_RULES = {  # pydantic's kinds of errors in the words of our messages
    **dict.fromkeys(("dataclass_type", "dict_type"), TABLE),
    "list_type": "a list",
    "string_type": "of type str",
    "bool_type": "of type bool",
    "int_type": "of type int",
    "float_type": "of type float",
    "less_than": "below {lt}",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "{ge:g} or more",
}


def build(kind: type, values: dict, where: str):
    """A dataclass, marked `checked`, from a table of `where`; a ValueError is one line on the first mistake."""
    try:  # as JSON: in Python objects strict pydantic takes no table for a dataclass
        return TypeAdapter(kind).validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise ValueError(f"{where}: {_one_line(error, kind)}") from None


def _one_line(error: ValidationError, kind: type) -> str:
    """Key, value and rule of the first mistake; unknown keys come first, for a misspelt key is a missing one, too."""
    mistake = min(error.errors(include_url=False), key=lambda each: each["type"] != "unexpected_keyword_argument")
    what, value, context = mistake["type"], mistake["input"], mistake.get("ctx", {})
    path = [part for part in mistake["loc"] if isinstance(part, str)]  # without positions in lists
    table = ".".join(path[:-1]) + ": " if path[1:] else ""
    if what == "unexpected_keyword_argument":
        keys = _keys_at(kind, path[:-1])
        return f"{table}unknown key {path[-1]!r}{closest(path[-1], keys)}; known keys: {', '.join(keys)}"
    if what == "missing":
        return f"{table}key {path[-1]!r} is missing; remedy: add it, nothing has a default"
    if what == "value_error" and isinstance(value, dict):  # on several keys of a table, which the message names
        return ".".join([*path, str(context["error"])])
    of_type = ""
    if what == "value_error":
        rule = str(context["error"])
    elif what == "literal_error":
        choices = re.findall("'(.*?)'", context["expected"])
        rule = f"one of: {', '.join(choices)}{closest(value, choices)}"
    else:
        rule = _RULES[what].format(**context) if what in _RULES else f"valid: {mistake['msg']}"
        of_type = f" ({type(value).__name__})" if rule.startswith("of type") else ""
    return f"{'.'.join(path)} is {value!r}{of_type}, but must be {rule}"


def _keys_at(kind: type, path: list[str]) -> list[str]:
    """The keys of a table within a dataclass, as of ['stage1', 'hard_negatives']."""
    for key in path:
        fields = getattr(kind, "__pydantic_fields__", {})
        kind = fields[key].annotation if fields else get_args(kind)[1]  # of dict[str, ...]
        if get_origin(kind) in (Annotated, UnionType):
            kind = get_args(kind)[0]
    return [field.alias or name for name, field in kind.__pydantic_fields__.items()]


def closest(key, known: Iterable, most: int = 1) -> str:
    """'; did you mean ...?' of the names that are like a wrong one, if any."""
    near = difflib.get_close_matches(str(key), list(map(str, known)), n=most)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
