"""Every input of the registry gets its verdict: read right, or refused in one line."""

import importlib

import pytest
from registry import CASES, KINDS

for kind in KINDS:
    importlib.import_module(f"hostile_{kind}")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_hostile_input(case, tmp_path):
    case.check(case.make(tmp_path))


def test_there_are_a_hundred_kinds():
    assert len({case.name for case in CASES}) == len(CASES) >= 100
