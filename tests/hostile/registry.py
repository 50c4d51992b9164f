"""The registry of hostile inputs: bad or odd inputs, each with the verdict that it must get.

A case is a function of `tmp_path` that makes its input and returns a function without arguments that hands the input to
the kit. `reads`: what the kit must return for it. `refused`: the line that the kit must refuse it with.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

KINDS = ("files", "models", "params", "notebooks", "mirrors")  # the modules of cases


@dataclass(frozen=True)
class Case:
    """One input. check: called with the function that hands it to the kit; raises AssertionError on another verdict."""

    name: str
    make: Callable[[Path], Callable[[], object]]
    check: Callable[[Callable[[], object]], None]


CASES: list[Case] = []


def refused(line: str, *inputs, error: type[Exception] = ValueError) -> Callable:
    """Register a case that must be refused: `error`, in one line that matches the regular expression `line`.

    inputs: further arguments of the function, one case for each.
    """

    def check(act: Callable[[], object]) -> None:
        with pytest.raises(error) as raised:
            act()
        message = str(raised.value)
        assert "\n" not in message, f"more than one line: {message}"
        assert re.search(line, message), f"no {line!r} in: {message}"

    return _register(check, inputs)


def reads(expected: object, *inputs) -> Callable:
    """Register a case that must be read right: the kit returns `expected`. inputs: as for `refused`."""

    def check(act: Callable[[], object]) -> None:
        assert act() == expected

    return _register(check, inputs)


def _register(check: Callable, inputs: tuple) -> Callable:
    def add(make: Callable) -> Callable:
        kind = make.__module__.rpartition(".")[2]
        for number, value in enumerate(inputs):
            CASES.append(Case(f"{kind}-{make.__name__}-{number}", lambda path, value=value: make(path, value), check))
        if not inputs:
            CASES.append(Case(f"{kind}-{make.__name__}", make, check))
        return make

    return add
