"""A teacher's embeddings: cached as live, made once, read as equal bytes, and stored whole or not at all."""

import copy
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import write_small_data, write_small_store
from helpers.closeness import assert_close
from helpers.ranks import Counting

from f2llm.batches import HomogeneousBatches
from f2llm.config import HardNegatives
from f2llm.model import Embedder
from f2llm.step import embed_without_gradient, prepare
from f2llm.store.tuples import TupleStore, read_arrow, write_arrow
from f2llm.teacher import Cached, check_teacher, live, most_rows, teacher_embeddings
from f2llm.text import prompted


@pytest.fixture
def teacher(embedder):
    """Other weights than the student's."""
    model = copy.deepcopy(embedder.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return Counting(model, embedder.tokenizer, embedder.max_tokens)


@pytest.fixture
def plan(tiny_training):
    return replace(tiny_training, distillation_weight=1.0, document_instruction_share=0.3)


@pytest.fixture
def batches(small_store, plan):
    """Two epochs of all four sources; most texts are met again."""
    return HomogeneousBatches(small_store, plan, seed=0, stage1=False)


@pytest.fixture
def packed_batches(embedder, batches, machine):
    """All batches, made ready for the student."""
    return [prepare(embedder, batches[step], machine) for step in range(len(batches))]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def distinct(packed_batches):
    return {text for packed in packed_batches for text in packed.batch.texts}


# Rows -------------------------------------------------------------------------------------------


def test_cached_embeddings_are_the_live_ones_and_of_a_text_always_the_first(teacher, packed_batches, folder, machine):
    cached, always, first, kinds = Cached(teacher, folder, machine), live(teacher), {}, set()
    for number, packed in enumerate(packed_batches):
        expected, found = always(packed), cached(packed)
        assert found.dtype == torch.float32 and found.shape == (len(packed.batch.texts), 32)
        known = sum(text in first for text in packed.batch.texts)
        kinds.add("new" if not known else "known" if known == len(packed.batch.texts) else "some")
        if not known:
            assert torch.equal(found, expected), "the same packs"
        assert_close(found, expected)
        for text, row in zip(packed.batch.texts, found):
            assert torch.equal(first.setdefault(text, row), row)
        if number % 5 == 0:
            cached.flush()
    assert kinds == {"new", "some", "known"}, "vacuous: not all kinds of batches were met"
    assert (torch.stack(list(first.values())).std(0) > 0.01).all(), "vacuous: all rows are alike"


def test_every_text_is_embedded_once_and_a_second_student_reads_equal_bytes_without_the_teacher(
    teacher, packed_batches, folder, machine
):
    cached = Cached(teacher, folder, machine)
    rows = []
    for number, packed in enumerate(packed_batches):
        rows.append(cached(packed).numpy().tobytes())
        if number % 7 == 6:
            cached.flush()
    cached.flush()
    assert (
        teacher.num_texts == len(distinct(packed_batches)) < sum(len(packed.batch.texts) for packed in packed_batches)
    )
    assert len(list(folder.glob("*.keys.npy"))) == len(cached.parts) > 3, "vacuous: a single part"
    teacher.num_texts = 0
    again = Cached(teacher, folder, machine)
    assert [again(packed).numpy().tobytes() for packed in reversed(packed_batches)] == rows[::-1]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    again.flush()
    assert teacher.num_texts == 0 and not again.new
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_what_was_never_flushed_is_made_again_to_the_same_bytes(teacher, packed_batches, folder, machine):
    """As a training that goes on from a checkpoint: it knows what was known then, and so embeds the same packs."""
    cached = Cached(teacher, folder, machine)
    for packed in packed_batches[:6]:
        cached(packed)
    cached.flush()
    rows = [cached(packed) for packed in packed_batches[6:9]]
    assert cached.new, "vacuous: nothing is lost"
    again = Cached(teacher, folder, machine)
    assert len(again.where) == len(distinct(packed_batches[:6]))
    assert all(torch.equal(again(packed), row) for packed, row in zip(packed_batches[6:9], rows))


def test_a_text_with_another_prompt_is_another_row(teacher, packed_batches, folder, machine):
    packed = packed_batches[0]
    plain = "document 7"
    texts = [plain, prompted(plain, "Find it."), prompted(plain, "Which kind?"), f"{plain} "]
    every = np.arange(4)
    batch = replace(packed.batch, texts=texts, stored=[7, None, None, None], query=every, passage=every)
    cached = Cached(teacher, folder, machine)
    rows = cached(prepare(teacher, batch, machine))
    assert teacher.num_texts == 4 == len({row.numpy().tobytes() for row in rows})
    alone = torch.cat([teacher.embed(teacher.tokenize([text])) for text in texts])
    assert_close(rows, alone)


def test_the_teacher_cuts_texts_as_its_own_longest_text_says(teacher, packed_batches, folder, machine):
    """What the student's packs hold does not matter to the cache."""
    (whole,) = (Cached(teacher, folder / "whole", machine)(packed) for packed in packed_batches[:1])
    teacher.max_tokens = 5
    cut = Cached(teacher, folder / "cut", machine)(packed_batches[0])
    alone = teacher.embed(teacher.tokenize(packed_batches[0].batch.texts)).detach()
    assert_close(cut, alone)
    assert (cut - whole).abs().max() > 0.1, "vacuous: no text is longer"


# Parts on the disk ------------------------------------------------------------------------------


@pytest.fixture
def two_parts(teacher, packed_batches, folder, machine):
    """A cache of two parts, and the texts of the first."""
    cached = Cached(teacher, folder, machine)
    cached(packed_batches[0])
    cached.flush()
    cached(packed_batches[1])
    cached.flush()
    assert sorted(path.name for path in folder.iterdir()) == [
        f"00000{part}.{kind}.npy" for part in (0, 1) for kind in ("keys", "rows")
    ]
    return folder


LEFT = {
    "rows without keys": ["000001.keys.npy"],
    "rows without keys, half keys aside": ["000001.keys.npy", ".000001.keys.npy"],
    "whole rows aside": ["000001.keys.npy", "000001.rows.npy", ".000001.rows.npy"],
}


@pytest.mark.parametrize("names", LEFT.values(), ids=LEFT)
def test_a_part_that_is_not_whole_is_ignored_and_written_anew(two_parts, teacher, packed_batches, machine, names):
    """What a kill leaves: files that it had not come to are missing, the one it was at lies aside."""
    expected = {path.name: path.read_bytes() for path in two_parts.iterdir()}
    for name in names:
        path = two_parts / name.lstrip(".")
        if name.startswith("."):
            (two_parts / name).write_bytes(expected[path.name][:-9])
        else:
            path.unlink()
    teacher.num_texts = 0
    again = Cached(teacher, two_parts, machine)
    assert len(again.where) == len(distinct(packed_batches[:1])) and len(again.parts) == 1
    rows = again(packed_batches[1])
    assert teacher.num_texts == len(distinct(packed_batches[:2])) - len(distinct(packed_batches[:1])) > 0
    again.flush()
    found = {path.name: path.read_bytes() for path in two_parts.iterdir()}
    assert found == expected
    assert torch.equal(again(packed_batches[1]), rows)


def test_nothing_new_writes_nothing(teacher, folder, machine):
    Cached(teacher, folder, machine).flush()
    assert not folder.exists()


def test_a_file_in_the_way_of_the_cache_is_one_clear_error(teacher, packed_batches, folder, machine):
    folder.write_text("in the way")
    cached = Cached(teacher, folder, machine)
    cached(packed_batches[0])
    with pytest.raises(RuntimeError, match=r"cannot write \S*/cache/\S+: .*remedy: "):
        cached.flush()


# Where the cache is -----------------------------------------------------------------------------


@pytest.fixture
def place(teacher, tmp_path, monkeypatch):
    """A working folder with data and the teacher's; the function gives the cache for a plan."""
    monkeypatch.chdir(tmp_path)
    write_small_data(tmp_path / "data")
    teacher.save(tmp_path / "teacher")

    def cache(training, machine, seed=0, path="teacher"):
        batches = HomogeneousBatches(TupleStore(), training, seed, stage1=False)
        model = Embedder.load(path)
        model.max_tokens = training.max_tokens
        return teacher_embeddings(tmp_path / path, model, batches, machine)

    return cache


def test_the_cache_of_a_plan_is_always_the_same_whatever_does_not_change_the_batches(place, plan, machine):
    cached = place(plan, machine)
    assert isinstance(cached, Cached)
    assert (cached.folder.parent.parts, len(cached.folder.name)) == (("scratch", "teacher"), 12)
    same = {"learning_rate": 1.0, "epochs": 1, "max_steps": 3, "distillation_weight": 0.5, "temperature": 1.0}
    same |= {"warmup_steps": 0, "matryoshka_min_dim": 0, "distillation_normalised": True}
    for name, value in same.items():
        assert getattr(plan, name) != value
        assert place(replace(plan, **{name: value}), machine).folder == cached.folder, name
    assert place(plan, replace(machine, token_budget=2000, save_every=1)).folder == cached.folder


PLANS = {
    "instructions": False,
    "document_instruction_share": 0.5,
    "max_tokens": 23,
    "global_batch_size": 5,
    "cap_per_source": 9,
    "hard_negatives": HardNegatives(retrieval=1, clustering=2, classification=1),
    "validation_rows": 2,
}


@pytest.mark.parametrize("name", PLANS)
def test_another_plan_of_texts_is_another_cache(place, plan, machine, name):
    plan = replace(plan, validate_every=3, validation_rows=1)
    assert getattr(plan, name) != PLANS[name]
    folders = [place(one, machine).folder for one in (plan, replace(plan, **{name: PLANS[name]}), plan)]
    assert folders[0] == folders[2] != folders[1]


def other_weights(tmp_path):
    model = Embedder.load(tmp_path / "teacher")
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save(tmp_path / "teacher")


def append_to(name):
    def append(tmp_path):
        with (tmp_path / name).open("ab") as file:
            file.write(b"\n")

    return append


def other_tuples(tmp_path):
    shutil.rmtree(tmp_path / "data" / "assembled")
    write_small_store(tmp_path / "data" / "assembled")
    path = tmp_path / "data" / "assembled" / "manifest.json"
    text = path.read_text()
    (digest,) = {digest for name, digest in TupleStore().hashes().items() if name == "tuples/kinds.arrow"}
    path.write_text(text.replace(digest, digest[::-1]))


def other_mined_negatives(tmp_path):
    path = tmp_path / "data" / "mined" / "code.arrow"
    table = read_arrow(path)
    rows = np.roll(np.arange(len(table)), 1)
    shutil.copy(path, tmp_path / "old.arrow")
    path.unlink()
    write_arrow(read_arrow(tmp_path / "old.arrow").take(rows), path)


FILES = {
    "weights": other_weights,
    "tokenizer": append_to("teacher/tokenizer.json"),
    "config": append_to("teacher/config.json"),
    "tuples": other_tuples,
    "mined negatives": other_mined_negatives,
}


@pytest.mark.parametrize("change", FILES.values(), ids=FILES)
def test_another_teacher_or_other_data_are_another_cache(place, plan, machine, tmp_path, change):
    before = place(plan, machine).folder
    assert place(plan, machine).folder == before
    change(tmp_path)
    assert place(plan, machine).folder != before


def test_another_seed_is_another_cache_and_another_path_to_the_same_teacher_is_not(place, plan, machine, tmp_path):
    before = place(plan, machine).folder
    assert place(plan, machine, seed=1).folder != before
    shutil.copytree(tmp_path / "teacher", tmp_path / "copy")
    (tmp_path / "copy" / "train.json").write_text("{}")
    assert place(plan, machine, path="copy").folder == before


def test_what_does_not_fit_is_embedded_at_every_step_and_nothing_is_written(
    place, plan, machine, packed_batches, tmp_path
):
    batches = HomogeneousBatches(TupleStore(), plan, 0, stage1=False)
    needed = most_rows(batches) * 32 * 4 / 2**30
    assert isinstance(place(plan, replace(machine, teacher_cache_gib=needed)), Cached)
    for gib in (0, 0.999 * needed):
        always = place(plan, replace(machine, teacher_cache_gib=gib))
        assert not isinstance(always, Cached)
        expected = embed_without_gradient(Embedder.load(tmp_path / "teacher"), packed_batches[0])
        assert_close(always(packed_batches[0]), expected)
    assert not (tmp_path / "scratch").exists()


# How many rows ----------------------------------------------------------------------------------

MANY = {
    "two epochs": {},
    "four epochs": {"epochs": 4},
    "one step": {"max_steps": 1},
    "nine steps": {"max_steps": 9},
    "all documents with and without a prompt": {"document_instruction_share": 0.5, "epochs": 12},
    "no prompts": {"instructions": False, "document_instruction_share": 0.0, "epochs": 12},
    "few rows": {"cap_per_source": 5},
    "withheld rows": {"validate_every": 2, "validation_rows": 4},
    "no negatives": {"hard_negatives": HardNegatives(retrieval=0, clustering=0, classification=0)},
}


@pytest.mark.parametrize("changes", MANY.values(), ids=MANY)
def test_most_rows_is_a_bound_of_what_is_met_and_not_far_above_it(small_store, plan, changes):
    batches = HomogeneousBatches(small_store, replace(plan, **changes), seed=0, stage1=False)
    met = len({text for step in range(len(batches)) for text in batches[step].texts})
    assert 0 < met <= most_rows(batches) < 4 * met + 20


def test_stage_1_meets_no_more_than_its_own_sources(small_store, plan):
    batches = HomogeneousBatches(small_store, replace(plan, epochs=9), seed=0, stage1=True)
    everything = HomogeneousBatches(small_store, replace(plan, epochs=9), seed=0, stage1=False)
    met = len({text for step in range(len(batches)) for text in batches[step].texts})
    assert met <= most_rows(batches) < most_rows(everything)


# Which teacher ----------------------------------------------------------------------------------


def test_a_teacher_that_is_narrower_than_its_student_is_an_error(embedder, teacher):
    check_teacher(embedder, teacher)
    teacher.model.config.hidden_size = 16
    with pytest.raises(ValueError, match="embeddings have 16 dimensions, fewer than the student's 32; remedy"):
        check_teacher(embedder, teacher)
    check_teacher(teacher, embedder)


def test_no_gradient_is_kept_for_the_teacher(embedder, teacher, packed_batches, folder, machine):
    for target in (live(teacher)(packed_batches[0]), Cached(teacher, folder, machine)(packed_batches[0])):
        assert not target.requires_grad
    assert embedder.embed_pack(packed_batches[0].packs[0]).requires_grad, "vacuous: no gradient anywhere"
