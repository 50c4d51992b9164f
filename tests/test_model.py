"""Embeddings against transformers' padded forward pass and sentence-transformers, and what must not change them."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SENTENCES
from helpers.closeness import assert_all_close, assert_close
from transformers import AutoModel, AutoTokenizer

from f2llm.model import Embedder, common_prefix, prompted

TEXTS = ["a", *SENTENCES, "", "fox", "lazy dog " * 40]  # the last one is longer than max_tokens


@pytest.fixture
def embedder(embedder):
    """With a budget so small that the texts take several forward passes."""
    embedder.token_budget = 60
    return embedder


def padded_embeddings(embedder, texts):
    """Oracle: one batch, padded on the right, with an attention mask; pooled at the last real token."""
    ids = embedder.tokenize(texts)
    longest = max(map(len, ids))
    padded = torch.tensor([row + [embedder.tokenizer.pad_token_id] * (longest - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    assert mask.min() == 0, "vacuous: nothing is padded"
    hidden = embedder.model(input_ids=padded, attention_mask=mask).last_hidden_state
    return hidden[torch.arange(len(ids)), mask.sum(1) - 1]


# Embeddings -------------------------------------------------------------------------------------


def test_embeddings_equal_a_padded_batch_with_attention_mask(embedder):
    ours = embedder.embed(embedder.tokenize(TEXTS))
    theirs = padded_embeddings(embedder, TEXTS)
    assert ours.std() > 0.1, "vacuous: all embeddings are alike"
    assert_close(ours, theirs)


def test_gradients_equal_those_of_a_padded_batch(embedder):
    weights = torch.randn(len(TEXTS), embedder.dim)
    parameters = dict(embedder.model.named_parameters())
    ours = torch.autograd.grad((embedder.embed(embedder.tokenize(TEXTS)) * weights).sum(), parameters.values())
    theirs = torch.autograd.grad((padded_embeddings(embedder, TEXTS) * weights).sum(), parameters.values())
    for name, reference in zip(parameters, theirs):
        assert reference.abs().max() > 1e-4, f"vacuous: no gradient reached {name}"
    assert_all_close(dict(zip(parameters, ours)), dict(zip(parameters, theirs)))


@pytest.mark.parametrize("token_budget", [1, 30, 10_000])
def test_the_token_budget_does_not_change_the_embeddings(embedder, token_budget):
    expected = embedder.embed(embedder.tokenize(TEXTS))
    embedder.token_budget = token_budget
    assert_close(embedder.embed(embedder.tokenize(TEXTS)), expected)


def test_embeddings_come_in_the_order_of_the_texts(embedder):
    embeddings = embedder.encode(TEXTS)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    assert np.linalg.norm(embeddings[:, None] - embeddings[None], axis=-1)[~np.eye(len(TEXTS), dtype=bool)].min() > 0.01
    assert_close(embedder.encode([TEXTS[row] for row in order]), embeddings[order])
    for text, embedding in zip(TEXTS, embeddings):
        assert_close(embedder.encode([text])[0], embedding)


def test_every_token_before_eos_matters_and_tokens_beyond_the_limit_do_not(embedder):
    base = embedder.tokenize(["lazy dog " * 40])[0]
    assert len(base) == embedder.max_tokens, "vacuous: the text was not cut"
    same, longer = embedder.encode(["lazy dog " * 40, "lazy dog " * 80])
    assert_close(same, longer)
    changed = [[*base[:position], 5, *base[position + 1 :]] for position in range(len(base) - 1)]
    embeddings = embedder.embed([base, *changed])
    assert (embeddings[1:] - embeddings[0]).abs().max(1).values.min() > 1e-4


# Tokens -----------------------------------------------------------------------------------------


def test_every_text_ends_with_exactly_one_eos(embedder):
    ids, eos = embedder.tokenize(TEXTS), embedder.tokenizer.eos_token_id
    assert [row.count(eos) for row in ids] == [1] * len(TEXTS)
    assert [row[-1] for row in ids] == [eos] * len(TEXTS)
    assert ids[TEXTS.index("")] == [eos]
    assert max(map(len, ids)) == embedder.max_tokens, "vacuous: no text was cut"


class Recorder:
    """A tokenizer's backend that remembers the lengths of the texts that it was given."""

    def __init__(self, backend):
        self.backend, self.lengths = backend, []

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def encode_batch_fast(self, texts, **options):
        self.lengths += map(len, texts)
        return self.backend.encode_batch_fast(texts, **options)


@pytest.mark.parametrize(
    "piece", [" ", "a", "lazy dog ", "ᄒ\u1161\u11ab", "e\u0301", "言語", "\u200b", "👩\u200d🚀", "7", "\n\n"]
)
def test_what_lies_far_behind_the_limit_is_not_read_and_changes_nothing(embedder, piece):
    text = f"the fox {piece * 200_000} end"
    embedder.tokenizer.backend_tokenizer.enable_truncation(embedder.max_tokens - 1)
    whole = embedder.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    recorder = Recorder(embedder.tokenizer.backend_tokenizer)
    plain = embedder.tokenizer
    embedder.tokenizer = SimpleNamespace(
        backend_tokenizer=recorder, eos_token_id=plain.eos_token_id, get_vocab=plain.get_vocab
    )
    (ids,) = embedder.tokenize([text])
    assert ids == [*whole, plain.eos_token_id]
    assert recorder.lengths and max(recorder.lengths) < 0.05 * len(text)


def test_the_saved_tokenizer_appends_eos_by_itself(embedder, tmp_path):
    embedder.save(tmp_path / "model")
    saved = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert saved(TEXTS, truncation=True, max_length=embedder.max_tokens)["input_ids"] == embedder.tokenize(TEXTS)


# Encoding ---------------------------------------------------------------------------------------


def test_encoded_rows_have_unit_length_also_as_a_prefix(embedder):
    whole, prefix = embedder.encode(TEXTS), embedder.encode(TEXTS, dim=8)
    assert (whole.shape, prefix.shape, whole.dtype) == ((len(TEXTS), 32), (len(TEXTS), 8), np.float32)
    for embeddings in (whole, prefix):
        assert_close(np.linalg.norm(embeddings, axis=1), np.ones(len(TEXTS)))
    assert np.linalg.norm(whole[:, :8], axis=1).max() < 0.95, "vacuous: the prefix was of unit length already"
    assert_close(prefix, whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True))


def test_an_instruction_is_a_prompt_before_the_text_and_nothing_else(embedder):
    embedder.max_tokens = 64
    with_instruction = embedder.encode(["fox", "dog"], instruction="Find it.")
    assert_close(with_instruction, embedder.encode([f"Instruct: Find it.\nQuery: {t}" for t in ("fox", "dog")]))
    assert np.abs(with_instruction - embedder.encode(["fox", "dog"])).max() > 0.01, "vacuous: no effect"
    assert prompted("fox", None) == "fox"


def test_no_texts_give_no_rows(embedder):
    assert embedder.encode([]).shape == (0, 32)
    assert embedder.encode([], dim=8).shape == (0, 8)


@pytest.mark.parametrize("dim", [0, 33, -1])
def test_a_dim_the_model_does_not_have_is_an_error(embedder, dim):
    with pytest.raises(ValueError, match=f"dim is {dim}, but .* 32 dimensions"):
        embedder.encode(["fox"], dim=dim)


def test_what_all_texts_begin_with_is_computed_once_and_changes_nothing(embedder, monkeypatch):
    embedder.max_tokens = 60
    texts, computed = ["fox", "dog", "a lazy dog jumps", "", *SENTENCES], []
    plain = embedder.embed_pack

    def counted(part, *rest, **options):
        computed.append(part)
        return plain(part, *rest, **options)

    monkeypatch.setattr(embedder, "embed_pack", counted)
    shared = embedder.encode(texts, instruction="Find the same animal in another language, please.")
    tokens = sum(part.num_tokens for part in computed)
    computed.clear()
    monkeypatch.setattr("f2llm.model.WORTH_SHARING", 10**9)
    whole = embedder.encode(texts, instruction="Find the same animal in another language, please.")
    assert tokens < 0.6 * sum(part.num_tokens for part in computed), "vacuous: nothing was shared"
    assert_close(shared, whole)


def test_the_common_prefix_leaves_every_text_a_token():
    assert common_prefix([[1, 2, 3, 9], [1, 2, 4, 9], [1, 2, 3, 8]]) == 2
    assert common_prefix([[1, 2], [1, 2], [1, 2]]) == 1
    assert common_prefix([[1, 2, 9], [1, 2]]) == 1
    assert common_prefix([[1, 2], [2, 1]]) == common_prefix([[1, 2, 3]]) == common_prefix([[9], [9]]) == 0


def test_one_text_instead_of_a_list_is_an_error(embedder):
    with pytest.raises(ValueError, match="single text 'fox'; remedy: a list"):
        embedder.encode("fox")


# Tokenizers that others would stumble over ------------------------------------------------------


def test_a_tokenizer_without_eos_is_an_error(embedder):
    tokenizer = copy.deepcopy(embedder.tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"tokenizer has no EOS token.*remedy: set eos_token"):
        Embedder(embedder.model, tokenizer, max_tokens=24)


def test_a_pad_token_that_is_eos_changes_nothing(embedder):
    """As in Qwen3's base models: what is real follows from lengths, never from a token."""
    expected = embedder.encode(TEXTS)
    embedder.tokenizer = copy.deepcopy(embedder.tokenizer)
    embedder.tokenizer.pad_token = embedder.tokenizer.eos_token
    assert_close(embedder.encode(TEXTS), expected)


def test_a_tokenizer_with_more_tokens_than_the_model_is_an_error(embedder, tmp_path):
    embedder.tokenizer = copy.deepcopy(embedder.tokenizer)
    embedder.tokenizer.add_tokens([f"<extra {number}>" for number in range(9)])
    embedder.save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"tokenizer has \d+ tokens, but the model only 320; remedy"):
        Embedder.load(tmp_path / "model")


# Folders ----------------------------------------------------------------------------------------


def test_a_saved_model_comes_back_bit_for_bit(embedder, tmp_path):
    embedder.save(tmp_path / "model")
    loaded = Embedder.load(tmp_path / "model", token_budget=embedder.token_budget)
    weights = loaded.model.state_dict()
    assert weights.keys() == embedder.model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in embedder.model.state_dict().items())
    assert loaded.max_tokens == embedder.max_tokens
    assert_close(loaded.encode(TEXTS), embedder.encode(TEXTS))


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named_with_a_remedy(embedder, tmp_path, missing):
    embedder.save(tmp_path / "model")
    (tmp_path / "model" / missing).unlink()
    with pytest.raises(ValueError, match=f"{missing} is missing.*remedy: dvc repro"):
        Embedder.load(tmp_path / "model")


def test_an_untrained_model_has_the_shape_but_not_the_weights(embedder, tmp_path):
    embedder.save(tmp_path / "model")
    first, second, other = (Embedder.untrained(tmp_path / "model", seed=seed) for seed in (1, 1, 2))
    assert first.num_parameters() == embedder.num_parameters()
    assert all(torch.equal(*pair) for pair in zip(first.model.parameters(), second.model.parameters(), strict=True))
    assert np.abs(first.encode(TEXTS) - embedder.encode(TEXTS)).max() > 0.1
    assert np.abs(first.encode(TEXTS) - other.encode(TEXTS)).max() > 0.1


def test_parameters_are_counted_with_and_without_the_embedding_table(embedder):
    total, without = embedder.num_parameters()
    assert total - without == len(embedder.tokenizer) * 32
    attention = 32 * 8 * (4 + 2 + 2 + 4) + 2 * 8  # query, key, value, out; two norms of one head
    assert without == 2 * (attention + 3 * 32 * 48 + 2 * 32) + 32


def test_sentence_transformers_loads_the_folder_as_it_is(embedder, tmp_path):
    from sentence_transformers import SentenceTransformer

    embedder.save(tmp_path / "model")
    other = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    texts = [text for text in TEXTS if text]
    assert_close(other.encode(texts), embedder.encode(texts))
    prompt = "Instruct: Find it.\nQuery: "
    assert_close(other.encode(texts, prompt=prompt), embedder.encode(texts, "Find it."))
    assert np.abs(other.encode(texts, prompt=prompt) - other.encode(texts)).max() > 0.01, "vacuous: no effect"


def test_plain_transformers_gives_the_same_from_the_folder(embedder, tmp_path):
    """As a reader of a model card would: the tokenizer appends EOS, pads and cuts; the last token is pooled."""
    embedder.save(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModel.from_pretrained(tmp_path / "model").eval()
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=embedder.max_tokens, return_tensors="pt")
    ends = batch["input_ids"] == tokenizer.eos_token_id
    last = batch["attention_mask"].sum(1) - 1
    assert ends.sum(1).tolist() == [1] * len(TEXTS) and torch.equal(ends.int().argmax(1), last)
    assert set(last.tolist()) > {embedder.max_tokens - 1}, "vacuous: nothing was cut, or nothing padded"
    with torch.inference_mode():
        rows = model(**batch).last_hidden_state[torch.arange(len(TEXTS)), last]
    assert_close(torch.nn.functional.normalize(rows, dim=-1), embedder.encode(TEXTS), eps=1e-6)


def test_its_files_are_those_of_sentence_transformers_5_and_6_alike(embedder, tmp_path):
    """Version 5 knows modules by their old names and pooling by booleans; 6 reads these, and writes others."""
    from sentence_transformers import SentenceTransformer

    embedder.save(tmp_path / "model")
    modules = json.loads((tmp_path / "model" / "modules.json").read_text())
    assert [module["type"] for module in modules] == [
        f"sentence_transformers.models.{kind}" for kind in ("Transformer", "Pooling", "Normalize")
    ]
    pooling = json.loads((tmp_path / "model" / "1_Pooling" / "config.json").read_text())
    assert [key for key, value in pooling.items() if value is True] == ["pooling_mode_lasttoken", "include_prompt"]
    assert pooling["word_embedding_dimension"] == embedder.dim
    settings = json.loads((tmp_path / "model" / "sentence_bert_config.json").read_text())
    assert settings == {"max_seq_length": embedder.max_tokens, "do_lower_case": False}
    SentenceTransformer(str(tmp_path / "model"), device="cpu").save_pretrained(str(tmp_path / "again"))
    again = json.loads((tmp_path / "again" / "1_Pooling" / "config.json").read_text())
    assert again["pooling_mode"] == "lasttoken", "vacuous: the installed version writes what we write"
    other = SentenceTransformer(str(tmp_path / "again"), device="cpu")
    texts = [text for text in TEXTS if text]
    for rows in (other.encode(texts), Embedder.load(tmp_path / "again").encode(texts)):
        assert_close(rows, embedder.encode(texts), eps=1e-6)


def test_embedding_leaves_the_model_as_it_was(embedder):
    before = copy.deepcopy(embedder.model.state_dict())
    embedder.encode(TEXTS)
    assert all(torch.equal(before[name], tensor) for name, tensor in embedder.model.state_dict().items())
    assert all(parameter.grad is None for parameter in embedder.model.parameters())
