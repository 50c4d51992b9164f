"""Who embeds: each miner against the model or the library that it stands for, and embeddings kept on disk."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import SENTENCES
from helpers.closeness import assert_close
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from f2llm.mining.encoders import EmbedderMiner, SentenceTransformerMiner, embedded_block, miner_of
from f2llm.text import prompted

INSTRUCTION = "Find the same sentence."


@pytest.fixture
def folder(embedder, tmp_path):
    embedder.save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def rules(config):
    return replace(config.mine, max_tokens=24)


# Models -----------------------------------------------------------------------------------------


def test_the_embedder_miner_is_the_model(folder, embedder, rules):
    miner = miner_of(replace(rules, miner=f"embedder:{folder}"), [])
    queries, documents = miner.encode_queries(SENTENCES, INSTRUCTION), miner.encode_documents(SENTENCES)
    assert_close(queries, embedder.encode(SENTENCES, INSTRUCTION))
    assert_close(documents, embedder.encode(SENTENCES))
    assert np.abs(queries - documents).max() > 0.01, "vacuous: the instruction changes nothing"


def test_sentence_transformers_give_what_the_embedder_gives(folder, rules):
    ours = EmbedderMiner(folder, 24)
    theirs = miner_of(replace(rules, miner=f"sentence-transformers:{folder}"), [])
    assert_close(theirs.encode_queries(SENTENCES, INSTRUCTION), ours.encode_queries(SENTENCES, INSTRUCTION))
    assert_close(theirs.encode_documents(SENTENCES), ours.encode_documents(SENTENCES))
    assert theirs.key != ours.key


def test_a_models_own_prompts_are_not_used(folder, rules):
    """They would stand before documents too where a default is set."""
    plain = SentenceTransformerMiner(str(folder), 24)
    expected = plain.encode_documents(SENTENCES), plain.encode_queries(SENTENCES, None)
    settings = folder / "config_sentence_transformers.json"
    prompts = {"prompts": {"query": "Q: ", "document": "D: "}, "default_prompt_name": "query"}
    settings.write_text(json.dumps(prompts | {"similarity_fn_name": "cosine"}))
    prompting = SentenceTransformerMiner(str(folder), 24)
    assert np.abs(prompting.model.encode(SENTENCES) - expected[0]).max() > 0.01, "vacuous: the prompts do nothing"
    assert_close(prompting.encode_documents(SENTENCES), expected[0])
    assert_close(prompting.encode_queries(SENTENCES, None), expected[1])


@pytest.mark.parametrize("kind", [EmbedderMiner, SentenceTransformerMiner])
def test_texts_are_cut_at_max_tokens(kind, folder):
    long = [sentence * 3 for sentence in SENTENCES]
    short, same = kind(folder, 8), kind(folder, 4000)
    assert np.abs(short.encode_documents(long) - same.encode_documents(long)).max() > 0.01
    assert_close(same.encode_documents(long), kind(folder, 24).encode_documents(long))


def test_the_key_is_that_of_weights_tokenizer_and_length(folder):
    first = EmbedderMiner(folder, 24).key
    (folder / "log.csv").write_text("not of the model")
    assert EmbedderMiner(folder, 24).key == first != EmbedderMiner(folder, 23).key
    for name in ("model.safetensors", "tokenizer.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + b" ")
        assert EmbedderMiner(folder, 24).key != first, name
        (folder / name).write_bytes(content)
    assert EmbedderMiner(folder.rename(folder.with_name("moved")), 24).key == first


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("embedder:models/none", "no model weights in models/none; remedy: .*dvc repro stage1"),
        ("sentence-transformers:nobody/nothing", "nobody/nothing: neither a folder nor .* remedy: hf download"),
        ("sentence-transformers:no/model/at/all", "neither a folder nor a model in the hub's cache"),
    ],
)
def test_a_miner_that_is_not_there_is_named_with_a_remedy(name, message, rules):
    with pytest.raises(ValueError, match=message):
        miner_of(replace(rules, miner=name), [])


def test_a_model_without_a_longest_text_is_a_miner_too(tokenizer, tmp_path):
    weights = np.random.default_rng(0).normal(size=(len(tokenizer), 8)).astype(np.float32)
    static = StaticEmbedding(tokenizer.backend_tokenizer, embedding_weights=weights)
    model = SentenceTransformer(modules=[static], device="cpu")
    model.save(str(tmp_path / "static"))
    rows = SentenceTransformerMiner(str(tmp_path / "static"), 24).encode_documents(SENTENCES)
    assert_close(rows, model.encode(SENTENCES, normalize_embeddings=True))


def test_sentence_transformers_that_are_not_installed_are_asked_for(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match="not installed; remedy: pip install sentence-transformers"):
        SentenceTransformerMiner(str(folder), 24).encode_documents(SENTENCES)


def test_prompts_are_put_together_as_everywhere(folder):
    miner = SentenceTransformerMiner(str(folder), 24)
    whole = [prompted(sentence, INSTRUCTION) for sentence in SENTENCES]
    assert_close(miner.encode_queries(SENTENCES, INSTRUCTION), miner.encode_documents(whole))


# Embeddings on disk -----------------------------------------------------------------------------


@pytest.fixture
def counting():
    """An encoder that counts its calls."""

    def encode(texts):
        encode.calls += 1
        return np.array([[len(text), encode.calls] for text in texts], dtype=np.float32)

    encode.calls = 0
    return encode


def test_a_block_is_embedded_once_and_can_be_mapped(counting, tmp_path):
    first = embedded_block(tmp_path / "new", "model", ["a", "bc"], counting)
    assert embedded_block(tmp_path / "new", "model", ["a", "bc"], counting) == first
    assert counting.calls == 1 and list((tmp_path / "new").iterdir()) == [first]
    np.testing.assert_array_equal(np.load(first, mmap_mode="r"), [[1, 1], [2, 1]])


def test_other_texts_or_another_model_are_embedded_anew(counting, tmp_path):
    blocks = [("model", ["a", "bc"]), ("model", ["ab", "c"]), ("model", ["abc"]), ("other", ["a", "bc"])]
    assert len({embedded_block(tmp_path, name, texts, counting) for name, texts in blocks}) == 4
    assert counting.calls == 4


@pytest.mark.parametrize("fault", ["cut short", "changed", "another's", "empty"])
def test_a_block_that_is_not_what_was_written_is_embedded_anew(fault, counting, tmp_path):
    path = embedded_block(tmp_path, "model", ["a", "bc"], counting)
    other = embedded_block(tmp_path, "other", ["a", "bc"], counting)
    content = path.read_bytes()
    faults = {"cut short": content[:-5], "changed": content[:-40] + b"\x01" + content[-39:], "empty": b""}
    faults["another's"] = other.read_bytes()
    assert faults[fault] != content
    path.write_bytes(faults[fault])
    assert embedded_block(tmp_path, "model", ["a", "bc"], counting) == path
    assert counting.calls == 3
    np.testing.assert_array_equal(np.load(path), [[1, 3], [2, 3]])


def test_an_encoder_that_fails_leaves_nothing_that_looks_whole(tmp_path):
    with pytest.raises(ValueError, match="no texts today"):
        embedded_block(tmp_path, "model", ["a"], lambda texts: (_ for _ in ()).throw(ValueError("no texts today")))
    assert not list(tmp_path.glob("*.npy"))
