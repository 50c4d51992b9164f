"""The tokenizer and the language model that training starts from."""

import math

import numpy as np
import pytest
import torch
from conftest import SENTENCES
from helpers.closeness import assert_close
from transformers import AutoTokenizer

from f2llm.embedded.backbone import (
    WITHIN,
    add_prompts,
    corpus,
    new_model,
    save_backbone,
    set_token_table,
    token_table,
    train_tokenizer,
    training_pairs,
)
from f2llm.model import Embedder
from f2llm.text import prompted

SCRIPTS = [
    *SENTENCES,
    "Ελληνικά και ქართული",
    "한국어 조선말",
    "ภาษาไทย",
    "አማርኛ",
    "emoji 🦊🏽 and\ttabs\n\n  spaces",
]


# Tokenizer --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", SCRIPTS)
def test_a_text_in_any_script_comes_back_from_its_tokens(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_composed_and_decomposed_letters_are_the_same_tokens(tokenizer):
    assert tokenizer("u\u0308ber")["input_ids"] == tokenizer("\u00fcber")["input_ids"]


def test_the_tokenizer_appends_exactly_one_eos(tokenizer):
    for ids in tokenizer([*SCRIPTS, ""])["input_ids"]:
        assert ids.count(tokenizer.eos_token_id) == 1
        assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_frequent_words_become_one_token():
    tokenizer = train_tokenizer(["the quick brown fox"] * 50, vocab=300)
    assert len(tokenizer("the quick brown fox", add_special_tokens=False)["input_ids"]) == 4
    assert len(tokenizer) <= 300


def test_words_keep_their_combining_marks():
    tokenizer = train_tokenizer(["हिन्दी में लिखी"] * 50, vocab=320)
    assert tokenizer.tokenize("हिन्दी") == tokenizer.tokenize("हिन्दी में")[:1]


def test_the_same_texts_give_the_same_tokenizer(tokenizer):
    again = train_tokenizer(SENTENCES, vocab=320)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert train_tokenizer(SENTENCES, vocab=300).backend_tokenizer.to_str() != tokenizer.backend_tokenizer.to_str()


# Model ------------------------------------------------------------------------------------------


def test_a_new_model_has_the_shape_of_its_backbone(tiny_backbone, tokenizer):
    model = new_model(tiny_backbone, tokenizer, seed=0)
    config, attention = model.config, model.model.layers[0].self_attn
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (32, 48, 2)
    assert attention.q_proj.out_features == 2 * attention.k_proj.out_features, "two query heads share a key"
    assert model.lm_head.weight is model.model.embed_tokens.weight, "tied embeddings"
    assert model.model.embed_tokens.num_embeddings == len(tokenizer)
    assert config.eos_token_id == tokenizer.eos_token_id


def test_the_seed_decides_the_weights(tiny_backbone, tokenizer):
    first, again, other = (new_model(tiny_backbone, tokenizer, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_a_random_model_starts_near_the_log_of_the_vocabulary(tiny_backbone, tokenizer):
    model = new_model(tiny_backbone, tokenizer, seed=0)
    ids = torch.tensor([tokenizer(" ".join(SENTENCES))["input_ids"]])
    assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(math.log(len(tokenizer)), rel=0.1)


def test_a_saved_backbone_is_an_embedder(tiny_backbone, tokenizer, tmp_path):
    model = new_model(tiny_backbone, tokenizer, seed=0).eval()
    save_backbone(model, tokenizer, tmp_path)
    loaded = Embedder.load(tmp_path)
    assert loaded.max_tokens == model.config.max_position_embeddings
    ids = loaded.tokenize(SENTENCES[:1])
    hidden = model.model(input_ids=torch.tensor(ids)).last_hidden_state[0, -1]
    assert_close(loaded.embed(ids)[0], hidden)


# Prompts ----------------------------------------------------------------------------------------


def test_a_prompt_is_one_token_and_the_text_behind_it_is_cut_as_alone(tmp_path):
    tokenizer, plain = (train_tokenizer(SENTENCES, vocab=320) for _ in range(2))
    prompts = [prompted("", "Find the answer."), prompted("", "Find the answer.").replace("answer", "code")]
    pieces = add_prompts(tokenizer, prompts)
    assert pieces == {prompt: plain(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts}
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for prompt in prompts:
            own = one.convert_tokens_to_ids(prompt)
            for text in (*SCRIPTS, "Query: a", ""):
                assert one(prompt + text)["input_ids"] == [own, *plain(text)["input_ids"]]
        unknown = prompted("", "Find the way.") + "a"
        assert one(unknown)["input_ids"] == plain(unknown)["input_ids"]


# Input embeddings -------------------------------------------------------------------------------

PAIRS = [([[0, 1], [2, 2, 0]], [[3, 4], [5]]), ([[1], [6, 1]], [[4, 3, 3], [0, 5]])]


def slow_information(pairs, vocab: int) -> np.ndarray:
    """Positive pointwise mutual information, count by count."""
    met = np.zeros((vocab, vocab))
    for queries, passages in pairs:
        for query, passage in zip(queries, passages):
            query, passage = set(query), set(passage)
            for one in query:
                for other in passage:
                    if one != other:
                        met[one, other] += 1 / math.sqrt(len(query) * len(passage))
                        met[other, one] += 1 / math.sqrt(len(query) * len(passage))
            for text in (query, passage):
                for one in text:
                    for other in text - {one}:
                        met[one, other] += WITHIN / len(text)
    context = met.sum(1) ** 0.75 / (met.sum(1) ** 0.75).sum()
    information = np.zeros_like(met)
    for one, other in np.argwhere(met > 0):
        information[one, other] = max(0, math.log(met[one, other] / met[one].sum() / context[other]))
    return (information + information.T) / 2


def test_the_table_is_that_of_the_slow_formula():
    vocab, dim = 8, 3  # token 7 is in no text
    values, vectors = np.linalg.eigh(slow_information(PAIRS, vocab))
    assert values[-dim] > values[-dim - 1] + 0.1, "the columns are determined"
    expected = vectors[:, ::-1][:, :dim] * math.sqrt(vocab / dim)
    table = token_table(PAIRS, (vocab, dim))
    assert table.dtype == np.float32
    np.testing.assert_allclose(np.abs(table), np.abs(expected), atol=1e-2)
    np.testing.assert_allclose(table @ table.T, expected @ expected.T, atol=1e-2)
    assert not table[7].any()


def test_tokens_that_mean_the_same_lie_together():
    draw = np.random.default_rng(0)  # 20 meanings, token n in one language and 20 + n in the other
    meanings = [draw.choice(20, 3, replace=False) for _ in range(600)]
    pairs = [([list(row) for row in meanings], [list(row + 20) for row in meanings])]
    table = token_table(pairs, (40, 16))
    assert ((table[:20] @ table[20:].T).argmax(1) == np.arange(20)).mean() > 0.9


def test_a_model_gets_the_rows_that_are_known_and_means_for_prompts(tiny_backbone):
    tokenizer = train_tokenizer(SENTENCES, vocab=320)
    (prompt,) = pieces = add_prompts(tokenizer, [prompted("", "Find the answer.")])
    model, before = (new_model(tiny_backbone, tokenizer, seed=0) for _ in range(2))
    table = np.zeros((len(tokenizer), 32), dtype=np.float32)
    table[pieces[prompt][0]] = np.eye(32)[0]
    set_token_table(model, tokenizer, table, pieces)
    rows, random = (each.get_input_embeddings().weight.detach() for each in (model, before))
    own = tokenizer.convert_tokens_to_ids(prompt)
    changed = sorted({own, pieces[prompt][0]})
    assert (rows != random).any(1).nonzero().flatten().tolist() == changed
    assert_close(rows[pieces[prompt][0]], torch.eye(32)[0] * tiny_backbone.initializer_range * 32**0.5)
    assert_close(rows[own], rows[pieces[prompt]].mean(0))


def test_training_pairs_are_the_tokens_of_stage_1_without_the_end(tokenizer, small_store):
    store = small_store
    stage1 = [name for name, entry in store.sources.items() if entry["stage1"]]
    assert 0 < len(stage1) < len(store.sources)
    found = list(training_pairs(store, tokenizer, max_rows=3, max_tokens=2))
    for name, (queries, passages) in zip(stage1, found, strict=True):
        assert len(queries) == len(passages) == min(3, len(store.tables[name]))
        row = store.tables[name].slice(0, 1).to_pylist()[0]
        for ids, text in ((queries[0], row["query"]), (passages[0], store.documents[name][row["passage"]])):
            assert ids == tokenizer(text)["input_ids"][:-1][:2]


# Corpus ---------------------------------------------------------------------------------------


def test_the_corpus_has_documents_and_queries_of_the_tuples_once_each(small_store):
    store = small_store
    found = corpus(store, seed=0)
    known = {*store.texts(), *(query for table in store.tables.values() for query in table["query"].to_pylist())}
    assert len(found) == len(set(found)) and set(found) == known
    assert corpus(store, seed=0) == found != corpus(store, seed=1)
    assert len(corpus(store, seed=0, num_texts=4)) <= 6
