"""Homogeneous batches as a pure function of (seed, step), and what each batch holds."""

import math
from collections import Counter
from copy import copy
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from conftest import SMALL_SOURCES

from f2llm.batches import HomogeneousBatches
from f2llm.config import HardNegatives

PROMPT = "Instruct: "


@pytest.fixture
def batches(small_store, tiny_training):
    return HomogeneousBatches(small_store, tiny_training, seed=0, stage1=False)


def flat(batch):
    """A batch as plain values, to compare."""
    return (
        batch.source,
        batch.task,
        batch.texts,
        *(part.tolist() for part in (batch.query, batch.passage, batch.hard_negatives, batch.group)),
    )


def queries(batch):
    return [batch.texts[row] for row in batch.query]


def plain(text):
    """A text without its prompt."""
    return text.rpartition("Query: ")[2]


# Order ------------------------------------------------------------------------------------------


def test_a_batch_is_a_pure_function_of_seed_and_step(batches, small_store, tiny_training):
    in_order = [flat(batches[step]) for step in range(len(batches))]
    other = HomogeneousBatches(small_store, tiny_training, seed=0, stage1=False)
    for step in np.random.default_rng(1).permutation(len(batches)):
        assert flat(other[int(step)]) == in_order[step]
    assert len({str(batch) for batch in in_order}) == len(batches) > 10, "vacuous: batches repeat"


def test_seeds_and_epochs_differ(batches, small_store, tiny_training):
    other = HomogeneousBatches(small_store, tiny_training, seed=1, stage1=False)
    assert [flat(batches[step]) for step in range(5)] != [flat(other[step]) for step in range(5)]
    epochs = [[flat(batches[epoch * batches.per_epoch + step]) for step in range(5)] for epoch in range(2)]
    assert epochs[0] != epochs[1]


def test_an_epoch_visits_every_usable_row_exactly_once(batches, small_store):
    for epoch in range(2):
        steps = range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch)
        seen = Counter(plain(text) for step in steps for text in queries(batches[step]))
        assert set(seen.values()) == {1}
        for name, table in small_store.tables.items():
            met = sum(text.startswith(f"{name} ") for text in seen)
            assert met == len(table) - (name == "pairs")  # one row of 'pairs' has too few negatives
    assert "pairs query 3" not in seen


def test_the_last_batch_of_a_source_is_smaller_and_repeats_nothing(batches, small_store):
    sizes = {name: [] for name in small_store.tables}
    for batch in (batches[step] for step in range(batches.per_epoch)):
        assert len(set(batch.rows)) == len(batch.rows) == len(batch.query)
        sizes[batch.source].append(len(batch.rows))
    assert sorted(sizes["tense"]) == [2, 4, 4, 4] and sorted(sizes["pairs"])[:2] == [3, 4], "vacuous: nothing is left"
    assert all(sorted(found)[1] == 4 for found in sizes.values())


def test_a_source_smaller_than_a_batch_is_one_batch_of_its_own(small_store, tiny_training):
    batches = HomogeneousBatches(small_store, replace(tiny_training, global_batch_size=24), seed=0, stage1=False)
    sizes = Counter((batches[step].source, len(batches[step].rows)) for step in range(batches.per_epoch))
    assert sizes["kinds", 20] == sizes["tense", 14] == sizes["code", 24] == sizes["code", 2] == 1


def test_sources_are_met_in_proportion_to_their_size(batches, small_store):
    met = Counter(batches[step].source for step in range(batches.per_epoch))
    assert met == {name: math.ceil((len(table) - (name == "pairs")) / 4) for name, table in small_store.tables.items()}
    order = [batches[step].source for step in range(batches.per_epoch)]
    assert order != sorted(order), "vacuous: sources come one after the other"


def test_stage_1_takes_stage_1_sources_only(small_store, tiny_training):
    batches = HomogeneousBatches(small_store, tiny_training, seed=0, stage1=True)
    assert {batches[step].source for step in range(len(batches))} == {"pairs", "code"}


def test_the_number_of_steps_is_epochs_times_batches_or_max_steps(batches, small_store, tiny_training):
    assert len(batches) == 2 * batches.per_epoch
    limited = HomogeneousBatches(small_store, replace(tiny_training, max_steps=5), seed=0, stage1=False)
    assert len(limited) == 5
    assert [flat(limited[step]) for step in range(5)] == [flat(batches[step]) for step in range(5)]
    for step in (-1, 5):
        with pytest.raises(IndexError):
            limited[step]


def test_the_cap_keeps_the_same_rows_of_a_source_in_every_epoch(small_store, tiny_training):
    batches = HomogeneousBatches(small_store, replace(tiny_training, cap_per_source=12, epochs=3), seed=0, stage1=False)
    seen = {plain(text) for step in range(len(batches)) for text in queries(batches[step])}
    assert Counter(text.split()[0] for text in seen) == dict.fromkeys(small_store.tables, 12)
    other = HomogeneousBatches(small_store, replace(tiny_training, cap_per_source=12), seed=1, stage1=False)
    assert seen != {plain(text) for step in range(len(other)) for text in queries(other[step])}


def test_a_source_without_a_usable_row_is_an_error(small_store, tiny_training):
    many = replace(tiny_training, hard_negatives=HardNegatives(retrieval=2, clustering=4, classification=2))
    with pytest.raises(ValueError, match=r"\['kinds', 'tense'\] have no row with as many hard negatives.*leave_out"):
        HomogeneousBatches(small_store, many, seed=0, stage1=False)


def test_a_source_of_one_row_is_a_batch_of_one(small_store, tiny_training):
    batches = HomogeneousBatches(small_store, replace(tiny_training, cap_per_source=1), seed=0, stage1=False)
    assert batches.per_epoch == 4
    assert [len(batches[step].rows) for step in range(4)] == [1] * 4


# Validation -------------------------------------------------------------------------------------


def test_withheld_rows_and_their_passages_are_never_trained_on(small_store, tiny_training):
    plan = replace(tiny_training, validate_every=1, validation_rows=3)
    batches = HomogeneousBatches(small_store, plan, seed=0, stage1=False)
    withheld = {batch.source: batch for batch in batches.validation()}
    assert {name: len(batch.rows) for name, batch in withheld.items()} == {
        "pairs": 3,
        "code": 2,
        "kinds": 2,
        "tense": 1,
    }
    for batch in (batches[step] for step in range(batches.per_epoch)):
        held = withheld[batch.source]
        assert not set(held.rows) & set(batch.rows)
        if batch.task == "retrieval":
            known = {plain(held.texts[row]) for row in held.passage}
            assert not known & {plain(batch.texts[row]) for row in batch.passage}
    again = HomogeneousBatches(small_store, plan, seed=0, stage1=False)
    assert [batch.texts for batch in again.validation()] == [batch.texts for batch in withheld.values()]


def test_nothing_is_withheld_without_validation(small_store, tiny_training):
    batches = HomogeneousBatches(small_store, replace(tiny_training, validation_rows=3), seed=0, stage1=False)
    assert list(batches.validation()) == []


def test_rows_with_too_few_negatives_are_counted(small_store, tiny_training):
    batches = HomogeneousBatches(small_store, tiny_training, seed=0, stage1=False)
    assert batches.too_few == {"pairs": 1}
    assert 3 not in batches.rows["pairs"] and len(batches.rows["pairs"]) == SMALL_SOURCES["pairs"][0] - 1


@pytest.mark.parametrize(("counts", "drawn", "rows"), [([0, 0, 0], 0, 3), ([1, 2, 2], 2, 2), ([0, 1, 2, 5], 5, 1)])
def test_where_no_row_has_as_many_negatives_as_asked_for_the_median_is_drawn(
    small_store, tiny_training, counts, drawn, rows
):
    """With one row that has enough, rows with fewer are left out, as before."""
    asked = replace(tiny_training, hard_negatives=HardNegatives(retrieval=5, clustering=1, classification=1))
    table = small_store.tables["pairs"].slice(0, len(counts))
    column = pa.array([list(range(count)) for count in counts], type=pa.list_(pa.int32()))
    store = copy(small_store)
    store.tables = {"pairs": table.set_column(table.column_names.index("negatives"), "negatives", column)}
    store.sources = {"pairs": small_store.sources["pairs"]}
    batches = HomogeneousBatches(store, asked, seed=0, stage1=False)
    assert batches.num_negatives("pairs") == drawn and len(batches.rows["pairs"]) == rows
    assert batches.draws == ({"pairs": drawn} if drawn < 5 else {})
    assert batches[0].hard_negatives.shape == (rows, drawn)


# Contents ---------------------------------------------------------------------------------------


def test_a_batch_holds_one_source_with_its_own_passages_and_negatives(batches, small_store):
    compared = 0
    for batch in (batches[step] for step in range(batches.per_epoch)):
        documents = small_store.documents[batch.source]
        rows = {row["query"]: row for row in small_store.tables[batch.source].to_pylist()}
        wanted = batches.num_negatives(batch.source)
        assert batch.hard_negatives.shape == (len(batch.rows), wanted)
        for position, query in enumerate(queries(batch)):
            row = rows[plain(query)]
            own = [documents[negative] for negative in row["negatives"]]
            drawn = [plain(batch.texts[negative]) for negative in batch.hard_negatives[position]]
            assert plain(batch.texts[batch.passage[position]]) == documents[row["passage"]]
            assert (batch.group[position], batch.document[position]) == (row["group"], row["passage"])
            assert len(set(drawn)) == wanted and set(drawn) <= set(own)
            compared += wanted
    assert compared > 40, "vacuous: few negatives were compared"


def test_negatives_change_from_epoch_to_epoch(small_store, tiny_training):
    batches = HomogeneousBatches(small_store, replace(tiny_training, epochs=6), seed=0, stage1=True)
    drawn = {}
    for batch in (batches[step] for step in range(len(batches))):
        for query, negatives in zip(queries(batch), batch.hard_negatives):
            drawn.setdefault(query, set()).add(frozenset(plain(batch.texts[row]) for row in negatives))
    assert np.mean([len(sets) for sets in drawn.values()]) > 2


def test_the_texts_of_a_batch_are_unique_and_all_used(batches):
    for batch in (batches[step] for step in range(len(batches))):
        assert len(set(batch.texts)) == len(batch.texts)
        used = {*batch.query.tolist(), *batch.passage.tolist(), *batch.hard_negatives.flatten().tolist()}
        assert used == set(range(len(batch.texts)))


def test_no_hard_negatives_leave_queries_and_passages(small_store, tiny_training):
    none = HardNegatives(retrieval=0, clustering=0, classification=0)
    none = replace(tiny_training, hard_negatives=none, distillation_weight=1.0)
    batch = HomogeneousBatches(small_store, none, seed=0, stage1=True)[0]
    assert batch.hard_negatives.shape == (4, 0)
    assert len(batch.texts) == 8


# Instructions -----------------------------------------------------------------------------------


def test_queries_carry_the_instruction_of_their_source(batches, small_store):
    for batch in (batches[step] for step in range(batches.per_epoch)):
        instruction = small_store.sources[batch.source]["instruction"]
        assert all(text.startswith(f"Instruct: {instruction}\nQuery: {batch.source} query") for text in queries(batch))


def test_without_instructions_every_text_is_raw(small_store, tiny_training):
    raw = replace(tiny_training, instructions=False, document_instruction_share=0.9)
    batches = HomogeneousBatches(small_store, raw, seed=0, stage1=False)
    met = [text for step in range(len(batches)) for text in batches[step].texts]
    assert len(met) > 100
    assert not any(text.startswith(PROMPT) for text in met)


def test_a_share_of_documents_of_symmetric_sources_carries_the_instruction(small_store, tiny_training):
    share = tiny_training.document_instruction_share
    assert share > 0, "vacuous: the configuration asks for none"
    batches = HomogeneousBatches(small_store, replace(tiny_training, epochs=20), seed=0, stage1=False)
    found = {name: [] for name in small_store.tables}
    for batch in (batches[step] for step in range(len(batches))):
        for row in (*batch.passage, *batch.hard_negatives.flatten()):
            found[batch.source].append(batch.texts[row].startswith(PROMPT))
    assert not any(found["code"]) and not any(found["tense"])
    for name in ("pairs", "kinds"):
        assert len(found[name]) > 1000
        assert np.mean(found[name]) == pytest.approx(share, abs=0.05)
