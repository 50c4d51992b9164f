"""Benchmarks: their arithmetic, their check that legs agree, and small runs. No test depends on a time."""

import importlib
import json
import math
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks import data, distillation, encode, harness, legs, prune, table, training
from benchmarks.table import MARKS, NAMES, lines
from f2llm.config import SHAPE
from f2llm.losses import matryoshka_dims
from f2llm.tokens import Tokens


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


def test_the_peak_memory_of_a_child_is_not_that_of_its_parent():
    held = torch.ones(2**30, dtype=torch.uint8)
    code = "from benchmarks.harness import peak_memory; print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], cwd=harness.ROOT, capture_output=True, text=True, check=True)
    assert 2**20 < int(done.stdout) < len(held) < harness.peak_memory()


# Training and encoding --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program, names",
    [
        (training, set(training.GOALS)),
        (encode, {"vs_sentence_transformers", "vs_sentence_transformers_batch8", "shared_instruction"}),
    ],
)
def test_the_quick_runs_end_well_and_write_nothing(program, names, capsys):
    before = {path: path.stat().st_mtime_ns for path in harness.RESULTS.glob("*")}
    ratios = program.main(["--quick"])
    assert json.loads(capsys.readouterr().out) == ratios
    assert ratios.keys() == names
    for name, values in ratios.items():
        assert all(math.isfinite(values[part]) and values[part] > 0 for part in ("min", "median", "max")), name
        assert 0 <= values["padding"] < 1
    assert {path: path.stat().st_mtime_ns for path in harness.RESULTS.glob("*")} == before


@pytest.fixture(scope="module")
def token_batch():
    return legs.draw_batch(2, legs.word_tokenizer(legs.SMALL_SHAPE["vocab_size"]), np.random.default_rng(0))


def test_texts_follow_their_law_and_end_with_eos():
    tokenizer, random = legs.word_tokenizer(512), np.random.default_rng(0)
    token_ids = tokenizer(legs.draw_texts(legs.PASSAGE, 2000, 512, random))["input_ids"]
    lengths = np.array([len(ids) for ids in token_ids])
    assert np.quantile(lengths, [0.1, 0.9]) == pytest.approx(legs.PASSAGE, rel=0.1)
    assert lengths.max() <= legs.MAX_TOKENS and {ids[-1] for ids in token_ids} == {tokenizer.eos_token_id}
    assert not {tokenizer.pad_token_id, tokenizer.unk_token_id} & {token for ids in token_ids for token in ids}


def test_padding_is_the_share_of_pads_in_what_is_computed(token_batch):
    lengths = [len(ids) for ids in token_batch.token_ids]
    assert len(lengths) == 2 * (2 + legs.HARD_NEGATIVES)
    assert token_batch.padding() == pytest.approx(1 - sum(lengths) / (len(lengths) * max(lengths)))
    pairs = [lengths[:2], *zip(lengths[2:10], lengths[10:])]  # a column: both queries, both passages ...
    by_column = 1 - sum(lengths) / sum(2 * max(pair) for pair in pairs)
    assert token_batch.padding_by_column() == pytest.approx(by_column)
    _, mask = legs.pad(token_batch.token_ids, 0)
    assert mask.sum(1).tolist() == lengths and (mask == 0).float().mean() == pytest.approx(
        token_batch.padding(), rel=1e-5
    )


def test_useful_flops_count_weights_and_the_causal_half_of_attention():
    shape = {
        "hidden_size": 3,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 5,
        "intermediate_size": 7,
        "vocab_size": 11,
    }
    weights = 3 * 20 + 2 * 3 * 10 + 20 * 3 + 3 * 3 * 7
    attention = 2 * 2 * 20 * (6**2 + 2**2) / 2  # scores and their sums of values
    assert legs.useful_flops(shape, [[0] * 6, [0] * 2]) == 3 * 2 * (2 * weights * 8 + attention)


def test_the_authors_step_is_the_same_with_and_without_checkpointing_and_pads_in_attention(token_batch):
    dims = matryoshka_dims(legs.SMALL_SHAPE["hidden_size"], legs.MIN_DIM)
    outcomes = {}
    for attention in ("sdpa", legs.UNPADDED):
        for checkpointing in (True, False):
            step = legs.authors_step(legs.new_model(legs.SMALL_SHAPE), dims, attention, checkpointing)
            outcomes[f"{attention} {checkpointing}"] = step(token_batch)
            outcomes[f"{attention} {checkpointing}, second step"] = step(token_batch)
    firsts = {name: values for name, values in outcomes.items() if "second" not in name}
    harness.gate(firsts)
    harness.gate({name: values for name, values in outcomes.items() if "second" in name})
    assert outcomes["sdpa True"][0] > outcomes["sdpa True, second step"][0]  # it has learnt


def test_embeddings_that_differ_or_have_no_length_are_an_error():
    unit = np.eye(3, dtype=np.float32)
    encode.require_equal({"one": unit, "other": unit + 1e-6})
    with pytest.raises(RuntimeError, match=r"'one' and 'other' are .* apart"):
        encode.require_equal({"one": unit, "other": unit + 1e-4})
    with pytest.raises(RuntimeError, match="apart"):
        encode.require_equal({"one": unit, "other": unit * np.nan})
    with pytest.raises(RuntimeError, match="nothing to compare"):
        encode.require_equal({"one": 0 * unit, "other": 0 * unit})


# The others, small ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["distillation", "gpu", "plan", "prune", "sharding"])
def test_a_quick_run_ends_with_finite_ratios_and_writes_nothing(name, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.harness.write", lambda *_: pytest.fail("a quick run has written a result"))
    ratios = importlib.import_module(f"benchmarks.{name}").main(["--quick"])
    assert ratios and all(math.isfinite(found["median"]) and found["median"] > 0 for found in ratios.values())
    assert json.loads(capsys.readouterr().out)


def test_memory_of_a_step_counts_its_tokens_and_not_the_way():
    from benchmarks.memory import growth

    cached, plain = growth(3, cached=True), growth(3, cached=False)
    assert cached["loss"] == pytest.approx(plain["loss"], rel=1e-4) and plain["loss"] > 1
    assert cached["tokens"] == plain["tokens"] > 1000 and plain["growth_mib"] >= 0


def test_the_ways_of_the_benchmark_of_adapters_start_from_one_loss():
    from benchmarks.lora import WAYS, Trained

    ways = {way: Trained(way, legs.SMALL_SHAPE, queries=2) for way in WAYS}
    losses, again = ([trained.step() for trained in ways.values()] for _ in range(2))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4) and losses[0] > 1
    assert len(set(again)) == 3 and max(again) < losses[0], "vacuous: no way has learned"
    full, adapter, with_magnitudes = (trained.checkpoint_bytes() for trained in ways.values())
    assert adapter < with_magnitudes < full / 2


def test_every_benchmark_of_the_table_is_one_that_make_bench_runs():
    (line,) = (line for line in (harness.ROOT / "Makefile").read_text().splitlines() if "-m benchmarks.$$name" in line)
    ran = line.partition(" in ")[2].partition(";")[0].split()
    assert [f"{name}_cpu" for name in ran] == [name for name in NAMES if name != "gpu"] and len(ran) > 5
    for name in ran:
        assert importlib.import_module(f"benchmarks.{name}").main


def test_the_cached_way_of_distillation_is_compared_with_equal_losses(tmp_path, monkeypatch):
    gated = []
    monkeypatch.setattr(distillation, "gate", lambda outcomes: gated.append(dict(outcomes)) or harness.gate(outcomes))
    seconds = distillation.measure(distillation.QUICK, tmp_path)
    assert {name for slow, fast, _ in distillation.AGAINST.values() for name in (slow, fast)} == seconds.keys()
    assert gated[0].keys() == seconds.keys() == {"live", "first", "cached", "given"}
    assert len(list(tmp_path.glob("*/*.keys.npy"))) == 3, "the warm-up's, the round's and the full one"


def test_pruning_is_measured_on_the_shape_of_0_6b_and_processes_that_disagree_are_an_error():
    settings, students, config = prune.settings_of(quick=False)
    assert settings["shape"] == {name: getattr(config.backbone, name) for name in SHAPE}
    assert list(students) == ["330M", "160M", "80M"] and settings["shape"]["hidden_size"] == 1024
    one = {"scores_seconds": 2.0, "cut_seconds": 1.0, "added_mib": 5.0, "scores_mib": 1.0, "student_mib": 3.0}
    one |= {"tokens": 9, "parameters": 7, "sum_of_scores": 0.5}
    other = one | {"parameters": 6, "scores_seconds": 3.0}
    found = prune.figures({"large": [one, one], "small": [other, other]}, "a model")
    assert set(found) == {"scores_s", "cut_large_s", "cut_small_s", "memory_large_mib", "memory_small_mib"}
    assert (found["scores_s"]["min"], found["scores_s"]["median"], found["scores_s"]["max"]) == (2, 2.5, 3)
    assert found["memory_large_mib"]["against"] == "scores and cutting, 3 of it the student"
    for key in ("tokens", "parameters", "sum_of_scores"):
        with pytest.raises(RuntimeError, match=f"disagree about {key}"):
            prune.figures({"large": [one, one | {key: 1}]}, "a model")


def test_the_data_legs_draw_the_same_tokens_from_both_layouts(tmp_path, monkeypatch):
    monkeypatch.chdir(harness.ROOT)
    monkeypatch.setattr(data, "STEPS", 3)
    num = 2000
    data.write_released(num, tmp_path / "part.parquet")
    made = data.assemble_leg(num, tmp_path)
    data.write_authors_layout(num, tmp_path)
    assert made["rows_per_s"] > 0 and made["disk_mb"] > 0.1
    (path,) = (tmp_path / "tokens").rglob("*.arrow")
    corpus = pq.read_table(tmp_path / "corpus.parquet")["input_ids"].to_pylist()
    assert corpus == [list(ids) for ids in Tokens(path)] and len(corpus) == num
    legs = {f"{leg}_{num}": data.LEGS[leg](num, tmp_path) for leg in ("ours", "authors")}
    for figures in legs.values():
        figures["startup_s"] = [figures["startup_s"]]
        assert figures["drawn_rows_per_s"] > 0
    legs[f"assemble_{num}"] = made
    found = data.figures(legs, [num])
    assert {"memory_growth_mb", "startup_s", "rows_per_s"} <= set(found)
    assert found["memory_growth_mb"]["median"] == 0 and found["startup_s"]["at_most"]


def test_the_table_goes_into_the_readme_of_the_benchmarks(tmp_path, monkeypatch):
    committed = (harness.ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    (tmp_path / "benchmarks").mkdir()
    path = tmp_path / "benchmarks" / "README.md"
    path.write_text(f"Before.\n\n{MARKS[0]}\nold\n{MARKS[1]}\n\nAfter.\n")
    monkeypatch.setattr(table, "ROOT", tmp_path)
    table.main()
    written = "\n".join(lines())
    assert path.read_text() == f"Before.\n\n{MARKS[0]}\n\n{written}\n\n{MARKS[1]}\n\nAfter.\n"
    assert f"{MARKS[0]}\n\n{written}\n\n{MARKS[1]}" in committed, "remedy: python -m benchmarks.table"
    assert written.count("\n| ") > 20, "vacuous"


def test_the_table_names_what_was_missed_and_what_was_not_run(tmp_path):
    found = {"min": 1.0, "median": 2.0, "max": 3.0, "against": "the other way"}
    ratios = {"good": {**found, "goal": 1.5, "padding": 0.25}, "short": {**found, "goal": 6}}
    ratios |= {"low": {**found, "goal": 3, "at_most": True}, "high": {**found, "goal": 1, "at_most": True}}
    ratios |= {"many": found | {"median": 54321.0, "goal": None}}
    result = {"date": "2026-11-22", "hardware": {"cpu": "A CPU"}, "ratios": ratios}
    (tmp_path / "training_cpu.json").write_text(json.dumps(result))
    table = lines(tmp_path)
    assert "| training_cpu | `good` | the other way; 25% padding | 1.00 | 2.00 | 3.00 | 1.5 |" in table
    assert "| training_cpu | `short` | the other way | 1.00 | 2.00 | 3.00 | 6 missed |" in table
    assert "| training_cpu | `low` | the other way | 1.00 | 2.00 | 3.00 | at most 3 |" in table
    assert "| training_cpu | `high` | the other way | 1.00 | 2.00 | 3.00 | at most 1 missed |" in table
    assert "| training_cpu | `many` | the other way | 1.00 | 54,321 | 3.00 |  |" in table
    assert "| gpu | not run on a GPU | | | | | |" in table
    assert table[-1] == "Measured: training_cpu 2026-11-22; A CPU, one thread."


def test_the_table_says_of_every_benchmark_on_which_machine_it_was_measured(tmp_path):
    ratios = {"good": {"min": 1.0, "median": 2.0, "max": 3.0, "against": "the other way", "goal": None}}
    for name, hardware in (("training", {"cpu": "A"}), ("encode", {"cpu": "B"}), ("prune", {"cpu": "A"})):
        result = {"date": "2026-11-22", "hardware": hardware, "ratios": ratios}
        (tmp_path / f"{name}_cpu.json").write_text(json.dumps(result))
    (tmp_path / "gpu.json").write_text(json.dumps({"date": "2026-11-23", "hardware": {"gpu": "C"}, "ratios": ratios}))
    assert [line for line in lines(tmp_path) if line.startswith("Measured")] == [
        "Measured: training_cpu 2026-11-22, prune_cpu 2026-11-22; A, one thread.",
        "Measured: encode_cpu 2026-11-22; B, one thread.",
        "Measured: gpu 2026-11-23; C.",
    ]


def test_how_far_a_plan_and_a_training_are_apart_is_the_same_both_ways():
    from benchmarks.plan import apart

    assert apart(2.0, 1.0) == apart(1.0, 2.0) == 2.0 and apart(3.0, 3.0) == 1.0
