"""The tokenizer and the language model that training starts from."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import SENTENCES
from helpers.closeness import assert_close

from f2llm.embedded.backbone import corpus, new_model, pretrain, save_backbone, train_tokenizer
from f2llm.embedded.texts import Function, Message, Texts
from f2llm.model import Embedder

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


def test_pretraining_starts_near_the_log_of_the_vocabulary_and_learns(tiny_backbone, tokenizer):
    model = new_model(tiny_backbone, tokenizer, seed=0)
    losses = pretrain(model, tokenizer, SENTENCES * 5, tiny_backbone)
    assert len(losses) == tiny_backbone.pretrain.steps
    assert losses[0] == pytest.approx(math.log(len(tokenizer)), rel=0.1)
    assert losses[-1] < 0.7 * losses[0]
    assert not model.training


def test_pretraining_twice_gives_the_same_losses(tiny_backbone, tokenizer):
    backbone = replace(tiny_backbone, pretrain=replace(tiny_backbone.pretrain, steps=4))
    runs = [pretrain(new_model(backbone, tokenizer, seed=0), tokenizer, SENTENCES, backbone) for _ in range(2)]
    assert runs[0] == runs[1] and len(set(runs[0])) == 4


def test_a_corpus_shorter_than_one_step_is_an_error(tiny_backbone, tokenizer):
    model = new_model(tiny_backbone, tokenizer, seed=0)
    with pytest.raises(ValueError, match=r"tokens, less than one pretrain.tokens_per_step, 128"):
        pretrain(model, tokenizer, ["short"], tiny_backbone)


def test_a_loss_that_is_not_finite_stops_pretraining(tiny_backbone, tokenizer):
    model = new_model(tiny_backbone, tokenizer, seed=0)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.inf
    with pytest.raises(RuntimeError, match="pretraining step 1: loss nan; remedy"):
        pretrain(model, tokenizer, SENTENCES, tiny_backbone)


def test_a_saved_backbone_is_an_embedder(tiny_backbone, tokenizer, tmp_path):
    model = new_model(tiny_backbone, tokenizer, seed=0).eval()
    save_backbone(model, tokenizer, tmp_path)
    loaded = Embedder.load(tmp_path)
    assert loaded.max_tokens == model.config.max_position_embeddings
    ids = loaded.tokenize(SENTENCES[:1])
    hidden = model.model(input_ids=torch.tensor(ids)).last_hidden_state[0, -1]
    assert_close(loaded.embed(ids)[0], hidden)


# Corpus -----------------------------------------------------------------------------------------


def test_the_corpus_has_every_kind_of_text_but_lists_and_no_repeats():
    names = [Message("city", f"city/{n}", locale, f"Town {n}") for n in range(20) for locale in ("en", "fr")]
    lists = [Message("list:city", "a+b", "en", "Town 1 and Town 2")]
    functions = [Function("p", "p/m.py", False, "Does it.", "At length.", "")]
    functions += [Function("p", "p/m.py", False, "No.", "", "x")]
    found = corpus(Texts(names + lists, functions), seed=0)
    assert sorted(found) == sorted([f"Town {n}" for n in range(20)] + ["Does it.", "At length.", "No.", "x"])
    assert corpus(Texts(names + lists, functions), seed=0) == found
    assert corpus(Texts(names + lists, functions), seed=1) != found
    assert len(corpus(Texts(names, []), seed=0, num_messages=5)) == 5
