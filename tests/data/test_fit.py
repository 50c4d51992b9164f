"""What `f2llm check` says a recipe will make of a file, against what assembly and batches make of it."""

import json
from dataclasses import replace

import pytest

from f2llm.config import HardNegatives
from f2llm.data.fit import fit
from f2llm.data.inspect import check_file


@pytest.fixture
def asked(config):
    """The default with steps that draw three hard negatives of pairs."""
    negatives = HardNegatives(retrieval=3, clustering=2, classification=1)
    stages = {name: replace(getattr(config, name), hard_negatives=negatives) for name in ("stage1", "stage2")}
    return replace(config, **stages)


def fitted(rows: list[dict], asked, tmp_path, task: str | None = None) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = check_file(path, 48, task=task)
    assert report.usable
    return "\n".join(fit(report, asked))


def pairs(num: int, *num_negatives: int) -> list[dict]:
    counts = num_negatives or (0,)
    return [
        {"query": f"question {n}", "passage": f"answer {n}"}
        | {"negatives": [f"wrong {n} {k}" for k in range(counts[n % len(counts)])]}
        for n in range(num)
    ]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((0,), "400 rows have fewer than the 3 that a step draws; stage mine adds those that are missing"),
        ((0, 1, 5, 5), "200 rows have fewer than the 3 that a step draws; stage mine adds"),
        ((2,), "every row has 2, so a step draws 2 instead of 3"),
        ((5, 3), "given; a step draws 3 of them"),
    ],
)
def test_the_origin_of_hard_negatives_is_said(counts, message, asked, tmp_path):
    assert message in fitted(pairs(400, *counts), asked, tmp_path)


def test_passages_of_a_clustering_source_are_not_mined(asked, tmp_path):
    text = fitted(pairs(400, 1, 3), asked, tmp_path, task="clustering")
    assert "200 rows have fewer than the 2 that a step draws, and will be left out; remedy: " in text


@pytest.mark.parametrize(("num", "labels", "says"), [(400, 4, "9 texts of other labels"), (400, 2, "the other label")])
def test_labels_say_where_their_negatives_come_from(num, labels, says, asked, tmp_path):
    text = fitted([{"query": f"text {n}", "label": f"label {n % labels}"} for n in range(num)], asked, tmp_path)
    assert says in text and "held out for evaluation: 48 texts" in text and "batches" not in text


def test_a_source_smaller_than_a_batch_says_so(asked, tmp_path):
    batch = asked.stage2.global_batch_size
    assert "batches" not in fitted(pairs(2 * batch), asked, tmp_path)
    text = fitted(pairs(batch), asked, tmp_path)
    assert f"fewer than the {batch} of a batch" in text and "remedy: more rows, or override.training" in text


def test_a_source_too_small_to_hold_out_says_so(asked, tmp_path):
    assert "held out for evaluation: nothing: 0 queries could be held out of 5" in fitted(pairs(5), asked, tmp_path)
