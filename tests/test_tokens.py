"""Stored tokens are those that the model would make, made once, and give the same training."""

import os

import numpy as np
import pytest
from conftest import SMALL_SOURCES
from helpers.closeness import assert_close

from f2llm.batches import HomogeneousBatches
from f2llm.step import grad_cache_backward, prepare
from f2llm.tokens import tokenise


@pytest.fixture
def tokens(small_store, embedder, tmp_path):
    return tokenise(small_store, list(SMALL_SOURCES), embedder, tmp_path, quiet=True)


def test_stored_tokens_are_those_of_the_model(small_store, embedder, tokens):
    for name, found in tokens.items():
        expected = embedder.tokenize(list(small_store.documents[name]))
        assert len(found) == len(expected) == SMALL_SOURCES[name][0] + 10
        assert [list(ids) for ids in found] == expected
        assert found[0].dtype == np.int32
    assert max(map(len, tokens["pairs"])) <= embedder.max_tokens


def test_a_cut_text_ends_with_eos(small_store, embedder, tmp_path):
    embedder.max_tokens = 5
    (found,) = tokenise(small_store, ["code"], embedder, tmp_path, quiet=True).values()
    assert {len(ids) for ids in found} == {5}, "vacuous: nothing was cut"
    assert {int(ids[-1]) for ids in found} == {embedder.tokenizer.eos_token_id}


def test_tokens_are_made_once_for_one_tokenizer_and_length(small_store, embedder, tokens, tmp_path):
    (folder,) = tmp_path.iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    tokenise(small_store, list(SMALL_SOURCES), embedder, tmp_path, quiet=True)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before and len(before) == 4
    embedder.max_tokens -= 1
    tokenise(small_store, ["pairs"], embedder, tmp_path, quiet=True)
    assert len(list(tmp_path.iterdir())) == 2, "another length is another folder"


def test_what_was_left_half_written_is_written_again(small_store, embedder, tokens, tmp_path):
    path = next(tmp_path.rglob("pairs-*.arrow"))
    whole = path.read_bytes()
    path.unlink()
    path.with_name(f".{path.name}").write_bytes(whole[:100])
    tokenise(small_store, ["pairs"], embedder, tmp_path, quiet=True)
    assert path.read_bytes() == whole and not path.with_name(f".{path.name}").exists()


@pytest.mark.parametrize("stage1", [True, False])
def test_a_step_with_stored_tokens_is_the_step_without(small_store, embedder, tokens, tiny_training, machine, stage1):
    batches = HomogeneousBatches(small_store, tiny_training, seed=0, stage1=stage1)
    from_store = 0
    for step in range(min(len(batches), 12)):
        batch = batches[step]
        plain, stored = prepare(embedder, batch, machine), prepare(embedder, batch, machine, tokens)
        assert plain.lengths == stored.lengths
        for one, other in zip(plain.packs, stored.packs):
            assert one.rows == other.rows and (one.input_ids == other.input_ids).all()
        losses = [grad_cache_backward(embedder, packed, tiny_training) for packed in (plain, stored)]
        assert losses[0].keys() == losses[1].keys()
        assert_close(*(list(found.values()) for found in losses), scale=1 / tiny_training.temperature)
        from_store += sum(row is not None for row in batch.stored)
        for text, row in zip(batch.texts, batch.stored):
            assert row is None or small_store.documents[batch.source][row] == text
    assert from_store > 40, "vacuous: nothing came from the store"


def test_a_folder_that_cannot_be_written_is_one_clear_error(small_store, embedder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RuntimeError, match=r"cannot write .*pairs-.*remedy"):
        tokenise(small_store, ["pairs"], embedder, tmp_path / "file", quiet=True)
    assert os.listdir(tmp_path) == ["file"]
