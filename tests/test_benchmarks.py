"""Benchmarks: their arithmetic, their check that legs agree, and small runs. No test depends on a time."""

import json
import math

import pytest
import torch

from benchmarks import harness, matryoshka


def test_a_ratio_is_taken_round_by_round():
    assert harness.ratio([6.0, 8.0, 5.0], [2.0, 2.0, 5.0]) == {"min": 1.0, "median": 3.0, "max": 4.0}
    assert harness.ratio([1.0, 4.0], [2.0, 2.0]) == {"min": 0.5, "median": 1.25, "max": 2.0}


@pytest.mark.parametrize("slow, fast", [([1.0, 2.0], [1.0]), ([], [])])
def test_a_ratio_of_unequal_or_no_rounds_is_an_error(slow, fast):
    with pytest.raises(ValueError, match="needs the same rounds of both"):
        harness.ratio(slow, fast)


def test_legs_take_turns_and_the_order_alternates():
    order = []
    seconds = harness.interleave({name: lambda name=name: order.append(name) for name in "abc"}, rounds=3)
    assert "".join(order) == "abccbaabc"
    assert {name: len(rounds) for name, rounds in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(second >= 0 for rounds in seconds.values() for second in rounds)


def test_the_gate_lets_equal_legs_pass_and_names_those_that_disagree():
    harness.gate({"one": (2.0, 0.5), "other": (2.0001, 0.50002), "third": (1.9999, 0.5)})
    for wrong in ((2.001, 0.5), (2.0, 0.501), (math.nan, 0.5), (2.0, math.inf)):
        with pytest.raises(RuntimeError, match=r"legs disagree.*'one'.*'other'"):
            harness.gate({"one": (2.0, 0.5), "other": wrong})


@pytest.mark.parametrize("empty", [(0.0, 0.0), (1.0, 0.0), (math.nan, 1.0)])
def test_the_gate_refuses_legs_that_agree_on_nothing(empty):
    with pytest.raises(RuntimeError, match="nothing to compare"):
        harness.gate({"one": empty, "other": empty})


def test_a_result_has_all_parts_and_says_where_it_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    content = {"settings": {"a": 1}, "ratios": {}, "legs": {}, "remarks": "none"}
    read = json.loads(harness.write("example", content).read_text())
    assert list(read) == ["name", "date", "hardware", "versions", "settings", "ratios", "legs", "remarks"]
    assert read["name"] == "example" and read["settings"] == {"a": 1}
    assert read["hardware"]["threads"] == 1 and read["hardware"]["matmul_gflops"] > 0
    assert read["versions"]["torch"] == torch.__version__
    with pytest.raises(ValueError, match="legs"):
        harness.write("example", {"settings": {}})


def test_a_child_that_fails_is_an_error_with_its_message():
    with pytest.raises(RuntimeError, match="no-such-file"):
        harness.in_child("json.tool", "no-such-file")


def test_the_quick_matryoshka_run_ends_well_and_writes_nothing(capsys):
    before = {path: path.stat().st_mtime_ns for path in harness.RESULTS.glob("*")}
    held = torch.ones(2**29, dtype=torch.uint8)  # a parent larger than its children must not hide their growth
    ratios = matryoshka.main(["--quick"])
    assert harness.peak_memory() > len(held)
    assert json.loads(capsys.readouterr().out) == ratios
    assert ratios.keys() == {"vs_naive", "vs_naive_memory"}
    for name, values in ratios.items():
        assert all(math.isfinite(values[part]) and values[part] > 0 for part in ("min", "median", "max")), name
        assert values["min"] <= values["median"] <= values["max"] and values["goal"] > 1
    assert {path: path.stat().st_mtime_ns for path in harness.RESULTS.glob("*")} == before


def test_the_matryoshka_legs_do_the_same_work():
    outcomes = {name: leg() for name, leg in matryoshka.make_legs(matryoshka.QUICK).items()}
    assert tuple(outcomes) == matryoshka.LEGS
    harness.gate(outcomes)
